"""Files of torch.save, read and written without torch; no code in them is run."""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
import pickle
import re
import struct
from typing import IO, Any
import zipfile

import ml_dtypes
import numpy as np

from vlp_jax.interop import unpickler

STORAGES = {
  "torch FloatStorage": np.dtype(np.float32),
  "torch DoubleStorage": np.dtype(np.float64),
  "torch HalfStorage": np.dtype(np.float16),
  "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch LongStorage": np.dtype(np.int64),
  "torch IntStorage": np.dtype(np.int32),
  "torch ShortStorage": np.dtype(np.int16),
  "torch CharStorage": np.dtype(np.int8),
  "torch ByteStorage": np.dtype(np.uint8),
  "torch BoolStorage": np.dtype(np.bool_),
  "torch ComplexFloatStorage": np.dtype(np.complex64),
  "torch ComplexDoubleStorage": np.dtype(np.complex128),
  "torch.storage UntypedStorage": np.dtype(np.uint8),
}
DTYPES = {
  f"torch {name}": np.dtype(dtype)
  for name, dtype in dict(
    float32=np.float32,
    float64=np.float64,
    float16=np.float16,
    bfloat16=ml_dtypes.bfloat16,
    float8_e4m3fn=ml_dtypes.float8_e4m3fn,
    float8_e5m2=ml_dtypes.float8_e5m2,
    int64=np.int64,
    int32=np.int32,
    int16=np.int16,
    int8=np.int8,
    uint8=np.uint8,
    uint16=np.uint16,
    uint32=np.uint32,
    uint64=np.uint64,
    bool=np.bool_,
    complex64=np.complex64,
    complex128=np.complex128,
  ).items()
}
# torch/serialization.py of every release: the number, pickled by protocol 2, opens a
# file from before torch 1.6.
MAGIC = 0x1950A86A20F9469CFC6C
LEGACY = pickle.dumps(MAGIC, 2)
# A packed record may be so much larger than the whole file: weights hardly shrink.
MOST_PACKED = 100
# Elements of a view that has more of them than its storage.
MOST_EXPANDED = 2**28
# TorchScript's mark before the classes of an archive.
SCRIPTED = "__torch__."


@dataclasses.dataclass
class Storage:
  """A run of numbers in the file; `memory` is set when its place is known.

  start, base: of a storage that is a part of another, as torch before 0.4 had them.
  """

  dtype: np.dtype
  key: str
  numel: int
  memory: np.ndarray | None = None
  start: int = 0
  base: "Storage | None" = None


@dataclasses.dataclass
class Tensor:
  """A strided view of a storage; offset and strides count elements."""

  storage: Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def array(self) -> np.ndarray:
    """The view, read-only. Tensors of one storage share their memory."""
    numbers = [self.offset, *self.shape, *self.strides]
    if not all(type(n) is int for n in numbers):
      raise ValueError("a tensor whose shape is no numbers.")
    if min(numbers) < 0 or len(self.shape) != len(self.strides):
      raise ValueError(f"a tensor of shape {self.shape}, strides {self.strides}.")
    memory = self.storage.memory.view(self.dtype)
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
    # A view may show one number often (`expand`), but not without end.
    if math.prod(self.shape) > max(memory.size, MOST_EXPANDED):
      raise ValueError(f"a tensor of shape {self.shape} of {memory.size} numbers.")
    # as_strided checks nothing: beyond this line it would read other memory.
    if self.offset + reach >= memory.size:
      raise ValueError(
        f"a tensor of shape {self.shape} reaches beyond its storage of {memory.size}."
      )
    strides = tuple(s * self.dtype.itemsize for s in self.strides)
    return np.lib.stride_tricks.as_strided(
      memory[self.offset :], self.shape, strides, writeable=False
    )


def load_zip(path: str | os.PathLike) -> Any:
  """The object in a zip file of torch.save or torch.jit.save, its tensors as `Tensor`.

  That of torch.jit.save is an `unpickler.Module`.

  Raises:
    ValueError: if the file is damaged or asks for more than data.
  """
  memory = np.memmap(path, np.uint8, mode="r")
  with zipfile.ZipFile(path) as f:
    root = next(name for name in f.namelist() if name.endswith("data.pkl"))
    root = root.removesuffix("data.pkl")
    infos = {info.filename: info for info in f.infolist()}
    if f"{root}byteorder" in infos and f.read(f"{root}byteorder") != b"little":
      raise ValueError(f"{path} was written on a big-endian machine.")
    storages, path_size = {}, os.path.getsize(path)

    def find(key, dtype, numel):
      if key not in storages:
        info = infos.get(f"{root}data/{key}")
        if info is None:
          raise ValueError(f"{path} is damaged: no record data/{key}.")
        if info.file_size > path_size * MOST_PACKED:
          raise ValueError(f"{path} is damaged: data/{key} is packed too often.")
        stored = _stored(f, info, memory)
        if stored.size < numel * dtype.itemsize:
          raise ValueError(f"{path} is damaged: record data/{key} is too short.")
        storages[key] = stored
      size = numel * dtype.itemsize
      return Storage(dtype, key, numel, memory=storages[key][:size])

    with f.open(f"{root}data.pkl") as program:
      return _run(program, path, find, modules=SCRIPTED)


