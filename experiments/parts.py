"""The speed runs' division: filters for the optimizer that is compared, SGD for the rest."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import optax

from experiments.optimizers import Optimizer
import fop_optax


@dataclasses.dataclass(frozen=True)
class Parts:
  """Rates are of the mean loss: the recipe's, of the sum, times its batch of 2,000.

  SGD has Nesterov's momentum. Weight decay is that of a step at the full rate, whatever the rate.
  """

  relative: bool = True  # whether steps of filters are `learning_rate` of their norm: `hyperball`
  head: float = 1340.0  # rate of the last layer
  biases: float = 106.0  # of all vectors
  momentum: float = 0.85  # weight of the past step
  weight_decay: float = 4e-3  # a step
  whitening_epochs: float = 3.0  # in which the bias of the first layer is trained


def label(path: Any, leaf: Any) -> str:
  """Which part a parameter belongs to."""
  if leaf.ndim > 2:
    return "filters"
  if leaf.ndim == 2:
    return "head"
  return "whitening" if "whitening" in jax.tree_util.keystr(path) else "biases"


def divided(
  parts: Parts,
  hyper: Optimizer,
  layers: Any,
  schedule: Callable[[Any], optax.Schedule],
  steps_per_epoch: int,
) -> optax.GradientTransformation:
  """Filters by `hyper`, the rest by SGD, whose rates `hyper.rest` multiplies."""
  if parts.relative:
    filters = optax.chain(
      hyper.make(optax.constant_schedule(1.0), layers),
      optax.scale(-1.0),
      fop_optax.hyperball(schedule(hyper.learning_rate), layers=layers),
    )
  else:
    filters = hyper.make(schedule(hyper.learning_rate), layers)

  def sgd(rate, schedule):
    decay = optax.add_decayed_weights(parts.weight_decay)
    step = optax.sgd(schedule(1.0), momentum=parts.momentum, nesterov=True)
    return optax.chain(optax.scale(rate), decay, step)

  head, biases = hyper.rest * parts.head, hyper.rest * parts.biases
  whitening = round(parts.whitening_epochs * steps_per_epoch)
  transforms = {
    "filters": filters,
    "head": sgd(head, schedule),
    "biases": sgd(biases, schedule),
    "whitening": sgd(biases, lambda rate: optax.linear_schedule(rate, 0.0, whitening)),
  }
  return optax.partition(transforms, labels)


def labels(params: optax.Params) -> Any:
  """The part of each parameter."""
  out = jax.tree_util.tree_map_with_path(label, params)
  if "filters" not in jax.tree.leaves(out):
    raise SystemExit(
      "--parts divides a network into filters and the rest, and this one has no parameter of three"
      " or more axes: take a network with filters, or a configuration without parts."
    )
  return out
