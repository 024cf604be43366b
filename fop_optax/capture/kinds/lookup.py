"""Embedding lookups: rows of a parameter read by index, the product with one-hot rows.

The input factor is diagonal: how often each row is looked up. Indices out of range count as the
lookup treats them: clipped ones at the edge, dropped ones not at all. Several axes that are indexed
together are one axis of rows, and a window of rows is as many lookups.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fop_optax import moments
from fop_optax.capture.values import Atom, Matching, atom


@dataclasses.dataclass(frozen=True)
class Lookup:
  """`y = gather(w, x)` of whole rows, by indices `x[..., components]`.

  Attributes:
    weight: which operand is looked up in.
    sizes: of the weight along the axis that each component of an index stands for.
    windows: how many entries are read along it.
    strides: by how many rows the component counts; 0 along an axis that is read whole.
    inputs: rows of the weight, those of all indexed axes.
    clip: indices out of range are clipped; else they are dropped.
    x_rows: axes of the indices that are rows.
    x_stack: axes of the indices each place of which has a weight of its own.
    y_rows: axes of y that come from them,
    y_stack: and of these.
    y_windows: axes of y along a window of rows, in the order of the weight's axes,
    window: how many rows each is long,
    window_strides: and by how many rows it counts.
    y_out: axes of y that are outputs.
  """

  weight: int
  sizes: tuple[int, ...]
  windows: tuple[int, ...]
  strides: tuple[int, ...]
  inputs: int
  clip: bool
  x_rows: moments.Axes
  x_stack: moments.Axes
  y_rows: moments.Axes
  y_stack: moments.Axes
  y_windows: moments.Axes
  window: tuple[int, ...]
  window_strides: tuple[int, ...]
  y_out: moments.Axes

  kind = "lookup"

  @property
  def row_axes(self) -> tuple[tuple[int, int], ...]:
    return tuple(zip(self.x_rows, self.y_rows, strict=True))

  def input_moment(self, x: jax.Array, bias: bool, diagonal: bool, dtype: Any) -> jax.Array:
    """How often each row is looked up: the diagonal of the one-hot rows' second moment."""
    assert diagonal
    index = self._indices(x)
    count = lambda index: jnp.zeros(self.inputs, dtype).at[index].add(1, mode="drop")
    for _ in self.x_stack:
      count = jax.vmap(count)
    counts = count(index).reshape(-1, self.inputs)
    if not bias:
      return counts
    ones = jnp.full((len(counts), 1), index.size / len(counts), dtype)
    return jnp.concatenate([counts, ones], axis=1)

  def output_moment(self, x: jax.Array, dy: jax.Array, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r dy_r dy_r'` over the lookups that read a row: no gradient comes back of others."""
    _, found = self.index(x)
    found = found.reshape(found.shape[: x.ndim - 1])
    dy = jnp.where(jnp.expand_dims(found, (*self.y_windows, *self.y_out)), dy, 0)
    roles = moments.Roles((*self.y_rows, *self.y_windows), self.y_stack, self.y_out)
    return moments.second_moment(dy, roles, diagonal, dtype)

  def input_rows(self, x: jax.Array) -> jax.Array:
    """Which row each lookup reads, `[stack, rows]`; `inputs`, one too many, where it reads none."""
    index = self._indices(x)
    return index.reshape(math.prod(index.shape[: len(self.x_stack)]), -1)

  def output_rows(self, dy: jax.Array, dtype: Any) -> jax.Array:
    """`dy_r` of each lookup, `[stack, rows, d]`."""
    roles = moments.Roles((*self.y_rows, *self.y_windows), self.y_stack, self.y_out)
    return moments.as_rows(dy, roles, dtype)

  def _indices(self, x: jax.Array) -> jax.Array:
    """`[*stack, *rows, *window]`."""
    index, found = self.index(x)
    index = jnp.where(found, index, self.inputs)
    windows = range(index.ndim - len(self.window), index.ndim)
    return index.transpose(*self.x_stack, *self.x_rows, *windows)

  def index(self, x: Any) -> tuple[Any, Any]:
    """Which rows are looked up, `[..., *window]`, and whether there are such, `[..., 1 ...]`."""
    xp = np if isinstance(x, np.ndarray) else jnp
    if x.dtype.itemsize < 4:  # sizes may not fit
      x = x.astype(np.int32)
    last = np.array(self.sizes, np.int32) - np.array(self.windows, np.int32)
    inside = last.astype(x.dtype)
    found = xp.ones(x.shape[:-1], bool) if self.clip else xp.all((x >= 0) & (x <= inside), -1)
    start = xp.clip(x, 0, inside).astype(np.int32)
    index = xp.sum(start * np.array(self.strides, np.int32), -1, dtype=np.int32)
    ones = (1,) * len(self.window)
    index, found = index.reshape(*index.shape, *ones), found.reshape(*found.shape, *ones)
    for i, (size, stride) in enumerate(zip(self.window, self.window_strides, strict=True)):
      index = index + (stride * np.arange(size, dtype=np.int32)).reshape(-1, *ones[i + 1 :])
    return index, found


def match(equation: Any, weight: int) -> Matching | str:
  """What a gather from this weight operand is as a layer, or why it is none."""
  numbers, params = equation.params["dimension_numbers"], equation.params
  if weight != 0:
    return "its entries are used as indices (`gather`)"
  return _match(
    w=tuple(equation.invars[0].aval.shape),
    y=tuple(equation.outvars[0].aval.shape),
    indexed=_ints(numbers.start_index_map),
    sizes=_ints(params["slice_sizes"]),
    collapsed=_ints(numbers.collapsed_slice_dims),
    offset=_ints(numbers.offset_dims),
    stacked=dict(
      zip(
        _ints(numbers.operand_batching_dims),
        _ints(numbers.start_indices_batching_dims),
        strict=True,
      )
    ),
    clip=params["mode"] == lax.GatherScatterMode.CLIP,
  )


def match_slice(equation: Any, weight: int) -> Matching | str:
  """What a `dynamic_slice` is as a layer: a lookup of one window, by one index."""
  if weight != 0:
    return "its entries are used as indices (`dynamic_slice`)"
  w, y = (tuple(variable.aval.shape) for variable in (equation.invars[0], equation.outvars[0]))
  axes = tuple(range(len(w)))
  return _match(w, y, indexed=axes, sizes=y, collapsed=(), offset=axes, stacked={}, clip=True)


def _match(
  w: tuple[int, ...],
  y: tuple[int, ...],
  indexed: tuple[int, ...],
  sizes: tuple[int, ...],
  collapsed: tuple[int, ...],
  offset: tuple[int, ...],
  stacked: dict[int, int],
  clip: bool,
) -> Matching | str:
  """The layer of a lookup in an array of shape `w`.

  Args:
    w, y: shapes of the array and of what is read of it.
    indexed: axes of `w` that the components of an index stand for.
    sizes: how much is read along each axis of `w`.
    collapsed: axes of `w` that `y` lacks.
    offset: axes of `y` along those of `w` that it has.
    stacked: axes of `w` each place of which has indices of its own -> axes of the indices.
    clip: whether indices out of range are clipped.
  """
  chosen = [axis for axis in range(len(w)) if sizes[axis] < w[axis] and axis not in stacked]
  chosen = chosen or [axis for axis in sorted(indexed) if w[axis] == 1]
  rest = [axis for axis in range(len(w)) if axis not in chosen and axis not in stacked]
  inputs, outputs = (math.prod(w[axis] for axis in axes) for axes in (chosen, rest))
  if 0 in y:
    return "nothing is looked up in it"
  if not chosen or not set(chosen) <= set(indexed):
    return "not whole rows of it are looked up"
  if outputs == 1 and len(chosen) > 1:
    one_by_one = all(sizes[axis] == 1 for axis in chosen)
    return (
      "its entries are looked up one by one" if one_by_one else "parts of its rows are looked up"
    )

  strides = {
    axis: math.prod(w[other] for other in chosen[i + 1 :]) for i, axis in enumerate(chosen)
  }
  kept = [axis for axis in range(len(w)) if axis not in collapsed and axis not in stacked]
  place = dict(zip(kept, offset, strict=True))
  of_index = [axis for axis in range(len(y)) if axis not in offset]
  stack = sorted(stacked)
  x_stack = tuple(stacked[axis] for axis in stack)
  x_rows = tuple(axis for axis in range(len(of_index)) if axis not in x_stack)
  windows = [axis for axis in chosen if axis in place]
  product = Lookup(
    weight=0,
    sizes=tuple(w[axis] for axis in indexed),
    windows=tuple(sizes[axis] for axis in indexed),
    strides=tuple(strides.get(axis, 0) for axis in indexed),
    inputs=inputs,
    clip=clip,
    x_rows=x_rows,
    x_stack=x_stack,
    y_rows=tuple(of_index[axis] for axis in x_rows),
    y_stack=tuple(of_index[axis] for axis in x_stack),
    y_windows=tuple(place[axis] for axis in windows),
    window=tuple(sizes[axis] for axis in windows),
    window_strides=tuple(strides[axis] for axis in windows),
    y_out=tuple(place[axis] for axis in rest if axis in place),
  )
  n_stack = math.prod(w[axis] for axis in stack)
  steps = (("transpose", (*stack, *chosen, *rest)), ("reshape", (n_stack, inputs, outputs)))
  rows = (*product.y_rows, *product.y_windows)
  axes: list[tuple[Atom, ...]] = [()] * len(y)
  for kind, role in (("stack", product.y_stack), ("row", rows), ("out", product.y_out)):
    for order, axis in enumerate(role):
      if y[axis] > 1:
        axes[axis] = (atom(kind, order, y[axis]),)
  n = math.prod(y[axis] for axis in rows)
  return Matching(product, steps, n_stack, inputs, outputs, n, tuple(axes))


def _ints(axes: Sequence[Any]) -> tuple[int, ...]:
  return tuple(map(int, axes))
