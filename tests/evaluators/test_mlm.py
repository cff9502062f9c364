"""MLM on words that only the image tells."""

import pytest

from tests.evaluators import fakes
from vlp_jax.evaluators import mlm

SHADES = (10, 40, 80, 128, 100)


def evaluator(source=None, batch_size=2, **fields):
  made = mlm.Evaluator(**fields)
  made.setup(
    pretrainer=fakes.pretrainer(),
    source=source or fakes.Source(SHADES),
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=None,
    batch_size=batch_size,
  )
  return made


def test_the_image_tells_the_word_and_the_mean_colour_does_not():
  # The fake sees a blank image as shade 128, which is right once in five.
  got = evaluator()(fakes.variables())
  assert got == {"accuracy": 100.0, "accuracy_blank": 20.0, "gain": 80.0}


def test_all_words():
  # The fake never says "shade"; "s10" … are half of the words.
  got = evaluator(words="all")(fakes.variables())
  assert got == {"accuracy": 50.0, "accuracy_blank": 10.0, "gain": 40.0}


def test_given_words_and_kinds():
  kinds = dict(shade=("S10", "s128"), noun=("shade",), none=("zebra",))
  got = evaluator(words=("s10", "s128", "shade"), kinds=kinds)(fakes.variables())
  assert got["shade/accuracy"] == 100.0 and got["shade/accuracy_blank"] == 50.0
  assert got["noun/accuracy"] == 0.0 and "none/accuracy" not in got
  assert got["accuracy"] == pytest.approx(100 * 2 / 7)


def test_a_word_is_right_only_if_all_its_pieces_are(monkeypatch):
  class Half(fakes.Mlm):
    def predict(self, model, ids, mask, image):
      # Right about the number, wrong about the "s" before it.
      logits = super().predict(model, ids, mask, image)
      return logits.at[:, 2, 5].add(9.0)

  made = mlm.Evaluator()
  made.setup(
    pretrainer=fakes.pretrainer(mlm=Half()),
    source=fakes.Source(SHADES),
    tokenizer=fakes.Tokenizer(),
    pp=fakes.PP,
    mesh=None,
    batch_size=2,
  )
  assert made(fakes.variables())["accuracy"] == 0.0


def test_together_hides_all_chosen_words_of_a_caption():
  made = evaluator(words="all", mask="together")
  made(fakes.variables())
  rows = made._rows(made._examples(fakes.variables())[0])
  vocab = fakes.Tokenizer().vocab
  assert len(rows.ids) == len(SHADES) and len(rows.hidden) == 2 * len(SHADES)
  assert (rows.ids[:, 1:4] == vocab.mask).all() and (rows.ids[:, 0] == vocab.cls).all()


def test_rate_is_drawn_by_example():
  source = fakes.Source(tuple(range(60)))
  half = evaluator(source, words="all", rate=0.5)
  rows = half._rows(half._examples(fakes.variables())[0])
  assert 40 < len(rows.hidden) < 80
  again = evaluator(source, words="all", rate=0.5, batch_size=7)
  assert again._rows(again._examples(fakes.variables())[0]).hidden == rows.hidden


def test_numbers_do_not_depend_on_batches():
  got = [
    evaluator(words="all", batch_size=b, pairs=p)(fakes.variables())
    for b, p in ((1, 1), (4, 3), (32, 64))
  ]
  assert got[0] == got[1] == got[2]


def test_nothing_is_compiled_twice():
  made = evaluator()
  made(fakes.variables()), made(fakes.variables(1.0))
  assert made._predict.fuse._cache_size() == 1
  assert made._encode.encode._cache_size() == 2  # images, and the blank one


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(words="colours"), 'words="colours"'),
    (dict(mask="all"), 'mask="all"'),
    (dict(rate=0.0), "rate=0.0"),
    (dict(objective="lm"), 'objective="lm"'),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    evaluator(**fields)


def test_words_that_are_nowhere():
  with pytest.raises(ValueError, match="zebra.*none of them is in a caption"):
    evaluator(words=("zebra",))(fakes.variables())


def test_a_source_that_lists_no_words():
  class Bare(fakes.Source):
    def read(self, indices):
      return [
        {k: v for k, v in e.items() if k != "words"} for e in super().read(indices)
      ]

  with pytest.raises(ValueError, match='list no.*set words="all"'):
    evaluator(Bare(SHADES))(fakes.variables())
