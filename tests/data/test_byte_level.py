"""RoBERTa's byte-level pieces: rows, odd texts, and what is said of wrong files."""

import json

import pytest
import tokenizers

from vlp_jax.data.tokenizers import byte_level

TEXTS = ["A small red circle left of a large blue square", "a star", "Café, naïve 🙂"]
# The order of roberta-base; <mask> is last there.
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("roberta")
  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator(
    TEXTS * 9, vocab_size=320, special_tokens=SPECIAL, show_progress=False
  )
  trained.save_model(str(path))
  return path


def test_rows_are_robertas(folder):
  tokenizer = byte_level.Tokenizer(str(folder), length=24)
  vocab = tokenizer.vocab
  assert (vocab.cls, vocab.pad, vocab.sep, vocab.unk, vocab.mask) == (0, 1, 2, 3, 4)
  assert vocab.size == len(json.loads((folder / "vocab.json").read_text("utf-8")))
  ids, mask = tokenizer.encode(TEXTS)
  files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
  own = tokenizers.ByteLevelBPETokenizer.from_file(*files)
  for row, seen, text in zip(ids, mask, TEXTS, strict=True):
    pieces = own.encode(text).ids[:22]
    assert row[seen].tolist() == [0, *pieces, 2]
    assert (row[~seen] == 1).all()
  assert tokenizer.decode(ids[1]) == "a star"
  short, full = byte_level.Tokenizer(str(folder), length=5).encode(TEXTS[:1])
  assert full.all() and short[0, -1] == 2


def test_no_text_is_unknown(folder):
  tokenizer = byte_level.Tokenizer(str(folder), length=64)
  ids, mask = tokenizer.encode(["Ünïcödé 漢字 🙃 <mask>"])
  assert tokenizer.vocab.unk not in ids[0][mask[0]]
  assert tokenizer.decode(ids[0]).strip() == "Ünïcödé 漢字 🙃"
  assert "<mask>" in tokenizer.pieces(ids[0])


def test_pieces_without_a_space_go_on_with_a_word(folder):
  tokenizer = byte_level.Tokenizer(str(folder), length=24)
  ids, _ = tokenizer.encode(["a xq"])
  inside = [i in tokenizer.vocab.continuation for i in ids[0]]
  # <s> "a" "Ġx" "q" </s>: the first word has no space before it.
  pieces = tokenizer.pieces(ids[0])
  for piece, within in zip(pieces, inside, strict=True):
    assert within == (piece not in SPECIAL and not piece.startswith("Ġ")), pieces


def test_it_says_what_is_wrong(folder, tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="vocab.json and merges.txt"):
    byte_level.Tokenizer(str(tmp_path), length=8)
  with pytest.raises(FileNotFoundError, match="no such folder"):
    byte_level.Tokenizer("./nowhere/at/all", length=8)
  monkeypatch.setattr(
    byte_level.huggingface_hub, "try_to_load_from_cache", lambda *_: None
  )
  with pytest.raises(FileNotFoundError, match="hf download FacebookAI/some-roberta"):
    byte_level.Tokenizer("some-roberta", length=8)
  (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text("utf-8"))
  for text, message in (("{", "JSON"), ('{"a": 0}', "there is no <pad>")):
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      byte_level.Tokenizer(str(tmp_path), length=8)
  with pytest.raises(ValueError, match="tokenizer.length=2"):
    byte_level.Tokenizer(str(folder), length=2)
