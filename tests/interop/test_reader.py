"""Checkpoint files: what is read from each format, and what is refused.

reference/torch_files was written by torch 2.13: the same tensors in the zip format and
in that before 1.6 (views, tied weights, all types), and a whole pickled module.
"""

import collections
import functools
import importlib
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vlp_jax.interop import reader
from vlp_jax.interop import torch_file

TORCH = pathlib.Path(__file__).parents[1] / "reference" / "torch_files"


def tensors():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(4, 3)).astype(np.float32)
  return dict(
    table=table,
    tied=table,
    transposed=table.T,
    half=rng.normal(size=5).astype(np.float16),
    bfloat16=rng.normal(size=5).astype(ml_dtypes.bfloat16),
    int64=np.array([2**40, -1]),
    bool=np.array([True, False, True]),
    scalar=np.float32(0.07),
    empty=np.zeros((0, 3), np.float32),
  )


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name, x in want.items():
    x = np.asarray(x)
    assert got[name].dtype == x.dtype, name
    assert got[name].shape == x.shape, name
    assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_what_is_saved_is_loaded(tmp_path, suffix):
  path = tmp_path / f"weights{suffix}"
  reader.save(path, tensors())
  assert_same(reader.load(path), tensors())
  assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_files_of_torch(name):
  got = reader.load(TORCH / name)
  want = dict(np.load(TORCH / "expected.npz"))
  assert got["bfloat16"].dtype == ml_dtypes.bfloat16
  got["bfloat16"] = got["bfloat16"].astype(np.float32)
  assert_same(got, want)
  assert np.shares_memory(got["plain"], got["tied"])
  assert np.shares_memory(got["plain"], got["offset"])
  assert not got["plain"].flags.writeable


def test_types_without_a_storage_of_their_own():
  got = reader.load(TORCH / "untyped.pth")
  assert got["a"].dtype == np.uint16 and got["a"].tolist() == [0, 1, 2]
  assert got["b"].dtype == ml_dtypes.float8_e4m3fn and got["b"].tolist() == [1.0] * 4


def test_tensors_are_mapped_not_read(tmp_path):
  for suffix in (".safetensors", ".pth"):
    path = tmp_path / f"weights{suffix}"
    reader.save(path, tensors())
    x = reader.load(path)["table"]
    while not isinstance(x, np.memmap):
      x = x.base
    assert pathlib.Path(x.filename).samefile(path)


def test_our_safetensors_is_read_by_its_library(tmp_path):
  path = tmp_path / "weights.safetensors"
  plain = {k: v for k, v in tensors().items() if k != "bfloat16"}
  reader.save(path, plain)
  assert_same(safetensors.numpy.load_file(path), plain)
  safetensors.numpy.save_file({"x": np.arange(3)}, path)
  assert reader.load(path)["x"].tolist() == [0, 1, 2]


