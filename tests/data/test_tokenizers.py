"""Tokenizers against what the libraries and ALBEF's official code give."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tokenizers

from vlp_jax.data import vocab as vocab_lib
from vlp_jax.data.tokenizers import sentencepiece
from vlp_jax.data.tokenizers import wordpiece

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "tokenizers"
CAPTIONS = [
  f"a {size} {colour} {shape} {place}"
  for size in ("small", "large")
  for colour in ("red", "green", "blue", "Café-brown")
  for shape in ("circle", "square", "star")
  for place in ("on the left", "on the right", "in the middle")
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  """(vocabulary file, cases) of a small part of BERT's uncased vocabulary."""
  reference = json.loads((REFERENCE / "bert_cases.json").read_text("utf-8"))
  file = tmp_path_factory.mktemp("bert") / "vocab.txt"
  file.write_text("\n".join(reference["vocab"]) + "\n", "utf-8")
  return str(file), reference["cases"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "words.model"
  return sentencepiece.train(CAPTIONS, path, vocab_size=160, model_type="bpe")


def row(ids, mask):
  """The ids of the first row that are not padding."""
  return ids[0][mask[0]].tolist()


# --- WordPiece ------------------------------------------------------------------------


# The texts behind ids of other references, which have ALBEF's vocabulary.
PAIRS = (
  "a man riding a brown horse on the beach",
  "two dogs playing in the snow near a red car",
  "the young woman is eating",
  "a large green train standing in a field next to people walking",
)
QUESTIONS = (
  "what is the man riding",
  "where are the dogs",
  "is the woman eating",
  "how many people are walking near the train",
)


@pytest.mark.parametrize(
  "name, texts, sep, first",
  [
    ("vilt/text_ids", PAIRS, True, 101),
    ("albef_vqa/question_ids", QUESTIONS, False, 101),
    ("blip_vqa/question_ids", QUESTIONS, True, 201),  # [ENC] in front
  ],
)
def test_the_ids_that_official_models_were_given(name, texts, sep, first):
  folder, _, key = name.partition("/")
  want = np.load(REFERENCE.parent / folder / "inputs.npz")[key]
  path = str(REFERENCE / "albef_vocab.txt")
  ids, _ = wordpiece.Tokenizer(path, length=want.shape[1], sep=sep).encode(list(texts))
  np.testing.assert_array_equal(ids[:, 1:], want[:, 1:])
  assert (want[:, 0] == first).all()


def test_wordpiece_gives_the_ids_of_the_official_albef_tokenizer():
  path = str(REFERENCE / "albef_vocab.txt")
  tokenizer = wordpiece.Tokenizer(path, length=25, sep=False)
  cases = json.loads((REFERENCE / "albef_cases.json").read_text("utf-8"))
  for case in cases:
    assert row(*tokenizer.encode([case["text"]])) == case["input_ids"], case["text"]
  ids, mask = tokenizer.encode([case["text"] for case in cases])
  assert ids.dtype == np.int32 and mask.dtype == bool
  assert ids.shape == mask.shape == (len(cases), 25)
  assert (ids[~mask] == tokenizer.vocab.pad).all()
  vocab = tokenizer.vocab
  assert (vocab.size, vocab.pad, vocab.unk, vocab.cls, vocab.sep, vocab.mask) == (
    (200, 0, 100, 101, 102, 103)
  )


def test_wordpiece_splits_odd_texts_as_bert(bert):
  path, cases = bert
  tokenizer = wordpiece.Tokenizer(path, length=64, sep=False)
  for case in cases:
    ids = row(*tokenizer.encode([case["text"]]))
    assert tokenizer.pieces(ids[1:]) == case["pieces"], case["text"]


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
  "text",
  [
    "ÀÉÎ naïve",
    "猫 a cat狗",
    "tabs\tand\nlines",
    "zero\u200bwidth",
    "\x00",
    "a [MASK] cat",
  ],
)
def test_wordpiece_is_berts(text, lower, tmp_path):
  words = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a cat naive ae ##i 猫 狗 tabs and lines".split()
  )
  words += ["zero", "##width", "À", "##ÉÎ", "na", "##ï", "##ve", "zerowidth"]
  file = tmp_path / "vocab.txt"
  file.write_text("\n".join(words), "utf-8")
  tokenizer = wordpiece.Tokenizer(str(file), length=20, lower=lower)
  theirs = tokenizers.BertWordPieceTokenizer(str(file), lowercase=lower)
  assert row(*tokenizer.encode([text])) == theirs.encode(text).ids


def test_wordpiece_knows_what_continues_a_word(bert):
  tokenizer = wordpiece.Tokenizer(bert[0], length=30)
  pieces = tokenizer.pieces(np.arange(tokenizer.vocab.size))
  assert tokenizer.vocab.continuation == tuple(
    i for i, piece in enumerate(pieces) if piece.startswith("##")
  )
  ids, _ = tokenizer.encode(["unbelievably 3,000 people"])
  assert tokenizer.decode(ids[0]) == "unbelievably 3, 000 people"


