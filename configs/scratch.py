"""Tiny configs that have no pretrained start, and learn all the same."""


def from_nothing(config, *, batch):
  """The tiny config, changed so that it learns from nothing.

  Kernels are drawn by their fan in: 0.02 makes layers of width 768, which it is for,
  halve what they read, but those of width 32 leave a ninth of it, and texts and images
  are not told apart. Nothing is dropped out: of 32 units, a tenth is more noise than
  what remains of them tells. And it warms up: layers that normalise what they add
  (METER's) collapse to one answer without.

  Args:
    config: changed.
    batch: examples a step.
  """
  for name in ("image", "text", "fusion"):
    config.model[name].init_std = None
    for field in ("dropout", "dropout_attention", "drop_path"):
      if field in config.model[name]:
        config.model[name][field] = 0.0
  config.optim.warmup = "10%"
  config.batch_size = batch
  return config
