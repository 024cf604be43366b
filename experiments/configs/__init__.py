"""Configurations by name: one file each, with how its values were chosen."""

import dataclasses
import importlib

from experiments.optimizers import TABLE, AdamW, Fop, Kfac, Sgd

NAMES = ("digits_mlp", "cifar10_mlp", "fashion_mnist_mlp")


@dataclasses.dataclass(frozen=True)
class Compare:
  """One comparison: data, model, budget, and each optimizer's hyperparameters."""

  dataset: str  # "digits" (embedded), or the name of a TFDS image classification set
  hidden: tuple[int, ...]  # widths of the hidden layers
  batch_size: int  # examples a step; what is left of an epoch is dropped
  epochs: int  # passes over the training images
  target: float  # test accuracy to reach
  warmup: float = 0.1  # share of the steps in which the rate rises
  seeds: int = 5  # runs of each optimizer; a seed is the same weights and batches for all
  first_seed: int = 0  # seeds count from here
  optimizers: tuple[str, ...] = tuple(TABLE)  # which of them to run
  sgd: Sgd = Sgd()
  adamw: AdamW = AdamW()
  kfac: Kfac = Kfac()
  fop: Fop = Fop()
  data_dir: str | None = None  # where TFDS folders are; else $TFDS_DATA_DIR
  out: str = "results"  # folder for the CSV, JSON and PNG files


def load(name: str) -> tuple[Compare, dict[str, dict[str, tuple[float, ...]]]]:
  """The configuration `name`, and the grid that `tune` searches for it."""
  module = importlib.import_module(f"experiments.configs.{name}")
  return module.CONFIG, module.GRID
