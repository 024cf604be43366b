"""Long-tailed versions of balanced sets: CIFAR-10-LT and CIFAR-100-LT."""

import numpy as np

from experiments.data.images import Data, with_moments


def class_counts(largest: int, classes: int, imbalance: float) -> list[int]:
  """Examples of each class: an exponential from `largest` down to `largest / imbalance`.

  Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", section 5; rounded
  down, as in the authors' code (richardaecn/class-balanced-loss) and that of LDAM (Cao et al. 2019,
  kaidic/LDAM-DRW), which others build on.
  """
  share = 1 / imbalance
  return [int(largest * share ** (c / (classes - 1.0))) for c in range(classes)]


def long_tailed(data: Data, imbalance: float, seed: int = 0) -> Data:
  """The training images thinned out, class by class; the test images stay balanced.

  Args:
    data: a balanced set, as `load("cifar10")`.
    imbalance: the largest class over the smallest: 10, 50 and 100 in the papers.
    seed: of the choice. Of each class the first ones of a shuffle are kept, so that of one seed
      the images at a higher imbalance are among those at a lower one.

  Returns:
    `data` with fewer training images, ordered by class, and their own mean and deviation.

  Raises:
    ValueError: where `imbalance` is below 1, or a class has too few images for the profile.
  """
  if imbalance < 1:
    raise ValueError(f"{imbalance=}: the largest class over the smallest is at least 1.")
  labels = data.train_labels
  counts = class_counts(len(labels) // data.classes, data.classes, imbalance)
  there = np.bincount(labels, minlength=data.classes)
  if (there < counts).any():
    few = int(np.argmax(there < counts))
    raise ValueError(f"Class {few} has {there[few]} images, of which {counts[few]} are to be kept.")
  rng = np.random.default_rng(seed)
  kept = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(counts)]
  chosen = np.concatenate(kept)
  return with_moments(
    data.train_images[chosen],
    labels[chosen],
    data.test_images,
    data.test_labels,
    data.classes,
  )