def test_a_name_is_looked_up_in_the_cache(bert, tmp_path, monkeypatch):
  def cached(name, file):
    assert file == "vocab.txt"
    return bert[0] if name == "google-bert/some-bert" else None

  monkeypatch.setattr(wordpiece.huggingface_hub, "try_to_load_from_cache", cached)
  assert wordpiece.Tokenizer("some-bert", length=5).vocab.mask == 4
  with pytest.raises(FileNotFoundError, match=r"tokenizer.path='other'.*hf download"):
    wordpiece.Tokenizer("other", length=5)
  folder = pathlib.Path(bert[0]).parent
  assert wordpiece.Tokenizer(str(folder), length=5).vocab.mask == 4


def test_wordpiece_says_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match="tokenizer.path.*no such vocabulary"):
    wordpiece.Tokenizer(str(tmp_path / "none.txt"), length=5)
  file = tmp_path / "vocab.txt"
  file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
  with pytest.raises(ValueError, match=r"vocab.txt' is not .* no \[MASK\]"):
    wordpiece.Tokenizer(str(file), length=5)
  file.write_bytes(b"\xff\xfe\x00[PAD]")
  with pytest.raises(ValueError, match="vocab.txt' is not a WordPiece vocabulary"):
    wordpiece.Tokenizer(str(file), length=5)


# --- SentencePiece --------------------------------------------------------------------


def test_sentencepiece_round_trip(model):
  tokenizer = sentencepiece.Tokenizer(model, length=24)
  texts = ["A small RED circle on the left", "a large blue star", ""]
  ids, mask = tokenizer.encode(texts)
  assert ids.shape == mask.shape == (3, 24)
  assert ids.dtype == np.int32 and mask.dtype == bool
  assert [tokenizer.decode(i) for i in ids] == [text.lower() for text in texts]
  assert tokenizer.pieces(ids[1])[:3] == ["[CLS]", "▁a", "▁large"]
  assert row(ids[2:], mask[2:]) == [tokenizer.vocab.cls, tokenizer.vocab.sep]
  assert tokenizer.pieces(np.arange(5)) == "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
  assert tokenizer.vocab.special == (0, 2, 3, 4)


def test_text_cannot_spell_a_special_piece(model):
  tokenizer = sentencepiece.Tokenizer(model, length=40, lower=False)
  ids, mask = tokenizer.encode(["[MASK] [PAD]<pad></s>"])
  assert not set(row(ids, mask)[1:-1]) & set(tokenizer.vocab.special)


def test_sentencepiece_knows_what_continues_a_word(model):
  tokenizer = sentencepiece.Tokenizer(model, length=40)
  ids, mask = tokenizer.encode(["a large starcircle"])
  continues = np.isin(ids[0], tokenizer.vocab.continuation)[mask[0]]
  pieces = tokenizer.pieces(ids[0][mask[0]])
  assert any(continues)
  for piece, continued in zip(pieces, continues, strict=True):
    assert continued == (not piece.startswith(("▁", "[")))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_deterministic(model_type, tmp_path):
  kwargs = dict(vocab_size=60, model_type=model_type)
  first = sentencepiece.train(CAPTIONS, tmp_path / "a" / "x.model", **kwargs)
  second = sentencepiece.train(CAPTIONS[::-1], tmp_path / "y.model", **kwargs)
  assert pathlib.Path(first).read_bytes() == pathlib.Path(second).read_bytes()
  # Nothing but the model is left behind.
  assert [file.name for file in (tmp_path / "a").iterdir()] == ["x.model"]


def test_a_model_without_our_pieces_gets_them_after_its_own(tmp_path):
  file = tmp_path / "t5.model"
  library = sentencepiece.sentencepiece
  with file.open("wb") as writer:
    library.SentencePieceTrainer.train(
      sentence_iterator=iter(CAPTIONS),
      model_writer=writer,
      vocab_size=60,
      hard_vocab_limit=False,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      pad_piece="<pad>",
      minloglevel=2,
    )
  own = library.SentencePieceProcessor(model_file=str(file))
  tokenizer = sentencepiece.Tokenizer(str(file), length=30, lower=False)
  vocab = tokenizer.vocab
  assert (vocab.pad, vocab.sep, vocab.unk) == (0, 1, 2)
  assert (vocab.cls, vocab.mask) == (own.get_piece_size(), own.get_piece_size() + 1)
  assert vocab.size == own.get_piece_size() + 2
  text = "a large green square"
  ids, mask = tokenizer.encode([text])
  assert row(ids, mask) == [vocab.cls, *own.encode(text), vocab.sep]
  assert tokenizer.decode(ids[0]) == text
  assert tokenizer.pieces([vocab.mask]) == ["[MASK]"]
  # SigLIP's rows have no other pieces than the model's own, and </s> to the end.
  siglip = dataclasses.replace(tokenizer, rows="siglip")
  assert siglip.vocab.size == own.get_piece_size()
  ids, mask = siglip.encode([text, text * 9])
  spelled = own.encode(text)
  assert ids[0].tolist() == spelled + [1] * (30 - len(spelled))
  assert row(ids, mask) == [*spelled, 1] and ids[1, -1] == 1 and mask[1].all()
  assert siglip.decode(ids[0]) == text
  assert siglip.pieces(ids[0, -1:]) == ["[SEP]"]


