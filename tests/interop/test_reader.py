"""Checkpoint files: what is read from each format, and what is refused.

reference/torch_files was written by torch 2.13: the same tensors in the zip format and
in that before 1.6 (views, tied weights, all types), and a whole pickled module.
"""

import collections
import os
import pathlib
import pickle
import re
import struct
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

SCRIPTED = b"\x80\x02c__torch__.my.model\nNet\n"
TENSOR = (
  b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\n"
  b"FloatStorage\nU\x010U\x03cpuK\x06tQK\x00K\x06\x85K\x01\x85\x89)tR"
)


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
