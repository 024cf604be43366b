"""Biases: what is added to a product's output, or to a slice of it, as a homogeneous coordinate.

Where a variable is `c y + ...` for the output `y` of a product, and `s b` is added to it, the
gradient of `b` is `s / c` times the sum over rows of the cotangent of `y`: in the rows of this
product the homogeneous coordinate is `s / c`. In rows of the same weight where nothing is added it
is 0. `Linear` follows `y` through transposes, reshapes and slices; what a bias is added to has all
rows, and any of the outputs.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import NamedTuple

from fop_optax import views
from fop_optax.capture.values import Atom, Linear, ParamView, Part, Window

Shape = tuple[int, ...]


def after(linear: Linear, steps: views.View, shape: Shape) -> Linear | None:
  """`linear`, a variable of `shape`, after `steps`; None where a bias could not follow it."""
  moved: Linear | None = linear
  for name, *args in steps:
    if moved is None:
      return None
    if name == "transpose":
      moved = _transposed(moved, *args)
      shape = tuple(shape[axis] for axis in args[0])
    elif name == "reshape":
      moved = _reshaped(moved, *args)
      (shape,) = args
    elif name == "slice":
      moved, shape = _sliced(moved, shape, *args)
    else:
      return None
  return moved


def scaled(linear: Linear, factor: complex) -> Linear | None:
  """`linear` times a number."""
  if not factor or isinstance(factor, complex):
    return None
  return dataclasses.replace(linear, factor=factor * linear.factor)


def _transposed(linear: Linear, permutation: tuple[int, ...]) -> Linear:
  window = linear.window
  if window:
    window = window._replace(axis=permutation.index(window.axis))
  axes = tuple(linear.axes[axis] for axis in permutation)
  return dataclasses.replace(linear, axes=axes, window=window)


def _reshaped(linear: Linear, shape: Shape) -> Linear | None:
  """The atoms regrouped for `shape`, split where need be; None if they do not fit."""
  if linear.window:
    return None
  atoms = [atom for axis in linear.axes for atom in axis]
  axes = []
  for size in shape:
    axis: list[Atom] = []
    while size > 1:
      first = atoms.pop(0)
      if size % first.size == 0:
        size //= first.size
      else:
        split = _split(first, size)
        if split is None:
          return None
        first, rest = split
        atoms.insert(0, rest)
        size = 1
      axis.append(first)
    axes.append(tuple(axis))
  return dataclasses.replace(linear, axes=tuple(axes))


def _split(atom: Atom, size: int) -> tuple[Atom, Atom] | None:
  """An atom as an outer part of `size` and an inner one; None if it does not come apart so."""
  inner = atom.size // size
  if atom.size % size or atom.start % inner or atom.full % inner:
    return None
  outer = Atom(atom.kind, (*atom.order, 0), size, atom.start // inner, atom.full // inner)
  return outer, Atom(atom.kind, (*atom.order, 1), inner, 0, inner)


def _sliced(
  linear: Linear, shape: Shape, start: Shape, limit: Shape, strides: Shape
) -> tuple[Linear | None, Shape]:
  sliced: Linear | None = linear
  cut = tuple(
    -(-(stop - first) // step) for first, stop, step in zip(start, limit, strides, strict=True)
  )
  for axis, (first, stop, step) in enumerate(zip(start, limit, strides, strict=True)):
    if sliced is not None and (first, stop) != (0, shape[axis]):
      sliced = _cut(sliced, axis, first, stop - first) if step == 1 else None
    elif step != 1:
      sliced = None
  return sliced, cut


def _cut(linear: Linear, axis: int, start: int, size: int) -> Linear | None:
  """The part of an axis from `start` on; None where it is of rows, or no rectangle of atoms."""
  window = linear.window
  if window:
    if axis != window.axis or not window.start <= start <= start + size <= sum(window[1:]):
      return None
    linear, start = dataclasses.replace(linear, window=None), start - window.start
    if size == window.size:
      return linear
  if not linear.axes[axis]:
    return None
  first, *inner = linear.axes[axis]
  each = math.prod(atom.size for atom in inner)
  if first.kind == "row" or start % each or size % each:
    return None
  part = first._replace(start=first.start + start // each, size=size // each)
  held = linear.held
  if part.size == 1:
    held, own = (*held, part), tuple(inner)
  else:
    own = (part, *inner)
  axes = (*linear.axes[:axis], own, *linear.axes[axis + 1 :])
  return dataclasses.replace(linear, axes=axes, held=held)


class Joint(NamedTuple):
  """A bias view, or a part of it, that is added to a product."""

  linear: Linear
  view: ParamView
  steps: views.View  # from the view to [stack, outputs], or to a slice of that
  place: views.View  # from [stack, outputs] to the slice


def joints(
  linears: Sequence[Linear], pieces: Sequence[ParamView | Part], shape: Shape
) -> list[Joint] | str:
  """How `pieces`, side by side a variable of `shape`, are added to `linears`; or why they are not.

  A bias is constant along every row axis and has one entry for each stacked output feature: a table
  of positions is none, nor is a scalar.
  """
  out = []
  for linear, piece in itertools.product(linears, pieces):
    joint = _joint(linear, piece, shape)
    if isinstance(joint, str):
      return joint
    if joint:
      out.append(joint)
  return out


def _joint(linear: Linear, piece: ParamView | Part, shape: Shape) -> Joint | str | None:
  """None where they do not meet."""
  view = piece.view if isinstance(piece, Part) else piece
  windows = [linear.window] if linear.window else []
  windows += [Window(*piece[1:])] if isinstance(piece, Part) else []
  if len({window.axis for window in windows}) > 1:
    return "it is added to products side by side, but joined from parts along another axis"
  if windows:
    axis = windows[0].axis
    start = max(window.start for window in windows)
    stop = min(sum(window[1:]) for window in windows)
    if start >= stop:
      return None
    ours = linear.window or Window(axis, 0, shape[axis])
    theirs = Window(*piece[1:]) if isinstance(piece, Part) else Window(axis, 0, shape[axis])
    whole = dataclasses.replace(linear, window=None)
    cut = whole
    if (start, stop) != (ours.start, ours.start + ours.size):
      cut = _cut(whole, axis, start - ours.start, stop - start)
    if cut is None:
      return _NO_SLICE
    linear = dataclasses.replace(cut, window=None)
    shape = (*shape[:axis], stop - start, *shape[axis + 1 :])
    if view.shape[axis] > 1:
      view = _narrowed(view, axis, start - theirs.start, stop - start)
  steps = _steps(linear, view, shape)
  return steps if isinstance(steps, str) else Joint(linear, view, *steps)


_NO_SLICE = "it is added to a slice of a product, or of a joined one, that is no slice of outputs"


def _narrowed(view: ParamView, axis: int, start: int, size: int) -> ParamView:
  if size == view.shape[axis]:
    return view
  edges = [(0, n, 1) for n in view.shape]
  edges[axis] = (start, start + size, 1)
  step = ("slice", *zip(*edges, strict=True))
  shape = (*view.shape[:axis], size, *view.shape[axis + 1 :])
  return dataclasses.replace(view, steps=(*view.steps, step), shape=shape)


def _steps(linear: Linear, bias: ParamView, shape: Shape) -> tuple[views.View, views.View] | str:
  """Steps of the bias to `[stack, outputs]`, or to a slice of that, and from it to the slice."""
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
  order = sorted(range(len(atoms)), key=lambda i: _weight_order(atoms[i]))
  stack, outputs = (_count(atoms, kind) for kind in ("stack", "out"))
  steps = (
    ("reshape", tuple(atom.size for atom in atoms)),
    ("transpose", tuple(order)),
    ("reshape", (stack, outputs)),
  )
  every = sorted((*atoms, *linear.held), key=_weight_order)
  if all(atom.size == atom.full for atom in every):
    return steps, ()
  place = (
    ("reshape", tuple(atom.full for atom in every)),
    (
      "slice",
      tuple(atom.start for atom in every),
      tuple(atom.start + atom.size for atom in every),
      (1,) * len(every),
    ),
    ("reshape", (stack, outputs)),
  )
  return steps, place


def stacked(place: views.View, times: int) -> views.View:
  """`place` for a weight that scans go over, `times` as many matrices."""
  (_, full), (_, start, stop, strides), (_, (stack, outputs)) = place
  return (
    ("reshape", (times, *full)),
    ("slice", (0, *start), (times, *stop), (1, *strides)),
    ("reshape", (times * stack, outputs)),
  )


def _weight_order(atom: Atom) -> tuple[bool, tuple[int, ...]]:
  return atom.kind != "stack", atom.order


def _count(atoms: Sequence[Atom], kind: str) -> int:
  return math.prod(atom.size for atom in atoms if atom.kind == kind)
