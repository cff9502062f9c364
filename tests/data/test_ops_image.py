"""Words on images: the official pixels, geometry, randomness, unreadable files."""

import pathlib
import warnings

import numpy as np
from PIL import Image
import pytest

from tests.data import pictures
from vlp_jax.data import decode
from vlp_jax.data import ops_image
from vlp_jax.data import pp
from vlp_jax.data import randaugment

REFERENCE = pathlib.Path(__file__).parents[1] / "reference/preproc/images.npz"
# transforms.Normalize of the official code of ALBEF and BLIP: CLIP's.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def run(text, image, seed=0):
  """uint8 [H, W, 3]: what the words of `text` make of pixels or of a file."""
  data = pictures.encoded(image) if isinstance(image, np.ndarray) else image
  rng = np.random.default_rng(seed)
  return pp.parse(text)({"image": data, "caption": "a"}, rng)["image"]


# --- The official evaluation ----------------------------------------------------------


@pytest.mark.parametrize("paper", ["albef", "blip"])
@pytest.mark.parametrize("name", ["wide", "tall", "small"])
def test_resize_is_that_of_the_official_code(paper, name):
  with np.load(REFERENCE) as arrays:
    image, want = arrays[name], arrays[f"{paper}_48.{name}"]
  out = run("decode|resize(48)", image)
  assert out.dtype == np.uint8 and out.shape == (48, 48, 3)
  scale = STD[:, None, None], MEAN[:, None, None]
  # The same uint8: their float, taken back, is within a thousandth of a grey level.
  levels = (want * scale[0] + scale[1]) * 255
  np.testing.assert_allclose(out.transpose(2, 0, 1), levels, rtol=0, atol=1e-3)
  normalised = (out.transpose(2, 0, 1) / np.float32(255) - scale[1]) / scale[0]
  np.testing.assert_allclose(normalised, want, rtol=0, atol=1e-6)


def test_shorter_side_and_centre():
  image = pictures.pixels(40, 56)
  assert run("decode|resize_shorter(20)", image).shape == (20, 28, 3)
  assert run("decode|resize_shorter(20)", image.transpose(1, 0, 2)).shape == (28, 20, 3)
  out = run("decode|center_crop(16)", image)
  np.testing.assert_array_equal(out, image[12:28, 20:36])
  # torchvision rounds (41 - 16) / 2 = 12.5 to even.
  out = run("decode|center_crop(16)", pictures.pixels(41, 43))
  np.testing.assert_array_equal(out, pictures.pixels(41, 43)[12:28, 14:30])
  for word in ("center_crop", "random_crop"):
    with pytest.raises(ValueError, match=rf"{word}\(48\).*56×40.*resize_shorter"):
      run(f"decode|{word}(48)", image)


@pytest.mark.parametrize("name, res", [("clip_vit", 32), ("clip_rn", 64)])
def test_clip_prepares_images_as_its_official_code(name, res):
  folder = pathlib.Path(__file__).parents[1] / "reference" / name
  with np.load(folder / "inputs.npz") as inputs:
    image = inputs["preprocess_rgb"]
  with np.load(folder / "expected.npz") as expected:
    want = expected["preprocess"]
  out = run(f"decode|resize_shorter({res})|center_crop({res})", image).transpose(
    2, 0, 1
  )
  normalised = (out / np.float32(255) - MEAN[:, None, None]) / STD[:, None, None]
  np.testing.assert_allclose(normalised, want, rtol=0, atol=1e-6)


def test_a_random_crop_is_any_square_of_the_image():
  image = pictures.pixels(40, 56)
  windows = np.lib.stride_tricks.sliding_window_view(image, (36, 36, 3))[:, :, 0]
  found = set()
  for seed in range(40):
    out = run("decode|random_crop(36)", image, seed)
    where = np.argwhere((windows == out).all(axis=(2, 3, 4)))
    assert len(where) == 1
    found.add(tuple(where[0]))
  rows, columns = zip(*found, strict=True)
  assert len(found) > 20 and set(rows) == set(range(5)) and max(columns) > 15


# --- Random words ---------------------------------------------------------------------


