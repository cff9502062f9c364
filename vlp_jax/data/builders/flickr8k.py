"""Flickr8k (Hodosh, Young, Hockenmaier 2013, JAIR 47) from a folder on this machine.

The folder is either the official one (Flicker8k_Dataset/*.jpg beside Flickr8k_text/ or
the lists themselves) or holds the images in zip files: it is found by looking.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import zipfile

import numpy as np
import tensorflow_datasets as tfds

from vlp_jax.data.builders import prepare

# Our split: the official list.
LISTS = {
  "train": "Flickr_8k.trainImages.txt",
  "val": "Flickr_8k.devImages.txt",
  "test": "Flickr_8k.testImages.txt",
}
CAPTION_FILES = ("Flickr8k.token.txt", "captions.tsv")
CAPTION_LINE = re.compile(rb"(?P<image>[^\t]+)#(?P<number>\d+)\t(?P<caption>.*)")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the bytes of an image are: a file, or a member of a zip file."""

  file: pathlib.Path
  member: str | None
  stamp: str  # changes when the bytes do


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder that was found complete.

  Attributes:
    splits: image names of each of our splits, in the order of the official lists.
    captions: of each listed image, in the order of their numbers, as bytes.
    images: the place of each listed image.
  """

  splits: dict[str, list[str]]
  captions: dict[str, list[bytes]]
  images: dict[str, Place]

  def fingerprint(self) -> str:
    """Eight letters that change with the lists, the captions and the images."""
    digest = hashlib.blake2b(digest_size=4)
    for split, names in self.splits.items():
      for name in names:
        digest.update(
          repr((split, name, self.captions[name], self.images[name].stamp)).encode()
        )
    return digest.hexdigest()


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The official 6,000 / 1,000 / 1,000 images with their captions; JPEG bytes as is.

  Args:
    data_dir: where prepared data go, to `data_dir/flickr8k/FINGERPRINT/VERSION`: a
      source folder that changes is prepared anew.
    source_dir: the folder to read.

  Raises:
    FileNotFoundError, ValueError: source_dir, a list or an image is not there, or a
      line does not parse; each names the file and what to do.
  """

  name = "flickr8k"
  VERSION = tfds.core.Version("1.0.0")
  url_infos = prepare.NO_DOWNLOADS

  def __init__(self, *, data_dir: str, source_dir: str):
    self._folder = look(source_dir)
    config = tfds.core.BuilderConfig(name=self._folder.fingerprint())
    super().__init__(data_dir=data_dir, config=config)

  def _info(self) -> tfds.core.DatasetInfo:
    return prepare.Info(
      builder=self,
      description="Flickr8k: photographs, each described by five people.",
      homepage="https://www.jair.org/index.php/jair/article/view/10833",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
          "captions": tfds.features.Sequence(tfds.features.Text()),
          "image_id": tfds.features.Scalar(np.int32),
          "key": tfds.features.Text(),
        }
      ),
      disable_shuffling=True,  # the lists' order
    )

  def _split_generators(self, dl_manager):
    first = 0
    generators = {}
    for split, names in self._folder.splits.items():
      generators[split] = self._generate_examples(names, first)
      first += len(names)  # an image_id belongs to one image of all splits
    return generators

  def _generate_examples(self, names, first):
    with contextlib.ExitStack() as stack:
      archives = {}
      for index, name in enumerate(names):
        place = self._folder.images[name]
        if place.member is None:
          image = place.file.read_bytes()
        else:
          if place.file not in archives:
            archives[place.file] = stack.enter_context(zipfile.ZipFile(place.file))
          image = archives[place.file].read(place.member)
        yield (
          index,
          {
            "image": image,
            "captions": self._folder.captions[name],
            "image_id": first + index,
            "key": name,
          },
        )


def look(source_dir: str | os.PathLike) -> Folder:
  """Finds lists, captions and images below a folder, and checks that all is there."""
  root = pathlib.Path(source_dir)
  if not root.is_dir():
    raise FileNotFoundError(
      f"source_dir={str(root)!r}: no such folder. Give the folder of Flickr8k, that"
      f" holds {LISTS['train']}, {CAPTION_FILES[0]} and the images."
    )
  splits = _splits(root)
  listed = [name for names in splits.values() for name in names]
  captions = _captions(_find(root, CAPTION_FILES), set(listed))
  images = _images(root, listed)
  for name in listed:
    if not captions[name]:
      raise ValueError(
        f"image {name} is in a list of {root}, but"
        f" {_find(root, CAPTION_FILES)} has no caption of it."
      )
  return Folder(splits, captions, images)


