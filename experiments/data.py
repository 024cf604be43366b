"""Data sets as NumPy arrays: the embedded digits, and prepared TFDS folders."""

import pathlib
from typing import NamedTuple

import numpy as np

DIGITS = pathlib.Path(__file__).parent / "datasets" / "digits.npz"


class Data(NamedTuple):
  """Images as stored (uint8 `[n, height, width, channels]`), classes, and what normalises them."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  mean: np.ndarray  # of the training images, by channel
  std: np.ndarray
  classes: int


def load(name: str, data_dir: str | None = None) -> Data:
  """Reads a data set whole: `"digits"`, or any TFDS image classification set prepared on disk."""
  if name == "digits":
    return _digits()
  train, classes = _read(name, "train", data_dir)
  test, _ = _read(name, "test", data_dir)
  return _with_moments(*train, *test, classes)


def holdout(data: Data, fraction: float = 0.2, seed: int = 0) -> Data:
  """The training part alone, `fraction` of it in the place of the test part: for tuning."""
  order = np.random.default_rng(seed).permutation(len(data.train_labels))
  held, kept = np.split(order, [round(fraction * len(order))])
  images, labels = data.train_images, data.train_labels
  return _with_moments(images[kept], labels[kept], images[held], labels[held], data.classes)


def _digits() -> Data:
  with np.load(DIGITS) as file:
    images, labels = file["images"][..., None], file["labels"].astype(np.int32)
  order = np.random.default_rng(0).permutation(len(labels))
  test, train = np.split(order, [360])
  return _with_moments(images[train], labels[train], images[test], labels[test], 10)


def _with_moments(train_images, train_labels, test_images, test_labels, classes) -> Data:
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


def _read(name: str, split: str, data_dir: str | None):
  """`((images, labels), classes)` of one split, decoded once."""
  try:
    import tensorflow_datasets as tfds

    # Never by TFDS's own download: it would fetch and prepare TFRECORD files, which need
    # TensorFlow to write and which `data_source` cannot read.
    source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    examples = source.__getitems__(range(len(source)))
  except ImportError as error:
    raise SystemExit(
      f"Reading {name!r} needs the packages of the `experiments` extra ({error}).\n"
      "Install them with: pip install 'fop_optax[experiments]'"
    ) from error
  # No folder of that name, no split in it, or files of another format than ArrayRecord.
  except (NotImplementedError, KeyError, ValueError, OSError) as error:
    raise SystemExit(_how_to_prepare(name, data_dir, error)) from error
  images = np.stack([example["image"] for example in examples])
  labels = np.array([example["label"] for example in examples], np.int32)
  return (images, labels), source.dataset_info.features["label"].num_classes


def _how_to_prepare(name: str, data_dir: str | None, error: Exception) -> str:
  folder = "" if data_dir is None else f", data_dir={data_dir!r}"
  reason = (str(error).splitlines() or [""])[0]
  return f"""\
The data set {name!r} is not there as ArrayRecord files ({type(error).__name__}: {reason}).
Prepare it once, with network access (TensorFlow is needed for this step alone):

  pip install 'fop_optax[experiments]' tensorflow
  python -c "import tensorflow_datasets as tfds; \\
    tfds.builder({name!r}, file_format='array_record'{folder}).download_and_prepare()"

It is looked for in --data-dir, else in $TFDS_DATA_DIR, else in ~/tensorflow_datasets."""
