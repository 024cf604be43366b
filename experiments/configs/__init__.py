"""Configurations by name: one file each, which says what it reproduces and how its values came."""

import dataclasses
import importlib
import itertools
import pkgutil
from typing import Literal

from experiments.networks import AnyNetwork
from experiments.optimizers import (
  TABLE,
  AdamW,
  Ekfac,
  FisherSoap,
  Fop,
  Kfac,
  KfacPolar,
  Muon,
  Neumann,
  Sgd,
  Shampoo,
  Soap,
  SoapMuon,
)
from experiments.parts import Parts


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment: data, model, budget, and each optimizer's hyperparameters."""

  dataset: str  # "digits" (embedded), a TFDS image set, "shakespeare", "byte_pairs", or "mock"
  model: AnyNetwork  # and its sizes
  batch_size: int  # examples a step; what is left of an epoch is dropped
  epochs: int  # passes over the training examples; of a text, of `steps_per_epoch` steps each
  target: float  # of the test accuracy, or of the loss
  metric: Literal["test_accuracy", "test_loss"] = "test_accuracy"  # what the target is of
  imbalance: float = 1.0  # of a long tail: the largest class over the smallest
  examples: int = 0  # training images that are used, drawn once; 0: all
  # In this order. "flip" draws anew in each epoch; "alternating_flip" draws once for each image in
  # which epochs it is mirrored, the even or the odd ones.
  augmentation: tuple[Literal["flip", "alternating_flip", "crop", "shift", "cutout"], ...] = ()
  # What the logits of a test image are a mean over: the image; it and its mirror image; these two
  # and, each with half their weight, both shifted by one pixel up-left and down-right.
  views: Literal["one", "mirrored", "shifted"] = "one"
  mixup: float = 0.0  # alpha of the Beta distribution; 0: none
  side: int = 0  # pixels of photographs that are streamed; 0: small images, that live on the device
  classes: tuple[str, ...] = ()  # of photographs, which are used; none: all
  workers: int | None = None  # processes that read and decode; by default as many as pay
  files: tuple[str, ...] = ()  # of a corpus in byte pairs: text, JSON lines, either gzipped
  vocabulary: int = 50_257  # to train on them
  tokenizer: str | None = None  # a tokenizer.json in place of that
  length: int = 0  # tokens of an example of text
  steps_per_epoch: int = 0  # of a text
  held_out: int = 50_000  # tokens at the start of the validation part that are evaluated on
  precision: Literal["float32", "bfloat16"] = "float32"  # that the model computes in
  # Of the rate. "step": a tenth at half, a hundredth at three quarters; "staircase": `stair` times
  # it every `stair_epochs`; "plateau": halved where an epoch's loss has not come down for two.
  schedule: Literal[
    "cosine", "linear", "exponential", "step", "staircase", "plateau", "constant"
  ] = "cosine"
  stair: float = 0.3
  stair_epochs: float = 40.0
  warmup: float = 0.1  # share of the steps in which the rate rises
  label_smoothing: float = 0.0  # share of a label that is spread over all classes
  batch_sizes: tuple[int, ...] = ()  # more than one to compare, in place of `batch_size`
  scale_rate: Literal["none", "linear", "sqrt"] = "none"  # of the rate with these over `batch_size`
  average: float = 0.0  # weight of the past in an average of the weights that is evaluated; 0: none
  # Whether an epoch is one call of a compiled loop. That is for tiny networks, whose steps are
  # shorter than calls; on the CPU, XLA's convolutions in a loop take several times as long.
  looped: bool = False
  # How parameters are divided between the optimizer that is compared and SGD; none: all are its.
  parts: Parts | None = None
  micro_batches: int = 1  # pieces a batch is worked off in, for less memory
  trials: int = 0  # points that `tune` draws from the grid's box for each optimizer; 0: the grid
  seeds: int = 5  # runs of each optimizer; a seed is the same weights and batches for all
  first_seed: int = 0  # seeds count from here
  optimizers: tuple[str, ...] = ("sgd", "adamw", "muon", "soap", "kfac", "fop")  # which to run
  sgd: Sgd = Sgd()
  adamw: AdamW = AdamW()
  muon: Muon = Muon()
  soap: Soap = Soap()
  soap_muon: SoapMuon = SoapMuon()
  soap_fisher: FisherSoap = FisherSoap()
  shampoo: Shampoo = Shampoo()
  neumann: Neumann = Neumann()
  kfac: Kfac = Kfac()
  kfac_polar: KfacPolar = KfacPolar()
  ekfac: Ekfac = Ekfac()
  fop: Fop = Fop()
  diagnostics: bool = False  # whether each epoch's curvature is kept, layer by layer
  tensorboard: bool = False  # whether numbers are written for TensorBoard too
  checkpoint_seconds: float = 60.0  # of training between two checkpoints, at the end of an epoch
  data_dir: str | None = None  # where TFDS folders are; else $TFDS_DATA_DIR
  out: str = "results"  # folder for all that is written

  def __post_init__(self):
    if unknown := [name for name in self.optimizers if name not in TABLE]:
      raise ValueError(f"unknown optimizers {unknown}: any of {', '.join(TABLE)}")
    for name in ("batch_size", "epochs", "micro_batches", "seeds"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} should be 1 or more")
    if sum(name in ("flip", "alternating_flip") for name in self.augmentation) > 1:
      raise ValueError(
        f"augmentation={self.augmentation} should have one of flip and alternating_flip, once"
      )


