"""Data in order, each example once: what evaluators read. Needs no TensorFlow.

Shape letters: B batch, R side of the image, L text length.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from vlp_jax.data import columns as columns_lib
from vlp_jax.data import ops_image
from vlp_jax.data import pp as pp_lib
from vlp_jax.data import records


def eval_images(
  source: Any,
  pp: str,
  *,
  batch_size: int,
  workers: int | None = None,
  sizes: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Images in the source's order, the last batch filled up with its first row.

  Yields:
    image uint8 [B, R, R, 3], image_id int32 [B], example_index int32 [B] and valid bool
    [B], false for what fills up. With `sizes`, pp may pad: image_size int32 [B, 2].

  Raises:
    ValueError: a record is broken: an evaluation leaves none out by itself.
  """
  op = _parse(pp) if sizes else _parse_square(pp)

  def load(indices):
    rows = [_strict(r, records.image_of, op) for r in source.read(indices)]
    batch = {"image": records.stack(rows), **records.sizes(rows), **_ids(rows, indices)}
    return _filled(batch, batch_size)

  return _ahead(load, _chunks(source, batch_size), workers)


def eval_texts(
  source: Any, pp: str, tokenizer: Any, *, batch_size: int
) -> Iterator[dict[str, Any]]:
  """All captions of all examples, in order, those of one example together.

  Args:
    source, tokenizer, batch_size: as of `train_batches`.
    pp: its words on captions are applied, those on images are not.

  Yields:
    text int32 [B, L], text_mask bool [B, L], image_id int32 [B], example_index int32
    [B], valid bool [B], and caption, a list of B texts as the source has them.

  Raises:
    ValueError: a record is broken.
  """
  op = _parse(pp, pp_lib.parse_captions)
  captions, columns = [], []

  def batch():
    ids, mask = tokenizer.encode([caption for _, caption in captions[:batch_size]])
    image_id, index = np.array(columns[:batch_size], np.int32).T
    full = _filled(
      {"text": ids, "text_mask": mask, "image_id": image_id, "example_index": index},
      batch_size,
    )
    return full | {"caption": _fill([raw for raw, _ in captions], batch_size)}

  for indices in _chunks(source, batch_size):
    for index, raw in zip(indices, source.read(indices), strict=True):
      for caption in raw["captions"] or [""]:
        captions.append(_strict(raw, records.caption_of, caption, op))
        columns.append((raw["image_id"], index))
    while len(captions) >= batch_size:
      yield batch()
      del captions[:batch_size], columns[:batch_size]
  if captions:
    yield batch()


def eval_pairs(
  source: Any,
  pp: str,
  tokenizer: Any,
  *,
  batch_size: int,
  workers: int | None = None,
  columns: columns_lib.Columns | None = None,
  sizes: bool = False,
) -> Iterator[dict[str, Any]]:
  """Each example with its first caption: what `eval_images` and `eval_texts` yield.

  And the columns, if there are any.
  """
  op = _parse(pp) if sizes else _parse_square(pp)
  more = columns or columns_lib.Columns()

  def load(indices):
    raw = source.read(indices)
    first = [r["captions"][0] if r["captions"] else "" for r in raw]
    rows = [
      _strict(r, records.example_of, caption, op, np.random.default_rng(0))
      | _strict(r, more.example, op, np.random.default_rng(0))
      for r, caption in zip(raw, first, strict=True)
    ]
    ids, mask = tokenizer.encode([row["caption"] for row in rows])
    batch = {
      "image": records.stack(rows),
      "text": ids,
      "text_mask": mask,
      **records.sizes(rows),
    }
    batch |= more.batch(rows, tokenizer)
    batch = _filled(batch | _ids(rows, indices), batch_size)
    return batch | {"caption": _fill([records.text_of(c) for c in first], batch_size)}

  return _ahead(load, _chunks(source, batch_size), workers)


def _ahead(
  load: Callable[[np.ndarray], dict], chunks: Iterable[np.ndarray], workers: int | None
) -> Iterator[dict]:
  """`load` of each chunk in order, so many at once, and one that waits."""
  workers = workers or min(8, records.cores())
  with futures.ThreadPoolExecutor(workers) as pool:
    waiting = collections.deque()
    try:
      for chunk in chunks:
        waiting.append(pool.submit(load, chunk))
        if len(waiting) > workers:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def _parse_square(pp):
  """The op of a pp that leaves images whole."""
  if pp_lib.leaves_sizes(pp):
    raise ValueError(
      f"config: evaluation: pp={pp!r}: evaluators take images without padding: say"
      " resize(…) instead of fit(…)."
    )
  return _parse(pp)


def _parse(pp, parse=pp_lib.parse):
  """The op of a pp, in which no two images change places."""
  if pp_lib.swaps(pp):
    raise ValueError(
      f"config: evaluation: pp={pp!r}: swap_sides is for training: evaluators take two"
      " images as the data have them; leave it out."
    )
  return parse(pp)


def _chunks(source, batch_size):
  for start in range(0, len(source), batch_size):
    yield np.arange(start, min(start + batch_size, len(source)))


def _ids(rows, indices):
  ids = np.array([row["image_id"] for row in rows], np.int32)
  return {"image_id": ids, "example_index": indices.astype(np.int32)}


def _fill(values, batch_size):
  """The first `batch_size` of a list, or the list filled up with its first."""
  return (values + values[:1] * (batch_size - len(values)))[:batch_size]


def _filled(batch, batch_size):
  """The batch with its first row repeated to `batch_size`, and `valid`."""
  count = len(batch["image_id"])
  batch = {
    key: np.concatenate([value, np.repeat(value[:1], batch_size - count, axis=0)])
    for key, value in batch.items()
  }
  return batch | {"valid": np.arange(batch_size) < count}


def _strict(raw, function, *args):
  """`function(raw, *args)`, where a broken record is the user's error."""
  try:
    return function(raw, *args)
  except ops_image.BadRecordError as error:
    raise ValueError(
      f"evaluation: {raw['key']} is broken: {error}. An official protocol leaves no"
      " example out by itself: mend the record, or take it out of the data that the"
      " evaluation's data.source names."
    ) from error
