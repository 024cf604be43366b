"""Views: how a parameter reaches the product it is used in, kept as plain data.

A view is a tuple of steps that take a parameter leaf to the weight as its layer sees it. Every step
moves, selects or repeats entries and computes nothing, so that a view is linear. That of a layer
reads no entry twice: replayed on a gradient it gives the gradient of the weight as used, and its
transpose brings a direction back to the leaf.
Being tuples of strings and integers, views hash, compare and pickle by value. Casts are no steps:
transposed through bfloat16 they would round a float32 direction.

======================================  ==========================================================
step                                    meaning
======================================  ==========================================================
``("reshape", shape)``                  same entries in row-major order
``("transpose", permutation)``          axes permuted
``("rev", axes)``                       axes reversed
``("slice", start, limit, strides)``    strided rectangle
``("take", axis, indices)``             entries chosen along an axis, some of them twice perhaps;
                                        an index of -1 makes zeros
``("scan", length)``                    the leading axis is one that `jax.lax.scan` goes over;
                                        the steps that follow act on its slices
``("stack",)``                          ends all scans: their axes and the slices' leading one
                                        become one
======================================  ==========================================================
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax import lax
import numpy as np

Step = tuple[Any, ...]
View = tuple[Step, ...]


def replay(view: View, leaf: Any) -> Any:
  """Applies `view` to a JAX array or, for index maps, to a NumPy array."""
  levels = 0
  for name, *args in view:
    if name == "scan":
      levels += 1
    elif name == "stack":
      leaf = leaf.reshape((math.prod(leaf.shape[: levels + 1]), *leaf.shape[levels + 1 :]))
      levels = 0
    elif isinstance(leaf, np.ndarray):
      leaf = _NUMPY[name](leaf, levels, *args)
    else:
      leaf = _LAX[name](leaf, levels, *args)
  return leaf


def transpose(
  view: View, cotangent: jax.Array, shape: tuple[int, ...], sharding: Any = None
) -> jax.Array:
  """The transpose of `replay(view, .)`: brings `cotangent` back to a leaf of `shape`.

  Under explicit mesh axes the leaf is of a type with that `sharding`.
  """
  if not view:
    return cotangent
  leaf = jax.ShapeDtypeStruct(shape, cotangent.dtype, sharding=sharding)
  (result,) = jax.linear_transpose(lambda leaf: replay(view, leaf), leaf)(cotangent)
  return result


def shape_of(view: View, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of `replay(view, leaf)` for a leaf of `shape`, scanned axes first."""
  lead: tuple[int, ...] = ()
  for name, *args in view:
    if name == "scan":
      lead, shape = (*lead, shape[0]), shape[1:]
    elif name == "stack":
      lead, shape = (), (math.prod((*lead, shape[0])), *shape[1:])
    else:
      shape = _SHAPE[name](shape, *args)
  return (*lead, *shape)


def simplify(view: View, shape: tuple[int, ...]) -> View:
  """Drops the steps of `view` that do nothing and merges neighbours, for a leaf of `shape`."""
  steps: list[Step] = []
  for step in view:
    if steps and step[0] == steps[-1][0] == "reshape":
      steps.pop()
    elif steps and step[0] == steps[-1][0] == "transpose":
      before = steps.pop()[1]
      step = ("transpose", tuple(before[axis] for axis in step[1]))
    steps.append(step)
  kept: list[Step] = []
  for step in steps:
    levels = 0 if any(s[0] == "stack" for s in kept) else sum(s[0] == "scan" for s in kept)
    before = shape_of(tuple(kept), shape)[levels:]
    if step == ("reshape", before) or step == ("transpose", tuple(range(len(before)))):
      continue
    if step[0] == "slice" and step == full_slice(before):
      continue
    if step[0] == "take" and step[2] == tuple(range(before[step[1]])):
      continue
    kept.append(step)
  return tuple(kept) if len(kept) == len(view) else simplify(tuple(kept), shape)


def take(shape: tuple[int, ...], axis: int, indices: Sequence[int]) -> Step:
  """The step that takes `indices` along an axis: a slice where they go up evenly."""
  stride = indices[1] - indices[0] if len(indices) > 1 else 1
  first, stop = (indices[0], indices[-1] + 1) if len(indices) else (0, 0)
  if first < 0 or stride < 1 or list(indices) != list(range(first, stop, stride)):
    return ("take", axis, tuple(map(int, indices)))
  _, *edges = full_slice(shape)
  own = (int(first), int(stop), int(stride))
  return ("slice", *((*e[:axis], n, *e[axis + 1 :]) for e, n in zip(edges, own, strict=True)))


def full_slice(shape: tuple[int, ...]) -> Step:
  """The slice that takes everything; a start for narrower ones."""
  return ("slice", (0,) * len(shape), tuple(shape), (1,) * len(shape))


def window(shape: tuple[int, ...], start: Sequence[int], sizes: tuple[int, ...]) -> Step:
  """The slice of `sizes` that `jax.lax.dynamic_slice` takes: starts are clipped."""
  first = tuple(max(min(i, n - k), 0) for i, n, k in zip(start, shape, sizes, strict=True))
  return ("slice", first, tuple(map(int.__add__, first, sizes)), (1,) * len(shape))


def runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[slice, slice]]:
  """The finest runs of axes that a reshape from `old` to `new` sizes maps to one another."""
  out, a, c = [], 0, 0
  while a < len(old) or c < len(new):
    b, d = a + (a < len(old)), c + (c < len(new))
    while math.prod(old[a:b]) != math.prod(new[c:d]):
      if math.prod(old[a:b]) < math.prod(new[c:d]):
        b += 1
      else:
        d += 1
    while b < len(old) and old[b] == 1:  # an axis of one entry is no run of its own
      b += 1
    while d < len(new) and new[d] == 1:
      d += 1
    out.append((slice(a, b), slice(c, d)))
    a, c = b, d
  return out


def grouped_axes(view: View, shape: tuple[int, ...]) -> list[tuple[int, ...]] | None:
  """For each axis of a view the leaf's axes that make it up, the slowest first.

  Those of one entry are left out. None if the view does more than to permute and group axes.
  """
  # An axis is a list of pieces (leaf axis, size, stride along it): reshapes may cut one in two.
  axes = [[(axis, n, 1)] for axis, n in enumerate(shape)]
  levels = 0
  for name, *args in view:
    if name == "scan":
      levels += 1
    elif name == "stack":
      axes, levels = [sum(axes[: levels + 1], []), *axes[levels + 1 :]], 0
    elif name == "transpose":
      axes = axes[:levels] + [axes[levels + axis] for axis in args[0]]
    elif name == "reshape" and (regrouped := _regroup(axes[levels:], args[0])) is not None:
      axes = axes[:levels] + regrouped
    else:
      return None
  merged = [_merge(pieces) for pieces in axes]
  whole = all(n == shape[axis] for pieces in merged for axis, n, _ in pieces)
  return [tuple(axis for axis, *_ in pieces) for pieces in merged] if whole else None


def _regroup(axes, sizes):
  """The pieces of `axes`, in their order, as axes of other sizes; None where one cannot be cut."""
  pieces = [piece for axis in axes for piece in axis if piece[1] > 1]
  out = []
  for size in sizes:
    out.append([])
    while size > 1:
      axis, n, stride = pieces.pop(0)
      own = math.gcd(size, n)
      if own < min(size, n):
        return None
      if own < n:
        pieces.insert(0, (axis, n // own, stride))
      out[-1].append((axis, own, stride * (n // own)))
      size //= own
  return out


def _merge(pieces):
  """Neighbouring pieces of one leaf axis put together again; those of one entry left out."""
  out = []
  for axis, n, stride in (piece for piece in pieces if piece[1] > 1):
    if out and out[-1][0] == axis and out[-1][2] == n * stride:
      n *= out.pop()[1]
    out.append((axis, n, stride))
  return out


def index_map(view: View, shape: tuple[int, ...]) -> np.ndarray:
  """Which entry of the leaf (row-major) stands at each place of the view, -1 for a zero."""
  return replay(view, np.arange(math.prod(shape)).reshape(shape))


def _lax_slice(leaf, levels, start, limit, strides):
  lead = leaf.shape[:levels]
  return lax.slice(leaf, (0,) * levels + start, lead + limit, (1,) * levels + strides)


def _numpy_slice(leaf, levels, start, limit, strides):
  window = tuple(slice(*edges) for edges in zip(start, limit, strides, strict=True))
  return leaf[(slice(None),) * levels + window]


def _lax_take(leaf, levels, axis, indices):
  at = (slice(None),) * (levels + axis)
  index = np.array(indices, np.int32)
  return leaf.at[(*at, index)].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _numpy_take(leaf, levels, axis, indices):
  taken = np.take(leaf, indices, levels + axis)
  zeros = (np.array(indices, int) < 0).reshape(-1, *[1] * (taken.ndim - levels - axis - 1))
  return np.where(zeros, -1, taken)


def _permutation(levels, permutation):
  return (*range(levels), *(levels + axis for axis in permutation))


_LAX: dict[str, Callable[..., jax.Array]] = {
  "reshape": lambda leaf, levels, shape: lax.reshape(leaf, leaf.shape[:levels] + shape),
  "transpose": lambda leaf, levels, perm: lax.transpose(leaf, _permutation(levels, perm)),
  "rev": lambda leaf, levels, axes: lax.rev(leaf, tuple(levels + axis for axis in axes)),
  "slice": _lax_slice,
  "take": _lax_take,
}
_NUMPY: dict[str, Callable[..., np.ndarray]] = {
  "reshape": lambda leaf, levels, shape: leaf.reshape(leaf.shape[:levels] + shape),
  "transpose": lambda leaf, levels, perm: leaf.transpose(_permutation(levels, perm)),
  "rev": lambda leaf, levels, axes: np.flip(leaf, tuple(levels + axis for axis in axes)),
  "slice": _numpy_slice,
  "take": _numpy_take,
}
_SHAPE: dict[str, Callable[..., tuple[int, ...]]] = {
  "reshape": lambda before, shape: shape,
  "transpose": lambda before, permutation: tuple(before[axis] for axis in permutation),
  "rev": lambda before, axes: before,
  "slice": lambda before, *edges: tuple(len(range(*e)) for e in zip(*edges, strict=True)),
  "take": lambda before, axis, indices: (*before[:axis], len(indices), *before[axis + 1 :]),
}
