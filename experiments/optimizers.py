"""Optimizers of the experiments: one dataclass each, its fields the hyperparameters.

A field that is None is left to the library. What a gradient must bring along stands beside the
fields: `groups` is None where the mean gradient is enough, else that of `fop_optax.capture`, whose
statistics come with it.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

import fop_optax

Schedule = optax.Schedule


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """What all of them have."""

  learning_rate: float = 0.1  # peak of the schedule
  rest: float = 1.0  # times the rates of what it is not given, where parameters are divided

  title: ClassVar[str]
  groups: ClassVar[int | None] = None
  basis: ClassVar[bool] = False  # whether statistics are measured in the state's eigenbases
  always: ClassVar[bool] = False  # whether statistics come at every step, not when they are due

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    """The transformation, whose rate follows `schedule`."""
    raise NotImplementedError

  def evaluated(self, params: Any, state: Any) -> Any:
    """The parameters that count, of those that are trained and the optimizer's state."""
    del state
    return params

  def given(self, schedule: Schedule) -> dict[str, Any]:
    """The arguments that are not left to the library."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    values["learning_rate"] = schedule
    del values["rest"]
    return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Sgd(Optimizer):
  """Stochastic gradient descent with heavy-ball momentum."""

  momentum: float = 0.9  # weight of the past step
  nesterov: bool = False  # whether momentum looks ahead
  weight_decay: float = 0.0  # added to the gradient, as the papers' baselines have it

  title: ClassVar[str] = "SGD"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    del layers
    sgd = optax.sgd(schedule, momentum=self.momentum, nesterov=self.nesterov)
    return optax.chain(optax.add_decayed_weights(self.weight_decay, is_matrix), sgd)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
  """Adam with decoupled weight decay."""

  learning_rate: float = 1e-3  # peak of the schedule
  weight_decay: float = 1e-2  # decoupled, multiplied by the rate
  b1: float = 0.9  # decay of the first moment
  b2: float = 0.999  # decay of the second moment

  title: ClassVar[str] = "AdamW"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    del layers
    return optax.adamw(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
  """optax's Muon, each matrix as `capture` finds it; AdamW for what is in no layer."""

  learning_rate: float = 0.03  # peak of the schedule
  weight_decay: float = 0.0  # decoupled, multiplied by the rate
  beta: float = 0.95  # weight of the past in momentum

  title: ClassVar[str] = "Muon"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return optax.contrib.muon(
      schedule,
      beta=self.beta,
      weight_decay=self.weight_decay,
      muon_weight_dimension_numbers=fop_optax.dimension_numbers(layers),
    )


@dataclasses.dataclass(frozen=True)
class Soap(Optimizer):
  """SOAP: Adam in the eigenbasis of the gradients' second moments."""

  learning_rate: float = 0.01  # peak of the schedule
  weight_decay: float = 1e-2  # decoupled, multiplied by the rate
  b1: float = 0.95  # decay of the first moment
  b2: float = 0.95  # decay of the second moment
  inverse_update_period: int | None = None  # steps between refreshes of the bases

  title: ClassVar[str] = "SOAP"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.soap(layers=layers, **self.given(schedule))


@dataclasses.dataclass(frozen=True)
class SoapMuon(Soap):
  """The polar factor of SOAP's direction (Vyas), each matrix as `capture` finds it."""

  learning_rate: float = 0.03  # peak of the schedule

  title: ClassVar[str] = "SOAP-Muon"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    options = self.given(schedule)
    del options["learning_rate"], options["weight_decay"]
    return optax.chain(
      fop_optax.scale_by_soap(layers=layers, **options),
      fop_optax.orthogonalize(layers=layers),
      optax.add_decayed_weights(self.weight_decay, is_matrix),
      optax.scale_by_learning_rate(schedule),
    )


@dataclasses.dataclass(frozen=True)
class FisherSoap(Soap):
  """Adam in the eigenbasis of K-FAC's factors (ours): SOAP with those in place of its own."""

  title: ClassVar[str] = "SOAP, Fisher basis"
  groups: ClassVar[int | None] = 1
  always: ClassVar[bool] = True

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.soap(layers=layers, fisher=True, **self.given(schedule))


