"""The optimizers of the sweep, and what it compares beside them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import fop_optax

RATE = 0.1  # of K-FAC and FOP
ADAM_RATE = 0.01  # of methods whose steps are of the size of Adam's
POLAR_RATE = 0.03  # of matrices whose singular values are all one
FALLING = optax.exponential_decay(0.3, 20, 1 / 3, end_value=0.1)  # a bound that is loose at first


class Method(NamedTuple):
  """An optimizer of the sweep.

  Attributes:
    make: rate schedule, layers -> optimizer.
    rates: peaks of the schedule; of a method that is not tuned the second is the one that counts.
    groups: of examples, as `fop_optax.capture` takes them; None: no capture.
    fisher: as `fop_optax.capture` takes it.
    sharing: likewise.
    eigenvalue: whether it takes the second moments of examples' gradients (EKFAC).
    tuned: whether the best rate counts, workload by workload.
  """

  make: Callable[[optax.Schedule, Any], optax.GradientTransformation]
  rates: tuple[float, ...]
  groups: int | None = None
  fisher: str = "empirical"
  sharing: str = "expand"
  eigenvalue: bool = False
  tuned: bool = False


def _around(rate: float) -> tuple[float, ...]:
  return rate / 3, rate, 3 * rate


def _kfac(fisher="empirical", sharing="expand", **options):
  make = lambda rate, layers: fop_optax.kfac(rate, layers, **options)
  eigenvalue = options.get("scaling") == "eigenvalue"
  return Method(make, _around(RATE), 1, fisher, sharing, eigenvalue)


def _then_polar(direction, groups=None):
  """The polar factor of what `direction(layers)` makes; momentum is `direction`'s."""

  def make(schedule, layers):
    polar = fop_optax.orthogonalize(layers=layers)
    return optax.chain(direction(layers), polar, optax.scale_by_learning_rate(schedule))

  return Method(make, _around(POLAR_RATE), groups=groups)


def _kfac_direction(layers):
  kfac = fop_optax.scale_by_kfac(layers, relative_damping=1e-2)
  return optax.chain(kfac, optax.trace(0.9))


def _gradient_only(optimizer, rate=ADAM_RATE, **options):
  return Method(lambda schedule, _: optimizer(schedule, **options), _around(rate))


def _neumann(schedule):
  """Behind a clip, as the method has no bound of its own on what a steep start does to a step."""
  clip = optax.clip_by_global_norm(1.0)
  return optax.chain(clip, fop_optax.neumann(schedule, steps_per_epoch=1))


TABLE = {
  "AdamW": Method(lambda rate, _: optax.adamw(rate), (3e-3, 1e-2, 3e-2, 1e-1), tuned=True),
  "Muon": Method(lambda rate, _: optax.contrib.muon(rate), (1e-2, 3e-2, 1e-1, 3e-1), tuned=True),
  "K-FAC": _kfac(),
  "FOP": Method(lambda rate, layers: fop_optax.fop(rate, layers), _around(RATE), groups=2),
}
OTHERS = {
  "SOAP": _gradient_only(fop_optax.soap),
  "SOAP every step": _gradient_only(fop_optax.soap, inverse_update_period=1),
  "KL-SOAP": _gradient_only(fop_optax.soap, rate=0.03, kl=True, correct_bias=False),
  "Shampoo": _gradient_only(fop_optax.shampoo),
  "EKFAC": _kfac(scaling="eigenvalue"),
  "K-FAC then polar": _then_polar(_kfac_direction, groups=1),
  "SOAP then polar": _then_polar(lambda _: fop_optax.scale_by_soap(inverse_update_period=1)),
  "Neumann": _gradient_only(_neumann, rate=0.3),
}
# What the defaults were chosen from, and what else is on offer: the model's own Fisher in place of
# the empirical one, the rows of an example added up.
VARIANTS = {
  "K-FAC damping 0.1": _kfac(relative_damping=0.1),
  "K-FAC damping 0.3": _kfac(relative_damping=0.3),
  "K-FAC constraint 0.03": _kfac(norm_constraint=0.03),
  "K-FAC constraint 0.3": _kfac(norm_constraint=0.3),
  "K-FAC constraint falling": _kfac(norm_constraint=FALLING),
  "K-FAC decay 0.1": _kfac(weight_decay=0.1),
  "K-FAC every step": _kfac(curvature_update_period=1),
  "K-FAC every 10": _kfac(curvature_update_period=10),
  "K-FAC sampled": _kfac("sampled"),
  "K-FAC sampled every step": _kfac("sampled", curvature_update_period=1),
  "K-FAC sampled every 10": _kfac("sampled", curvature_update_period=10),
  "K-FAC factors in bfloat16": _kfac(factor_dtype=jnp.bfloat16),
  "K-FAC reduce": _kfac(sharing="reduce"),
}
METHODS = TABLE | OTHERS | VARIANTS
MARKED = "sampled", "exact"  # values of `fisher` that need a marked loss
