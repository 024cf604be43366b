"""Views: how a parameter reaches the product it is used in, kept as plain data.

A view is a tuple of steps that take a parameter leaf to the weight as its layer sees it. Every step
moves or selects entries and computes nothing, so that a view is linear: replayed on a gradient it
gives the gradient of the weight as used, and its transpose brings a direction back to the leaf.
Being tuples of strings and integers, views hash, compare and pickle by value. Casts are no steps:
transposed through bfloat16 they would round a float32 direction.

======================================  ==========================================================
step                                    meaning
======================================  ==========================================================
``("reshape", shape)``                  same entries in row-major order
``("transpose", permutation)``          axes permuted
``("rev", axes)``                       axes reversed
``("slice", start, limit, strides)``    strided rectangle
``("take", axis, indices)``             the places along an axis, in this order
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
import jax.numpy as jnp
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


def transpose(view: View, cotangent: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The transpose of `replay(view, .)`: brings `cotangent` back to a leaf of `shape`."""
  leaf = jax.ShapeDtypeStruct(shape, cotangent.dtype)
  (result,) = jax.linear_transpose(lambda leaf: replay(view, leaf), leaf)(cotangent)
  return result


def shape_of(view: View, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of `replay(view, leaf)` for a leaf of `shape`, scanned axes first."""
  return replay(view, np.broadcast_to(np.int8(0), shape)).shape  # strides of 0: takes no memory


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
    kept.append(step)
  return tuple(kept) if len(kept) == len(view) else simplify(tuple(kept), shape)


def full_slice(shape: tuple[int, ...]) -> Step:
  """The slice that takes everything; a start for narrower ones."""
  return ("slice", (0,) * len(shape), tuple(shape), (1,) * len(shape))


def repeats(view: View) -> bool:
  """Whether a view has steps that repeat entries."""
  return any(step[0] == "take" and len(set(step[2])) < len(step[2]) for step in view)


def window(shape: tuple[int, ...], start: Sequence[int], sizes: tuple[int, ...]) -> Step:
  """The slice of `sizes` that `jax.lax.dynamic_slice` takes: starts are clipped."""
  first = tuple(max(min(i, n - k), 0) for i, n, k in zip(start, shape, sizes, strict=True))
  return ("slice", first, tuple(map(int.__add__, first, sizes)), (1,) * len(shape))


def index_map(view: View, shape: tuple[int, ...]) -> np.ndarray:
  """Which entry of the leaf (row-major) stands at each place of the view."""
  return replay(view, np.arange(math.prod(shape)).reshape(shape))


def _lax_slice(leaf, levels, start, limit, strides):
  lead = leaf.shape[:levels]
  return lax.slice(leaf, (0,) * levels + start, lead + limit, (1,) * levels + strides)


def _numpy_slice(leaf, levels, start, limit, strides):
  window = tuple(slice(*edges) for edges in zip(start, limit, strides, strict=True))
  return leaf[(slice(None),) * levels + window]


def _permutation(levels, permutation):
  return (*range(levels), *(levels + axis for axis in permutation))


_LAX: dict[str, Callable[..., jax.Array]] = {
  "reshape": lambda leaf, levels, shape: lax.reshape(leaf, leaf.shape[:levels] + shape),
  "transpose": lambda leaf, levels, perm: lax.transpose(leaf, _permutation(levels, perm)),
  "rev": lambda leaf, levels, axes: lax.rev(leaf, tuple(levels + axis for axis in axes)),
  "slice": _lax_slice,
  "take": lambda leaf, levels, axis, indices: jnp.take(
    leaf, np.array(indices), axis=levels + axis, mode="clip"
  ),
}
_NUMPY: dict[str, Callable[..., np.ndarray]] = {
  "reshape": lambda leaf, levels, shape: leaf.reshape(leaf.shape[:levels] + shape),
  "transpose": lambda leaf, levels, perm: leaf.transpose(_permutation(levels, perm)),
  "rev": lambda leaf, levels, axes: np.flip(leaf, tuple(levels + axis for axis in axes)),
  "slice": _numpy_slice,
  "take": lambda leaf, levels, axis, indices: np.take(leaf, indices, axis=levels + axis),
}
