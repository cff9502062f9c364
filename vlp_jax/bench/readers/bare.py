"""Decodes whole JPEGs that lie in memory, by libjpeg-turbo, and nothing else."""

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

  pool = futures.ThreadPoolExecutor(work.workers)
  run = map if work.workers == 1 else pool.map
  version = importlib.metadata.version("simplejpeg")
  batches = work_lib.forever(lambda: run(decode, chunks))
  work_lib.serve(work, batches, simplejpeg=version)


if __name__ == "__main__":
  main()
