"""What each primitive does to a view of a parameter: one table, one rule an entry.

A primitive that is not in `STEPS`, nor handled by `walk`, makes no view: a parameter that meets it
is left to the fallback, with the equation as the reason.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
from typing import Any

from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat, views
from fop_optax.capture import values

Steps = list[views.View]  # for each output of an equation, the steps from its one operand


def _unchanged(equation: Any) -> Steps:
  return [()] * len(equation.outvars)


def _convert(equation: Any) -> Steps | None:
  floating = jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
  return [()] if floating else None


def _reshape(equation: Any) -> Steps:
  step = ("reshape", tuple(equation.outvars[0].aval.shape))
  order = equation.params.get("dimensions")  # a transpose first, as batching makes it
  return [(("transpose", tuple(map(int, order))), step) if order is not None else (step,)]


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
  table: dict[Any, Callable[[Any], Steps | None]] = {
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
  vector = view.vector or sum(size > 1 for size in view.shape) < 2
  return dataclasses.replace(view, steps=view.steps + taken, shape=shape, vector=vector)


def shifted_after(
  shifted: values.Shifted, taken: views.View, shape: tuple[int, ...]
) -> values.Shifted | None:
  """A sum of a view and something else, of `shape`, after the steps `taken`; None if it is none."""
  after = repeated_after(shifted.view.shape, shape, taken)
  return shifted._replace(view=viewed(shifted.view, *after)) if after else None


def repeated_after(
  core: tuple[int, ...], shape: tuple[int, ...], taken: views.View
) -> tuple[views.View, tuple[int, ...]] | None:
  """A view repeated from `core` to `shape` after the steps `taken`: its own steps, and new core.

  Transposes and reshapes that keep axes of repeats apart from axes of entries; None for others.
  """
  own: list[views.Step] = []
  for name, *args in taken:
    if name == "transpose":
      core, shape = (tuple(sizes[axis] for axis in args[0]) for sizes in (core, shape))
    elif name == "reshape" and (regrouped := _regrouped(core, shape, args[0])):
      core, shape = regrouped, args[0]
      args = [core]
    else:
      return None
    own.append((name, *args))
  return tuple(own), core


def _regrouped(
  core: tuple[int, ...], shape: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
  """`core` where `shape`, to which it is repeated, is reshaped to `new`; None if they mix."""
  left = [(size, ours != size) for ours, size in zip(core, shape, strict=True) if size > 1]
  out = []
  for size in new:
    rest, kinds = size, set()
    while rest > 1:
      first, repeated = left.pop(0)
      kinds.add(repeated)
      if first % rest == 0 and first > rest:  # split: the inner part comes next
        left.insert(0, (first // rest, repeated))
        first = rest
      if rest % first or len(kinds) > 1:
        return None
      rest //= first
    out.append(1 if True in kinds else size)
  return tuple(out)


def parts_after(
  parts: tuple[values.Part, ...], taken: views.View, shape: tuple[int, ...]
) -> tuple[values.Part, ...] | None:
  """Parts of a variable after steps that lead to `shape`; None where they do not stay parts."""
  for name, *args in taken:
    if name == "transpose":
      (permutation,) = args
      parts = tuple(
        part._replace(
          view=viewed(
            part.view,
            (("transpose", permutation),),
            tuple(part.view.shape[axis] for axis in permutation),
          ),
          axis=permutation.index(part.axis),
        )
        for part in parts
      )
    elif name == "reshape":
      moved = [_with_ones(part, parts, *args) for part in parts]
      if None in moved:
        return None
      parts = tuple(moved)
    else:
      return None
  return parts


def _with_ones(
  part: values.Part, parts: tuple[values.Part, ...], shape: tuple[int, ...]
) -> values.Part | None:
  """A part after a reshape that adds or removes axes of size one only."""
  before = list(part.view.shape)
  before[part.axis] = sum(each.size for each in parts)
  if [size for size in before if size > 1] != [size for size in shape if size > 1]:
    return None
  nth = sum(size > 1 for size in before[: part.axis])
  long = [axis for axis, size in enumerate(shape) if size > 1]
  if before[part.axis] == 1 or nth >= len(long):
    return None
  own = tuple(part.size if axis == long[nth] else size for axis, size in enumerate(shape))
  return part._replace(view=viewed(part.view, (("reshape", own),), own), axis=long[nth])


def broadcast_core(equation: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape after `broadcast_in_dim`, with 1 on the axes along which entries are repeated."""
  core = [1] * len(equation.outvars[0].aval.shape)
  for axis, size in zip(equation.params["broadcast_dimensions"], shape, strict=True):
    core[axis] = size
  return tuple(core)


def disjoint(readers: list[Any]) -> bool:
  """Whether equations (None: an output) that read a variable each take a slice of their own."""
  if any(reader is None or reader.primitive is not primitives.slice_p for reader in readers):
    return False
  windows = [
    [range(*edges) for edges in zip(p["start_indices"], p["limit_indices"], strict=True)]
    for p in (reader.params for reader in readers)
  ]
  return all(
    any(max(a.start, b.start) >= min(a.stop, b.stop) for a, b in zip(one, other, strict=True))
    for one, other in itertools.combinations(windows, 2)
  )
