"""What fine-tuning configs share: the model, the data and the evaluations of a task."""

from configs import parts


def albef_task(task, *, tiny, batch, epochs, length, lr=2e-5, warmup="100 steps"):
  """ALBEF at 384 pixels, from a pretrained file: what its official tasks share.

  Numbers: salesforce/ALBEF configs/*.yaml, of which one GPU's batch is an eighth.
  """
  name, res = ("tiny", 32) if tiny else ("B", 384)
  bert = dict(depth=2 if tiny else 6, dropout=0.1, dropout_attention=0.1)
  c = parts.base(seed=42, batch_size=16 if tiny else batch)
  c.total = "4 steps" if tiny else f"{epochs} epochs"
  c.tokenizer = dict(
    type="wordpiece", path="bert-base-uncased", length=length, sep=False
  )
  c.model = dict(
    image=parts.size(name, type="vit", patch=16, res=res),
    text=parts.size(name, type="text", length=512, **bert),
    fusion=dict(type="cross_attention", **bert),
    embed_dim=None,
  )
  if not tiny:
    c.init = dict(type="albef_tasks", path="ALBEF.pth")
  c.ema_decay = 0.995
  words = f"decode|random_resized_crop({res}, min_area=0.5)|flip|randaugment(2, 7)"
  source = dict(type="task", path=f"data/{task}_train.json")
  c.data = dict(source=source, pp=f"{words}|clean(30)")
  c.optim = dict(lr=lr, end_lr=1e-6, weight_decay=0.02, bounds=())
  c.optim.update(undecayed=r"(^|/)(bias|scale)$", warmup_lr=1e-5)
  c.optim.warmup = "1 step" if tiny else warmup
  return c


def task_of(config, task, *, tiny, batch, epochs, **optim):
  """A pretraining config for a task of its own table, at 10 % warm-up (ViLT, METER).

  Numbers: task_finetune_* of dandelin/ViLT vilt/config.py, zdou0830/METER meter/
  config.py. Objectives are the task's to say.

  Args:
    config: of pretraining; changed.
    task: table in data/ without "_train.json".
    optim: fields of config.optim.
  """
  config.batch_size = 8 if tiny else batch
  config.total = "4 steps" if tiny else f"{epochs} epochs"
  config.data.source = dict(type="task", path=f"data/{task}_train.json")
  config.optim.update(warmup="1 step" if tiny else "10%", **optim)
  return config


def blip_task(config, task, *, res, epochs, lr, length, words=30, **init):
  """BLIP's pretraining config for a task at `res` pixels, of batches of 256.

  Numbers: salesforce/BLIP configs/*.yaml and train_*.py: a cosine to zero without
  warm-up, no teacher. Objectives are the task's to say.

  Args:
    config: of pretraining, maybe tiny; changed.
    task: table in data/ without "_train.json".
    words: that a text keeps.
    init: fields of config.init beside type and path.
  """
  tiny = config.model.image.res < 224
  res = config.model.image.res = 32 if tiny else res
  config.batch_size = 8 if tiny else 256
  config.total = "4 steps" if tiny else f"{epochs} epochs"
  tokens = dict(type="wordpiece", path="bert-base-uncased", length=length, roles=True)
  config.tokenizer = tokens
  del config.ema_decay
  config.model.embed_dim = None
  config.data.source = dict(type="task", path=f"data/{task}_train.json")
  crop = f"random_resized_crop({res}, min_area=0.5)|flip|randaugment(2, 5)"
  config.data.pp = f"decode|{crop}|clean({words}, paper='blip')"
  config.optim = dict(lr=lr, weight_decay=0.05, undecayed=None)
  if not tiny:
    config.init = dict(type="blip", path="model_base_14M.pth", key="model", **init)
  return config


def tables(type, *, pp="decode|resize(384)|clean(30)", **files):
  """Evaluations after every epoch, of tables in data/ that are as the training one."""
  return {
    name: dict(
      type=type, every="1 epoch", data=dict(source=dict(path=f"data/{file}"), pp=pp)
    )
    for name, file in files.items()
  }
