"""Tables: an array that meets what depends on the batch, the same for every example (positions).

`y = h + w` is a lookup of every row of `w` once an example, the product with one-hot rows, and so
is `y = [w; h]`, a token repeated over the batch and joined to it. The last axis of `w` longer than
one are its outputs, the others its inputs; a vector is no table of what is added, but one row of
what is joined. Rows at constant indices enter as often as they are chosen.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax import moments, views
from fop_optax.capture import entries
from fop_optax.capture.values import Matching, ParamView, Window


@dataclasses.dataclass(frozen=True)
class Table:
  """`y = h + w` or, joined, `y = [w; h]`, where each row of `w` stands at `counts` places of y.

  `cut` is the axis, start and size of the part of y that is `w`, if it is not all.
  """

  weight: int
  counts: tuple[int, ...] | int  # one a row, or the same of `positions` rows
  positions: int
  y_rows: moments.Axes
  y_out: moments.Axes
  cut: Window | None

  kind = "table"
  row_axes = ()

  def input_moment(self, x: jax.Array, bias: bool, diagonal: bool, dtype: Any) -> jax.Array:
    """How often each row is added: the diagonal of the one-hot rows' second moment."""
    assert diagonal and not bias
    return jnp.broadcast_to(jnp.array(self.counts, dtype), (1, self.positions))

  def output_moment(self, x: jax.Array, dy: jax.Array, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r dy_r dy_r'` over the rows of all examples."""
    if self.cut:
      axis, start, size = self.cut
      dy = jax.lax.slice_in_dim(dy, start, start + size, axis=axis)
    return moments.second_moment(dy, moments.Roles(self.y_rows, (), self.y_out), diagonal, dtype)


def match(
  shape: tuple[int, ...], weight: int, view: ParamView, leaf: tuple[int, ...], cut: Window | None
) -> tuple[Matching, ParamView] | None:
  """What the meeting of `view` with the batch is as a layer, and of which view.

  Args:
    shape: what the view is repeated to.
    weight: which operand it is.
    view: of a parameter.
    leaf: shape of that parameter.
    cut: where it stands if it is joined; None if it is added.

  Returns:
    None for a scalar, for a vector that is added, and for rows at constant indices that are mixed.
  """
  own = [axis for axis, size in enumerate(view.shape) if size > 1]
  vector = view.vector or len(own) < 2
  if len(view.shape) != len(shape) or not own or (vector and cut is None):
    return None
  if entries.repeats(view.steps):
    return _chosen(shape, weight, view, leaf, cut)
  (*_, out) = own
  outputs = shape[out]
  positions, rows = math.prod(view.shape) // outputs, math.prod(shape) // outputs
  others = tuple(axis for axis in range(len(shape)) if axis != out)
  product = Table(weight, rows // positions, positions, others, (out,), cut)
  steps = (("reshape", (1, positions, outputs)),)
  return Matching(product, steps, 1, positions, outputs, rows, axes=()), view


def _chosen(
  shape: tuple[int, ...], weight: int, view: ParamView, leaf: tuple[int, ...], cut: Window | None
) -> tuple[Matching, ParamView] | None:
  """`match` for rows at constant indices: a table of all rows, each as often as it is chosen."""
  first = next(i for i, step in enumerate(view.steps) if step[0] == "take")
  before, after = view.steps[:first], view.steps[first:]
  if any(step[0] == "scan" for step in after):
    return None
  whole = views.shape_of(before, leaf)[len(view.levels) :]
  axis = after[0][1]
  rest = [other for other in range(len(whole)) if other != axis]
  inputs, outputs = whole[axis], math.prod(whole[other] for other in rest)
  # which row, and which entry of it, stands at each place of the variable
  row = np.arange(inputs).reshape([inputs if other == axis else 1 for other in range(len(whole))])
  column = np.arange(outputs).reshape([1 if i == axis else n for i, n in enumerate(whole)])
  row, column = (views.replay(after, np.broadcast_to(each, whole)) for each in (row, column))

  varies = lambda array, axis: bool(np.any(array != np.take(array, [0], axis)))
  out = tuple(axis for axis in range(len(shape)) if varies(column, axis))
  others = tuple(axis for axis in range(len(shape)) if axis not in out)
  column = column[tuple(slice(None) if axis in out else 0 for axis in range(len(shape)))]
  if any(varies(row, axis) for axis in out) or list(column.ravel()) != list(range(outputs)):
    return None
  row = row[tuple(0 if axis in out else slice(None) for axis in range(len(shape)))]
  places = math.prod(shape) // outputs
  counts = np.bincount(row.ravel(), minlength=inputs) * (places // row.size)
  product = Table(weight, tuple(map(int, counts)), inputs, others, out, cut)
  steps = (("transpose", (axis, *rest)), ("reshape", (1, inputs, outputs)))
  view = dataclasses.replace(view, steps=before, shape=whole)
  return Matching(product, steps, 1, inputs, outputs, places, axes=()), view
