"""Stages of one method hand their weights on: what each starts from fits it."""

import jax
import numpy as np
import pytest

from tests.configs import test_all
from vlp_jax import batch as batch_lib
from vlp_jax import build
from vlp_jax import clock as clock_lib
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax import feeds
from vlp_jax.interop import initial
from vlp_jax.interop import native
from vlp_jax.ops import tree
from vlp_jax.training import optim as optim_lib
from vlp_jax.training import step as step_lib

# Of the towers, so that whole trees can be made.
SMALL = [
  f"--config.model.{tower}.{name}={value}"
  for tower in ("image", "text")
  for name, value in dict(width=32, num_heads=2, mlp_dim=64).items()
]
SMALL += ["--config.model.fusion.depth=3", "--config.model.image.patch=32"]
SMALL += ["--config.model.fusion.distances=(7, 196)"]
SMALL += ["--config.model.codebook.hidden=8", "--config.model.codebook.codes=8"]


def stage(name):
  """(config, its parameters' shapes, its pretrainer) of a stage of VLMo, small."""
  path = f"{test_all.ROOT}/configs/vlmo.py" + (f":{name}" if name else "")
  options = [o for o in SMALL if name == "images" or "codebook" not in o]
  if not name:
    options.append("--config.model.embed_dim=32")
  if name == "images":
    options += ["--config.objectives.mim.codes=8", "--config.objectives.mim.patches=49"]
    options += ["--config.model.codebook.res=56"]
  config = config_lib.run(config_file.load(path, options))
  config_lib.check(config)
  vocab, length = test_all.stand_in(config)
  time = clock_lib.of(config, 1000)
  made = build.pretrainer(config, vocab=vocab, length=length, time=time)
  batch = batch_lib.of(feeds.feeds(config, {}, made), made.model.image, length)
  return config, step_lib.abstract_params(made, batch), made


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stages():
  return {name: stage(name) for name in ("images", "texts", "")}


def test_vlmo_hands_its_weights_on(stages, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for number, name in enumerate(("images", "texts"), 1):
    filled = jax.tree.map(
      lambda x, n=number: np.full(x.shape, n, x.dtype), stages[name][1]
    )
    folder = tmp_path / "runs" / f"vlmo_{name}"
    folder.mkdir(parents=True)
    native.save(folder / "native", native.Checkpoint(None, {"params": filled}))
  for name in ("texts", ""):
    config, shapes, made = stages[name]
    got = tree.flatten(initial.load(config.init, shapes, model=made.model))
    value = {p: float(x.flat[0]) for p, x in got.items() if isinstance(x, np.ndarray)}
    fresh = sorted({"/".join(p.split("/")[:3]) for p in got if p not in value})
    block = "model/fusion/lower/blocks/{}/up/kernel"
    if name == "texts":
      assert set(value.values()) == {1.0}
      assert value[block.format("mlp_image")] == value[block.format("mlp_text")] == 1
      assert "model/text/word" in fresh and "model/fusion/pool" in fresh
    else:
      # Of the images' stage what the texts' has no part in, all else of the texts'.
      assert {p for p, v in value.items() if v == 1} == {
        p for p in got if p.startswith("model/image/")
      }
      assert value["objectives_mlm/bias"] == value[block.format("mlp_text")] == 2
      assert [p for p in fresh if not p.startswith("objectives_it")] == [
        "model/image_proj/kernel",
        "model/log_scale",
        "model/text_proj/kernel",
      ]


def test_the_stage_of_texts_moves_the_language_expert_alone(stages):
  config, shapes, _ = stages["texts"]
  optim = build.optim(config.optim)
  tx, _ = optim_lib.make(optim, shapes, total_steps=200_000)
  state = jax.eval_shape(tx.init, shapes)
  kept = {path.split("mu/")[1] for path in tree.flatten(state) if "mu/" in path}
  assert "model/fusion/lower/blocks/mlp_text/up/kernel" in kept
  assert "model/text/word/embedding" in kept
  # vlmo/run.py: of attention the biases by distance, of no branch the layer scale.
  attention = {p.split("/")[-1] for p in kept if "attn" in p}
  assert attention == {"distance"}
  assert not [p for p in kept if "mlp_image" in p or "scale_" in p]
