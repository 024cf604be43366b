"""Products with a constant that meet the batch: evaluated as if each example had its own.

The output of such a product is repeated along a new leading axis, one row for each time that the
constant is used in the batch, so that a cotangent comes back for each; what is made of it without
the batch is mapped over that axis, until it meets the batch and the axis takes its place there.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repeated:
  """A value that is the same for each index of its leading axis."""

  rows: jax.Array


def repeat(value: Any, times: int) -> Repeated:
  if isinstance(value, Repeated):
    return value
  return Repeated(jnp.broadcast_to(value, (times, *value.shape)))


def once(value: Any) -> Any:
  """One of the equal values."""
  return value.rows[0] if isinstance(value, Repeated) else value


def any_of(operands: Sequence[Any]) -> bool:
  return any(isinstance(operand, Repeated) for operand in operands)


def mapped(evaluate: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
  """`evaluate(*operands)`, a list of arrays, for each row of those that are repeated."""
  axes = [0 if isinstance(operand, Repeated) else None for operand in operands]
  arrays = [operand.rows if isinstance(operand, Repeated) else operand for operand in operands]
  return [Repeated(rows) for rows in jax.vmap(evaluate, axes)(*arrays)]


def meet(equation: Any, operands: Sequence[Any], axes: Mapping[int, int | None]) -> list[Any]:
  """The operands of an equation with the batch, no longer repeated but spread over an axis of it.

  Args:
    equation: as in `Found.meetings`, as are `axes`.
    operands: its operands.
    axes: the axis of the output for some of them; None: one of the rows will do.
  """
  shape = tuple(equation.outvars[0].aval.shape)
  met = list(operands)
  for number, axis in axes.items():
    operand = operands[number]
    if isinstance(operand, Repeated):
      met[number] = once(operand) if axis is None else _spread(equation, operand, axis, shape)
  return met


def _spread(equation: Any, operand: Repeated, axis: int, shape: tuple[int, ...]) -> jax.Array:
  own = range(operand.rows.ndim - 1)
  if equation.primitive is primitives.broadcast_in_dim_p:
    own = equation.params["broadcast_dimensions"]
  rows = operand.rows
  if axis in own:  # of size 1 there
    rows = jnp.squeeze(rows, 1 + tuple(own).index(axis))
  dims = (axis, *(int(dim) for dim in own if dim != axis))
  spread = jnp.transpose(rows, sorted(range(len(dims)), key=lambda i: dims[i]))
  return lax.broadcast_in_dim(spread, shape, sorted(dims))