def test_our_pth_is_read_by_torch(tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "weights.pth"
  reader.save(path, tensors(), key="model")
  got = torch.load(path, weights_only=True)
  assert list(got) == ["model"]
  for name, want in tensors().items():
    x = got["model"][name]
    assert str(x.dtype).removeprefix("torch.") == str(np.asarray(want).dtype)
    np.testing.assert_array_equal(x.float().numpy(), np.asarray(want, np.float32))
  assert got["model"]["table"].data_ptr() == got["model"]["tied"].data_ptr()
  assert got["model"]["table"].data_ptr() != got["model"]["transposed"].data_ptr()


def test_state_dict_under_a_key(tmp_path):
  path = tmp_path / "weights.ckpt"
  for key in ("model", "state_dict", "teacher"):
    reader.save(path, tensors(), key=key)
    assert_same(reader.load(path, key=key), tensors())
    if key != "teacher":
      assert_same(reader.load(path), tensors())
  with pytest.raises(
    ValueError, match="no state dict under.*key=.*entries are teacher"
  ):
    reader.load(path)
  with pytest.raises(ValueError, match="no entry 'student'; its entries are teacher"):
    reader.load(path, key="student")
  with pytest.raises(ValueError, match=r"'config' is not a state dict.*alpha|name"):
    reader.load(TORCH / "zip.pth", key="config")
  with pytest.raises(ValueError, match="'name' is not a state dict"):
    reader.load(archive(tmp_path, dict(name="a")), key="name")


def test_npz_of_big_vision_bfloat16(tmp_path):
  x = np.arange(4).astype(ml_dtypes.bfloat16)
  path = tmp_path / "weights.npz"
  np.savez(path, x=x)
  assert reader.load(path)["x"].dtype == ml_dtypes.bfloat16
  np.savez(path, x=np.array([object()]))
  with pytest.raises(ValueError, match="'x' cannot be read.*pickle"):
    reader.load(path)


SCRIPTED = b"\x80\x02c__torch__.my.model\nNet\n"
TENSOR = (
  b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\n"
  b"FloatStorage\nU\x010U\x03cpuK\x06tQK\x00K\x06\x85K\x01\x85\x89)tR"
)


class Evil:
  """What it asks for is run by `pickle.load`."""

  def __init__(self, function, *args):
    self.asked = (function, args)

  def __reduce__(self):
    return self.asked


def archive(folder, content, protocol=2):
  """A zip file of torch.save whose pickle is `content`, an object or a program."""
  path = folder / "made.pth"
  if not isinstance(content, bytes):
    content = pickle.dumps(content, protocol)
  with zipfile.ZipFile(path, "w") as f:
    f.writestr("archive/data.pkl", content)
    f.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
  return path


def program(*numbers):
  """A state dict of one tensor "x" whose offset, shape and strides are given."""
  offset, shape, strides = numbers
  return b"".join(
    [
      b"\x80\x02}U\x01xctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\n",
      b"FloatStorage\nU\x010U\x03cpuK\x06tQ",
      *(pickle.dumps(n, 2)[2:-1] for n in (offset, shape, strides)),
      b"\x89)tRs.",
    ]
  )


@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickles_are_refused_and_not_run(tmp_path, protocol):
  marker = tmp_path / "was_run"
  evil = Evil(os.system, f"touch {marker}")
  for content in (evil, {"model": {"x": evil}}, [evil], {"x": Evil(eval, "1")}):
    path = archive(tmp_path, content, protocol)
    with pytest.raises(ValueError, match="refused: it asks for (posix|nt|.*builtin)"):
      reader.load(path)
    legacy = tmp_path / "legacy.pth"
    parts = [torch_file.LEGACY, pickle.dumps(1001, 2), pickle.dumps({}, 2)]
    parts += [pickle.dumps(content, protocol), pickle.dumps([], 2)]
    legacy.write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match="refused: it asks for (posix|nt|.*builtin)"):
      reader.load(legacy)
  assert not marker.exists()


@pytest.mark.parametrize(
  "code, named",
  [
    (b"cos\nsystem\n.", "os system"),
    # Through an attribute of a function that is allowed.
    (b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93}b.", "the state of"),
    (b"ccollections\nOrderedDict.fromkeys\n)R.", "OrderedDict.fromkeys"),
    (b"(ios\nsystem\n.", "INST"),
    (b"(S'ls'\n)o.", "OBJ"),
    (b"S'x'\n)R.", "a call of str"),
    (b"cnumpy\ndtype\n(U\x01OtR.", "numpy dtype O"),
    (b"ctorch.storage\n_load_from_bytes\n)R.", "_load_from_bytes"),
    (b"U\x06moduleU\x01a\x86Q.", "a persistent module of a"),
  ],
)
def test_other_ways_into_a_pickle_are_refused(tmp_path, code, named):
  with pytest.raises(ValueError, match=named):
    reader.load(archive(tmp_path, b"\x80\x02" + code))


class Chain:
  """Names that may be called, one within the other, around one that may not."""

  def __init__(self, inner):
    self.inner = inner

  def __reduce__(self):
    return collections.OrderedDict, ([("x", self.inner)],)


