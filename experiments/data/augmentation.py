"""Augmentation inside the jitted step: functions of a key and a batch of images.

Images are `[n, height, width, channels]` in any dtype, which the result has too; sizes are in
pixels. Each image has its own draw, and the same key gives the same draws. Before normalisation
or after it is all one, but for what fills in: 0 is black before and the mean colour after.
`mean_over_views` is for evaluation, and draws nothing.
"""

from collections.abc import Callable
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def pad_crop(key: jax.Array, images: jax.Array, padding: int = 4, fill: ArrayLike = 0) -> jax.Array:
  """A window of the images' own size out of images padded on all sides.

  Args:
    key: of `jax.random`.
    images: a batch.
    padding: on each side; each of the `(2 padding + 1)^2` windows is as likely.
    fill: of the padding, one value or one a channel; `None` mirrors the image, its edge not twice.
  """
  n, *shape = images.shape
  margins = ((padding, padding), (padding, padding), (0, 0))

  def crop(image, corner):
    if fill is None:
      padded = jnp.pad(image, margins, mode="reflect")
    else:
      inner = jnp.pad(jnp.ones(shape, bool), margins)
      padded = jnp.where(inner, jnp.pad(image, margins), jnp.asarray(fill, image.dtype))
    return jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), shape)

  corners = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)
  return jax.vmap(crop)(images, corners)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Left and right exchanged, in half of the images on average."""
  return mirror(images, jax.random.bernoulli(key, shape=(len(images),)))


def mirror(images: jax.Array, which: jax.Array) -> jax.Array:
  """Left and right exchanged, in the images where `which`, bool `[n]`, is true."""
  return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)


def cutout(key: jax.Array, images: jax.Array, side: int, fill: ArrayLike = 0) -> jax.Array:
  """A square of `side` filled, around a pixel drawn from all.

  As in DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with
  Cutout": what reaches over the edge is lost, so that up to three quarters of a square are.

  Args:
    key: of `jax.random`.
    images: a batch.
    side: of the square, from `side // 2` pixels before the one drawn.
    fill: one value or one a channel.
  """
  n, height, width, _ = images.shape

  def covered(key, length):
    first = jax.random.randint(key, (n, 1), 0, length) - side // 2
    place = jnp.arange(length)[None]
    return (place >= first) & (place < first + side)

  of_rows, of_columns = jax.random.split(key)
  rows, columns = covered(of_rows, height), covered(of_columns, width)
  hole = rows[:, :, None, None] & columns[:, None, :, None]
  return jnp.where(hole, jnp.asarray(fill, images.dtype), images)


def mixup(
  key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Each example mixed with another of the batch, images and labels alike.

  `lam x_i + (1 - lam) x_j`, with `lam` of Beta(alpha, alpha), one for the batch, and `j` a shuffle
  of the batch: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", and its code.

  Args:
    key: of `jax.random`.
    images: a batch, floating point.
    labels: probabilities `[n, classes]`, floating point: `jax.nn.one_hot` of classes.
    alpha: above zero; 0.2 in the paper on ImageNet, 1 on CIFAR-10.

  Raises:
    TypeError: where images or labels are of integers, which have nothing in between.
  """
  for name, array in (("images", images), ("labels", labels)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(f"mixup needs {name} in floating point, not {array.dtype}.")
  of_share, of_order = jax.random.split(key)
  share = jax.random.beta(of_share, alpha, alpha)
  order = jax.random.permutation(of_order, len(images))

  def mix(array):
    lam = share.astype(array.dtype)
    return lam * array + (1 - lam) * array[order]

  return mix(images), mix(labels)


def random_resized_crop(
  key: jax.Array,
  images: jax.Array,
  side: int,
  area: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
  """A random rectangle of each image, made a square of `side`: `[n, side, side, channels]`.

  The rectangle's share of the area is uniform in `area`, the logarithm of width over height uniform
  in `ratio` (Szegedy et al. 2015, "Going Deeper with Convolutions", section 6). One that is too
  high or too wide is cut to the image: `photographs.random_resized_crop`, for workers, draws again.
  Scaled by a triangle filter, as wide as an output pixel where the image is made smaller.
  """
  n, height, width, channels = images.shape
  of_area, of_ratio, of_place = jax.random.split(key, 3)
  pixels = height * width * jax.random.uniform(of_area, (n, 1), minval=area[0], maxval=area[1])
  low, high = map(math.log, ratio)
  stretch = jnp.exp(jax.random.uniform(of_ratio, (n, 1), minval=low, maxval=high))
  size = jnp.sqrt(jnp.concatenate([pixels / stretch, pixels * stretch], axis=1))
  size = jnp.minimum(size, jnp.array([[height, width]], size.dtype))  # [n, 2]
  room = jnp.array([[height, width]], size.dtype) - size
  corner = room * jax.random.uniform(of_place, (n, 2))

  def cut(image, corner, size):
    scale = side / size
    shape = (side, side, channels)
    return jax.image.scale_and_translate(image, shape, (0, 1), scale, -corner * scale, "linear")

  crops = jax.vmap(cut)(images.astype(size.dtype), corner, size)
  if jnp.issubdtype(images.dtype, jnp.integer):
    limits = jnp.iinfo(images.dtype)
    crops = jnp.clip(jnp.round(crops), limits.min, limits.max)
  return crops.astype(images.dtype)


def mean_over_views(
  logits: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  views: Literal["one", "mirrored", "shifted"],
) -> jax.Array:
  """The logits of each image, a mean over views of it: test-time augmentation.

  As in Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv:2404.00498), and its
  code.

  Args:
    logits: of a batch of images.
    images: a batch.
    views: "one", the image; "mirrored", the image and its mirror image; "shifted", these two with
      half of the weight, and both of the image shifted by one pixel, up-left and down-right, with
      the other half. What a shift uncovers is the image's reflection, its edge not twice.
  """
  if views == "one":
    return logits(images)

  def mirrored(own):
    return 0.5 * logits(own) + 0.5 * logits(own[:, :, ::-1])

  if views == "mirrored":
    return mirrored(images)
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
  shifted = 0.5 * mirrored(padded[:, :-2, :-2]) + 0.5 * mirrored(padded[:, 2:, 2:])
  return 0.5 * mirrored(images) + 0.5 * shifted