def _find(root, names) -> pathlib.Path:
  """The file of one of these names in the folder, or in a folder of it."""
  for name in names:
    for file in (root / name, *sorted(root.glob(f"*/{name}"))):
      if file.is_file():
        return file
  raise FileNotFoundError(
    f"no {' or '.join(names)} in {root} or a folder of it. It is part of"
    " Flickr8k_text.zip."
  )


def _splits(root) -> dict[str, list[str]]:
  split_of = {}
  splits = {}
  for split, list_name in LISTS.items():
    file = _find(root, (list_name,))
    try:
      lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
      raise ValueError(f"{file} is not a list of image names: {error}") from error
    splits[split] = [line.strip() for line in lines if line.strip()]
    if not splits[split]:
      raise ValueError(f"{file} names no image.")
    for name in splits[split]:
      if name in split_of:
        raise ValueError(
          f"{file}: image {name} stands there twice, or in the list of"
          f" {split_of[name]} too: an image belongs to one split, once."
        )
      split_of[name] = split
  return splits


def _captions(file, listed) -> dict[str, list[bytes]]:
  """Captions of the listed images, as bytes: who reads them judges whether UTF-8."""
  numbered = collections.defaultdict(dict)
  for at, line in enumerate(file.read_bytes().splitlines(), start=1):
    if not line.strip():
      continue
    match = CAPTION_LINE.fullmatch(line)
    if match is None:
      raise ValueError(
        f"{file}, line {at}: want `image.jpg#number<TAB>caption`, found"
        f" {line[:80].decode('utf-8', 'replace')!r}."
      )
    name = match["image"].decode("utf-8", "replace")
    if name not in listed:
      continue  # the official file describes 91 images of no split
    number = int(match["number"])
    if number in numbered[name]:
      raise ValueError(f"{file}, line {at}: a second caption {name}#{number}.")
    numbered[name][number] = match["caption"].strip()
  return {
    name: [numbered[name][k] for k in sorted(numbered.get(name, ()))] for name in listed
  }


def _images(root, listed) -> dict[str, Place]:
  """The first folder of loose images, or of zip files, with all listed images."""
  best, most = {}, -1
  for places in _candidates(root):
    count = sum(name in places for name in listed)
    if count == len(listed):
      return {name: places[name] for name in listed}
    if count > most:
      best, most = places, count
  if most <= 0:
    raise FileNotFoundError(
      f"none of the {len(listed)} listed images is in {root}: want them in a folder"
      " there (Flicker8k_Dataset/*.jpg), or in zip files."
    )
  missing = next(name for name in listed if name not in best)
  at = next(iter(best.values())).file.parent
  raise FileNotFoundError(
    f"image {missing} is in a list of {root}, but not in {at} ({most} of"
    f" {len(listed)} listed images are there)."
  )


def _candidates(root):
  """Yields {image name: Place} of each folder, loose images before zipped ones."""
  folders = [pathlib.Path(folder) for folder, _, _ in os.walk(root)]
  folders.sort(key=lambda folder: (len(folder.parts), folder))
  for folder in folders:
    with os.scandir(folder) as entries:
      found = {
        entry.name: Place(folder / entry.name, None, _stamp(entry.stat()))
        for entry in entries
        if entry.name.lower().endswith((".jpg", ".jpeg")) and entry.is_file()
      }
    if found:
      yield found
  for folder in folders:
    found = {}
    for file in sorted(folder.glob("*.zip")):
      try:
        with zipfile.ZipFile(file) as archive:
          members = archive.infolist()
      except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is not a zip file: {error}") from error
      for member in members:
        name = pathlib.PurePosixPath(member.filename).name
        # The official archive carries a Mac's folder of ._NAME.jpg, no images.
        if name.lower().endswith((".jpg", ".jpeg")) and not name.startswith("._"):
          stamp = f"{member.file_size} {member.CRC}"
          found.setdefault(name, Place(file, member.filename, stamp))
    if found:
      yield found


def _stamp(stat) -> str:
  return f"{stat.st_size} {stat.st_mtime_ns}"