@pytest.mark.parametrize(
  "text, shape",
  [
    ("decode|random_resized_crop(24)", (24, 24, 3)),
    ("decode|random_resized_crop(96, min_area=0.9)", (96, 96, 3)),
    ("decode|flip", (40, 56, 3)),
    ("decode|random_crop(16)", (16, 16, 3)),
    ("decode|randaugment(2, 7)", (40, 56, 3)),
    ("decode|random_resized_crop(24)|flip|randaugment(3, 9)", (24, 24, 3)),
  ],
)
def test_random_words_are_functions_of_the_generator(text, shape):
  image = pictures.encoded(pictures.pixels(), "JPEG")
  outs = [run(text, image, seed) for seed in range(12)]
  for seed, out in enumerate(outs):
    assert out.dtype == np.uint8 and out.shape == shape
    np.testing.assert_array_equal(out, run(text, image, seed))
  assert len({out.tobytes() for out in outs}) > 1


def test_window_is_within_its_bounds_and_uniform_in_place():
  rng = np.random.default_rng(0)
  bounds = dict(area=(0.2, 0.6), ratio=(3 / 4, 4 / 3))
  windows = np.array(
    [ops_image.random_window(60, 80, rng, **bounds) for _ in range(2000)]
  )
  top, left, height, width = windows.T
  assert (top >= 0).all() and (top + height <= 60).all()
  assert (left >= 0).all() and (left + width <= 80).all()
  area, ratio = height * width / 4800, width / height
  # Sides are rounded to pixels: half a pixel of 30.
  assert 0.19 < area.min() < 0.22 and 0.57 < area.max() < 0.62
  assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.37
  assert abs(area.mean() - 0.4) < 0.01  # standard error 0.0026
  assert abs(np.log(ratio).mean()) < 0.02  # standard error 0.004
  place = left[width < 80] / (80 - width[width < 80])
  assert abs(place.mean() - 0.5) < 0.03  # standard error 0.007


def test_window_of_an_image_that_no_try_fits():
  bounds = dict(area=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
  rng = np.random.default_rng(0)
  # The largest central one whose ratio is within bounds.
  assert ops_image.random_window(30, 300, rng, **bounds) == (0, 130, 30, 40)
  assert ops_image.random_window(300, 30, rng, **bounds) == (130, 0, 40, 30)


def test_crop_cuts_the_window_that_it_drew():
  image = pictures.pixels(40, 40)
  crop = "decode|random_resized_crop(20, min_area=0.25, max_area=0.25, "
  out = run(crop + "min_ratio=1.0, max_ratio=1.0)", image, seed=3)
  # Not resized: one of the 20 x 20 windows, to the pixel.
  windows = np.lib.stride_tricks.sliding_window_view(image, (20, 20, 3))[:, :, 0]
  assert (windows == out).all(axis=(2, 3, 4)).any()


def test_jpeg_decoded_at_reduced_scale_looks_the_same():
  image = pictures.pixels(400, 640, seed=1)
  jpeg = pictures.encoded(image, "JPEG", quality=95)
  for seed in range(4):
    small = run("decode|random_resized_crop(32, min_area=0.5)", jpeg, seed)
    whole = run(
      "decode|random_resized_crop(32, min_area=0.5)", np.asarray(_open(jpeg)), seed
    )
    # In grey levels. A place is rounded to pixels of the reduced scale.
    assert np.abs(small.astype(int) - whole).mean() < 4


def _open(data):
  return decode.load(decode.open_image(data))


def test_flip_mirrors_with_its_probability():
  image = pictures.pixels()
  np.testing.assert_array_equal(run("decode|flip(0)", image), image)
  np.testing.assert_array_equal(run("decode|flip(1)", image), image[:, ::-1])
  flipped = [
    np.array_equal(run("decode|flip(0.3)", image, seed), image[:, ::-1])
    for seed in range(400)
  ]
  assert abs(np.mean(flipped) - 0.3) < 0.09  # four standard errors


# --- RandAugment ----------------------------------------------------------------------


def _dot(y=20, x=30, side=48):
  """Grey 40 with a white square of 3 x 3 about (y, x)."""
  image = np.full((side, side + 8, 3), 40, np.uint8)
  image[y - 1 : y + 2, x - 1 : x + 2] = 240
  return image


def _place(image):
  """(y, x): the middle of what is light."""
  light = image[..., 0] > 180
  assert light.any()
  return tuple(np.argwhere(light).mean(0))


def test_the_list_is_that_of_albef():
  assert set(randaugment.OPS) == {
    "identity", "autocontrast", "equalize", "brightness", "sharpness",
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
  }  # fmt: skip


@pytest.mark.parametrize("name", sorted(randaugment.OPS))
def test_each_op_keeps_shape_and_dtype(name):
  for image in (pictures.pixels(), pictures.pixels(3, 9), pictures.pixels(1, 1)):
    before = image.copy()
    for negative in (False, True):
      out = randaugment.apply(image[:, ::-1], name, 7, negative=negative)
      assert out.dtype == np.uint8 and out.shape == image.shape
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
  "name, negative, to",
  [
    # ALBEF's matrices: a positive offset brings the picture to the left and upwards.
    ("translate_x", False, (20, 23)),
    ("translate_x", True, (20, 37)),
    ("translate_y", False, (13, 30)),
    ("translate_y", True, (27, 30)),
    # x + 0.3 * 0.7 y, about the corner.
    ("shear_x", False, (20, 34.2)),
    ("shear_x", True, (20, 25.8)),
    ("shear_y", False, (26.3, 30)),
    ("shear_y", True, (13.7, 30)),
  ],
)
def test_where_a_shift_goes(name, negative, to):
  out = randaugment.apply(_dot(), name, 7, negative=negative)
  np.testing.assert_allclose(_place(out), to, atol=0.5)
  assert (out == 128).all(axis=-1).any()  # grey comes in from outside
  assert not (_dot() == 128).any()


