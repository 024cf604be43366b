"""Tables: an array added to what depends on the batch, the same for every example (positions).

`y = h + w` is a lookup of every row of `w` once an example, the product with one-hot rows. The last
axis of `w` longer than one are its outputs, the others its inputs; a vector is no table.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax import moments
from fop_optax.capture.values import Matching, ParamView


@dataclasses.dataclass(frozen=True)
class Table:
  """`y = h + w`, where `w` has `positions` rows and is repeated `repeats` times."""

  weight: int
  positions: int
  repeats: int
  y_rows: moments.Axes
  y_out: moments.Axes

  kind = "table"
  row_axes = ()

  def input_moment(self, x: jax.Array, bias: bool, diagonal: bool, dtype: Any) -> jax.Array:
    """How often each row is added: the diagonal of the one-hot rows' second moment."""
    assert diagonal and not bias
    return jnp.full((1, self.positions), self.repeats, dtype)

  def output_moment(self, x: jax.Array, dy: jax.Array, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r dy_r dy_r'` over the rows of all examples."""
    return moments.second_moment(dy, moments.Roles(self.y_rows, (), self.y_out), diagonal, dtype)


def match(equation: Any, weight: int, view: ParamView) -> Matching | None:
  """What the addition of `view` is as a layer; None if it is a vector or a scalar."""
  shape = equation.outvars[0].aval.shape
  own = [axis for axis, size in enumerate(view.shape) if size > 1]
  if view.vector or len(own) < 2 or len(view.shape) != len(shape):
    return None
  outputs = shape[own[-1]]
  positions, rows = math.prod(view.shape) // outputs, math.prod(shape) // outputs
  others = tuple(axis for axis in range(len(shape)) if axis != own[-1])
  product = Table(weight, positions, rows // positions, others, (own[-1],))
  steps = (("reshape", (1, positions, outputs)),)
  return Matching(product, steps, 1, positions, outputs, rows, axes=())
