"""One row per optimizer: each goes through every test of the contract suite."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

import fop_optax
from fop_optax.optimizers.completion import keep_dtypes


@dataclasses.dataclass(frozen=True)
class Row:
  """An optimizer.

  Attributes:
    name: of the test.
    make: factory, called with keyword arguments.
    kwargs: its arguments, but `layers`.
    curvature: whether it takes `layers` and `stats`.
    ours: whether it is of this library.
    per_example: whether it takes per-example gradients `[B, *param]`.
    blockwise: whether what it does to a leaf or a layer does not depend on the others.
    moves_at_once: whether the first step moves parameters.
    often: whether statistics are due at the second step too.
    always: whether statistics come at every step, as the state does not say when.
    squares: whether `stats` need second moments of gradients.
    injected: the arguments that `optax.inject_hyperparams` turns into arrays.
    static: arguments to declare static there.
  """

  name: str
  make: Callable[..., optax.GradientTransformation]
  kwargs: dict[str, Any]
  curvature: bool = True
  ours: bool = True
  per_example: bool = False
  blockwise: bool = True
  moves_at_once: bool = True
  often: bool = False
  always: bool = False
  squares: bool = False
  injected: tuple[str, ...] = ()
  static: tuple[str, ...] = ()

  def tx(self, layers, **kwargs) -> optax.GradientTransformationExtraArgs:
    layers = {"layers": layers} if self.curvature else {}
    return optax.with_extra_args_support(self.make(**self.kwargs, **layers, **kwargs))

  def inject(self, layers) -> optax.GradientTransformationExtraArgs:
    layers = {"layers": layers} if self.curvature else {}
    return optax.inject_hyperparams(self.make, self.static)(**self.kwargs, **layers)


def decays(params):
  """A weight decay mask: matrices only."""
  return {
    name: {"b": False, "w": True} if isinstance(leaf, dict) else False
    for name, leaf in params.items()
  }


def soap_then(last_step):
  """SOAP's direction without bases, from the first step on, with a last step at a rate."""

  def make(learning_rate, b1=0.9):
    soap = fop_optax.scale_by_soap(b1, eps=1e-30, skip_first=False, max_precond_dim=1)
    return optax.chain(soap, last_step(learning_rate))

  return make


def polar(learning_rate, layers=None):
  """Polar factors, times the rate."""
  rate = keep_dtypes(optax.scale_by_learning_rate(learning_rate))  # an injected one is float32
  return optax.chain(fop_optax.orthogonalize(layers=layers), rate)


def kfac_polar(layers, learning_rate, damping):
  """K-FAC's direction, then its polar factors."""
  kfac = fop_optax.scale_by_kfac(layers, damping=damping, curvature_update_period=10)
  return optax.chain(kfac, polar(learning_rate, layers))


COMMON = ("damping", "decay", "curvature_update_period", "inverse_update_period")
ALIAS = ("learning_rate", "momentum", "weight_decay")
# Each layer and each step by itself.
PLAIN = {
  "learning_rate": 0.1,
  "damping": 1e-2,
  "norm_constraint": None,
  "curvature_update_period": 10,
}