def test_what_is_allowed_does_not_carry_what_is_not(tmp_path):
  marker = tmp_path / "was_run"
  asked = {
    "posix system": Evil(os.system, f"touch {marker}"),
    "builtin.* eval": Evil(eval, "1"),
    "builtin.* exec": Evil(exec, "1"),
    "builtin.* getattr": Evil(getattr, "x", "y"),
    ".* open": Evil(open, str(marker), "w"),
    "Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
    "importlib import_module": Evil(importlib.import_module, "os"),
    ".*pickle loads": Evil(pickle.loads, b""),
    "functools partial": Evil(functools.partial, os.system),
  }
  for name, evil in asked.items():
    for content in (Chain(Chain(evil)), {"model": Chain(evil)}, [(evil,)]):
      with pytest.raises(ValueError, match=f"refused: it asks for .*{name}"):
        reader.load(archive(tmp_path, content))
  assert not marker.exists()


def zipped(folder, files):
  path = folder / "made.pth"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as f:
    for name, content in files.items():
      f.writestr(name, content)
  return path


def test_archives_that_are_not_as_torch_writes_them(tmp_path):
  inner = archive(tmp_path, {"x": Evil(os.system, "true")}).read_bytes()
  with pytest.raises(ValueError, match="damaged"):
    reader.load(zipped(tmp_path, {"archive/data.pkl": inner}))
  with pytest.raises(ValueError, match=r"neither of numpy nor of torch.*inner\.pth"):
    reader.load(zipped(tmp_path, {"inner.pth": inner}))
  # A path out of the archive is a name like any other, and nothing is unpacked.
  evil = pickle.dumps({"x": Evil(os.system, "true")}, 2)
  with pytest.raises(ValueError, match="refused: it asks for posix system"):
    reader.load(zipped(tmp_path, {"../../data.pkl": evil}))
  outside = program(0, (6,), (1,)).replace(b"U\x010", b"U\x09../../etc")
  with pytest.raises(ValueError, match=r"no record data/\.\./\.\./etc"):
    reader.load(zipped(tmp_path, {"archive/data.pkl": outside}))
  # Weights that unpack to more than they can be.
  large = {"archive/data.pkl": program(0, (6,), (1,)), "archive/data/0": bytes(10**8)}
  with pytest.raises(ValueError, match="data/0 is packed too often"):
    reader.load(zipped(tmp_path, large))


def deep(push, wrap, times):
  """A value within values; `wrap` makes one of the topmost."""
  return b"\x80\x02" + push + wrap * times


