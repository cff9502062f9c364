"""Images alone: all of a folder, for `data.kinds.NAME.holds="images"`."""

import dataclasses
import functools
import pathlib

import numpy as np

ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Source:
  """Image files of a folder and of all folders in it (as ImageNet lies), by name.

  Attributes:
    path: of the folder, or several with commas between.
  """

  path: str

  def __post_init__(self):
    if not self._files:
      raise ValueError(
        f"config: source.path={self.path}: has no image ({', '.join(ENDINGS)})."
      )

  def __len__(self) -> int:
    return len(self._files)

  def read(self, indices: np.ndarray) -> list[dict]:
    """Raw examples without captions; see sources/__init__.py."""
    return [self._example(int(index)) for index in indices]

  def captions(self, indices: np.ndarray) -> list[str]:
    """None: images have none."""
    del indices
    return []

  def _example(self, index):
    file = self._files[index]
    example = {"image": b"", "captions": [], "image_id": index, "key": str(file)}
    try:
      example["image"] = file.read_bytes()
    except OSError:
      example["error"] = "file cannot be read"
    return example

  @functools.cached_property
  def _files(self):
    found = []
    for name in self.path.split(","):
      folder = pathlib.Path(name.strip())
      if not folder.is_dir():
        raise FileNotFoundError(
          f"config: source.path={folder}: no such folder; set"
          " --config.data.kinds.NAME.source.path=… to a folder of images."
        )
      found += sorted(f for f in folder.rglob("*") if f.suffix.lower() in ENDINGS)
    return found
