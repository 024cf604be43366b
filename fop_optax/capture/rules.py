"""What each primitive does to a view of a parameter: one table, one rule an entry.

A primitive that is not in `STEPS`, nor handled by `walk`, makes no view: a parameter that meets it
is left to the fallback, with the equation as the reason.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax import views
from fop_optax.capture import values

Steps = list[views.View]  # for each output of an equation, the steps from its one operand


def _unchanged(equation: Any) -> Steps:
  return [()] * len(equation.outvars)


def _convert(equation: Any) -> Steps | None:
  floating = jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
  return [()] if floating else None


def _reshape(equation: Any) -> Steps | None:
  if equation.params.get("dimensions") is not None:
    return None
  return [(("reshape", tuple(equation.outvars[0].aval.shape)),)]


def _squeeze(equation: Any) -> Steps:
  return [(("reshape", tuple(equation.outvars[0].aval.shape)),)]


def _transpose(equation: Any) -> Steps:
  return [(("transpose", tuple(int(axis) for axis in equation.params["permutation"])),)]


def _rev(equation: Any) -> Steps:
  return [(("rev", tuple(int(axis) for axis in equation.params["dimensions"])),)]


def _slice(equation: Any) -> Steps:
  start, limit = equation.params["start_indices"], equation.params["limit_indices"]
  strides = equation.params["strides"] or (1,) * len(start)
  return [(("slice", *(tuple(map(int, edges)) for edges in (start, limit, strides))),)]


def _split(equation: Any) -> Steps:
  return _pieces(equation, int(equation.params["axis"]), map(int, equation.params["sizes"]))


def _unstack(equation: Any) -> Steps:
  axis = int(equation.params["axis"])
  shape = equation.invars[0].aval.shape
  pieces = _pieces(equation, axis, [1] * shape[axis])
  return [(*piece, ("reshape", (*shape[:axis], *shape[axis + 1 :]))) for piece in pieces]


def _pieces(equation: Any, axis: int, sizes: Any) -> Steps:
  shape = tuple(equation.invars[0].aval.shape)
  steps, start = [], 0
  for size in sizes:
    edges = [(0, n, 1) for n in shape]
    edges[axis] = (start, start + size, 1)
    steps.append((("slice", *zip(*edges, strict=True)),))
    start += size
  return steps


@functools.cache
def steps() -> dict[Any, Callable[[Any], Steps | None]]:
  """Primitives of one operand that move or select entries, and the steps that they are."""
  table = {
    primitives.convert_element_type_p: _convert,
    primitives.copy_p: _unchanged,
    primitives.name_p: _unchanged,
    primitives.reduce_precision_p: _unchanged,
    primitives.reshape_p: _reshape,
    primitives.squeeze_p: _squeeze,
    primitives.transpose_p: _transpose,
    primitives.rev_p: _rev,
    primitives.slice_p: _slice,
  }
  for name, rule in (("split", _split), ("unstack", _unstack)):
    if name in _compat.unexported():
      table[_compat.unexported()[name]] = rule
  return table


def viewed(view: values.ParamView, taken: views.View, shape: tuple[int, ...]) -> values.ParamView:
  """`view` after the steps `taken`, which lead to `shape`."""
  return dataclasses.replace(view, steps=view.steps + taken, shape=shape)


def linear_after(linear: values.Linear, taken: views.View) -> values.Linear | None:
  """The output of a product after the steps `taken`; None where a bias could not follow it."""
  for name, *args in taken:
    if linear is None or name not in ("transpose", "reshape"):
      return None
    linear = linear.transposed(*args) if name == "transpose" else linear.reshaped(*args)
  return linear


def broadcast_core(equation: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape after `broadcast_in_dim`, with 1 on the axes along which entries are repeated."""
  core = [1] * len(equation.outvars[0].aval.shape)
  for axis, size in zip(equation.params["broadcast_dimensions"], shape, strict=True):
    core[axis] = size
  return tuple(core)


