"""Decoding photographs, and cropping them to a square, in NumPy and Pillow: for worker processes.

Sizes are in pixels. Where a photograph is made smaller, JPEG decoding at a half, a quarter or an
eighth of its size does the first part of it, which takes a fraction of the time; what is left is
a bilinear filter over as many pixels as go into one.
"""

import io
import math

import numpy as np
from PIL import Image


def decode(encoded: bytes) -> np.ndarray:
  """A PNG or JPEG file's pixels, uint8 `[height, width, channels]`; a grey one has one channel."""
  with Image.open(io.BytesIO(encoded)) as image:
    pixels = np.asarray(image, np.uint8)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def centre_crop(encoded: bytes, size: int, part: float = 1.0) -> np.ndarray:
  """The middle of a photograph, uint8 `[size, size, 3]`.

  Args:
    encoded: a file in any format that Pillow reads, grey, colour or CMYK.
    size: of the result.
    part: how much of the shorter side is in it: 0.875 is a shorter side of 256 for 224.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    width, height = image.size
    side = part * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return _cut(image, (left, top, left + side, top + side), size)


def random_resized_crop(
  encoded: bytes,
  size: int,
  rng: np.random.Generator,
  area: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """A random rectangle of a photograph, made square, uint8 `[size, size, 3]`.

  The rectangle's share of the area is uniform in `area`, the logarithm of width over height uniform
  in `ratio` (Szegedy et al. 2015, "Going Deeper with Convolutions", section 6). One that does not
  fit is drawn again, up to ten times; then it is the largest one in the middle, of a ratio allowed.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    return _cut(image, random_box(image.size, rng, area, ratio), size)


def random_box(
  shape: tuple[int, int],
  rng: np.random.Generator,
  area: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[float, float, float, float]:
  """`(left, top, right, bottom)` of `random_resized_crop`, for a photograph `(width, height)`."""
  width, height = shape
  for _ in range(10):
    pixels = rng.uniform(*area) * width * height
    shear = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round((pixels * shear) ** 0.5), round((pixels / shear) ** 0.5)
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  w, h = min(width, height * ratio[1]), min(height, width / ratio[0])
  left, top = (width - w) / 2, (height - h) / 2
  return left, top, left + w, top + h


def _cut(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
  left, top, right, bottom = box
  shrink = min(right - left, bottom - top) / size
  if shrink > 1:  # a JPEG decodes at the smallest scale that is not below what is asked for
    whole = image.size
    drafted = image.draft("RGB", (int(whole[0] / shrink), int(whole[1] / shrink)))
    if drafted is not None:
      # What it covers of the smaller image, whose sides are rounded up.
      _, (_, _, width, height) = drafted
      x, y = width / whole[0], height / whole[1]
      left, top, right, bottom = left * x, top * y, right * x, bottom * y
  image = image if image.mode == "RGB" else image.convert("RGB")
  inside = (left, top, min(right, image.size[0]), min(bottom, image.size[1]))
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=inside))