def test_siglip_rows_want_an_end(model):
  with pytest.raises(ValueError, match="leave sep=True"):
    sentencepiece.Tokenizer(model, length=5, sep=False, rows="siglip")


def test_sentencepiece_says_what_is_wrong(tmp_path, capfd):
  with pytest.raises(FileNotFoundError, match="tokenizer.path=.*train"):
    sentencepiece.Tokenizer(str(tmp_path / "none.model"), length=5)
  file = tmp_path / "x.model"
  for content in (b"", b"these are only words\n", b"\x00" * 64):
    file.write_bytes(content)
    with pytest.raises(ValueError, match="x.model' is not a SentencePiece model"):
      sentencepiece.Tokenizer(str(file), length=5)
  with pytest.raises(ValueError, match="no captions"):
    sentencepiece.train(["", " "], file, vocab_size=50)
  with pytest.raises(ValueError, match="vocab_size=8 from 72 captions"):
    sentencepiece.train(CAPTIONS, file, vocab_size=8)
  with pytest.raises(ValueError, match='model_type="word"'):
    sentencepiece.train(CAPTIONS, file, vocab_size=50, model_type="word")


# --- Both -----------------------------------------------------------------------------


@pytest.fixture(params=["wordpiece", "sentencepiece"])
def either(request, bert, model):
  """(class, path) of one of the two."""
  if request.param == "wordpiece":
    return wordpiece.Tokenizer, str(REFERENCE / "albef_vocab.txt")
  return sentencepiece.Tokenizer, model


def test_truncation_keeps_the_last_sep(either):
  make, path = either
  text = ["a red car on the beach " * 9]
  full = make(path, length=200).encode(text)
  ids, mask = make(path, length=8).encode(text)
  assert mask.all()
  assert ids[0, :7].tolist() == full[0][0, :7].tolist()
  assert ids[0, 7] == make(path, length=8).vocab.sep
  ids, mask = make(path, length=8, sep=False).encode(text)
  assert ids[0].tolist() == full[0][0, :8].tolist()


def test_length_has_room_for_a_piece(either):
  make, path = either
  with pytest.raises(ValueError, match="tokenizer.length=2: want 3"):
    make(path, length=2)
  with pytest.raises(ValueError, match="tokenizer.length=1: want 2"):
    make(path, length=1, sep=False)


def test_tokenizers_and_vocabularies_are_values(either):
  make, path = either
  one, two = make(path, length=8), make(path, length=8)
  assert one == two and hash(one) == hash(two) and one != make(path, length=9)
  assert one.vocab == two.vocab and hash(one.vocab) == hash(two.vocab)
  want = dict(path=path, length=8, lower=True, sep=True)
  assert want.items() <= dataclasses.asdict(one).items()


def test_a_batch_is_its_rows(either):
  make, path = either
  tokenizer = make(path, length=12)
  texts = ["cafe people", "", "two dogs playing in the snow near a red car", "🙂"]
  ids, mask = tokenizer.encode(texts)
  for i, text in enumerate(texts):
    alone, alone_mask = tokenizer.encode([text])
    assert (alone[0] == ids[i]).all() and (alone_mask[0] == mask[i]).all()
  assert tokenizer.encode([])[0].shape == (0, 12)


def test_pack():
  vocab = vocab_lib.Vocab(size=9, pad=0, unk=1, cls=2, sep=3, mask=4)
  ids, mask = vocab_lib.pack([[5, 6], [], [5, 6, 7, 8]], vocab, length=4, sep=True)
  assert ids.tolist() == [[2, 5, 6, 3], [2, 3, 0, 0], [2, 5, 6, 3]]
  assert mask.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]


def test_wordpiece_with_the_ids_of_roles(bert):
  """BLIP's [DEC] and [ENC] stand behind the file's pieces; texts are as without."""
  path, _ = bert
  plain = wordpiece.Tokenizer(path, length=12)
  roles = wordpiece.Tokenizer(path, length=12, roles=True)
  size = plain.vocab.size
  assert (plain.vocab.dec, plain.vocab.enc) == (None, None)
  assert (roles.vocab.dec, roles.vocab.enc) == (size, size + 1)
  assert roles.vocab.size == size + 2
  assert {size, size + 1} <= set(roles.vocab.special)
  for a, b in zip(
    plain.encode(["cafe people"]), roles.encode(["cafe people"]), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert roles.pieces(np.array([size, size + 1])) == ["[DEC]", "[ENC]"]
  assert (
    roles.decode(np.array([size, *row(*roles.encode(["cafe people"]))]))
    == "cafe people"
  )
