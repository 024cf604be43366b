"""Optimizers of the comparison: one dataclass each, its fields the hyperparameters."""

import dataclasses
from typing import Any, ClassVar

import optax

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


# Name -> dataclass. `groups` says what the gradient must bring along: None, the mean gradient
# alone; else that of `fop_optax.capture`, with its statistics, from as many groups of examples.
TABLE = {"sgd": Sgd, "adamw": AdamW}