def test_rotation_is_counter_clockwise_about_the_middle():
  # 8 right of the middle (24, 28); 21 degrees.
  turned = np.deg2rad(21)
  for negative, sign in ((False, 1), (True, -1)):
    out = randaugment.apply(_dot(24, 36), "rotate", 7, negative=negative)
    want = (24 - sign * 8 * np.sin(turned), 28 + 8 * np.cos(turned))
    np.testing.assert_allclose(_place(out), want, atol=0.6)
    assert (out[0, 0] == 128).all() and (out[-1, -1] == 128).all()


def test_brightness_is_a_factor():
  image = np.array([[[0, 100, 200]]], np.uint8)
  # 1.8 * level / 10 + 0.1
  for level, want in ((0, (0, 10, 20)), (5, (0, 100, 200)), (10, (0, 190, 255))):
    out = randaugment.apply(image, "brightness", level, negative=False)
    np.testing.assert_allclose(out[0, 0], want, atol=1)


def test_contrast_and_histogram_use_the_whole_range():
  image = (pictures.pixels() // 4 + 60).astype(np.uint8)
  for name in ("autocontrast", "equalize"):
    out = randaugment.apply(image, name, 7, negative=False)
    assert (out.min((0, 1)) == 0).all() and (out.max((0, 1)) == 255).all()
    for channel in range(3):  # order is kept
      order = np.argsort(image[..., channel].ravel(), kind="stable")
      assert (np.diff(out[..., channel].ravel()[order].astype(int)) >= 0).all()
  flat = np.full((5, 5, 3), 90, np.uint8)
  np.testing.assert_array_equal(
    randaugment.apply(flat, "autocontrast", 7, negative=False), flat
  )


def test_sharpness_blurs_and_sharpens():
  image = _dot()
  spread = [
    np.abs(
      np.diff(
        randaugment.apply(image, "sharpness", level, negative=False).astype(int), axis=1
      )
    ).sum()
    for level in (0, 5, 10)
  ]
  assert spread[0] < spread[1] < spread[2]
  np.testing.assert_array_equal(
    randaugment.apply(image, "sharpness", 5, negative=False), image
  )
  edges = pictures.pixels()
  out = randaugment.apply(edges, "sharpness", 10, negative=False)
  np.testing.assert_array_equal(out[0], edges[0])
  np.testing.assert_array_equal(out[:, -1], edges[:, -1])


def test_each_op_is_drawn_as_often_and_skipped_every_other_time(monkeypatch):
  drawn = []

  def told(image, name, level, *, negative):
    drawn.append((name, negative))
    return image

  monkeypatch.setattr(randaugment, "apply", told)
  rng = np.random.default_rng(0)
  image = pictures.pixels(2, 2)
  for _ in range(2000):
    randaugment.augment(image, rng, count=2, level=7)
  assert abs(len(drawn) / 4000 - 0.5) < 0.04  # five standard errors
  counts = [sum(n == name for n, _ in drawn) for name in randaugment.OPS]
  assert min(counts) > 140 and max(counts) < 260  # 200 each, four standard errors
  assert abs(np.mean([negative for _, negative in drawn]) - 0.5) < 0.05


# --- Files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "kind, mode, off",
  [
    ("PNG", "RGB", 0),
    ("PNG", "RGBA", 0),
    ("PNG", "P", 60),
    ("GIF", "P", 60),
    ("BMP", "RGB", 0),
    ("JPEG", "RGB", 6),
    ("JPEG", "CMYK", 6),
  ],
)
def test_formats_are_known_by_their_bytes(kind, mode, off):
  # `off`: grey levels that the format loses of this picture.
  image = pictures.pixels()
  out = run("decode", pictures.encoded(image, kind, mode))
  assert out.dtype == np.uint8 and out.shape == image.shape
  assert np.abs(out.astype(int) - image).mean() <= off / 2
  assert np.abs(out.astype(int) - image).max() <= 3 * off


