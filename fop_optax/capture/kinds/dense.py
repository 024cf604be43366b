"""Dense products: any `dot_general` of which one operand is a weight.

Its axes are the stack (batched weights, as of experts), the inputs (contracted) and the outputs of
the weight, and the rows of the other operand. Stack, inputs and outputs are in the order of the
weight's own axes, however the product spells them.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax import moments
from fop_optax.capture.values import Atom, Matching, Part, Window, atom


@dataclasses.dataclass(frozen=True)
class Dense:
  """The axes of `x` and `y` of a product `y = dot_general(x, w)` by their role."""

  weight: int  # which operand is the weight
  x_rows: moments.Axes
  x_stack: moments.Axes
  x_in: moments.Axes
  y_rows: moments.Axes
  y_stack: moments.Axes
  y_out: moments.Axes
  x_cut: Window | None = None  # where the weight is one of several joined ones, what it meets of x
  y_cut: Window | None = None  # and what of y it makes
  repeats: int = 1  # rows that are repeated so often, in y along a new leading axis
  parts: tuple[int, ...] = ()  # of complex numbers, which are rows: 0 real, 1 imaginary

  kind = "dense"

  @property
  def row_axes(self) -> tuple[tuple[int, int], ...]:
    return () if self.repeats > 1 else tuple(zip(self.x_rows, self.y_rows, strict=True))

  def repeated(self, times: int, x_too: bool) -> "Dense":
    """The product with a new leading axis of `times` rows in y, and in x if that has it too."""
    later = lambda axes: tuple(axis + 1 for axis in axes)
    cut = lambda window: window and window._replace(axis=window.axis + 1)
    moved = dataclasses.replace(
      self,
      y_rows=(0, *later(self.y_rows)),
      y_stack=later(self.y_stack),
      y_out=later(self.y_out),
      y_cut=cut(self.y_cut),
    )
    if not x_too:
      return dataclasses.replace(moved, repeats=times)
    return dataclasses.replace(
      moved,
      x_rows=(0, *later(self.x_rows)),
      x_stack=later(self.x_stack),
      x_in=later(self.x_in),
      x_cut=cut(self.x_cut),
    )

  def as_real(self, x: jax.Array, dy: jax.Array) -> tuple["Dense", jax.Array, jax.Array]:
    """The product of real numbers that has the same gradient, `Re(x dy') = Re x Re dy' - Im ...`.

    Parts of `x` and `dy` are rows of their own, along a new leading axis.
    """
    xs, dys = (jnp.real(x), -jnp.imag(x)), (jnp.real(dy), jnp.imag(dy))
    x, dy = (jnp.stack([part[i] for i in self.parts]) for part in (xs, dys))
    return dataclasses.replace(self.repeated(len(self.parts), True), parts=()), x, dy

  def input_moment(self, x: jax.Array, bias: bool, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r x_r x_r'`, of `[x_r; 1]` with `bias`."""
    roles = moments.Roles(self.x_rows, self.x_stack, self.x_in)
    x = _cut(x, self.x_cut)
    a = moments.second_moment(x, roles, diagonal, dtype)
    if bias:
      n = math.prod(x.shape[axis] for axis in self.x_rows)
      a = moments.with_ones(a, moments.row_sum(x, roles, dtype), n)
    return self.repeats * a if self.repeats > 1 else a

  def output_moment(self, x: jax.Array, dy: jax.Array, diagonal: bool, dtype: Any) -> jax.Array:
    """`sum_r dy_r dy_r'`."""
    roles = moments.Roles(self.y_rows, self.y_stack, self.y_out)
    return moments.second_moment(_cut(dy, self.y_cut), roles, diagonal, dtype)

  def input_sum(self, x: jax.Array, bias: bool, dtype: Any) -> jax.Array:
    """`sum_r x_r`, of `[x_r; 1]` with `bias`: `[stack, d]`."""
    x = _cut(x, self.x_cut)
    total = moments.row_sum(x, moments.Roles(self.x_rows, self.x_stack, self.x_in), dtype)
    return moments.with_count(total, x, self.x_rows) if bias else total

  def output_sum(self, dy: jax.Array, dtype: Any) -> jax.Array:
    """`sum_r dy_r`."""
    roles = moments.Roles(self.y_rows, self.y_stack, self.y_out)
    return moments.row_sum(_cut(dy, self.y_cut), roles, dtype)

  def input_rows(self, x: jax.Array, dtype: Any) -> jax.Array:
    """`x_r`, `[stack, rows, d]`."""
    roles = moments.Roles(self.x_rows, self.x_stack, self.x_in)
    return moments.as_rows(_cut(x, self.x_cut), roles, dtype)

  def output_rows(self, dy: jax.Array, dtype: Any) -> jax.Array:
    """`dy_r`, `[stack, rows, d]`."""
    roles = moments.Roles(self.y_rows, self.y_stack, self.y_out)
    return moments.as_rows(_cut(dy, self.y_cut), roles, dtype)


