"""What a loss gives on a batch, and how far apart two such outcomes are: on the host."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from fop_optax.capture.arguments import is_typed_key

PyTree = Any


class Outcome(NamedTuple):
  """What a loss gives on a batch; `grads` one leaf a parameter."""

  loss: Any
  grads: Sequence[Any]
  aux: PyTree = ()


def attempt(evaluate: Callable[[], Any]) -> Any:
  """What is evaluated, or the error: a loss may raise any on a batch of another size."""
  try:
    return evaluate()
  except Exception as error:
    return error


def first_line(error: Exception) -> str:
  """Of its message."""
  return str(error).partition("\n")[0][:200].rstrip(".")


def take(leaf: Any, index: np.ndarray) -> Any:
  """`leaf[index]`, sharded as `leaf` is."""
  if isinstance(leaf, np.ndarray) or is_typed_key(leaf):
    return leaf[index]
  return jax.device_put(np.asarray(leaf)[index], leaf.sharding)


def wide(array: Any) -> np.ndarray:
  """On the host, in double precision."""
  array = np.asarray(array)
  return array.astype(complex if jnp.issubdtype(array.dtype, jnp.complexfloating) else float)


def norm(arrays: Sequence[Any]) -> float:
  """Of all entries together."""
  return math.sqrt(sum(np.sum(np.abs(array) ** 2) for array in arrays))


def distance(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
  """The norm of the difference relative to the larger norm."""
  ours, theirs = list(map(wide, ours)), list(map(wide, theirs))
  difference = norm([a - b for a, b in zip(ours, theirs, strict=True)])
  return difference and difference / max(norm(ours), norm(theirs))


def floating(variables: Sequence[Any], equations: Sequence[Any]) -> set[Any]:
  """The floating types of variables, and of what equations compute."""
  dtypes = {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}
  found = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
  for equation in equations:
    inside = [inner.eqns for inner in core.jaxprs_in_params(equation.params)]
    found |= floating(equation.outvars, [inner for eqns in inside for inner in eqns])
  return found


def listed(items: Sequence[str], most: int = 4) -> str:
  """The first of them, and how many more there are."""
  more = f" and {len(items) - most} more" if len(items) > most else ""
  return ", ".join(items[:most]) + more


def shown(array: Any) -> str:
  """A number, or the norm of an array."""
  array = wide(array)
  return f"{array:.6g}" if array.ndim == 0 else f"norm {norm([array]):.6g}"
