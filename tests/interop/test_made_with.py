"""What no tensor tells: layers of other activations or epsilons are refused."""

import pathlib

import ml_collections
import pytest

from vlp_jax import build
from vlp_jax import config as config_lib
from vlp_jax import config_file
from vlp_jax.data import vocab as vocab_lib
from vlp_jax.interop import albef
from vlp_jax.interop import big_vision
from vlp_jax.interop import blip
from vlp_jax.interop import coca
from vlp_jax.interop import initial
from vlp_jax.interop import made_with
from vlp_jax.interop import meter
from vlp_jax.interop import open_clip
from vlp_jax.interop import vilt

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
VOCAB = vocab_lib.Vocab(size=30, pad=0, unk=1, cls=2, sep=3, mask=4, dec=5, enc=6)
# config -> format, a tower of it and what its file has there.
PUBLISHED = {
  "albef": (albef, "fusion", dict(act="gelu", norm_eps=1e-12)),
  "blip": (blip, "image", dict(act="gelu", norm_eps=1e-6)),
  "coca": (coca, "text", dict(act="gelu", norm_eps=1e-5)),
  "meter": (meter, "image", dict(act="quick_gelu", norm_eps=1e-5)),
  "meter:bert": (meter, "text", dict(act="gelu", norm_eps=1e-12)),
  "vilt": (vilt, "fusion", dict(act="gelu", norm_eps=1e-6)),
  "siglip": (big_vision, "image", dict(act="gelu_tanh", norm_eps=1e-6)),
  "siglip:L16": (open_clip, "text", dict(norm_eps=1e-6)),
  "finetune/albef_ve": (albef, "text", dict(act="gelu", norm_eps=1e-12)),
  "finetune/blip_vqa": (blip, "decoder", dict(act="gelu", norm_eps=1e-12)),
  "finetune/meter_vqa": (meter, "fusion", dict(act="gelu", norm_eps=1e-12)),
}


def model_of(name):
  file, colon, argument = name.partition(":")
  path = f"{CONFIGS / file}.py{colon}{argument}"
  config = config_lib.run(config_file.load(path))
  return build.model(config.model, vocab=VOCAB, length=16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_configs_are_made_as_the_files_are(name):
  """And with one other field a model is refused, before the file is opened."""
  module, tower, fields = PUBLISHED[name]
  model = model_of(name)
  made_with.check(model, module.MADE_WITH, "it")
  kind = module.__name__.rpartition(".")[2]
  for field, value in fields.items():
    wrong = "relu" if field == "act" else 1e-3
    part = getattr(model, tower).clone(**{field: wrong})
    other = model.clone(**{tower: part})
    spec = dict(type=kind, path="nowhere.pth")
    if kind in ("big_vision", "open_clip"):
      with pytest.raises(ValueError) as error:
        made_with.check(other, module.MADE_WITH, "nowhere.pth")
    else:
      with pytest.raises(ValueError) as error:
        initial.load(spec, {}, model=other)
    told = f"model.{tower}.{field}={wrong!r}, but the checkpoint wants"
    assert told in str(error.value) and repr(value) in str(error.value)
    assert str(error.value).startswith("nowhere.pth was made with other layers:")
    said = {f"model.{tower}.{field}": wrong}
    made_with.check(other, module.MADE_WITH, "it", said)


def test_all_that_differ_are_listed_and_towers_that_are_not_there_pass():
  model = model_of("albef")
  made = made_with.of(
    image=dict(act="relu", norm_eps=1e-5), decoder=dict(act="relu"), text=dict(odd=1)
  )
  with pytest.raises(ValueError) as error:
    made_with.check(model, made, "it")
  assert str(error.value).count("but the checkpoint wants") == 2
  made_with.check(None, made, "it")
  made_with.check(model, {"model.image.act": frozenset({"gelu", "relu"})}, "it")
  with pytest.raises(ValueError, match="made_with='model.image.odd': the model has no"):
    made_with.check(model, {}, "it", {"model.image.odd": 1})


def test_a_config_says_it_in_pairs():
  """ConfigDict takes no dots in names."""
  told = (("model.text.act", "relu"), ("model.image.norm_eps", 1e-5))
  spec = dict(type="albef", path="nowhere.pth", made_with=told)
  config = ml_collections.ConfigDict(dict(init=spec)).to_dict()
  model = model_of("albef")
  with pytest.raises(ValueError) as error:
    initial.load(config["init"], {}, model=model)
  assert "model.text.act='gelu', but the checkpoint wants 'relu'" in str(error.value)
  assert "norm_eps=1e-06, but the checkpoint wants 1e-05" in str(error.value)
