"""Optimizers of the comparison: one dataclass each, its fields the hyperparameters."""

import dataclasses
from typing import Any, ClassVar

import optax

import fop_optax

Schedule = optax.Schedule


@dataclasses.dataclass(frozen=True)
class Sgd:
  """Stochastic gradient descent with heavy-ball momentum."""

  learning_rate: float = 0.1  # peak of the schedule
  momentum: float = 0.9  # weight of the past step

  title: ClassVar[str] = "SGD"
  groups: ClassVar[int | None] = None

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    del layers
    return optax.sgd(schedule, momentum=self.momentum)


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay."""

  learning_rate: float = 1e-3  # peak of the schedule
  weight_decay: float = 1e-2  # decoupled, multiplied by the rate
  b1: float = 0.9  # decay of the first moment
  b2: float = 0.999  # decay of the second moment

  title: ClassVar[str] = "AdamW"
  groups: ClassVar[int | None] = None

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    del layers
    return optax.adamw(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Kfac:
  """K-FAC: the mean gradient, preconditioned. Where a field is None the library's default holds."""

  learning_rate: float = 0.1  # peak of the schedule
  damping: float | None = None  # added to the Fisher, split between its factors
  relative_damping: float | None = None  # the same, in units of each block's mean eigenvalue
  norm_constraint: float | None = None  # of the step's squared length in the Fisher
  momentum: float = 0.9  # weight of the past step
  decay: float = 0.95  # of the running factors, a refresh
  curvature_update_period: int | None = None  # steps between refreshes of factors and inverses

  title: ClassVar[str] = "K-FAC"
  groups: ClassVar[int | None] = 1

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.kfac(layers=layers, **self.given(schedule))

  def given(self, schedule: Schedule) -> dict[str, Any]:
    """The arguments that are not left to the library."""
    values = dataclasses.asdict(self) | {"learning_rate": schedule}
    return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Fop(Kfac):
  """FOP: K-FAC, with the part of the halves' difference that is Fisher-orthogonal to the mean."""

  title: ClassVar[str] = "FOP"
  groups: ClassVar[int | None] = 2

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.fop(layers=layers, **self.given(schedule))


# Name -> dataclass. `groups` says what the gradient must bring along: None, the mean gradient
# alone; else that of `fop_optax.capture`, with its statistics, from as many groups of examples.
TABLE = {"sgd": Sgd, "adamw": AdamW, "kfac": Kfac, "fop": Fop}
