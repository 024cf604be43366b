"""Products with a constant that meet the batch: evaluated as if each example had its own.

The output of such a product is repeated along a new leading axis, one row for each time that the
constant is used in the batch, so that a cotangent comes back for each; what is made of it without
the batch is mapped over that axis, until it meets the batch and the axis takes its place there.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat


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


def evaluate(
  jaxpr: Any, equation: Any, operands: Sequence[Any], meeting: Mapping[int, int | None] | None
) -> list[Any]:
  """One equation, some operands of which may be repeated.

  Args:
    jaxpr: where it stands.
    equation: the equation.
    operands: its operands.
    meeting: if it has the batch, as in `Found.meetings`: for some of the operands the axis of the
      output that their rows go to; None: one of the rows will do.
  """
  if not any_of(operands):
    return _compat.evaluate_equation(jaxpr, equation, operands)
  if meeting is None:
    axes = [0 if isinstance(operand, Repeated) else None for operand in operands]
    arrays = [each.rows if isinstance(each, Repeated) else each for each in operands]
    function = lambda *values: _compat.evaluate_equation(jaxpr, equation, values)
    return [Repeated(rows) for rows in jax.vmap(function, axes)(*arrays)]
  met = list(operands)
  for number, axis in meeting.items():
    operand = operands[number]
    if axis is None or not isinstance(operand, Repeated):
      met[number] = once(operand)
    elif equation.primitive is primitives.dot_general_p:
      return [_product(equation, operands, number, axis)]
    else:
      met[number] = _spread(equation, operand, axis)
  if equation.primitive is primitives.broadcast_in_dim_p:
    return met
  return _compat.evaluate_equation(jaxpr, equation, met)


def _spread(equation: Any, operand: Repeated, axis: int) -> jax.Array:
  """The rows along `axis` of the output of an equation that goes entry by entry, or repeats."""
  own = range(operand.rows.ndim - 1)
  if equation.primitive is primitives.broadcast_in_dim_p:
    own = equation.params["broadcast_dimensions"]
  rows = operand.rows
  if axis in own:  # of size 1 there
    rows = jnp.squeeze(rows, 1 + tuple(own).index(axis))
  dims = (axis, *(int(dim) for dim in own if dim != axis))
  spread = jnp.transpose(rows, sorted(range(len(dims)), key=lambda i: dims[i]))
  return lax.broadcast_in_dim(spread, equation.outvars[0].aval.shape, sorted(dims))


def free_axes(equation: Any, side: int) -> dict[int, int]:
  """The axes of a `dot_general`'s output that are one operand's alone, and which of its axes."""
  contract, batch = equation.params["dimension_numbers"]
  free = [
    [axis for axis in range(v.aval.ndim) if axis not in (*contract[i], *batch[i])]
    for i, v in enumerate(equation.invars)
  ]
  first = len(batch[0]) + (len(free[0]) if side else 0)
  return {first + i: axis for i, axis in enumerate(free[side])}


def _product(equation: Any, operands: Sequence[Any], side: int, axis: int) -> jax.Array:
  """A `dot_general` in which each row of one operand meets its own along `axis` of the output."""
  contract, batch = equation.params["dimension_numbers"]
  contracted: list[tuple[int, ...]] = [tuple(axes) for axes in contract]
  shared: list[tuple[int, ...]] = [tuple(axes) for axes in batch]
  contracted[side] = tuple(i + 1 for i in contracted[side])
  shared[side] = (0, *(i + 1 for i in shared[side]))
  shared[1 - side] = (free_axes(equation, 1 - side)[axis], *shared[1 - side])
  left, right = (each.rows if isinstance(each, Repeated) else each for each in operands)
  params = equation.params
  out = lax.dot_general(
    left,
    right,
    ((contracted[0], contracted[1]), (shared[0], shared[1])),
    precision=params["precision"],
    preferred_element_type=params["preferred_element_type"],
  )
  return jnp.moveaxis(out, 0, axis)
