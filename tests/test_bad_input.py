"""What a user gets wrong: one line of what and where, exit code 2, nothing compiled."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import runs
from vlp_jax import evaluate
from vlp_jax import train
from vlp_jax.training import step as step_lib


@pytest.fixture
def too_late(monkeypatch):
  """Nothing may be compiled: neither the first state nor the step."""

  def compiled(*args, **kwargs):
    raise AssertionError("the mistake was not found before something is compiled")

  monkeypatch.setattr(step_lib, "init_program", compiled)
  monkeypatch.setattr(step_lib, "make_train_step", compiled)


def fails(capsys, workdir, *overrides, command=train, config=None):
  """The message of a command that ends with 2."""
  options = [f"--config.{item}" for item in overrides]
  options += [f"--config={config or runs.CONFIG}"] if command is train else []
  capsys.readouterr()
  with pytest.raises(SystemExit) as stopped:
    command.main([*options, f"--workdir={workdir}"])
  said = capsys.readouterr()
  assert stopped.value.code == 2, said.err
  message = [x for x in said.err.splitlines() if x.startswith("vlp_jax: error:")]
  assert len(message) == 1 and "Traceback" not in said.err, said.err
  return said.err[said.err.index("vlp_jax: error:") :]


NO_SPLIT = "data.source={'type': 'scenes', 'split': 'dev', 'res': 24}"
WRONG = {
  "a key that there is not": (
    ["objectives.itc.qeue=64"],
    ["config: objectives.itc.qeue: no such field of vlp_jax/objectives/itc.py"]
    + ["did you mean 'queue'?"],
  ),
  "a key of the top level": (
    ["bach_size=16"],
    ["config: bach_size: no such field of vlp_jax/config.py", "'batch_size'"],
  ),
  "a key of the optimiser": (["optim.larning=1"], ["config: optim.larning: no such"]),
  "an objective that there is not": (
    ["objectives.itd.rate=0.5"],
    ["config: objectives.itd", "vlp_jax/objectives/itd.py", "did you mean 'it"],
  ),
  "a wrong type": (
    ["optim.lr=fast"],
    ["config: optim.lr: wrong type: got 'fast' (str), wants float"],
  ),
  "a wrong type within a part": (
    ["model.image.depth=1.5"],
    ["config: model.image.depth: wrong type: got 1.5 (float), wants int"],
  ),
  "a wrong choice": (
    ["objectives.itm.negatives=herd"],
    ["config: objectives.itm.negatives: wrong value: got 'herd'"]
    + ["did you mean 'hard'?"],
  ),
  "no duration": (["total=soon"], ["config: total: wrong type: got 'soon'", "epochs"]),
  "a total that is a share of itself": (["total='5%'"], ["config: total='5%'"]),
  "a warm-up longer than the run": (
    ["optim.warmup=100"],
    ["config: optim.warmup is 100 steps, but the run has 24"],
  ),
  "a batch that does not split": (
    ["batch_size=12"],
    ["config: batch_size=12", "8"],
  ),
  "a mesh of other devices": (
    ["sharding.mesh={'data': 3}"],
    ["config: sharding.mesh: data=3", "makes 3 devices, but there are 8"],
  ),
  "a mesh with an axis that there is not": (
    ["sharding.mesh={'model': 8}"],
    ["config: sharding.mesh.model: no such axis; there are data, fsdp, tensor"],
  ),
  "a table that is not there": (
    ["data.source={'type': 'table', 'path': 'no/such/folder'}"],
    ["source.path=no/such/folder", "no such table or folder", "config.data.source"],
  ),
  "a split that there is not": (
    [NO_SPLIT],
    ['split="dev": scenes have train, val, test'],
  ),
  "a tokenizer that is not there": (
    ["tokenizer={'type': 'wordpiece', 'path': 'no/vocab.txt', 'length': 12}"],
    ["tokenizer.path='no/vocab.txt': no such vocabulary", "vocab.txt"],
  ),
  "a SentencePiece model that is not there": (
    ["tokenizer={'type': 'sentencepiece', 'path': 'no.model', 'length': 12}"],
    ["tokenizer.path='no.model': no such SentencePiece model"],
  ),
  "a guard's policy that there is not": (
    ["guard.nonfinite=ignore"],
    ["config: guard.nonfinite: wrong value: got 'ignore'", "'stop' or 'skip'"],
  ),
  "a guard's field that there is not": (
    ["guard.sigmas=3.0"],
    ["config: guard.sigmas: no such field of vlp_jax/training/guard.py"]
    + ["did you mean 'loss_sigmas'?"],
  ),
  "a guard that never stops": (
    ["guard.most=0"],
    ["config: guard.most=0: wants 1 or more"],
  ),
  "a signal that cannot be caught": (
    ["preemption.signals=('SIGTERM', 'SIGKILL')"],
    ["config: preemption.signals: 'SIGKILL' is no signal that can be caught"],
  ),
  "a cloud that is not known": (
    ["preemption.maintenance=azure"],
    ["config: preemption.maintenance: wrong value: got 'azure'", "'gce'"],
  ),
  "no objective": (
    ["objectives.itc=None", "objectives.itm=None", "objectives.mlm=None"],
    ["config: objectives is empty", "itc"],
  ),
  "a queue smaller than the batch": (
    ["objectives.itc.queue=8"],
    ["objectives.itc.queue=8 is smaller than batch_size=16"],
  ),
  "a teacher that is not there": (
    ["ema_decay=None"],
    ["config: objectives.itc.queue wants a teacher: set ema_decay"],
  ),
  "negatives from other microbatches": (
    ["accumulate=2"],
    ["config: objectives.itm.group=None: negatives are drawn among", "to 8 or another"],
  ),
  "microbatches that the batch does not make": (
    ["accumulate=3"],
    ["config: accumulate=3: batch_size=16 does not make so many microbatches"],
  ),
  "a stream of one microbatch": (
    ["accumulate_stream=True"],
    ["config: accumulate_stream=True streams microbatches, but accumulate=1"],
  ),
  "a tile of nothing": (
    ["objectives.itc.backend='ring'", "objectives.itc.tile=0"],
    ["objectives.itc.tile=0: want 1 or more"],
  ),
  "images of another size than the model's": (
    ["data.pp='decode|resize(64)'"],
    ["image is uint8[64, 64, 3], but the model takes uint8[24, 24, 3]"]
    + ["config.data.pp", "model.image.res"],
  ),
  "images of which the patches make no grid": (
    ["model.image.patch=7"],
    ["model.image: res=24 is not a multiple of patch=7"],
  ),
  "a word of preprocessing that there is not": (
    ["data.pp='decode|resiz(24)'"],
    ["resiz", "did you mean 'resize'"],
  ),
  "no decode": (["data.pp='flip'"], ["pp: 'flip' lacks decode"]),
  "an evaluation without data": (
    ["evals.val={'type': 'retrieval'}"],
    ["config: evals.val.data is missing"],
  ),
  "an evaluation's data that are not there": (
    [
      "evals.val={'type': 'retrieval', 'data': {'pp': 'decode', 'source':"
      " {'type': 'table', 'path': 'no.jsonl'}}}"
    ],
    ["source.path=no.jsonl", "no such table"],
  ),
  "re-ranking without ITM": (
    [
      "objectives.itm=None",
      "evals.val={'type': 'retrieval', 'rerank': 4, 'data':"
      " {'pp': 'decode', 'source': {'type': 'scenes', 'split': 'val', 'res': 24}}}",
    ],
    ["evals", "itm", "objective"],
  ),
  "weights that are not there": (
    ["init={'type': 'albef', 'path': 'no.pth'}"],
    ["no.pth"],
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configs(name, capsys, tmp_path, too_late):
  overrides, words = WRONG[name]
  message = fails(capsys, tmp_path, *overrides)
  for word in words:
    assert word in message
  assert not (tmp_path / "checkpoints").exists() or not runs.steps(tmp_path)


def test_a_workdir_that_cannot_be_written_to(capsys, too_late):
  message = fails(capsys, "s3://bucket/run")
  assert "--workdir=s3://bucket/run: wants a folder of a disk, or gs://" in message


def test_no_config(capsys, tmp_path, too_late):
  missing = runs.ROOT / "configs" / "quikstart.py"
  message = fails(capsys, tmp_path, config=missing)
  assert "no such file" in message and "did you mean" in message
  assert "quickstart.py" in message


def test_no_data(capsys, tmp_path, too_late):
  """A table without rows, one whose rows lack a field, a folder without images."""
  table = tmp_path / "pairs.jsonl"
  source = f"data.source={{'type': 'table', 'path': {str(table)!r}}}"
  table.write_text("")
  assert "is empty" in (message := fails(capsys, tmp_path / "run", source))
  assert str(table) in message
  table.write_text(json.dumps({"image": "a.jpg", "txt": "a cat"}) + "\n")
  message = fails(capsys, tmp_path / "run", source)
  assert f"{table}, line 1" in message and '"caption"' in message
  (tmp_path / "empty").mkdir()
  source = f"data.source={{'type': 'table', 'path': {str(tmp_path / 'empty')!r}}}"
  assert "empty" in fails(capsys, tmp_path / "run", source)


def test_nothing_but_broken_records(capsys, tmp_path, too_late):
  table = tmp_path / "pairs.jsonl"
  rows = [{"image": f"{i}.jpg", "caption": f"picture {i}"} for i in range(40)]
  table.write_text("".join(json.dumps(row) + "\n" for row in rows))
  source = f"data.source={{'type': 'table', 'path': {str(table)!r}}}"
  pp = "data.pp='decode|resize(24)'"
  message = fails(capsys, tmp_path / "run", source, pp)
  assert ".jpg" in message and "broken" in message


def test_nothing_to_evaluate(capsys, tmp_path):
  message = fails(capsys, tmp_path / "run", command=evaluate)
  assert "say --config=FILE" in message


# --- Runs of ITC alone, of which the first step is soon there -------------------------

ITC = runs.ITC


def trains(workdir, *overrides):
  options = [f"--config.{item}" for item in (*ITC, *overrides)]
  with pytest.raises(SystemExit) as stopped:
    train.main([f"--config={runs.CONFIG}", *options, f"--workdir={workdir}"])
  assert stopped.value.code == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of 6 steps, with checkpoints of steps 3 and 6."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  trains(workdir, "total=6")
  return workdir


def test_a_checkpoint_of_another_model(trained, capsys, too_late):
  message = fails(capsys, trained, *ITC, "total=9", "model.embed_dim=8")
  assert "is of another model than this config" in message
  assert str(trained / "checkpoints" / "6") in message
  assert "params/model/image_proj/kernel" in message
  assert "(32, 16) in the checkpoint, (32, 8) in this config" in message
  assert runs.steps(trained) == [3, 6]


def test_a_checkpoint_with_other_objectives(trained, capsys, too_late):
  message = fails(
    capsys,
    trained,
    *ITC[1:],
    "total=9",
    "model.fusion={'type': 'cross_attention', 'depth': 1}",
  )
  assert "only in this config: params/model/fusion" in message


def test_a_step_that_was_not_saved(trained, capsys):
  with pytest.raises(SystemExit) as stopped:
    evaluate.main([f"--workdir={trained}", "--step=5"])
  assert stopped.value.code == 2
  message = capsys.readouterr().err
  assert "none of step 5" in message and "[3, 6]" in message


def test_a_loss_that_is_no_number(trained, tmp_path, capsys):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  before = runs.state(workdir)
  message = fails(capsys, workdir, *ITC, "total=12", "optim.lr=1e30")
  # Step 7 starts well and leaves bad weights, which step 8 meets.
  assert "error: step 8: " in message and "loss" in message
  assert "not finite" in message
  assert "The last good checkpoint is kept: step 6." in message
  assert "optim.lr" in message
  assert runs.steps(workdir)[-1] == 6
  for path, value in runs.state(workdir).items():
    np.testing.assert_array_equal(value, before[path])
    assert np.isfinite(value).all(), path
  assert [line["step"] for line in runs.metrics(workdir)] == list(range(1, 8))


# --- A full disk ----------------------------------------------------------------------

# Once there is a checkpoint of step 2, the disk gets room for the log alone.
FULL = """
mount -t tmpfs -o size=64m tmpfs "$DISK" || exit 77
fill() {
  until [ -d "$DISK/run/checkpoints/2" ]; do sleep 0.05; done
  left=$(df --output=avail -k "$DISK" | tail -1)
  head -c $((left - 48))k /dev/zero > "$DISK/filler"
}
fill &
"$@"
echo "first: $?"
kill %1 2> /dev/null
rm "$DISK/filler"
"$@"
echo "second: $?"
cp -r "$DISK/run" "$OUT"
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare to mount a disk")
def test_a_full_disk(tmp_path):
  """The run trains on, says that it could not save, and goes on once there is room."""
  disk, out = tmp_path / "disk", tmp_path / "out"
  disk.mkdir()
  settings = (*ITC, "total=8", "checkpoint.every=1", "checkpoint.keep=20")
  command = [sys.executable, "-m", "vlp_jax.train", f"--config={runs.CONFIG}"]
  command += [f"--config.{item}" for item in settings]
  command += [f"--workdir={disk / 'run'}"]
  done = subprocess.run(
    ["unshare", "-rm", "bash", "-c", FULL, "bash", *command],
    cwd=runs.ROOT,
    env=os.environ | {"DISK": str(disk), "OUT": str(out)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  said = done.stdout + done.stderr
  if done.returncode == 77 or done.stderr.startswith("unshare:"):
    pytest.skip(f"may not mount a small disk: {done.stderr.strip()[-200:]}")
  assert "first: 2" in done.stdout, said[-3000:]
  first = done.stderr.partition("vlp_jax: error: ")[2].splitlines()[0]
  # A save that has begun may take the log's room for a moment: then that is told.
  if first.startswith("log: "):
    assert str(disk / "run" / "metrics.jsonl") in first
  else:
    assert "Training goes on and saves" in done.stderr
    assert "checkpoint: step 8 could not be saved in" in first
    assert str(disk / "run" / "checkpoints") in first
  assert "Make room" in first
  assert "second: 0" in done.stdout, said[-3000:]
  assert "goes on from step" in done.stderr
  assert runs.steps(out)[-1] == 8
  assert [line["step"] for line in runs.metrics(out)] == list(range(1, 9))
