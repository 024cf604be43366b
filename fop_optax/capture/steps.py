"""What each primitive does to a view of a parameter: one table, one rule an entry.

A primitive that is not in `STEPS`, nor handled by `walk`, makes no view: a parameter that meets it
is left to the fallback, with the equation as the reason.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import Any

from jax import lax
from jax.extend.core import primitives
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat, views
from fop_optax.capture import values

Steps = list[views.View]  # for each output of an equation, the steps from its one operand


def unsuited(dtype: Any) -> str:
  """Why a parameter of this type can be in no layer; empty if it can."""
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return f"{dtype}: curvature is of real parameters"
  if jnp.finfo(dtype).bits < 16:
    return f"{dtype}: curvature is of parameters with 16 bits or more"
  return ""


def _unchanged(equation: Any) -> Steps:
  return [()] * len(equation.outvars)


def _convert(equation: Any) -> Steps | None:
  floating = jnp.issubdtype(equation.params["new_dtype"], jnp.inexact)  # complex numbers, too
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


def _pad(equation: Any) -> Steps:
  steps: list[views.Step] = []
  shape = tuple(equation.invars[0].aval.shape)
  for axis, edges in enumerate(equation.params["padding_config"]):
    low, high, interior = map(int, edges)
    indices = np.full(max(shape[axis] + (shape[axis] - 1) * interior, 0), -1)
    indices[:: interior + 1] = np.arange(shape[axis])
    indices = np.pad(indices, (max(low, 0), max(high, 0)), constant_values=-1)
    indices = indices[max(-low, 0) : len(indices) - max(-high, 0)]
    if len(indices) != shape[axis] or -1 in indices:
      steps.append(("take", axis, tuple(indices.tolist())))
  return [tuple(steps)]


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
    primitives.pad_p: _pad,
    primitives.sharding_constraint_p: _unchanged,
  }
  for name, rule in (("split", _split), ("unstack", _unstack), ("reshard", _unchanged)):
    if name in _compat.unexported():
      table[_compat.unexported()[name]] = rule
  return table


def viewed(view: values.ParamView, taken: views.View, shape: tuple[int, ...]) -> values.ParamView:
  """`view` after the steps `taken`, which lead to `shape`."""
  vector = view.vector or sum(size > 1 for size in view.shape) < 2
  return dataclasses.replace(view, steps=view.steps + taken, shape=shape, vector=vector)


def moved(view: values.ParamView, taken: views.View, before: tuple[int, ...]) -> values.ParamView:
  """`view`, of a variable of shape `before`, after the steps `taken` of one equation.

  Axes along which a broadcast repeats entries stay so where the steps leave them whole; else the
  repetition becomes a step.
  """
  for step in taken:
    after = views.shape_of((step,), before)
    view = _kept(view, step, before, after) or viewed(written_out(view, before), (step,), after)
    before = after
  return view


def shifted_after(
  shifted: values.Shifted, taken: views.View, before: tuple[int, ...]
) -> values.Shifted | None:
  """A sum of a view and something else, of shape `before`, after `taken`; None if it is none."""
  view: values.ParamView | None = shifted.view
  for step in taken:
    after = views.shape_of((step,), before)
    view = view and _kept(view, step, before, after)
    before = after
  return shifted._replace(view=view) if view else None


def _kept(
  view: values.ParamView, step: views.Step, before: tuple[int, ...], after: tuple[int, ...]
) -> values.ParamView | None:
  """`view` after a step that leaves the axes whole along which entries are repeated, else None."""
  own = _repeated_after(step, view.shape, before, after)
  if own is None:
    return None
  return viewed(view, (("reshape", own) if step[0] == "reshape" else step,), own)


def _repeated_after(
  step: views.Step, own: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int, ...] | None:
  """What becomes of a shape with 1 on repeated axes; None if they do not stay axes."""
  if own == before:
    return after
  if step[0] == "transpose":
    return views.shape_of((step,), own)
  if step[0] != "reshape":
    return None
  sizes: list[int] = []
  for old, new in views.runs(before, after):
    if own[old] == before[old]:
      sizes += after[new]
    elif max(own[old]) == 1:
      sizes += [1] * len(after[new])
    else:
      return None
  return tuple(sizes)


def written_out(
  view: values.ParamView, shape: tuple[int, ...], keep: Sequence[int] = ()
) -> values.ParamView:
  """`view` with the repetitions that lead to `shape` as steps, but for those along axes `keep`."""
  for axis, size in enumerate(shape):
    if view.shape[axis] != size and axis not in keep:
      own = (*view.shape[:axis], size, *view.shape[axis + 1 :])
      view = dataclasses.replace(view, steps=(*view.steps, ("take", axis, (0,) * size)), shape=own)
  return view


def tiled(
  view: values.ParamView, shape: tuple[int, ...], reps: tuple[int, ...]
) -> values.ParamView:
  """`view`, of a variable of `shape`, repeated `reps` times along each axis, new ones first."""
  new = (1,) * (len(reps) - len(shape))
  reps = (1,) * (len(shape) - len(reps)) + tuple(map(int, reps))
  view = moved(view, (("reshape", new + shape),), shape)
  for axis, (own, size, times) in enumerate(zip(view.shape, new + shape, reps, strict=True)):
    if own > 1 and times > 1:
      step = ("take", axis, tuple(range(size)) * times)
      view = viewed(view, (step,), views.shape_of((step,), view.shape))
  return view


def scanned(view: values.ParamView, length: int, depth: int) -> values.ParamView:
  """What one step of a scan at `depth` sees of `view`: a slice, or all if they are repeated."""
  if view.shape[0] != length:
    return moved(view, (("reshape", view.shape[1:]),), view.shape)
  view = viewed(view, (("scan", length),), view.shape[1:])
  return dataclasses.replace(view, levels=(*view.levels, depth))


def joined(pieces: Sequence[values.ParamView], axis: int) -> values.ParamView | None:
  """One view of pieces of one parameter side by side, as `jnp.roll` makes them; None if unlike."""
  like, indices = set(), []
  for view in pieces:
    before, edges = view.steps, [(0, size, 1) for size in view.shape]
    if before and before[-1][0] == "slice":
      before, edges = before[:-1], list(zip(*before[-1][1:], strict=True))
    indices += range(*edges[axis])
    edges[axis] = (0, 0, 1)  # where a piece starts and ends is in `indices`
    like.add((view.leaf, view.levels, view.scale, before, tuple(edges)))
  if len(like) > 1:
    return None
  ((_, _, _, before, edges),) = like
  edges = [*edges[:axis], (0, len(indices), 1), *edges[axis + 1 :]]
  steps = (*before, ("take", axis, tuple(indices)), ("slice", *zip(*edges, strict=True)))
  shape = tuple(len(range(*edge)) for edge in edges)
  return viewed(dataclasses.replace(pieces[0], steps=()), steps, shape)


def gathered(equation: Any, indices: np.ndarray) -> views.View | None:
  """Steps that a `gather` at known indices is, of whole slices along one axis; else None."""
  numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
  shape, y = tuple(equation.invars[0].aval.shape), equation.outvars[0].aval
  collapsed = numbers.collapsed_slice_dims
  # a batched `dynamic_slice` keeps the axis that it looks up, with a size of 1
  looked_up = collapsed or [i for i, size in enumerate(sizes) if size == 1 < shape[i]]
  if len(looked_up) != 1 or numbers.operand_batching_dims:
    return None
  (axis,) = looked_up
  starts = dict(zip(numbers.start_index_map, np.moveaxis(indices, -1, 0), strict=True))
  if equation.params["mode"] == lax.GatherScatterMode.CLIP:
    starts = {i: np.clip(start, 0, shape[i] - sizes[i]) for i, start in starts.items()}
  none = np.zeros(indices.shape[:-1], int)
  chosen, rest = starts.get(axis, none), [i for i in range(len(shape)) if i != axis]
  if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= shape[axis]:
    return None
  low, high = [0] * len(shape), list(shape)
  for i in rest:
    start = starts.get(i, none)
    low[i] = int(start.min())
    high[i] = low[i] + sizes[i]
    if low[i] < 0 or high[i] > shape[i] or low[i] != start.max():
      return None
  windows = list(map(int, numbers.offset_dims))
  lead = [i for i in range(y.ndim) if i not in windows]
  order = np.argsort([*lead, *windows])
  return (
    ("slice", tuple(low), tuple(high), (1,) * len(shape)),
    _chosen(axis, chosen.ravel(), [end - start for start, end in zip(low, high, strict=True)]),
    ("transpose", (axis, *rest)),
    ("reshape", (*chosen.shape, *(size for i, size in enumerate(sizes) if i not in collapsed))),
    ("transpose", tuple(order.tolist())),
  )


def _chosen(axis: int, indices: np.ndarray, shape: Sequence[int]) -> views.Step:
  """Places along an axis as a step: a slice if they are evenly spaced."""
  first, n = int(indices[0]), len(indices)
  stride = int(indices[1]) - first if n > 1 else 1
  if stride <= 0 or not np.array_equal(indices, first + stride * np.arange(n)):
    return ("take", axis, tuple(indices.tolist()))
  edges = [(0, size, 1) for size in shape]
  edges[axis] = (first, int(indices[-1]) + 1, stride)
  return ("slice", *zip(*edges, strict=True))


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
      with_ones = [_with_ones(part, parts, *args) for part in parts]
      if None in with_ones:
        return None
      parts = tuple(part for part in with_ones if part)
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
