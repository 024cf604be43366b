"""Which entries of a parameter a view reads: equal, transposed, disjoint or repeated ones.

Nearly every view is separable: at place `(s, i, j)` stands entry `f(s) + g(i) + h(j)` of the
parameter, counted in row-major order, and three vectors say what a map of all entries would. Where
a view is not, or the vectors do not decide, the map does.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math

import numpy as np

from fop_optax import views

_ZERO = -(1 << 50)  # stands for no entry but a zero: negative, whatever is added to it

Shape = tuple[int, ...]
Indices = tuple[int, ...]  # for each place along an axis, which distinct one it repeats; -1: zeros


@dataclasses.dataclass(frozen=True)
class Fold:
  """Which slices, rows and columns of a matrix as used repeat others; None where none does.

  `x W[r] = (x S) W` with the 0/1 matrix `S` that adds up the inputs of equal rows, so that the
  input factor of the distinct entries is `S' A S`, and their output factor likewise. What meets
  zeros is left out. Repeated slices of the stack bring rows.
  """

  stack: Indices | None
  inputs: Indices | None
  outputs: Indices | None


def distinct(
  view: views.View, shape: Shape, levels: int = 1
) -> tuple[views.View, Fold | None, int]:
  """A view to `[stack, inputs, outputs]` less what is repeated in it, and what that was.

  Args:
    view: of a parameter of `shape`.
    shape: of the parameter.
    levels: product of the lengths of the scans that go over the parameter.

  Returns:
    The view of the distinct entries; how they are repeated, within one step of those scans, or
    None; how often each slice of the stack is.

  Raises:
    ValueError: if the entries are not repeated in whole rows, columns and slices.
  """
  if not repeats(view):
    return view, None, 1
  axes = _separable(views.simplify(view, shape), shape)
  if axes is None:
    raise ValueError("its entries are repeated, but not in whole rows and columns")
  keep, indices = zip(*map(_first, axes), strict=True)
  if not all(keep):
    raise ValueError("nothing of it but zeros is left")
  base = Entries(_shortened(view, shape, keep), shape)
  times = set(np.bincount([i for i in indices[0] if i >= 0]).tolist())
  if len(times) > 1 or not base.distinct:
    raise ValueError("its entries are repeated, some of them more often than others")
  stack, inputs, outputs = (None if i == tuple(range(len(i))) else i for i in indices)
  if stack and levels > 1:
    one, count = stack[: len(stack) // levels], len(keep[0]) // levels
    if stack != tuple(-1 if i < 0 else i + count * n for n in range(levels) for i in one):
      raise ValueError("its entries are repeated across the steps of a `scan`")
    stack = one
  fold = Fold(stack, inputs, outputs) if stack or inputs or outputs else None
  return base.view, fold, times.pop()


def repeats(view: views.View) -> bool:
  """Whether a view has steps that repeat entries or bring zeros."""
  taken = (step[2] for step in view if step[0] == "take")
  return any(-1 in indices or len(set(indices)) < len(indices) for indices in taken)


def _first(axis: np.ndarray) -> tuple[Indices, Indices]:
  """The places of an axis that repeat no earlier one, and for each place which of them it is."""
  keep: list[int] = []
  number: dict[int, int] = {}
  indices = []
  for place, entry in enumerate(axis.tolist()):
    if entry < _ZERO // 2:
      indices.append(-1)
      continue
    if entry not in number:
      number[entry] = len(keep)
      keep.append(place)
    indices.append(number[entry])
  return tuple(keep), tuple(indices)


def _shortened(view: views.View, shape: Shape, keep: Sequence[Indices]) -> views.View:
  """`view` of the slices, rows and columns in `keep` alone."""
  for axis, indices in enumerate(keep):
    view = (*view, views.take(views.shape_of(view, shape), axis, indices))
  sizes = tuple(map(len, keep))
  if math.prod(sizes) == math.prod(shape):  # the parameter as it is, repeated and taken back?
    whole = (("reshape", sizes),)
    if Entries(view, shape).equal(Entries(whole, shape)):
      return whole
  return view


class Entries:
  """The entries of a parameter of `shape` that a view to `[stack, inputs, outputs]` reads."""

  def __init__(self, view: views.View, shape: Shape):
    self.view, self.shape = view, shape
    self.sizes = views.shape_of(view, shape)
    self.axes = _separable(views.simplify(view, shape), shape)

  @functools.cached_property
  def index(self) -> np.ndarray:
    return views.index_map(self.view, self.shape)

  @functools.cached_property
  def box(self) -> list[np.ndarray] | None:
    """Coordinates read along each axis of the parameter, if each pairing of them is read once."""
    if self.axes is None or 0 in self.sizes:
      return None
    first = sum(int(axis.min()) for axis in self.axes)
    start = np.array(np.unravel_index(first, self.shape))[:, None]
    moves = [np.array(np.unravel_index(axis - axis.min(), self.shape)) for axis in self.axes]
    if np.any(start[:, 0] + sum(move.max(axis=1) for move in moves) >= self.shape):
      return None  # coordinates carry over: they do not add up
    box = [
      functools.reduce(lambda a, b: _set(np.add.outer(a, b)), map(_set, along), at)
      for at, *along in zip(start, *moves, strict=True)
    ]
    return box if math.prod(map(len, box)) == math.prod(self.sizes) else None

  @property
  def distinct(self) -> bool:
    """Whether no entry is read twice."""
    return self.box is not None or np.unique(self.index).size == self.index.size

  def disjoint(self, other: "Entries") -> bool:
    """Whether no entry is read by both."""
    if self.box is None or other.box is None:
      return not np.isin(self.index, other.index).any()
    return not all(np.isin(a, b).any() for a, b in zip(self.box, other.box, strict=True))

  def same_set(self, other: "Entries") -> bool:
    """Whether both read the same entries, in whatever order."""
    if self.box is None or other.box is None:
      return np.array_equal(np.unique(self.index), np.unique(other.index))
    return all(map(np.array_equal, self.box, other.box))

  def equal(self, other: "Entries", flipped: bool = False) -> bool:
    """Whether both read the same entries in the same places, or in those of the transposes."""
    order = [0, 2, 1] if flipped else [0, 1, 2]
    if self.axes is None or other.axes is None:
      return np.array_equal(self.index, other.index.transpose(order))
    pairs = list(zip(self.axes, (other.axes[axis] for axis in order), strict=True))
    return (
      all(len(a) == len(b) and np.array_equal(a - a[:1], b - b[:1]) for a, b in pairs)
      and sum(int(a[0] - b[0]) for a, b in pairs) == 0
    )


def _set(numbers: np.ndarray) -> np.ndarray:
  """The different ones of some small natural numbers, sorted."""
  return np.flatnonzero(np.bincount(numbers.reshape(-1)))


def _separable(view: views.View, shape: Shape) -> list[np.ndarray] | None:
  """Vectors, one an axis, whose sum at a place is the entry that stands there; None if none are."""
  if 0 in views.shape_of(view, shape):
    return None
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  axes = [np.arange(size) * stride for size, stride in zip(shape, strides, strict=True)]
  lead: list[np.ndarray] = []
  for name, *args in view:
    if name == "scan":
      lead.append(axes.pop(0))
    elif name == "stack":
      axes, lead = [_merge([*lead, axes[0]]), *axes[1:]], []
    elif name == "reshape":
      runs = views.runs(tuple(map(len, axes)), args[0])
      pieces = [_regroup(axes[old], args[0][new]) for old, new in runs]
      if any(piece is None for piece in pieces):
        return None
      axes = list(itertools.chain.from_iterable(piece or () for piece in pieces))
    elif name == "transpose":
      axes = [axes[axis] for axis in args[0]]
    elif name == "rev":
      axes = [axis[::-1] if number in args[0] else axis for number, axis in enumerate(axes)]
    elif name == "slice":
      edges = zip(*args, strict=True)
      axes = [axis[slice(*edge)] for axis, edge in zip(axes, edges, strict=True)]
    else:
      number, indices = args[0], np.array(args[1], int)
      axes[number] = np.where(indices < 0, _ZERO, axes[number][indices])
  return [*lead, *axes]


def _merge(axes: Sequence[np.ndarray]) -> np.ndarray:
  return functools.reduce(np.add.outer, axes, np.zeros((), int)).reshape(-1)


def _regroup(axes: list[np.ndarray], sizes: Shape) -> list[np.ndarray] | None:
  """The vectors of axes of `sizes`, reshaped from `axes`; None if there are none."""
  if tuple(map(len, axes)) == sizes:
    return axes
  whole = _merge(axes).reshape(sizes)
  if not sizes:
    return None  # one entry and no axis to say which
  whole = np.where(whole < _ZERO // 2, _ZERO, whole)
  origin = np.unravel_index(np.argmax(whole > _ZERO), sizes)
  out = []
  for axis in range(len(sizes)):
    along = whole[(*origin[:axis], slice(None), *origin[axis + 1 :])]
    out.append(np.where(along == _ZERO, _ZERO, along - whole[origin]) if axis else along)
  total = functools.reduce(np.add.outer, out)
  return out if np.array_equal(np.where(total < _ZERO // 2, _ZERO, total), whole) else None