def _stored(f, info, memory):
  """uint8 [n]: the bytes of a record, mapped unless they are compressed."""
  if info.compress_type != zipfile.ZIP_STORED:
    return np.frombuffer(f.read(info), np.uint8)
  # The local header: 30 bytes, of which the last four are the lengths of two texts.
  at = info.header_offset
  name, extra = struct.unpack("<HH", memory[at + 26 : at + 30].tobytes())
  first = at + 30 + name + extra
  if first + info.file_size > memory.size:
    raise ValueError(f"{f.filename} is cut short: it ends within {info.filename}.")
  return np.asarray(memory[first : first + info.file_size])


def load_legacy(path: str | os.PathLike) -> Any:
  """The object in a file of torch.save before 1.6, its tensors as `Tensor`.

  Such a file is five pickles (magic number, protocol, machine, object, keys of the
  storages), then each storage: its length as int64, then its numbers.
  """
  memory = np.memmap(path, np.uint8, mode="r")
  storages = {}

  def find(key, dtype, numel):
    return storages.setdefault(key, Storage(dtype, key, numel))

  with open(path, "rb") as f:
    magic, _, machine = (_run(f, path) for _ in range(3))
    if magic != MAGIC:
      raise ValueError(f"{path} is not a file of torch.save.")
    if isinstance(machine, dict) and machine.get("little_endian") is False:
      raise ValueError(f"{path} was written on a big-endian machine.")
    content = _run(f, path, find)
    keys = _run(f, path)
    at = f.tell()
  if not isinstance(keys, list) or set(unpickler.hashable(keys)) != set(storages):
    raise ValueError(f"{path} is damaged: its storages are not those it lists.")
  for key in keys:
    storage = storages[key]
    size = storage.numel * storage.dtype.itemsize
    first, at = at + 8, at + 8 + size
    if at > memory.size:
      raise ValueError(f"{path} is cut short: it ends within storage {key}.")
    (numel,) = struct.unpack("<q", memory[first - 8 : first].tobytes())
    if numel != storage.numel:
      raise ValueError(f"{path} is damaged: storage {key} has {numel} numbers.")
    storage.memory = np.asarray(memory[first:at])
  return content


def _tensor(storage, offset, shape, strides, *_):
  base = storage.base or storage
  return Tensor(base, base.dtype, storage.start + offset, tuple(shape), tuple(strides))


def _tensor_v3(storage, offset, shape, strides, grad, hooks, dtype, *_):
  return Tensor(storage, DTYPES[dtype.name], offset, tuple(shape), tuple(strides))


def _typed(function, kind, args, state):
  if kind.name not in CLASSES:
    raise unpickler.Refused(kind.name)
  return unpickler.call(function, args, CALLS)


def _numpy_type(code, *_):
  # A number's type only: an object's could be anything.
  if not isinstance(code, str) or not re.fullmatch("[biufc][0-9]{1,2}", code):
    raise unpickler.Refused(f"numpy dtype {_name(code)}")
  return np.dtype(code)


def _encode(text, encoding="latin1"):
  if encoding != "latin1":
    raise unpickler.Refused(f"_codecs encode {_name(encoding)}")
  return text.encode("latin1")


def _name(x):
  """Of a value, for messages: a nested one could be of any length."""
  return x if isinstance(x, str) else getattr(x, "name", type(x).__name__)


def _complex(*parts):
  if not all(isinstance(part, int | float) for part in parts):
    raise TypeError("a complex number of no numbers")
  return complex(*parts)


def _ordered(items):
  items = items.items() if isinstance(items, dict) else items
  pairs = [tuple(pair) for pair in items]
  unpickler.hashable(key for key, _ in pairs)
  return dict(pairs)


def _scalar(dtype, data):
  return np.frombuffer(data, dtype, count=1)[0]


