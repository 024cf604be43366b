"""Small sets of images, decoded once: arrays that can live on the device."""

import pathlib
from typing import NamedTuple

import numpy as np

from experiments.data import cache, folders

DIGITS = pathlib.Path(__file__).parents[1] / "datasets" / "digits.npz"
# Photographs are of many sizes. These are made square, of so many pixels a side.
SIDES = {"caltech101": 80, "caltech101_80px": 80}


class Data(NamedTuple):
  """Images as stored (uint8 `[n, height, width, channels]`), classes, and what normalises them."""

  train_images: np.ndarray
  train_labels: np.ndarray  # int32 [n], from 0
  test_images: np.ndarray
  test_labels: np.ndarray
  mean: np.ndarray  # of the training images, by channel
  std: np.ndarray
  classes: int


def load(name: str, data_dir: str | None = None, side: int | None = None) -> Data:
  """Reads a data set whole, decoding it at the first time (`cache.folder`).

  Args:
    name: `"digits"` (embedded), `"mnist"`, `"fashion_mnist"`, `"cifar10"`, `"cifar100"`,
      `"caltech101"`, or any other TFDS image classification set prepared on disk.
    data_dir: where they are: see `folders.root`.
    side: pixels. Images are scaled until the shorter side has so many, and the middle is kept. By
      default they stay as they are, but for the photographs of `SIDES`.

  Raises:
    SystemExit: with what to do, where the set or the packages that read it are not there.
  """
  if name == "digits":
    return _digits()
  source = folders.open_source(name, "train", data_dir)
  side = side or SIDES.get(name.split(":")[0])
  if side is None and None in source.dataset_info.features["image"].shape:
    raise SystemExit(f"The images of {name!r} are of many sizes: choose one with `side`.")
  split = folders.evaluation_split(source)
  train = _decoded(source, "train", side)
  test = _decoded(folders.open_source(name, split, data_dir), split, side)
  return with_moments(*train, *test, source.dataset_info.features["label"].num_classes)


def holdout(data: Data, fraction: float = 0.2, seed: int = 0) -> Data:
  """The training part alone, `fraction` of it in the place of the test part: for tuning."""
  order = np.random.default_rng(seed).permutation(len(data.train_labels))
  held, kept = np.split(order, [round(fraction * len(order))])
  images, labels = data.train_images, data.train_labels
  return with_moments(images[kept], labels[kept], images[held], labels[held], data.classes)


def subset(data: Data, examples: int, seed: int = 0) -> Data:
  """`data` with so many of its training images, drawn once."""
  if examples > len(data.train_labels):
    raise SystemExit(f"--examples {examples}: there are {len(data.train_labels)} training images.")
  kept = np.random.default_rng(seed).permutation(len(data.train_labels))[:examples]
  images, labels = data.train_images[kept], data.train_labels[kept]
  return with_moments(images, labels, data.test_images, data.test_labels, data.classes)


def with_moments(train_images, train_labels, test_images, test_labels, classes: int) -> Data:
  """`Data` of these arrays, with the mean and deviation of `train_images`."""
  # Sums of bytes and of their squares are exact in int64, and make no float copy of the images.
  counts = np.stack(
    [np.bincount(plane.ravel(), minlength=256) for plane in np.moveaxis(train_images, -1, 0)]
  )
  values = np.arange(256)
  mean = counts @ values / counts.sum(1)
  std = np.sqrt(counts @ values**2 / counts.sum(1) - mean**2)
  return Data(
    train_images,
    train_labels,
    test_images,
    test_labels,
    mean.astype(np.float32),
    std.astype(np.float32),
    classes,
  )


def _digits() -> Data:
  with np.load(DIGITS) as file:
    images, labels = file["images"][..., None], file["labels"].astype(np.int32)
  order = np.random.default_rng(0).permutation(len(labels))
  test, train = np.split(order, [360])
  return with_moments(images[train], labels[train], images[test], labels[test], 10)


def _decoded(source, split: str, side: int | None) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels of one split, from the cache or into it."""
  from experiments.data import photographs

  def make():
    examples = source.__getitems__(range(len(source)))
    one = photographs.decode if side is None else lambda e: photographs.centre_crop(e, side)
    return {
      "images": np.stack([one(example["image"]) for example in examples]),
      "labels": np.array([example["label"] for example in examples], np.int32),
    }

  key = folders.key(source, split) + ("" if side is None else f"-{side}px")
  stored = cache.arrays(key, make)
  return stored["images"], stored["labels"]
