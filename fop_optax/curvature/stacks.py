"""Stacks: layers of equal shape side by side, so that each operation is one batched operation.

A *block* is one matrix of one layer, the unit of curvature; of methods that know no layers, one
tensor of a parameter. Which block stands where follows from the layers (or tensors) alone, and from
which leaves are masked, so a plan is static and costs nothing to remake.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.layers import Factors, Layers, is_masked, side_shapes
from fop_optax.moments import whole
from fop_optax.tensors import Tensors

Blocks = Layers | Tensors

SMALL_SIDE = 65  # up to it a larger side costs little: 64 and a bias


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers of equal shape.

  Attributes:
    layers: indices of the layers, in the order of their blocks.
    blocks: number of matrices (or tensors), all layers together.
    dims: shape of each.
    diagonal: for each axis whether its factor is kept as its diagonal.
  """

  layers: tuple[int, ...]
  blocks: int
  dims: tuple[int, ...]
  diagonal: tuple[bool, ...]

  @property
  def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shapes of the stacked factors, one an axis: of a layer `A` and `G`."""
    return side_shapes(self.blocks, self.dims, self.diagonal)


def plan_stacks(layers: Blocks, leaves: Sequence[Any] | None = None) -> tuple[Stack, ...]:
  """Groups layers by shape; leaves out those whose leaves optax has all masked.

  A stack whose layers are all masked keeps one block of one entry: so the structure of a state does
  not depend on masks (which `optax.tree.map_params` does not know) and none of its arrays is empty
  (Orbax saves none).

  Raises:
    ValueError: if some leaves of a layer are masked and some are not.
  """
  by_shape: dict[tuple, list[int]] = {}
  for index, layer in enumerate(layers):
    members = by_shape.setdefault((layer.dims, layer.diagonal), [])
    if leaves is None or not _masked(layers, index, leaves):
      members.append(index)
  return tuple(
    Stack(tuple(members), sum(layers[i].stack for i in members), dims, diagonal)
    if members
    else Stack((), 1, (1,) * len(dims), diagonal)
    for (dims, diagonal), members in by_shape.items()
  )


def _masked(layers: Blocks, index: int, leaves: Sequence[Any]) -> bool:
  masked = [leaf for leaf in layers[index].leaves if is_masked(leaves[leaf])]
  if masked and len(masked) < len(layers[index].leaves):
    names = ", ".join(layers.paths[leaf] for leaf in masked)
    raise ValueError(
      f"The layer {layers[index].path} is masked in part: {names} is masked, the rest is not."
      " Weight and bias are one block of curvature: mask both or neither (to keep one of them"
      " fixed, close over it in the loss and capture without it)."
    )
  return bool(masked)


def stack_matrices(stack: Stack, layers: Blocks, leaves: Sequence[Any], dtype: Any) -> jax.Array:
  """The blocks of `stack` out of the leaves of a tree like params: `[blocks, *dims]`.

  They are on every device: under explicit mesh axes leaves that are sharded are gathered.
  """
  if not stack.layers:
    return jnp.zeros((stack.blocks, *stack.dims), dtype)
  matrices = []
  for layer in (layers[i] for i in stack.layers):
    wide = {leaf: whole(jnp.asarray(leaves[leaf], dtype)) for leaf in layer.leaves}
    matrices.append(layer.gather(wide))
  return _concatenate(matrices)


def stack_factors(stack: Stack, factors: Sequence[Factors], dtype: Any) -> Factors:
  """The factors of the layers of `stack`, side by side."""
  if not stack.layers:
    return Factors(*(jnp.zeros(shape, dtype) for shape in stack.factor_shapes))
  members = [jax.tree.map(lambda f: f.astype(dtype), factors[i]) for i in stack.layers]
  return Factors(_concatenate([f.A for f in members]), _concatenate([f.G for f in members]))


def stack_squares(
  stack: Stack, second_moments: Sequence[jax.Array], dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """The second moments of the layers of `stack`, and numbers that are finite if they are."""
  if not stack.layers:
    return jnp.zeros((stack.blocks, *stack.dims), dtype), jnp.zeros(stack.blocks, dtype)
  joined = _concatenate([second_moments[i].astype(dtype) for i in stack.layers])
  return joined, jnp.sum(joined - joined, axis=range(1, joined.ndim))


def unstack(
  stacks: Sequence[Stack], layers: Blocks, matrices: Sequence[jax.Array], leaves: Sequence[Any]
) -> list[Any]:
  """`leaves` with those in a layer replaced by what `matrices` hold for them.

  In their dtype, and as they are sharded by their types.
  """
  shares: dict[int, jax.Array] = {}
  for stack, blocks in zip(stacks, matrices, strict=True):
    start = 0
    for layer in (layers[i] for i in stack.layers):
      own = blocks[start : start + layer.stack]
      start += layer.stack
      for leaf, share in layer.spread(own, layers.shapes).items():
        shares[leaf] = shares[leaf] + share if leaf in shares else share
  out = list(leaves)
  for leaf, share in shares.items():
    share = share.astype(dtype_of(leaves[leaf]))
    out[leaf] = _compat.sharded_like(share, jax.typeof(leaves[leaf]))
  return out


def by_shape(
  function: Callable[..., Any],
  *columns: Sequence[jax.Array],
  static: Sequence[Hashable] | None = None,
) -> list[Any]:
  """`function` of each row of `columns`, of arrays with blocks along the leading axis.

  Rows of equal shapes but for the number of blocks go side by side through one call; `static` has
  for each row what `function` takes before them, and keeps apart rows where that differs.
  """
  rows = list(zip(*columns, strict=True))
  first = [()] * len(rows) if static is None else [(own,) for own in static]
  equal: dict[Any, list[int]] = {}
  for index, row in enumerate(rows):
    shapes = tuple((x.shape[1:], x.dtype) for x in row)
    equal.setdefault((first[index], shapes), []).append(index)
  out: list[Any] = [None] * len(rows)
  for (own, _), members in equal.items():
    beside = map(_concatenate, zip(*(rows[index] for index in members), strict=True))
    result, start = function(*own, *beside), 0
    for index in members:
      stop = start + len(rows[index][0])
      out[index] = jax.tree.map(lambda x, a=start, b=stop: x[a:b], result)
      start = stop
  return out


def padded_lengths(sides: Iterable[int]) -> dict[int, int]:
  """The length that each side is padded to.

  A side goes with the one that is one larger, as that of a bias is, and small ones go together.
  """
  larger, lead = {}, 0
  for d in sorted(set(sides), reverse=True):
    lead = larger[d] = lead if d == lead - 1 or 0 < lead <= SMALL_SIDE else d
  return larger


def padded(sides: Sequence[jax.Array]) -> list[jax.Array]:
  """Stacks of matrices with zeros up to a side that others have; diagonals are as they are."""
  larger = padded_lengths(x.shape[1] for x in sides if x.ndim == 3)
  fill = lambda x: [(0, 0)] + [(0, larger[x.shape[1]] - x.shape[1])] * 2
  return [jnp.pad(x, fill(x)) if x.ndim == 3 else x for x in sides]


def by_side(
  function: Callable[..., Any],
  *columns: Sequence[tuple[Any, ...]],
  static: Sequence[tuple[Hashable, ...]] | None = None,
) -> list[tuple[Any, ...]]:
  """`by_shape` of what each stack has for each axis; None where the first column has None.

  Sides of equal shape go through one call, whichever axis and stack they are of.
  """
  first = columns[0]
  places = [(k, m) for k, own in enumerate(first) for m, x in enumerate(own) if x is not None]
  pick = lambda column: [column[k][m] for k, m in places]
  found = by_shape(function, *map(pick, columns), static=None if static is None else pick(static))
  results = dict(zip(places, found, strict=True))
  return [tuple(results.get((k, m)) for m in range(len(own))) for k, own in enumerate(first)]


def by_block(
  function: Callable[..., Any], skip: Callable[..., Any], *arrays: Any, due: jax.Array | None = None
) -> Any:
  """`function` of each block along the leading axes; `skip` of those that are not `due`."""
  if due is None:
    return jax.vmap(function)(*arrays)
  # A loop: a batched `cond` would make them all.
  one = lambda block: jax.lax.cond(block[0], function, skip, *block[1:])
  return jax.lax.map(one, (due, *arrays))


def stored(
  old: Any, new: Any, sound: jax.Array, due: jax.Array | None
) -> tuple[Any, jax.Array, jax.Array]:
  """What was made anew of each block, where it is `sound` and was `due` (None: all were).

  `old` and `new` are like tuples of arrays with the blocks first, or None where there is nothing to
  take the place of. Returns what is kept, and of each block whether it is new and whether it
  failed.
  """
  made = sound if due is None else sound & due
  pairs = zip(old, new, strict=True)
  kept = tuple(a if a is None or b is None else renewed(a, b, made) for a, b in pairs)
  return kept, made, ~sound


def renewed(old: Any, new: Any, made: jax.Array) -> Any:
  """A tree of arrays with the blocks first: `new` of those that were `made`, else `old`."""
  own = lambda old, new: jnp.where(made.reshape(-1, *[1] * (old.ndim - 1)), new, old)
  return jax.tree.map(own, old, new)


def per_stack(flat: Any, blocks: Sequence[int]) -> list[Any]:
  """Numbers of all blocks (or None), stack by stack of so many."""
  ends = list(itertools.accumulate(blocks))
  split = lambda start, end: jax.tree.map(lambda x: x[start:end], flat)
  return [split(end - n, end) for n, end in zip(blocks, ends, strict=True)]


def dtype_of(leaf: Any) -> Any:
  """dtype of an array, of a `jax.ShapeDtypeStruct` or of a Python number."""
  return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _concatenate(arrays):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