# What a pickle may ask for; the functions are ours.
CALLS: dict[str, Callable] = {
  "torch._utils _rebuild_tensor": _tensor,
  "torch._utils _rebuild_tensor_v2": _tensor,
  "torch._utils _rebuild_tensor_v3": _tensor_v3,
  "torch._utils _rebuild_parameter": lambda x, *_: x,
  "torch._utils _rebuild_parameter_with_state": lambda x, *_: x,
  "torch._tensor _rebuild_from_type_v2": _typed,
  "torch Size": lambda sizes=(): tuple(sizes),
  "torch device": lambda *parts: ":".join(map(_name, parts)),
  "collections OrderedDict": lambda items=(): _ordered(items),
  "numpy dtype": _numpy_type,
  "numpy.core.multiarray scalar": _scalar,
  "numpy._core.multiarray scalar": _scalar,
  "_codecs encode": _encode,
}
for _module in ("builtins", "__builtin__"):  # Python 3's name, and that of protocol 2.
  CALLS |= {
    f"{_module} set": lambda items=(): set(unpickler.hashable(items)),
    f"{_module} complex": _complex,
  }
CLASSES = {"torch Tensor", "torch.nn.parameter Parameter"}
NAMES = {*CALLS, *STORAGES, *DTYPES, *CLASSES}


def _storage(pid, find):
  """A storage: ("storage", type, key, device, numel[, view])."""
  tag, kind, *rest = pid
  if tag != "storage" or getattr(kind, "name", None) not in STORAGES:
    raise unpickler.Refused(f"a persistent {_name(tag)} of {_name(kind)}")
  key, _, numel, *view = rest
  if not isinstance(key, str | int) or type(numel) is not int or numel < 0:
    raise unpickler.Refused("a storage without a name or size")
  storage = find(str(key), STORAGES[kind.name], int(numel))
  if view and view[0] is not None:
    _, start, numel = view[0]
    return Storage(storage.dtype, storage.key, numel, start=start, base=storage)
  return storage


def _run(program, path, find=None, modules=None):
  """What one pickle builds; `find(key, dtype, numel)` gives a storage."""
  persistent = None if find is None else lambda pid: _storage(pid, find)
  return unpickler.run(
    program, path, calls=CALLS, names=NAMES, persistent=persistent, modules=modules
  )


def raw(x: np.ndarray) -> memoryview:
  """The bytes of an array in C order."""
  return memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


def write(
  f: IO[bytes], tensors: Mapping[str, np.ndarray], *, key: str | None = None
) -> None:
  """Writes a state dict as torch.save does; torch.load(weights_only=True) reads it.

  Args:
    f: open for writing.
    tensors: name to array; those of one memory become tensors of one storage.
    key: writes {key: tensors} instead.
  """
  kinds = {dtype: name for name, dtype in STORAGES.items()}
  kinds[np.dtype(np.uint8)] = "torch ByteStorage"
  stored, keys = [], {}
  program = [b"\x80\x02}"]
  program += [_plain(key), b"}("] if key is not None else [b"("]
  for name, x in tensors.items():
    if x.dtype not in kinds:
      raise ValueError(f"tensor {name!r}: torch's format has no type {x.dtype}.")
    where = (x.__array_interface__["data"][0], x.shape, x.strides, x.dtype)
    # Empty arrays may share an address without being one.
    if x.size == 0 or where not in keys:
      keys[where] = str(len(stored))
      stored.append(x)
    strides = np.cumprod([1, *x.shape[:0:-1]])[::-1].tolist() if x.ndim else []
    program += [
      _plain(name),
      b"ctorch._utils\n_rebuild_tensor_v2\n((",
      _plain("storage"),
      b"c%b\n" % kinds[x.dtype].replace(" ", "\n").encode(),
      _plain(keys[where]) + _plain("cpu") + _plain(x.size),
      b"tQ" + _plain(0) + _plain(x.shape) + _plain(tuple(strides)) + _plain(False),
      b"ccollections\nOrderedDict\n)RtR",
    ]
  program.append(b"u" if key is None else b"us")
  with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", b"".join(program) + b".")
    archive.writestr("archive/byteorder", b"little")
    for number, x in enumerate(stored):
      with archive.open(f"archive/data/{number}", "w", force_zip64=True) as record:
        record.write(raw(x))
    archive.writestr("archive/version", b"3\n")


def _plain(value):
  """The instructions that push a str, int, bool or tuple of ints."""
  return pickle.dumps(value, 2)[2:-1]