@pytest.mark.parametrize(
  "code, message",
  [
    # A key that is a tuple of tuples without end: its hash would end the process.
    (b"}" + deep(b")", b"\x85", 10**5)[2:] + b"K\x01s.", "a key that is no plain"),
    (b"\x8f(" + deep(b")", b"\x85", 10**5)[2:] + b"\x90.", "a key that is no plain"),
    # Pairs of themselves, 2^60 in all: none may be looked through.
    (b")" + b"2\x86" * 60 + b".", "instruction DUP"),
    (b")" + b"q\x00h\x00\x86" * 60 + b".", "holds a tuple"),
    (b"}U\x01x)" + b"q\x00h\x00\x86" * 60 + b"s.", "no state dict"),
    (b")" + b"q\x00h\x00\x86" * 60 + b"U\x01a\x93.", "whose name is no text"),
    (b")" + b"q\x00h\x00\x86" * 60 + b"K\x01\x86Q.", "a persistent tuple of int"),
    # A storage of more numbers than there are, of less than none, and of none at all.
    (program(0, (2**62,), (1,))[2:], "of 6 numbers"),
    (program(0, (2**20,), (1,))[2:], "reaches beyond its storage"),
    (program(0, (2**62,), (0,))[2:], "of 6 numbers"),
    (program(2**63, (1,), (1,))[2:], "reaches beyond its storage"),
    (
      program(0, (6,), (1,))[2:].replace(b"K\x06tQ", b"J\xff\xff\xff\xfftQ"),
      "a storage",
    ),
    (
      program(0, (6,), (1,))[2:].replace(b"K\x06tQ", b"J\x00\x00\x00\x7ftQ"),
      "too short",
    ),
    (b"\x8a\xff" + b"\x01" * 10 + b".", "damaged"),
    (b"B\xff\xff\xff\x7fx.", "damaged"),
    (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.", "damaged"),
    (b"h\x63.", "damaged"),
    (b"(" * 10, "damaged"),
  ],
)
def test_programs_that_would_stall_or_crash(tmp_path, code, message):
  with pytest.raises(ValueError, match=message):
    reader.load(archive(tmp_path, b"\x80\x02" + code))


def test_modules_that_stand_for_many(tmp_path):
  """A module twice within the next, forty times over."""
  net = b"c__torch__.my.model\nNet\n)\x81"
  code = b"\x80\x02" + net
  for _ in range(40):
    code += b"q\x00" + net + b"}(U\x01ah\x00U\x01bh\x00ub"
  with pytest.raises(ValueError, match="more than 100,000 modules"):
    reader.load(archive(tmp_path, code + b"."))


def _programs():
  """Pickles of each kind, for changing."""
  yield program(0, (2, 3), (3, 1))
  yield SCRIPTED + b")\x81}(U\x01w" + TENSOR + b"U\x08training\x89ub."
  yield pickle.dumps({"a": [1, 2.5, (True, None)], "b": {"c": b"xy"}}, 4)
  yield pickle.dumps({"model": Chain(Evil(os.system, "touch was_run"))}, 2)


def test_changed_programs_are_read_or_refused(tmp_path, monkeypatch):
  """Bytes changed, left out, doubled: nothing runs, and nothing fails otherwise."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  read = refused = 0
  for whole in _programs():
    for _ in range(150):
      content = bytearray(whole)
      for _ in range(rng.integers(1, 3)):
        at = int(rng.integers(2, len(content)))
        change = rng.integers(3)
        if change == 0:
          content[at] = rng.integers(256)
        elif change == 1:
          del content[at : at + int(rng.integers(1, 4))]
        else:
          content[at:at] = content[at : at + int(rng.integers(1, 9))]
      try:
        reader.load(archive(tmp_path, bytes(content)))
        read += 1
      except ValueError as e:
        refused += 1
        assert "made.pth" in str(e) and len(str(e)) < 2_000
  assert refused > 200 and read > 5
  assert not (tmp_path / "was_run").exists()


def test_reading_needs_no_torch(tmp_path):
  """Every container, with torch and its kind out of reach."""
  reader.save(tmp_path / "a.safetensors", tensors())
  reader.save(tmp_path / "a.npz", tensors())
  files = [
    TORCH / "zip.pth",
    TORCH / "legacy.pth",
    TORCH.parent / "clip_vit/model_jit.pt",
  ]
  files += [tmp_path / "a.safetensors", tmp_path / "a.npz"]
  code = [
    "import sys",
    f"sys.path.insert(0, {str(TORCH.parents[2])!r})",
    "for name in ('torch', 'transformers', 'safetensors', 'timm', 'open_clip'):",
    "  sys.modules[name] = None",
    "from vlp_jax.interop import reader",
    *(f"assert reader.load({str(file)!r})" for file in files),
  ]
  run = subprocess.run(
    [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=False
  )
  assert run.returncode == 0, run.stderr


def test_a_pickled_module_is_refused_by_name():
  with pytest.raises(
    ValueError, match=r"module\.pth refused.*torch\.nn\.modules\.linear"
  ):
    reader.load(TORCH / "module.pth")


@pytest.mark.parametrize(
  "numbers", [(0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 2), (4, 2)), (-1, (2,), (1,))]
)
def test_a_tensor_cannot_see_beyond_its_storage(tmp_path, numbers):
  with pytest.raises(ValueError, match="'x' is a tensor of shape"):
    reader.load(archive(tmp_path, program(*numbers)))


def test_a_tensor_within_its_storage(tmp_path):
  x = reader.load(archive(tmp_path, program(1, (2, 2), (1, 3))))["x"]
  assert x.tolist() == [[1, 4], [2, 5]]


def test_compressed_archive(tmp_path):
  whole = archive(tmp_path, program(0, (6,), (1,)))
  path = tmp_path / "small.pth"
  with (
    zipfile.ZipFile(whole) as old,
    zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
  ):
    for name in old.namelist():
      new.writestr(name, old.read(name))
  assert reader.load(path)["x"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_truncated_files(tmp_path, suffix):
  path = tmp_path / f"weights{suffix}"
  reader.save(path, tensors())
  whole = path.read_bytes()
  for share in (0.02, 0.3, 0.6, 0.9, 0.99):
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=f"weights{suffix}"):
      reader.load(path)


def test_truncated_legacy_file(tmp_path):
  whole = (TORCH / "legacy.pth").read_bytes()
  path = tmp_path / "cut.pth"
  for size in range(20, len(whole), 97):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="cut.pth"):
      reader.load(path)


@pytest.mark.parametrize("source", ["zip.pth", "legacy.pth", ".safetensors", ".npz"])
def test_flipped_bytes_are_read_or_refused(tmp_path, source):
  path = TORCH / source
  if source.startswith("."):
    path = tmp_path / f"whole{source}"
    reader.save(path, tensors())
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  damaged = tmp_path / "damaged"
  refused = 0
  for end in [len(whole), 400] * 100:
    content = bytearray(whole)
    content[rng.integers(end)] = rng.integers(256)
    damaged.write_bytes(content)
    try:
      reader.load(damaged)
    except ValueError as e:
      refused += 1
      assert str(damaged) in str(e)
  assert refused > 20


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "not a checkpoint"),
    (b"hello, this is text", "not a checkpoint"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    (struct.pack("<Q", 1 << 40) + b"{}", "cut short"),
    (struct.pack("<Q", 2) + b"{x", "no JSON"),
    (torch_file.LEGACY, "cut short"),
  ],
)
def test_what_is_not_a_checkpoint(tmp_path, content, message):
  path = tmp_path / "weights.bin"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    reader.load(path)


def test_paths_that_are_no_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere.pth"):
    reader.load(tmp_path / "nowhere.pth")
  with pytest.raises(ValueError, match="is a folder"):
    reader.load(tmp_path)
  with zipfile.ZipFile(tmp_path / "other.pth", "w") as f:
    f.writestr("readme.txt", "hello")
  with pytest.raises(ValueError, match="neither of numpy nor of torch.*readme.txt"):
    reader.load(tmp_path / "other.pth")


def test_save_refuses_what_it_cannot_write(tmp_path):
  with pytest.raises(ValueError, match="unknown suffix"):
    reader.save(tmp_path / "weights.h5", tensors())
  with pytest.raises(ValueError, match="key='model' is for .pth"):
    reader.save(tmp_path / "weights.npz", tensors(), key="model")
  for suffix in (".safetensors", ".pth"):
    with pytest.raises(ValueError, match="'text'.*no type"):
      reader.save(tmp_path / f"weights{suffix}", {"text": np.array(["a"])})
  assert not os.listdir(tmp_path)


def test_metadata_of_a_state_dict_is_ignored(tmp_path):
  content = collections.OrderedDict(a=1, b=2.5)
  content._metadata = {"": 1}
  got = reader.load(archive(tmp_path, content))
  assert got["a"] == 1 and got["b"] == 2.5


# --- TorchScript ----------------------------------------------------------------------


def test_modules_of_an_archive_become_one_state_dict(tmp_path):
  # Net(w=tensor, training=False, below=Net(w=tensor))
  inner = SCRIPTED[2:] + b")\x81}U\x01w" + TENSOR + b"sb"
  whole = SCRIPTED + b")\x81}(U\x01w" + TENSOR + b"U\x08training\x89U\x05below"
  tensors = reader.load(archive(tmp_path, whole + inner + b"ub."))
  assert list(tensors) == ["w", "below.w"]
  assert tensors["below.w"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
  "code, named",
  [
    # A call of its class, arguments for it, a state that is no attributes.
    (b")R.", "a call of __torch__.my.model Net"),
    (b"K\x01\x85\x81.", "a call of __torch__.my.model Net"),
    (b")\x81K\x01b.", "the state of a Module"),
    (b")\x81}U\x01x]sb.", "attribute 'x' of a scripted module is a list"),
    (b")\x81q\x00}U\x01xh\x00sb.", "a module lies within itself"),
    (b".", "holds a Global"),
  ],
)
def test_other_things_to_do_with_a_module_are_refused(tmp_path, code, named):
  with pytest.raises(ValueError, match=re.escape(named)):
    reader.load(archive(tmp_path, SCRIPTED + code))
