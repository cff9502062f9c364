"""CLIP's tokenizer against the official one.

tests/reference/clip_tokenizer has the ids that openai/CLIP gives. Of the file of merges
it has those that these texts use, in their places; the others are of bytes that no text
has.
"""

import gzip
import json
import pathlib

import numpy as np
import pytest

from vlp_jax.data import vocab as vocab_lib
from vlp_jax.data.tokenizers import clip_bpe

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "clip_tokenizer"
MERGES = str(REFERENCE / "merges.txt.gz")
CASES = json.loads((REFERENCE / "cases.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
  return clip_bpe.Tokenizer(MERGES, length=77)


def test_ids_are_those_of_the_official_tokenizer(tokenizer):
  texts = [case["text"] for case in CASES]
  ids, mask = tokenizer.encode(texts)
  for case, row, real in zip(CASES, ids, mask, strict=True):
    assert row[real].tolist() == [49_406, *case["ids"], 49_407], case["text"]
  longest = json.loads((REFERENCE / "config.json").read_text("utf-8"))["long_case"]
  want = np.load(REFERENCE / "expected.npz")["tokenize_77"]
  got, mask = tokenizer.encode([*texts, longest])
  np.testing.assert_array_equal(got, want)
  assert got.dtype == np.int32 and mask.dtype == bool
  assert (got[~mask] == 0).all() and (got.max(axis=1) == 49_407).all()


def test_the_last_real_token_is_the_end_of_text(tokenizer):
  ids, mask = tokenizer.encode(["a photo of a cat", "", "photo " * 100])
  assert (ids[np.arange(3), mask.sum(axis=1) - 1] == tokenizer.vocab.sep).all()
  assert mask.sum(axis=1).tolist() == [7, 2, 77]


def test_text_comes_back(tokenizer):
  for text in ("a photo of a cat", "café naïve über", "emoji 😀🚀 test", ""):
    assert tokenizer.decode(tokenizer.encode([text])[0][0]) == text
  ids, _ = tokenizer.encode(["emoji 😀"])
  pieces = tokenizer.pieces(ids[0, :3])
  assert pieces[:2] == ["<|startoftext|>", "emoji"]


def test_cleaning_is_the_official_one():
  assert clip_bpe.clean("  A\t&amp;lt;b&gt;\n ’x‘ ﬁne ") == "a <b> 'x' fine"


def test_the_vocabulary_has_no_mask(tokenizer):
  vocab = tokenizer.vocab
  assert vocab == vocab_lib.Vocab(
    size=49_408, pad=0, unk=49_407, cls=49_406, sep=49_407, mask=None
  )
  assert vocab.special == (0, 49_406, 49_407)
  assert hash(vocab) == hash(clip_bpe.Tokenizer(MERGES, length=9).vocab)


def test_it_says_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match="tokenizer.path='no'.*github.com/openai"):
    clip_bpe.Tokenizer("no", length=77)
  with pytest.raises(ValueError, match="tokenizer.length=2: want 3 or more"):
    clip_bpe.Tokenizer(MERGES, length=2)
  file = tmp_path / "merges.txt"
  file.write_text("title\ni n\nt h\n", "utf-8")
  with pytest.raises(ValueError, match="not CLIP's file of merges.*48894 lines"):
    clip_bpe.Tokenizer(str(file), length=77)
  whole = pathlib.Path(MERGES).read_bytes()
  file.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="damaged"):
    clip_bpe.Tokenizer(str(file), length=77)
  file.write_bytes(gzip.decompress(whole).replace(b"\xc3\xb5", b"~~"))
  with pytest.raises(ValueError, match="not CLIP's file of merges"):
    clip_bpe.Tokenizer(str(file), length=77)