@dataclasses.dataclass(frozen=True)
class Shampoo(Optimizer):
  """Shampoo with Adam's step length."""

  learning_rate: float = 0.01  # peak of the schedule
  weight_decay: float | None = None
  inverse_update_period: int | None = None  # steps between refreshes of the roots

  title: ClassVar[str] = "Shampoo"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.shampoo(layers=layers, **self.given(schedule))


@dataclasses.dataclass(frozen=True)
class Neumann(Optimizer):
  """The Neumann optimizer."""

  learning_rate: float = 0.1  # peak of the schedule
  weight_decay: float = 0.0  # added to the gradient
  sgd_epochs: float = 5.0  # of plain SGD at first
  reset_epochs: float = 10.0  # until the series starts anew, then twice as many, ...
  steps_per_epoch: int = 0  # those of the run, which fills them in

  title: ClassVar[str] = "Neumann"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    del layers
    return fop_optax.neumann(
      schedule,
      self.steps_per_epoch,
      weight_decay=self.weight_decay,
      num_sgd_steps=self._steps(self.sgd_epochs),
      reset_period=self._steps(self.reset_epochs),
    )

  def evaluated(self, params: Any, state: Any) -> Any:
    return fop_optax.neumann_eval_params(state, params)

  def _steps(self, epochs: float) -> Any:
    return jnp.maximum(jnp.round(epochs * self.steps_per_epoch), 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Kfac(Optimizer):
  """K-FAC: the mean gradient, preconditioned."""

  damping: float | None = None  # added to the Fisher, split between its factors
  relative_damping: float | None = None  # the same, in units of each block's mean eigenvalue
  norm_constraint: float | None = None  # of the step's squared length in the Fisher
  momentum: float = 0.9  # weight of the past step
  weight_decay: float | None = None  # decoupled, multiplied by the rate
  decay: float = 0.95  # of the running factors, a refresh
  curvature_update_period: int | None = None  # steps between refreshes of factors and inverses

  title: ClassVar[str] = "K-FAC"
  groups: ClassVar[int | None] = 1

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.kfac(layers=layers, **self.given(schedule))


@dataclasses.dataclass(frozen=True)
class KfacPolar(Kfac):
  """The polar factor of K-FAC's direction (ours), each matrix as `capture` finds it."""

  learning_rate: float = 0.03  # peak of the schedule

  title: ClassVar[str] = "K-FAC, polar"

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    options = self.given(schedule)
    momentum, decay = options.pop("momentum"), options.pop("weight_decay", 0.0)
    del options["learning_rate"]
    return optax.chain(
      fop_optax.scale_by_kfac(layers, **options),
      optax.trace(momentum),
      fop_optax.orthogonalize(layers=layers),
      optax.add_decayed_weights(decay, is_matrix),
      optax.scale_by_learning_rate(schedule),
    )


@dataclasses.dataclass(frozen=True)
class Ekfac(Kfac):
  """EKFAC: K-FAC's eigenbasis, with second moments that are measured in it."""

  title: ClassVar[str] = "EKFAC"
  basis: ClassVar[bool] = True

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.kfac(layers=layers, scaling="eigenvalue", **self.given(schedule))


@dataclasses.dataclass(frozen=True)
class Fop(Kfac):
  """FOP: K-FAC, with the part of the halves' difference that is Fisher-orthogonal to the mean."""

  title: ClassVar[str] = "FOP"
  groups: ClassVar[int | None] = 2

  def make(self, schedule: Schedule, layers: Any) -> optax.GradientTransformation:
    return fop_optax.fop(layers=layers, **self.given(schedule))


def is_matrix(params: Any) -> Any:
  """Which leaves decay where biases and normalisations do not."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


# Name -> dataclass: what `--optimizers` takes.
TABLE: dict[str, type[Optimizer]] = {
  "sgd": Sgd,
  "adamw": AdamW,
  "muon": Muon,
  "soap": Soap,
  "soap_muon": SoapMuon,
  "soap_fisher": FisherSoap,
  "shampoo": Shampoo,
  "neumann": Neumann,
  "kfac": Kfac,
  "kfac_polar": KfacPolar,
  "ekfac": Ekfac,
  "fop": Fop,
}
