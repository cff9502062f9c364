"""Where a run keeps what it writes: a folder of a disk, or gs://… of a store."""

from collections.abc import Iterator, Sequence
import contextlib
import importlib.util
import os
import pathlib
import tempfile

from etils import epath


def workdir(text: epath.PathLike) -> epath.Path:
  """The folder that is named, a disk's by its whole path; it need not be there.

  Raises:
    ValueError: an address that cannot be written to from here.
  """
  scheme, there, rest = os.fspath(text).partition("://")
  if not there:
    return epath.Path(pathlib.Path(text).expanduser().resolve())
  if scheme != "gs" or not rest.strip("/"):
    raise ValueError(
      f"--workdir={text}: wants a folder of a disk, or gs://BUCKET/FOLDER. (Arrays are"
      " saved with orbax, which writes to Google Cloud Storage alone; other stores can"
      " be mounted, as by mountpoint-s3 or rclone, and named as folders.)"
    )
  if importlib.util.find_spec("gcsfs") is not None:
    # It finds credentials and emulators as Google's tools do; TensorFlow's own client
    # serves where it is not installed.
    os.environ.setdefault("EPATH_USE_TF", "0")
  return epath.Path(f"gs://{rest.strip('/')}")


@contextlib.contextmanager
def local(folder: epath.Path, reads: Sequence[str] = ()) -> Iterator[pathlib.Path]:
  """A folder of a disk to write to; what is in it at the end is in `folder` then.

  For those who can write to a disk alone. Of a folder that is on one, it is itself.

  Args:
    reads: names of files that are wanted in it, if they are there.
  """
  if "://" not in os.fspath(folder):
    yield pathlib.Path(folder)
    return
  with tempfile.TemporaryDirectory(prefix="vlp_jax") as name:
    scratch = pathlib.Path(name)
    for file in reads:
      if (folder / file).exists():
        (scratch / file).write_bytes((folder / file).read_bytes())
    yield scratch
    for path in sorted(scratch.rglob("*")):
      where = path.relative_to(scratch)
      if path.is_file() and str(where) not in reads:
        (folder / where).parent.mkdir(parents=True, exist_ok=True)
        (folder / where).write_bytes(path.read_bytes())