def stacked(equation: Any, weight: int) -> moments.Axes:
  """The axes of the weight operand that the product keeps in x, w and y."""
  return tuple(map(int, equation.params["dimension_numbers"][1][weight]))


def match(
  equation: Any, weight: int, part: Part | None = None, own: tuple[int, ...] = ()
) -> Matching:
  """What a `dot_general` with this weight operand, or with a part of it, is as a layer.

  `own` is the operand's shape with 1 on stacked axes along which it is repeated: rows.
  """
  contract, batch = equation.params["dimension_numbers"]
  x, w = equation.invars[1 - weight].aval, equation.invars[weight].aval
  (w_in, x_in), (w_stack, x_stack) = (
    [tuple(map(int, axes[side])) for side in (weight, 1 - weight)] for axes in (contract, batch)
  )
  x_rows, w_out = _others(x, x_in, x_stack), _others(w, w_in, w_stack)
  n_stack, n_rows, n_out = len(w_stack), len(x_rows), len(w_out)
  # the output's axes: the stack, then the left operand's rest, then the right operand's
  rows, out = range(n_stack, n_stack + n_rows), range(n_stack + n_rows, n_stack + n_rows + n_out)
  if weight == 0:
    out, rows = range(n_stack, n_stack + n_out), range(n_stack + n_out, n_stack + n_out + n_rows)
  repeated = [i for i in range(n_stack) if own and own[w_stack[i]] != w.shape[w_stack[i]]]
  stack_order = sorted(set(range(n_stack)) - set(repeated), key=lambda i: w_stack[i])
  x_rows = (*(x_stack[i] for i in repeated), *x_rows)
  product = Dense(
    weight=weight,
    x_rows=x_rows,
    x_stack=tuple(x_stack[i] for i in stack_order),
    x_in=tuple(axis for _, axis in sorted(zip(w_in, x_in, strict=True))),
    y_rows=(*repeated, *rows),
    y_stack=tuple(stack_order),
    y_out=tuple(out),
  )
  if part:
    product = _part(product, part, w_stack, w_in, w_out)
  w_shape = part.view.shape if part else own or w.shape
  groups = [sorted(w_stack), sorted(w_in), list(w_out)]
  stack, inputs, outputs = (math.prod(w_shape[axis] for axis in group) for group in groups)
  order = tuple(axis for group in groups for axis in group)
  steps = (("transpose", order), ("reshape", (stack, inputs, outputs)))
  n = math.prod(x.shape[axis] for axis in x_rows)
  shape = list(equation.outvars[0].aval.shape)
  if product.y_cut:
    shape[product.y_cut.axis] = product.y_cut.size
  axes = _atoms(shape, product)
  return Matching(product, steps, stack, inputs, outputs, n, axes, product.y_cut)


def of_complex(matching: Matching, parts: tuple[int, ...]) -> Matching:
  """A product of complex numbers with a real weight: a row each for these parts of the output."""
  assert isinstance(matching.product, Dense)
  product = dataclasses.replace(matching.product, parts=parts)
  return matching._replace(product=product, rows=len(parts) * matching.rows)


def _part(product: Dense, part: Part, w_stack, w_in, w_out) -> Dense:
  """The product of one part alone, which meets a part of x and makes a part of y."""
  roles = (
    ("x_cut", w_in, product.x_in),
    ("x_cut", w_stack, product.x_stack),
    ("y_cut", w_stack, product.y_stack),
    ("y_cut", w_out, product.y_out),
  )
  cuts: dict[str, Any] = {
    name: Window(axes[sorted(own).index(part.axis)], part.start, part.size)
    for name, own, axes in roles
    if part.axis in own
  }
  return dataclasses.replace(product, **cuts)


def _cut(array: jax.Array, cut: Window | None) -> jax.Array:
  if cut is None:
    return array
  axis, start, size = cut
  return jax.lax.slice_in_dim(array, start, start + size, axis=axis)


def _atoms(shape: Sequence[int], product: Dense) -> tuple[tuple[Atom, ...], ...]:
  """What each axis of the output is made of."""
  axes: list[tuple[Atom, ...]] = [()] * len(shape)
  roles = (("stack", product.y_stack), ("row", product.y_rows), ("out", product.y_out))
  for kind, role in roles:
    for order, axis in enumerate(role):
      if shape[axis] > 1:
        axes[axis] = (atom(kind, order, shape[axis]),)
  return tuple(axes)


def _others(aval: Any, *roles: tuple[int, ...]) -> tuple[int, ...]:
  taken = {axis for role in roles for axis in role}
  return tuple(axis for axis in range(aval.ndim) if axis not in taken)