def dense(equation: Any, weight: int) -> values.Product:
  """The roles of the axes in a `dot_general` whose operand `weight` is the weight."""
  contract, batch = equation.params["dimension_numbers"]
  w_in, x_in = contract[weight], contract[1 - weight]
  w_stack, x_stack = batch[weight], batch[1 - weight]
  x_rows = _others(equation.invars[1 - weight], x_in, x_stack)
  n_stack, n_rows = len(w_stack), len(x_rows)
  n_out = len(_others(equation.invars[weight], w_in, w_stack))
  stack_order = sorted(range(n_stack), key=lambda i: w_stack[i])
  # the output's axes: the stack, then the left operand's rest, then the right operand's
  rows, out = range(n_stack, n_stack + n_rows), range(n_stack + n_rows, n_stack + n_rows + n_out)
  if weight == 0:
    out, rows = range(n_stack, n_stack + n_out), range(n_stack + n_out, n_stack + n_out + n_rows)
  return values.Product(
    weight=weight,
    x_rows=x_rows,
    x_stack=tuple(int(x_stack[i]) for i in stack_order),
    x_in=tuple(int(axis) for _, axis in sorted(zip(w_in, x_in, strict=True))),
    y_rows=tuple(rows),
    y_stack=tuple(stack_order),
    y_out=tuple(out),
  )


def weight_steps(equation: Any, weight: int) -> tuple[views.View, tuple[int, int, int]]:
  """Steps from the weight operand to `[stack, inputs, outputs]`, and these sizes."""
  contract, batch = equation.params["dimension_numbers"]
  shape = equation.invars[weight].aval.shape
  w_stack, w_in = sorted(map(int, batch[weight])), sorted(map(int, contract[weight]))
  w_out = _others(equation.invars[weight], w_in, w_stack)
  sizes = tuple(values.sizes(shape, tuple(axes)) for axes in (w_stack, w_in, w_out))
  return (("transpose", (*w_stack, *w_in, *w_out)), ("reshape", sizes)), sizes


def output_atoms(equation: Any, product: values.Product) -> tuple[tuple[values.Atom, ...], ...]:
  """What each axis of a product's output is made of."""
  shape = equation.outvars[0].aval.shape
  axes: list[tuple[values.Atom, ...]] = [()] * len(shape)
  for kind, role in (("stack", "y_stack"), ("row", "y_rows"), ("out", "y_out")):
    for order, axis in enumerate(getattr(product, role)):
      if shape[axis] > 1:
        axes[axis] = (values.Atom(kind, (order,), shape[axis]),)
  return tuple(axes)


def bias_steps(
  linear: values.Linear, bias: values.ParamView, shape: tuple[int, ...]
) -> views.View | str:
  """Steps from a view that is added to `linear`, of `shape`, to `[stack, outputs]`, or why not.

  A bias is constant along every row axis and has one entry for each stacked output feature: a
  table of positions is none, nor is a scalar.
  """
  atoms = []
  for axis, size, ours in zip(linear.axes, bias.shape, shape, strict=True):
    kinds = {atom.kind for atom in axis}
    if "row" in kinds:
      if kinds != {"row"} or size != 1:
        return "it is added to a product, but differs between rows (positions), so it is no bias"
    elif size != ours:
      return "it is added to a product, but has not one entry for each output feature"
    else:
      atoms += axis
  order = sorted(range(len(atoms)), key=lambda i: (atoms[i].kind != "stack", atoms[i].order))
  stack, outputs = (
    values.sizes(tuple(a.size if a.kind == kind else 1 for a in atoms), tuple(range(len(atoms))))
    for kind in ("stack", "out")
  )
  return (
    ("reshape", tuple(atom.size for atom in atoms)),
    ("transpose", tuple(order)),
    ("reshape", (stack, outputs)),
  )


def _others(variable: Any, *roles: Any) -> tuple[int, ...]:
  taken = {int(axis) for role in roles for axis in role}
  return tuple(axis for axis in range(variable.aval.ndim) if axis not in taken)
