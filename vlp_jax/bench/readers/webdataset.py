"""webdataset from a .tar, Pillow and torchvision's transforms."""

import torch
import webdataset

from vlp_jax.bench.readers import torch_loader
from vlp_jax.bench.readers import work as work_lib


def main() -> None:
  work = work_lib.said()
  torch.set_num_threads(1)
  transform = torch_loader.transform(work.res)
  # The one .tar is named once for each worker, so that all have something to read.
  shards = [f"{work.folder}/images.tar"] * max(1, work.workers)
  data = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None)
  data = data.shuffle(100).decode("pil").to_tuple("jpg").map_tuple(transform)
  data = data.batched(work.batch_size, partial=False)
  loader = webdataset.WebLoader(
    data, batch_size=None, num_workers=work.workers if work.workers > 1 else 0
  )
  images = (batch for (batch,) in work_lib.forever(lambda: loader))
  work_lib.serve(work, images, webdataset=webdataset.__version__)


if __name__ == "__main__":
  main()
