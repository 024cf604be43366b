"""Checks of hyperparameters, layers and statistics: what is wrong, and what to write instead."""

from collections.abc import Callable, Sequence
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax.layers import Layers, Stats
from fop_optax.sharding import Sharding


def check_layers(layers: Any) -> Layers:
  """Checks that `layers` are what `capture` found, and some."""
  if not isinstance(layers, Layers):
    raise TypeError(
      f"`layers` is a {type(layers).__name__}, not a `Layers`. Pass `captured.layers` of"
      " `captured = fop_optax.capture(loss, params, ...)`."
    )
  if not layers:
    raise ValueError("`layers` is empty: the loss has no layer to precondition.")
  return layers


def check(name: str, value: Any, valid: Callable[[Any], bool], wanted: str) -> None:
  """Checks a hyperparameter: one number, in range where that is known before the step is run."""
  if value is None or callable(value):
    return
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    if not valid(value):
      raise ValueError(f"`{name}={value}` should be {wanted}.")
  elif isinstance(value, Layers):
    raise ValueError(
      f"`{name}` is the layers: the rate comes first, as in `fop_optax.kfac(0.1, captured.layers)`."
    )
  elif not hasattr(value, "dtype") or jnp.ndim(value) > 0:
    shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
    got = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else shown
    raise ValueError(
      f"`{name}` should be one number (a Python number, an array without axes or a schedule), not"
      f" {got}. For parameters that need values of their own give each group an optimizer, with"
      " `optax.partition`."
    )


def check_given(name: str, value: Any) -> None:
  """Checks that a hyperparameter which has no default is there."""
  if value is None:
    raise ValueError(f"`{name}=None`: it takes a number, an array without axes or a schedule.")


def check_period(name: str, value: Any) -> None:
  """Checks a period."""
  whole = lambda x: x >= 1 and x == int(x)
  check(name, value, whole, "a whole number of steps, at least 1")


def check_dtype(name: str, value: Any) -> None:
  """Checks the dtype that something is held in; None stands for that of the arithmetic."""
  if value is None:
    return
  try:
    floating = not isinstance(value, jax.Array) and jnp.issubdtype(jnp.dtype(value), jnp.floating)
  except TypeError:
    floating = False
  if not floating:
    raise ValueError(
      f"`{name}={value!r}` should be a floating dtype, as jnp.bfloat16, or None."
      " `optax.inject_hyperparams` takes a dtype for a schedule: declare it with"
      f' `optax.inject_hyperparams(..., static_args="{name}")`.'
    )


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
  """Checks a hyperparameter that names a choice."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"`{name}={value!r}` should be one of {', '.join(map(repr, choices))}.")


def check_factors(layers: Layers, stats: Any) -> None:
  """Checks that `stats` are of a loss with these layers."""
  if not isinstance(stats, Stats):
    raise TypeError(
      f"`stats` is a {type(stats).__name__}: pass the third of what"
      " `captured.value_and_grad` returned."
    )
  shapes = [tuple(tuple(x.shape) for x in f) for f in stats.factors]
  if shapes != [layer.factor_shapes for layer in layers]:
    raise ValueError(
      f"`stats` are of another loss: their factors have shapes {shapes}, but these layers have"
      f" {[layer.factor_shapes for layer in layers]}. `layers` and `stats` should come from the"
      " same `captured`."
    )


def of_owners(owned: bool, sharding: Sharding | None) -> str:
  """What more to say of a state that does not fit, where it or the optimizer has owners."""
  if not owned and sharding is None:
    return ""
  return (
    f" It is {'dealt to owners' if owned else 'in the order of blocks'}, and this optimizer has"
    f" {f'{sharding.devices} owners' if sharding else 'no `sharding`'}: of other devices take"
    " `fop_optax.to_owners(fop_optax.to_blocks(opt_state), sharding)`."
  )


def check_sharding(sharding: Any) -> None:
  """Checks over which devices curvature is dealt."""
  if sharding is not None and not isinstance(sharding, Sharding):
    raise TypeError(
      f"`sharding` is a {type(sharding).__name__}: pass `fop_optax.Sharding(mesh)`, or None for"
      " curvature that every device has."
    )
