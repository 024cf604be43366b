"""Embedding lookups: rows of a parameter gathered by index, the product with one-hot rows.

The input factor is diagonal: how often each row is looked up. Indices out of range count as the
lookup treats them: clipped ones at the edge, dropped ones not at all.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fop_optax import moments
from fop_optax.capture.values import Atom, Matching, atom


@dataclasses.dataclass(frozen=True)
class Lookup:
  """`y = gather(w, x)` of whole rows: `y_rows` are the axes of `y` that come from `x`."""

  weight: int
  rows: int  # of the parameter
  clip: bool  # indices out of range are clipped; else they are dropped
  y_rows: moments.Axes
  y_out: moments.Axes

  kind = "lookup"

  @property
  def row_axes(self) -> tuple[tuple[int, int], ...]:
    return tuple(enumerate(self.y_rows))

  def input_moment(self, x: jax.Array, bias: bool, diagonal: bool, dtype: Any) -> jax.Array:
    """How often each row is looked up: the diagonal of the one-hot rows' second moment."""
    assert diagonal
    index = self._index(x)
    counts = jnp.zeros(self.rows, dtype).at[index].add(1, mode="drop")[None]
    if not bias:
      return counts
    return jnp.concatenate([counts, jnp.full((1, 1), index.size, dtype)], axis=1)

  def output_moment(self, x: jax.Array, dy: jax.Array, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r dy_r dy_r'` over the lookups that read a row: no gradient comes back of others."""
    index = self._index(x)
    found = (index >= 0) & (index < self.rows)
    dy = jnp.where(jnp.expand_dims(found, self.y_out), dy, 0)
    roles = moments.Roles(self.y_rows, (), self.y_out)
    return moments.second_moment(dy, roles, diagonal, dtype)

  def _index(self, x: jax.Array) -> jax.Array:
    index = x[..., 0]
    return jnp.clip(index, 0, self.rows - 1) if self.clip else index


def match(equation: Any, weight: int) -> Matching | str:
  """What a gather from this weight operand is as a layer, or why it is none."""
  numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
  w, y = equation.invars[0].aval, equation.outvars[0].aval
  looked_up = tuple(numbers.collapsed_slice_dims)
  if weight != 0 or len(looked_up) != 1 or tuple(numbers.start_index_map) != looked_up:
    return "its entries are looked up one by one (`gather`)"
  if numbers.operand_batching_dims or numbers.start_indices_batching_dims:
    return "its rows are looked up example by example (`gather` with batching)"
  (axis,) = looked_up
  rest = [i for i in range(w.ndim) if i != axis]
  if any(sizes[i] != w.shape[i] for i in rest):
    return "parts of its rows are looked up (`gather`)"
  y_out = tuple(map(int, numbers.offset_dims))
  y_rows = tuple(i for i in range(y.ndim) if i not in y_out)
  clip = equation.params["mode"] == lax.GatherScatterMode.CLIP
  product = Lookup(0, w.shape[axis], clip, y_rows, y_out)
  outputs = math.prod(w.shape[i] for i in rest)
  steps = (("transpose", (axis, *rest)), ("reshape", (1, w.shape[axis], outputs)))
  axes: list[tuple[Atom, ...]] = [()] * y.ndim
  for kind, role in (("row", y_rows), ("out", y_out)):
    for order, i in enumerate(role):
      if y.shape[i] > 1:
        axes[i] = (atom(kind, order, y.shape[i]),)
  rows = math.prod(y.shape[i] for i in y_rows)
  return Matching(product, steps, 1, w.shape[axis], outputs, rows, tuple(axes))