def test_grey_becomes_rgb_and_animations_their_first_picture():
  image = pictures.pixels()
  out = run("decode", pictures.encoded(image, "JPEG", "L"))
  assert out.shape == image.shape
  assert (out == out[..., :1]).all()
  first, second = (Image.fromarray(pictures.pixels(20, 20, seed)) for seed in (0, 1))
  still = pictures.encoded(np.asarray(first), "GIF", "P")
  moving = pictures.encoded(
    np.asarray(first), "GIF", "P", save_all=True, append_images=[second.convert("P")]
  )
  np.testing.assert_array_equal(run("decode", moving), run("decode", still))


def test_a_palette_with_transparent_entries_is_no_warning():
  image = Image.fromarray(pictures.pixels()).quantize(16)
  data = pictures.encoded(np.asarray(image.convert("RGB")), "PNG", "P", transparency=0)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert run("decode", data).shape == (40, 56, 3)


JPEG = pictures.encoded(pictures.pixels(), "JPEG")
PNG = pictures.encoded(pictures.pixels())


@pytest.mark.parametrize(
  "data, reason",
  [
    (b"", "empty file"),
    (JPEG[: len(JPEG) // 2], "truncated image"),
    (JPEG[:30], "truncated image"),
    (PNG[:60] + bytes(40) + PNG[100:], "damaged image"),
    (PNG[: len(PNG) // 2], "truncated image"),
    (b"<html>not found</html>", "no image"),
    (pictures.bomb(), "image too large"),
    (pictures.wide_jpeg(), "image too large"),
  ],
)
@pytest.mark.parametrize("word", ["resize(8)", "random_resized_crop(8)", "flip"])
def test_what_cannot_be_read_is_told_by_its_reason(data, reason, word):
  with pytest.raises(decode.BadRecordError) as caught:
    run(f"decode|{word}", data)
  assert caught.value.reason == reason
  assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("data", [pictures.bomb(), pictures.wide_jpeg()])
def test_a_bomb_is_known_by_its_header(monkeypatch, data):
  def no(*_):
    raise AssertionError("decoded")

  monkeypatch.setattr(Image.Image, "load", no)
  with pytest.raises(decode.BadRecordError, match=r"too large \(50000×"):
    run("decode|resize(8)", data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_file_cut_anywhere_is_refused_or_whole(kind):
  image = pictures.pixels()
  mode = "P" if kind == "GIF" else "RGB"
  data = pictures.encoded(image, kind, mode)
  whole = run("decode", data)
  # What ends a file behind its last pixel may be missing.
  spare = {"PNG": 24, "GIF": 2}.get(kind, 0)
  for length in [*range(0, len(data), 37), len(data) - 20, len(data) - 1]:
    try:
      out = run("decode", data[:length])
    except decode.BadRecordError:
      continue
    assert length >= len(data) - spare
    np.testing.assert_array_equal(out, whole)


RANDAUGMENT = REFERENCE.with_name("randaugment.npz")


def test_randaugment_is_that_of_the_official_code():
  # Outputs of salesforce/ALBEF dataset/randaugment.py with OpenCV 5.0.
  with np.load(RANDAUGMENT) as arrays:
    arrays = dict(arrays)
  image = arrays.pop("image")
  assert len(arrays) == 14
  for name, want in arrays.items():
    op, _, sign = name.partition(".")
    out = randaugment.apply(image, op, 7, negative=sign == "negative").astype(int)
    if op == "sharpness":
      # Where it went below 0 or above 255 the official code wraps around.
      wrapped = np.abs(out - want) > 128
      assert set(np.unique(out[wrapped])) <= {0, 255} and wrapped.mean() < 0.02
      want = np.where(wrapped, out, want)
    # OpenCV counts positions in 32nds of a pixel, and rounds where Pillow cuts off.
    moves = op in ("rotate", "shear_x", "shear_y")
    np.testing.assert_allclose(out, want, rtol=0, atol=1 if moves else 0)
