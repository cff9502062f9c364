"""SentencePiece from a model file (Kudo and Richardson 2018), and training one."""

from collections.abc import Iterable
import dataclasses
import functools
import io
import os
import pathlib
from typing import Literal

import numpy as np
import sentencepiece

from vlp_jax.data import vocab as vocab_lib

# How models that others trained call the special pieces; ours come first.
NAMES = {
  "pad": ("[PAD]", "<pad>"),
  "cls": ("[CLS]", "<s>"),
  "sep": ("[SEP]", "</s>"),
  "mask": ("[MASK]", "<mask>"),
}
SPACE = "\u2581"  # stands for the blank before a word


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Ids of a SentencePiece model.

  A model that was trained elsewhere may lack special pieces (T5's has no [CLS] and no
  [MASK]): those get the ids after the model's own, and `vocab.size` grows by them.

  Attributes:
    path: the `.model` file.
    length: of a row of ids.
    lower: lower-cases the text first, whatever the model's own normalisation does.
    sep: ends a row with [SEP].
    rows: "bert" is [CLS] pieces [SEP] [PAD]…; "siglip" is pieces </s> </s>…, of the
      model's own pieces alone (big_vision's tokenize(eos="sticky", pad_value=1)).
  """

  path: str
  length: int
  lower: bool = True
  sep: bool = True
  rows: Literal["bert", "siglip"] = "bert"

  def __post_init__(self):
    if self.rows == "siglip" and not self.sep:
      raise ValueError('tokenizer: rows="siglip" ends with </s>: leave sep=True.')
    vocab_lib.check_length(self.length, sep=self.sep)
    _ = self.vocab  # a wrong file is told now, not at the first batch

  @functools.cached_property
  def _model(self):
    if not os.path.isfile(self.path):
      raise FileNotFoundError(
        f"tokenizer.path={self.path!r}: no such SentencePiece model. Give the path of"
        " a .model file, or train one with"
        " vlp_jax.data.tokenizers.sentencepiece.train(captions, path, vocab_size=…)."
      )
    model = sentencepiece.SentencePieceProcessor()
    try:
      loaded = model.LoadFromSerializedProto(pathlib.Path(self.path).read_bytes())
    except (RuntimeError, OSError) as error:
      raise ValueError(
        f"tokenizer.path={self.path!r} is not a SentencePiece model: {error}"
      ) from error
    if not loaded or not model.get_piece_size():
      raise ValueError(f"tokenizer.path={self.path!r} is not a SentencePiece model.")
    return model

  @functools.cached_property
  def vocab(self) -> vocab_lib.Vocab:
    """Size and special ids."""
    model = self._model
    size = own = model.get_piece_size()
    ids = {}
    for special, names in NAMES.items():
      known = [model.piece_to_id(name) for name in names]
      # An unknown piece has the id of <unk>; one of text is no special piece.
      known = [
        i for i in known if i != model.unk_id() and _stands_for_no_text(model, i)
      ]
      if known:
        ids[special] = known[0]
      else:
        ids[special] = size
        size += 1
    continuation = tuple(
      i
      for i in range(own)
      if not model.id_to_piece(i).startswith(SPACE)
      and i != model.unk_id()
      and not _stands_for_no_text(model, i)
    )
    if self.rows == "siglip":
      if ids["sep"] >= own:
        raise ValueError(
          f"tokenizer.path={self.path!r} has no piece </s>, which ends and fills the"
          ' rows of rows="siglip".'
        )
      end = ids["sep"]
      size, ids = own, dict(pad=end, cls=end, sep=end, mask=None)
    return vocab_lib.Vocab(
      size=size, unk=model.unk_id(), continuation=continuation, **ids
    )

  def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """n texts -> (ids int32 [n, length], mask bool [n, length])."""
    if self.lower:
      texts = [text.lower() for text in texts]
    # One thread: a batch of captions is done before others would have started.
    rows = self._model.encode(list(texts), out_type=int, num_threads=1)
    return vocab_lib.pack(
      rows, self.vocab, length=self.length, sep=self.sep, cls=self.rows == "bert"
    )

  def decode(self, ids: np.ndarray) -> str:
    """The text of one row of ids, without special pieces."""
    special = self.vocab.special
    return self._model.decode([int(i) for i in ids if int(i) not in special])

  def pieces(self, ids: np.ndarray) -> list[str]:
    """The piece of every id of one row, special ones as [PAD], [CLS], [SEP], [MASK]."""
    vocab = self.vocab
    names = {getattr(vocab, name): f"[{name.upper()}]" for name in NAMES}
    names = {i: name for i, name in names.items() if i is not None}
    names[vocab.unk] = "[UNK]"
    return [names.get(i) or self._model.id_to_piece(i) for i in map(int, ids)]


def _stands_for_no_text(model, index) -> bool:
  """Whether a piece is a control symbol, or one that its maker declared."""
  # ALBERT's [CLS], [SEP] and [MASK] are of the first kind, others' of the second;
  # a control symbol never comes out of text.
  piece = model.id_to_piece(index)
  named = any(piece in names for names in NAMES.values())
  return model.is_control(index) or named


def train(
  captions: Iterable[str],
  path: str | os.PathLike,
  *,
  vocab_size: int,
  model_type: Literal["unigram", "bpe"] = "unigram",
  lower: bool = True,
  seed: int = 0,
) -> str:
  """Trains a model on captions and writes it to `path`; returns the path.

  The same captions in any order give the same file. The file appears whole or not at
  all. Special pieces: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, none of which text
  can spell.

  Args:
    captions: the training texts.
    path: the `.model` file to write; its folder is made.
    vocab_size: pieces with the special ones. A limit: few captions have fewer.
    model_type: "unigram" or "bpe".
    lower: as the field of the Tokenizer that will use it.
    seed: of SentencePiece's own generator.

  Raises:
    ValueError: there are no captions, or vocab_size is too small for their letters.
  """
  if model_type not in ("unigram", "bpe"):
    raise ValueError(f'model_type="{model_type}": want "unigram" or "bpe".')
  texts = sorted(text.lower() if lower else text for text in captions)
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise ValueError(f"no captions to train the tokenizer {str(path)!r} on.")
  sentencepiece.set_random_generator_seed(seed)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=model,
      vocab_size=vocab_size,
      model_type=model_type,
      hard_vocab_limit=False,
      character_coverage=1.0,
      num_threads=1,
      shuffle_input_sentence=False,
      pad_id=0,
      unk_id=1,
      bos_id=2,
      eos_id=3,
      pad_piece="[PAD]",
      unk_piece="[UNK]",
      bos_piece="[CLS]",
      eos_piece="[SEP]",
      control_symbols=["[MASK]"],
      minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    raise ValueError(
      f"tokenizer of vocab_size={vocab_size} from {len(texts)} captions: {error}"
    ) from error
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
  return str(path)