# Fields that say where and how often a run is made, and not what it is.
AROUND = (
  *("batch_sizes", "scale_rate", "trials", "seeds", "first_seed", "optimizers", "target"),
  *("checkpoint_seconds", "data_dir", "workers", "out", "diagnostics", "tensorboard"),
)
NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


# Where a configuration has none of its own.
GRID: dict[str, dict[str, tuple[float, ...]]] = {
  "sgd": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "weight_decay": (0.0, 5e-4)},
  "adamw": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (1e-2, 1e-1)},
  "muon": {"learning_rate": (0.01, 0.03, 0.1, 0.3), "weight_decay": (0.0, 1e-1)},
  "soap": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (1e-2, 1e-1)},
  "soap_muon": {"learning_rate": (0.01, 0.03, 0.1, 0.3), "weight_decay": (0.0, 1e-1)},
  "soap_fisher": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (1e-2, 1e-1)},
  "shampoo": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 1e-1)},
  "neumann": {"learning_rate": (0.01, 0.03, 0.1, 0.3), "weight_decay": (0.0, 5e-4)},
  "kfac": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "weight_decay": (0.0, 1e-1)},
  "kfac_polar": {"learning_rate": (0.01, 0.03, 0.1, 0.3), "weight_decay": (0.0, 1e-1)},
  "ekfac": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "weight_decay": (0.0, 1e-1)},
  "fop": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "weight_decay": (0.0, 1e-1)},
}


def by_batch_size(config: Config) -> list[Config]:
  """The configurations of all `batch_sizes`, with their rates."""
  out = []
  for size in config.batch_sizes or (config.batch_size,):
    ratio = size / config.batch_size
    factor = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[config.scale_rate]
    scaled = {
      name: dataclasses.replace(own, learning_rate=factor * own.learning_rate)
      for name in TABLE
      for own in [getattr(config, name)]
    }
    out.append(dataclasses.replace(config, batch_size=size, batch_sizes=(), **scaled))
  return out


def check_pieces(config: Config, optimizers: tuple[str, ...]) -> None:
  """Raises SystemExit if an optimizer cannot divide a batch into its groups and micro-batches."""
  for own, name in itertools.product(by_batch_size(config), optimizers):
    pieces = (TABLE[name].groups or 1) * config.micro_batches
    if own.batch_size % pieces:
      raise SystemExit(
        f"--batch-size {own.batch_size}: {TABLE[name].title} needs a multiple of {pieces}, of"
        f" groups={pieces // config.micro_batches} times micro_batches={config.micro_batches}."
      )


def load(name: str) -> tuple[Config, dict[str, dict[str, tuple[float, ...]]]]:
  """The configuration `name`, and the grid that `tune` searches for it."""
  module = importlib.import_module(f"experiments.configs.{name}")
  return module.CONFIG, getattr(module, "GRID", GRID)


def described(name: str) -> str:
  """The first line of what a configuration says of itself."""
  module = importlib.import_module(f"experiments.configs.{name}")
  return (module.__doc__ or "").strip().splitlines()[0]
