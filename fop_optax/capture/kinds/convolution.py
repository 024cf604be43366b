"""Convolutions: products of the kernel with the patches that it meets.

One patch function serves every stride, padding, dilation, number of groups and layout, transposed
convolutions (`lhs_dilation`) too: `lax.pad` with interior padding, then a strided slice for each
offset of the kernel. `patches' dy` is the kernel's gradient.
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
class Convolution:
  """`y = conv_general_dilated(x, w)`, and in which order the weight has its input axes.

  `input_order` lists the weight's input axes in the weight's own order: `-1` for the input feature,
  else the number of the spatial axis.
  """

  weight: int
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  lhs_dilation: tuple[int, ...]
  rhs_dilation: tuple[int, ...]
  groups: int
  kernel: tuple[int, ...]
  output: tuple[int, ...]  # spatial shape of y
  x_axes: tuple[int, ...]  # batch, feature, spatial ...
  y_axes: tuple[int, ...]
  input_order: tuple[int, ...]

  kind = "conv"

  @property
  def row_axes(self) -> tuple[tuple[int, int], ...]:
    return ((self.x_axes[0], self.y_axes[0]),)

  def input_moment(self, x: jax.Array, bias: bool, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r p_r p_r'` over the patches `p_r`, of `[p_r; 1]` with `bias`, in chunks of examples."""
    x = self._channels_last(x)
    example_bytes = math.prod(self.output) * math.prod(self.kernel) * x.shape[-1] * x.dtype.itemsize

    def moment(x):
      patches, roles = self._patches(x)
      a = moments.second_moment(patches, roles, diagonal, dtype)
      if not bias:
        return a
      n = math.prod(patches.shape[axis] for axis in roles.rows)
      return moments.with_ones(a, moments.row_sum(patches, roles, dtype), n)

    return moments.sum_in_chunks(moment, [x], example_bytes)

  def output_moment(self, x: jax.Array, dy: jax.Array, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r dy_r dy_r'`, a block for each feature group."""
    return moments.second_moment(*self._by_group(dy), diagonal, dtype)

  def input_sum(self, x: jax.Array, bias: bool, dtype: Any) -> jax.Array:
    """`sum_r p_r`, of `[p_r; 1]` with `bias`: `[stack, d]`. No patch is formed."""
    x = self._channels_last(x)
    n = len(self.kernel)
    total = jnp.stack([jnp.sum(piece, range(n + 1), dtype) for piece in self._pieces(x)])
    total = total.reshape(*self.kernel, self.groups, -1)
    inputs = (n + 1 if axis == -1 else axis for axis in self.input_order)
    total = total.transpose(n, *inputs).reshape(self.groups, -1)
    if not bias:
      return total
    count = jnp.full((self.groups, 1), len(x) * math.prod(self.output), dtype)
    return jnp.concatenate([total, count], axis=1)

  def output_sum(self, dy: jax.Array, dtype: Any) -> jax.Array:
    """`sum_r dy_r`, for each feature group."""
    batch, feature, *spatial = self.y_axes
    return jnp.sum(dy, (batch, *spatial), dtype).reshape(self.groups, -1)

  def input_rows(self, x: jax.Array, dtype: Any) -> jax.Array:
    """The patches, `[groups, rows, d]`."""
    return moments.as_rows(*self._patches(self._channels_last(x)), dtype)

  def output_rows(self, dy: jax.Array, dtype: Any) -> jax.Array:
    """`dy_r` of each feature group, `[groups, rows, d]`."""
    return moments.as_rows(*self._by_group(dy), dtype)

  def _channels_last(self, x: jax.Array) -> jax.Array:
    return x.transpose(self.x_axes[0], *self.x_axes[2:], self.x_axes[1])

  def _by_group(self, dy: jax.Array) -> tuple[jax.Array, moments.Roles]:
    """`dy[n, *spatial, groups, features]`, and its axes: rows, stack, features."""
    batch, feature, *spatial = self.y_axes
    dy = dy.transpose(batch, *spatial, feature)
    dy = dy.reshape(*dy.shape[:-1], self.groups, -1)
    return dy, moments.Roles(tuple(range(dy.ndim - 2)), (dy.ndim - 2,), (dy.ndim - 1,))

  def _patches(self, x: jax.Array) -> tuple[jax.Array, moments.Roles]:
    """Patches of `x[n, *spatial, features]`, and their axes: rows, stack, features."""
    n = len(self.kernel)
    # [n, *output, group, *kernel, feature], then the inputs in the order of the weight's axes
    patches = self._windows(x)
    split = (*patches.shape[: n + 1], *self.kernel, self.groups, x.shape[-1] // self.groups)
    patches = patches.reshape(split)
    first = n + 1
    features = tuple(2 * n + 2 if axis == -1 else first + axis for axis in self.input_order)
    return patches, moments.Roles(tuple(range(first)), (2 * n + 1,), features)

  def _windows(self, x: jax.Array) -> jax.Array:
    """What the offsets of the kernel meet of `x`, side by side: `[n, *output, offsets, features]`.

    In a loop: written out, each offset is one more kernel to compile.
    """
    x, starts = self._padded(x), jnp.asarray(self._starts())
    first = self._window(x, (0,) * len(self.kernel))[..., None, :]

    def put(i, out):
      window = self._window(x, starts[i])
      return lax.dynamic_update_index_in_dim(out, window, i, out.ndim - 2)

    shape = (*first.shape[:-2], len(starts), first.shape[-1])
    return lax.fori_loop(1, len(starts), put, jnp.broadcast_to(first, shape))  # sharded like x

  def _pieces(self, x: jax.Array) -> list[jax.Array]:
    """For each offset of the kernel what it meets of `x[n, *spatial, features]`."""
    x = self._padded(x)
    return [self._window(x, start) for start in self._starts().tolist()]

  def _starts(self) -> np.ndarray:
    """Where the windows of the kernel's offsets start."""
    return np.indices(self.kernel).reshape(len(self.kernel), -1).T * np.array(self.rhs_dilation)

  def _window(self, x: jax.Array, start: Sequence[Any] | jax.Array) -> jax.Array:
    """Every `stride`-th entry of a padded `x` from `start` on, as many as the output has."""
    pairs = zip(self.output, self.strides, strict=True)
    sizes = [len(x), *((size - 1) * stride + 1 for size, stride in pairs), x.shape[-1]]
    window = lax.dynamic_slice(x, [0, *start, 0], sizes)
    return lax.slice(window, [0] * x.ndim, sizes, [1, *self.strides, 1])

  def _padded(self, x: jax.Array) -> jax.Array:
    steps = zip(self.padding, self.lhs_dilation, strict=True)
    config = [(0, 0, 0), *((*edges, step - 1) for edges, step in steps), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def match(equation: Any, weight: int) -> Matching | str:
  """What a convolution with this weight operand is as a layer, or why it is none."""
  params = equation.params
  x, w = equation.invars[0].aval, equation.invars[1].aval
  y = equation.outvars[0].aval
  if weight != 1:
    return "it is the left operand of a convolution, which is not its kernel"
  if params["batch_group_count"] != 1:
    return "it is the kernel of a convolution with groups of examples (`batch_group_count`)"
  if params.get("lhs_shape") is not None and tuple(params["lhs_shape"]) != tuple(x.shape):
    return "it is the kernel of a convolution of an unknown form"
  numbers, groups = params["dimension_numbers"], params["feature_group_count"]
  out_axis, in_axis, *spatial = map(int, numbers.rhs_spec)
  order = sorted((in_axis, *spatial))
  names = {in_axis: -1} | {axis: i for i, axis in enumerate(spatial)}
  kernel = tuple(w.shape[axis] for axis in spatial)
  product = Convolution(
    weight=1,
    strides=tuple(params["window_strides"]),
    padding=tuple(tuple(edges) for edges in params["padding"]),
    lhs_dilation=tuple(params["lhs_dilation"]),
    rhs_dilation=tuple(params["rhs_dilation"]),
    groups=groups,
    kernel=kernel,
    output=tuple(y.shape[axis] for axis in numbers.out_spec[2:]),
    x_axes=tuple(map(int, numbers.lhs_spec)),
    y_axes=tuple(map(int, numbers.out_spec)),
    input_order=tuple(names[axis] for axis in order),
  )
  inputs = math.prod(w.shape[axis] for axis in order)
  outputs = w.shape[out_axis] // groups
  steps = (
    ("transpose", (out_axis, *order)),
    ("reshape", (groups, outputs, inputs)),
    ("transpose", (0, 2, 1)),
  )
  rows = math.prod(product.output) * x.shape[product.x_axes[0]]
  axes: list[tuple[Atom, ...]] = [()] * y.ndim
  batch, feature, *places = product.y_axes
  for i, axis in enumerate((batch, *places)):
    axes[axis] = _atoms(("row", i, y.shape[axis]))
  axes[feature] = _atoms(("stack", 0, groups), ("out", 0, outputs))
  return Matching(product, steps, groups, inputs, outputs, rows, tuple(axes))


def _atoms(*atoms: tuple[str, int, int]) -> tuple[Atom, ...]:
  return tuple(atom(*each) for each in atoms if each[2] > 1)
