"""Small picture files, whole and broken, a source that holds them, and a tokenizer."""

import dataclasses
import io
import struct
import zlib

import numpy as np
from PIL import Image


def pixels(height=40, width=56, seed=0):
  """uint8 [H, W, 3]: smooth, so that JPEG keeps it, and different for every seed."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
  return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind="PNG", mode="RGB", **fields):
  """The bytes of a file."""
  file = io.BytesIO()
  Image.fromarray(image).convert(mode).save(file, kind, **fields)
  return file.getvalue()


def bomb(side=50_000):
  """A PNG whose header says side x side, with nothing behind it."""
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  chunk = struct.pack(">I", len(header)) + b"IHDR" + header
  return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + header))


def wide_jpeg(width=50_000):
  """A JPEG whose header says that it is so wide; its data are those of 16 pixels."""
  data = bytearray(encoded(pixels(16, 16), "JPEG"))
  at = data.index(b"\xff\xc0") + 7
  data[at : at + 2] = struct.pack(">H", width)
  return bytes(data)


@dataclasses.dataclass(frozen=True)
class Source:
  """Records in memory: (image bytes, captions) each; counts what is read."""

  records: tuple

  def __len__(self):
    return len(self.records)

  def read(self, indices):
    return [self._example(int(i)) for i in indices]

  def captions(self, indices):
    return [text for i in indices for text in self.records[int(i)][1]]

  def _example(self, index):
    image, captions = self.records[index]
    return dict(image=image, captions=captions, image_id=index, key=f"pic{index}.jpg")


def source(count, *, captions=1, broken=None):
  """`count` pictures with texts "i0 of 3", "i1 of 3"…; `broken` {index: record}."""
  records = []
  for index in range(count):
    texts = [f"c{k} of {index}" for k in range(captions)]
    records.append((encoded(pixels(24, 32, index)), texts))
  for index, record in (broken or {}).items():
    records[index] = record
  return Source(tuple(records))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Characters are tokens, 0 is padding."""

  length: int = 16

  def encode(self, texts):
    ids = np.zeros((len(texts), self.length), np.int32)
    for row, text in zip(ids, texts, strict=True):
      codes = [ord(letter) for letter in text[: self.length]]
      row[: len(codes)] = codes
    return ids, ids > 0

  def decode(self, ids):
    return "".join(chr(i) for i in ids if i)
