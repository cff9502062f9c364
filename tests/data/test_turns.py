"""Several kinds of data in a run: whose turn it is, and what their batches have."""

import itertools

import numpy as np
import pytest

from tests.data import pictures
from vlp_jax.data import pipeline
from vlp_jax.data import turns
from vlp_jax.data.sources import images
from vlp_jax.data.sources import lines

TOKENIZER = pictures.Tokenizer()
CYCLES = [
  ("pairs", "images", "texts"),
  ("pairs", "pairs", "texts"),
  ("pairs+images", "texts", "images"),
]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("cycle", CYCLES)
def test_seen_counts_what_at_says(cycle, drawn):
  made = turns.Turns(cycle, drawn, seed=3)
  counts = dict.fromkeys(made.kinds, 0)
  for step in range(50):
    assert made.seen(step) == counts
    for kind in made.at(step):
      counts[kind] += 1


def test_a_cycle_is_a_round_robin():
  made = turns.Turns(("images", "texts", "pairs"))
  assert [made.at(s) for s in range(4)] == [("images",), ("texts",), ("pairs",)] + [
    ("images",)
  ]
  assert turns.Turns(("a+b+c",)).at(17) == ("a", "b", "c")


def test_drawn_turns_have_exact_shares_and_depend_on_the_seed():
  cycle = ("pairs", "images", "texts")
  rows = []
  for seed in (0, 1):
    made = turns.Turns(cycle, True, seed)
    order = [made.at(s)[0] for s in range(60)]
    assert all(sorted(order[i : i + 3]) == sorted(cycle) for i in range(0, 60, 3))
    rows.append(order)
  assert rows[0] != rows[1]
  assert len({tuple(rows[0][i : i + 3]) for i in range(0, 60, 3)}) > 3


def test_shares_are_of_what_steps_read():
  assert turns.Turns(("a", "b", "a", "c")).shares == {"a": 0.5, "b": 0.25, "c": 0.25}
  assert turns.Turns(("a+b", "c", "b+a")).shares == {"a+b": 2 / 3, "c": 1 / 3}
  made = turns.Turns(("b", "a+b", "b"), True, seed=5)
  read = [frozenset(made.at(step)) for step in range(30)]
  for entry, share in made.shares.items():
    assert read.count(frozenset(entry.split("+"))) == 30 * share


@pytest.mark.parametrize("cycle", [(), ("a+",), ("a+a",), ("",)])
def test_wrong_turns(cycle):
  with pytest.raises(ValueError, match=r"config: data\.turns"):
    turns.Turns(cycle)


def feeds(seen, batch_size=4):
  """The two kinds' batches after so many of each."""
  source = pictures.source(10)
  make = lambda **given: pipeline.train_batches(
    source, "decode|resize(8)", TOKENIZER, batch_size=batch_size, seed=0, **given
  )
  return {
    "pairs": make(start=seen["pairs"] * batch_size),
    "texts": make(start=seen["texts"] * batch_size, holds="texts"),
  }


def test_goes_on_at_any_step_as_if_never_stopped():
  made = turns.Turns(("pairs", "texts", "pairs"), True, seed=1)
  whole = turns.TurnBatches(made, feeds(made.seen(0)), 0)
  want = list(itertools.islice(whole, 7))
  whole.close()
  for step in (1, 4):
    again = turns.TurnBatches(made, feeds(made.seen(step)), step)
    for got, expected in zip(again, want[step:], strict=False):
      assert got.keys() == expected.keys()
      for kind, batch in got.items():
        for name, value in batch.items():
          np.testing.assert_array_equal(value, expected[kind][name])
    again.close()
  # Nothing is left out: each kind goes through its own data.
  pairs = np.concatenate([b["pairs"]["image_id"] for b in want if "pairs" in b])
  assert len(set(pairs[:10].tolist())) == 10


def test_what_a_kind_does_not_have_is_not_in_its_batches(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"one two\n\n  \r\nthree\r\nfour five\nsix")
  texts = lines.Source(str(tmp_path / "a.txt"))
  assert len(texts) == 5
  got = texts.captions(np.arange(5))
  assert got == [b"one two", b"", b"three", b"four five", b"six"]
  made = pipeline.train_batches(
    lines.Source(f"{tmp_path}/a.txt"),
    "",
    TOKENIZER,
    batch_size=4,
    seed=0,
    holds="texts",
    max_bad=1.0,
  )
  batch = next(made)
  assert set(batch) == {"text", "text_mask", "image_id"}
  rows = zip(batch["text"], batch["text_mask"], strict=True)
  said = {TOKENIZER.decode(t[m]) for t, m in rows}
  assert said <= {"one two", "three", "four five", "six"}
  made.close()

  (tmp_path / "deep").mkdir()
  for i, raw in enumerate(pictures.source(3).read(np.arange(3))):
    (tmp_path / "deep" / f"{i}.PNG").write_bytes(raw["image"])
  made = pipeline.train_batches(
    images.Source(str(tmp_path)),
    "decode|resize(8)",
    TOKENIZER,
    batch_size=3,
    seed=0,
    holds="images",
  )
  batch = next(made)
  assert set(batch) == {"image", "image_id"}
  assert batch["image"].shape == (3, 8, 8, 3)
  assert sorted(batch["image_id"].tolist()) == [0, 1, 2]
  made.close()


def test_sources_that_are_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    lines.Source(str(tmp_path / "none.txt"))
  with pytest.raises(FileNotFoundError, match="no such folder"):
    images.Source(str(tmp_path / "none"))
  with pytest.raises(ValueError, match="has no image"):
    images.Source(str(tmp_path))
  (tmp_path / "empty.txt").write_text("\n\n")
  with pytest.raises(ValueError, match="no line with a text"):
    lines.Source(str(tmp_path / "empty.txt"))
