"""The README's table of planned baselines: what it says, and that it is still so.

What the planner said is in tests/reference/plans.json, made by the slow test with
UPDATE_PLANS=1. It wants the compilers of `pip install -e '.[plan]'`, in the versions
that made the file: others plan otherwise.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / "tests" / "reference" / "plans.json"
DTYPE = "--config.model.dtype=bfloat16"
FULL = "--config.model.remat=full"
SIGLIP2 = ("--config.sharding.mesh.data=32", "--config.sharding.mesh.fsdp=8")
# {baseline: what does not fit its slice without}; two names are of one program.
ROWS = {
  "albef": (),
  "beit3": (),
  "blip": (FULL,),
  "cappa": (),
  "clip, openclip": (),
  "coca": (FULL,),
  "flava": (FULL,),
  "flip": (FULL,),
  "late_fusion": (),
  "lit": (),
  "meter": (FULL,),
  "siglip": (FULL,),
  "siglip2": (FULL, *SIGLIP2),
  "uniter": (FULL,),
  "vilt": (FULL,),
  "vlmo": (FULL,),
  "vlp": (),
}
KEPT = ("topology", "batch_size", "needed", "seconds", "rates", "versions")
NEAR = 0.01  # A plan that is further from what it was has changed.


def plans():
  return json.loads(FILE.read_text("utf-8"))


def row(name, plan):
  """The line of the README."""
  seconds, rates = plan["seconds"], plan["rates"]
  said = "".join(f", `{each.removeprefix('--config.')}`" for each in ROWS[name])
  parts = ("compute", "memory", "interconnect")
  days = rates["days"]
  cells = (
    name + said,
    plan["topology"],
    f"{plan['batch_size']:,}",
    f"{plan['needed'] / 2**30:.1f}",
    ", ".join(f"{1e3 * seconds[part]:.0f}" for part in parts),
    f"{1e3 * seconds['step']:,.0f}",
    f"{100 * rates['mfu']:.0f}",
    f"{days:.0f}" if days >= 10 else f"{days:.1f}" if days >= 1 else f"{days:.2f}",
  )
  return f"| {' | '.join(cells)} |"


def test_the_table_is_what_the_planner_said():
  text = (ROOT / "README.md").read_text("utf-8")
  missing = [line for n, p in plans().items() if (line := row(n, p)) not in text]
  assert not missing
  assert list(plans()) == list(ROWS)


def test_every_card_with_a_slice_is_in_the_table():
  names = {each for name in ROWS for each in name.split(", ")}
  cards = (ROOT / "configs" / "cards").glob("*.toml")
  assert names == {card.stem for card in cards if "\nslice" in card.read_text("utf-8")}


def installed():
  """Versions of what plans for a TPU."""
  return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='no libtpu: pip install "jax[tpu]", which needs no TPU',
)
@pytest.mark.parametrize("name", ROWS)
def test_a_plan_is_what_it_was(name):
  update = os.environ.get("UPDATE_PLANS") == "1"
  old = plans().get(name, {}) if FILE.exists() else {}
  if not update and old["versions"] != installed():
    pytest.skip(f"planned with {old['versions']}, here is {installed()}")
  config = f"--config=configs/{name.partition(',')[0]}.py"
  done = subprocess.run(
    [sys.executable, "-m", "vlp_jax.plan", config, DTYPE, *ROWS[name], "--json"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  new = {key: value for key, value in json.loads(done.stdout).items() if key in KEPT}
  if update:
    made = (plans() if FILE.exists() else {}) | {name: new}
    FILE.write_text(
      json.dumps({n: made[n] for n in ROWS if n in made}, indent=1) + "\n"
    )
    return
  assert new["needed"] == pytest.approx(old["needed"], rel=NEAR)
  assert new["seconds"] == pytest.approx(old["seconds"], rel=NEAR)