ROWS = (
  Row(
    "sgd",
    optax.sgd,
    {"learning_rate": 0.1, "momentum": 0.9},
    curvature=False,
    ours=False,
    injected=("learning_rate",),
  ),
  Row(
    "soap",
    fop_optax.soap,
    {"learning_rate": 0.01, "mask": decays, "inverse_update_period": 2},
    curvature=False,
    moves_at_once=False,
    injected=("learning_rate", "b1", "b2", "eps", "weight_decay", "inverse_update_period"),
    static=("mask",),
  ),
  Row(
    "soap in the Fisher basis",
    fop_optax.soap,
    {"learning_rate": 0.01, "fisher": True, "inverse_update_period": 2},
    always=True,
    moves_at_once=False,
    injected=("learning_rate", "b1", "eps", "inverse_update_period"),
    static=("layers",),
  ),
  Row(
    "soap variant",
    fop_optax.soap,
    {
      "learning_rate": optax.linear_schedule(0.01, 0.001, 10),
      "shampoo_beta": 0.9,
      "inverse_update_period": fop_optax.WarmupPeriod(1, 2),
      "stagger": True,
      "precondition_1d": True,
      "one_sided": True,
      "factorized": True,
      "normalize_grads": True,
      "skip_first": False,
      "start": "identity",
      "kl": True,
    },
    curvature=False,
    injected=("learning_rate", "shampoo_beta", "inverse_update_period"),
  ),
  Row(
    "shampoo",
    fop_optax.shampoo,
    {
      "learning_rate": 0.01,
      "eps": 1e-3,
      "weight_decay": 0.1,
      "mask": decays,
      "inverse_update_period": 2,
    },
    curvature=False,
    injected=("learning_rate", "b1", "b2", "eps", "weight_decay", "inverse_update_period"),
    static=("mask",),
  ),
  Row(
    "shampoo variant",
    fop_optax.shampoo,
    {
      "learning_rate": optax.linear_schedule(0.01, 0.001, 10),
      "eps": 1e-3,
      "b3": 0.8,
      "grafting": "adagrad",
      "graft_eps": 1e-8,
      "inverse_update_period": fop_optax.WarmupPeriod(1, 2),
      "start_step": 2,
      "stagger": True,
      "root": "newton",
      "contrast": True,
      "block_size": 4,
      "merge_to": 2,
    },
    curvature=False,
    injected=("learning_rate", "b3", "graft_eps", "inverse_update_period", "start_step"),
    static=("block_size", "merge_to"),
  ),
  Row(
    "neumann",
    fop_optax.neumann,
    {
      "learning_rate": optax.linear_schedule(0.1, 0.01, 10),
      "steps_per_epoch": 2,
      "num_sgd_steps": 1,
      "weight_decay": 0.1,
      "mask": decays,
    },
    curvature=False,
    blockwise=False,
    injected=(
      "learning_rate",
      "steps_per_epoch",
      "num_sgd_steps",
      "alpha",
      "gamma",
      "weight_decay",
    ),
    static=("mask",),
  ),
  Row(
    "kfac",
    fop_optax.kfac,
    {**PLAIN, "weight_decay": 1e-2, "mask": decays},
    injected=("decay", "damping", *ALIAS, "curvature_update_period"),
    static=("mask",),
  ),
  Row(
    "kfac defaults",
    fop_optax.kfac,
    {"learning_rate": 0.1},
    blockwise=False,
    often=True,
    injected=("norm_constraint", "curvature_update_period", *ALIAS),
  ),
  Row(
    "kfac exact",
    fop_optax.kfac,
    {
      "learning_rate": optax.linear_schedule(0.1, 0.01, 10),
      "damping": optax.linear_schedule(0.1, 0.01, 10),
      "relative_damping": optax.linear_schedule(0.5, 0.05, 10),
      "scaling": "exact",
      "norm_constraint": optax.linear_schedule(1e-3, 1e-2, 10),
      "momentum": None,
      "curvature_update_period": fop_optax.WarmupPeriod(2, 2),
      "inverse_update_period": fop_optax.WarmupPeriod(1, 3),
      "stagger": True,
    },
    blockwise=False,
    often=True,
    injected=(*COMMON, "relative_damping", "norm_constraint", "learning_rate"),
  ),
  Row(
    "kfac eigenvalue",
    fop_optax.kfac,
    {**PLAIN, "scaling": "eigenvalue", "weight_decay": 1e-2, "mask": decays},
    squares=True,
    injected=("decay", "damping", *ALIAS, "curvature_update_period"),
    static=("mask",),
  ),
  Row(
    "fop eigenvalue",
    fop_optax.fop,
    {
      "learning_rate": 0.1,
      "relative_damping": 0.5,
      "scaling": "eigenvalue",
      "curvature_update_period": 1,
      "inverse_update_period": 2,
      "stagger": True,
    },
    blockwise=False,
    often=True,
    squares=True,
    injected=("relative_damping", "norm_constraint", "curvature_update_period", *ALIAS),
  ),
  Row("fop", fop_optax.fop, PLAIN, injected=(*COMMON[:3], *ALIAS)),
  Row(
    "fop defaults",
    fop_optax.fop,
    {"learning_rate": 0.1, "relative_damping": 0.5},
    blockwise=False,
    often=True,
    injected=("relative_damping", "norm_constraint", "curvature_update_period", *ALIAS),
  ),
  Row(
    "fop literal",
    fop_optax.fop,
    {
      "learning_rate": jnp.float32(0.1),
      "damping": 1e-2,
      "projection_metric": "damped",
      "total_gradient": "sum",
      "beta": 0.1,
      "nesterov": True,
      "norm_constraint": None,
    },
    often=True,
    injected=("beta", *ALIAS),
  ),
  Row(
    "kfac per example",
    fop_optax.kfac_per_example,
    {**PLAIN, "weight_decay": 1e-2, "mask": decays, "max_vector": 5},
    curvature=False,
    per_example=True,
    injected=("decay", "damping", *ALIAS, "curvature_update_period"),
    static=("mask", "max_dim", "max_vector"),
  ),
  Row(
    "kfac per example exact",
    fop_optax.kfac_per_example,
    {
      "learning_rate": optax.linear_schedule(0.1, 0.01, 10),
      "damping": optax.linear_schedule(0.1, 0.01, 10),
      "curvature": "exact",
      "norm_constraint": 1e-3,
    },
    curvature=False,
    per_example=True,
    blockwise=False,
    injected=("damping", "norm_constraint", *ALIAS),
    static=("max_dim", "max_vector"),
  ),
  Row(
    "fop per example",
    fop_optax.fop_per_example,
    {
      **PLAIN,
      "scaling": "exact",
      "curvature_update_period": 2,
      "inverse_update_period": 3,
    },
    curvature=False,
    per_example=True,
    injected=(*COMMON, *ALIAS),
    static=("groups", "max_dim", "max_vector"),
  ),
  Row(
    "fop per example exact",
    fop_optax.fop_per_example,
    {"learning_rate": jnp.float32(0.1), "damping": 0.1, "curvature": "exact", "groups": 4},
    curvature=False,
    per_example=True,
    blockwise=False,
    injected=("damping", *ALIAS),
    static=("groups", "max_dim", "max_vector"),
  ),
  Row(
    "soap then polar",
    soap_then(polar),
    {"learning_rate": 0.02},
    curvature=False,
    injected=("learning_rate", "b1"),
  ),
  Row(
    "soap on spheres",
    soap_then(fop_optax.hyperball),
    {"learning_rate": optax.linear_schedule(0.02, 0.0, 10)},
    curvature=False,
    injected=("learning_rate", "b1"),
  ),
  Row(
    "kfac then polar",
    kfac_polar,
    {"learning_rate": 0.02, "damping": 1e-2},
    injected=("learning_rate", "damping"),
  ),
)
