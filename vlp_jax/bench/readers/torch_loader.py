"""PyTorch's DataLoader, torchvision's transforms and Pillow."""

from PIL import Image
import torch
import torchvision
from torchvision.transforms import v2

from vlp_jax.bench.readers import work as work_lib


def transform(res: int) -> v2.Compose:
  """ALBEF's and CLIP's; to uint8, which is the least work."""
  return v2.Compose(
    [
      v2.RandomResizedCrop(
        res, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC
      ),
      v2.RandomHorizontalFlip(),
      v2.PILToTensor(),
    ]
  )


class Files(torch.utils.data.Dataset):
  """The files of a folder."""

  def __init__(self, work):
    self.files, self.transform = work.files, transform(work.res)

  def __len__(self):
    return len(self.files)

  def __getitem__(self, index):
    with Image.open(self.files[index]) as image:
      return self.transform(image.convert("RGB"))


def main() -> None:
  work = work_lib.said()
  torch.set_num_threads(1)
  loader = torch.utils.data.DataLoader(
    Files(work),
    work.batch_size,
    shuffle=True,
    drop_last=True,
    # One worker: in the process itself, which saves the copy to another.
    num_workers=work.workers if work.workers > 1 else 0,
    persistent_workers=work.workers > 1,
  )
  about = {"torch": torch.__version__, "torchvision": torchvision.__version__}
  work_lib.serve(work, work_lib.forever(lambda: loader), **about)


if __name__ == "__main__":
  main()
