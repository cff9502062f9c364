"""Decodes whole JPEGs that lie in memory, by libjpeg-turbo, and nothing else."""

import collections
from concurrent import futures
import importlib.metadata

import simplejpeg

from vlp_jax import memory
from vlp_jax.bench.readers import work as work_lib


def main() -> None:
  work = work_lib.said()
  memory.keep_images()
  files = [file.read_bytes() for file in work.files]
  starts = range(0, len(files), work.batch_size)
  chunks = [files[i : i + work.batch_size] for i in starts]

  def decode(chunk):
    for data in chunk:
      simplejpeg.decode_jpeg(data, "RGB")
    return chunk

  endless = work_lib.forever(lambda: chunks)
  if work.workers == 1:
    batches = map(decode, endless)
  else:
    batches = _side_by_side(decode, endless, work.workers)
  version = importlib.metadata.version("simplejpeg")
  work_lib.serve(work, batches, simplejpeg=version)


def _side_by_side(decode, chunks, workers):
  """So many at once, and one that waits: what is ahead is less than `work.AHEAD`."""
  with futures.ThreadPoolExecutor(workers) as pool:
    waiting = collections.deque()
    for chunk in chunks:
      waiting.append(pool.submit(decode, chunk))
      if len(waiting) > workers:
        yield waiting.popleft().result()


if __name__ == "__main__":
  main()
