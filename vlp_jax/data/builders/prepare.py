"""Writes a data set to disk once: quiet, offline, and whole or not at all."""

import contextlib
import fcntl
import io
import os
import pathlib
import shutil
import tempfile

from absl import logging
import tensorflow_datasets as tfds

FILE_FORMAT = "array_record"
# A builder's `url_infos`: TFDS 4.9.10 would look for a list of checksums by means of
# importlib_resources, which it does not install.
NO_DOWNLOADS = {}


class Info(tfds.core.DatasetInfo):
  """A DatasetInfo that never asks the network."""

  def initialize_from_bucket(self) -> None:
    """Nothing: TFDS looks its name up in a public bucket, ours is not there."""


def prepare(
  builder_class: type[tfds.core.GeneratorBasedBuilder],
  *,
  data_dir: str | os.PathLike,
  progress: bool = False,
  **fields,
) -> tfds.core.GeneratorBasedBuilder:
  """The builder with its data on disk, written now if they are not there yet.

  TFDS writes to an incomplete folder and renames it, so that what has the final name
  is whole. What a killed run has left is removed by the next one; of two processes
  that prepare the same data, the second waits for the first.

  Args:
    builder_class: a `Builder` of this folder.
    data_dir: the data come to `data_dir/NAME/CONFIG/VERSION`.
    progress: shows TFDS's bars and messages.
    **fields: of the builder.
  """
  with _quiet(not progress):
    builder = builder_class(data_dir=data_dir, **fields)
    if builder.data_path.exists():
      return builder
    with _alone(builder.data_path.parent):
      # Another process may have written them while this one waited.
      builder = builder_class(data_dir=data_dir, **fields)
      # TFDS makes a folder for downloads; there are none, so it is not to stay.
      with tempfile.TemporaryDirectory() as nothing:
        builder.download_and_prepare(
          file_format=FILE_FORMAT,
          download_dir=nothing,
          download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
  return builder


@contextlib.contextmanager
def _alone(folder):
  """Holds the folder's lock, and removes what an interrupted run left in it."""
  local = pathlib.Path(os.fspath(folder))
  if "://" in os.fspath(folder):
    yield  # buckets have no locks; their incomplete folders are only clutter
    return
  local.mkdir(parents=True, exist_ok=True)
  with open(local / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    for left in local.glob("incomplete.*"):
      shutil.rmtree(left, ignore_errors=True)
    yield


@contextlib.contextmanager
def _quiet(quiet):
  """Keeps TFDS's bars, prints and notes away; its errors are raised as ever."""
  tfds.display_progress_bar(enable=not quiet)
  if not quiet:
    yield
    return
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)
