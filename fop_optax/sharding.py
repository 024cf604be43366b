"""Curvature owned over a mesh: which device keeps, inverts and applies which blocks.

Inverting replicated curvature costs each of `n` devices what it costs one. Here each block, its `A`
and its `G` together, has one owner. The owners of the blocks of all stacks follow from their sides
alone, by the longest processing time first on `d_A^3 + d_G^3` (Graham, 1969: at most `4/3 - 1/3n`
of the least possible largest load).

Blocks of one stack that a device owns are in its *slots*: the arrays of a stack are `[n * slots,
...]`, the device's own along the leading axis, `slots` the most that one of them owns. A slot that
stays empty has zeros, which nobody inverts.
"""

from collections.abc import Callable, Sequence
import contextvars
import dataclasses
import functools
import heapq
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from fop_optax.curvature.stacks import Stack


@dataclasses.dataclass(frozen=True)
class Sharding:
  """Over which devices the blocks of curvature are dealt: static and hashable.

  Attributes:
    mesh: the mesh on which parameters are replicated and batches sharded.
    axes: names of those of its axes over which blocks have owners; along the others the owners'
      arrays are replicated. One name may stand for itself.

  Raises:
    TypeError: if the mesh is none.
    ValueError: if it has no such axes, or one is named twice.

  Example:
    >>> import fop_optax, jax
    >>> sharding = fop_optax.Sharding(jax.make_mesh((1,), ("data",)), axes=("data",))
    >>> print(sharding.devices)
    1
  """

  mesh: Mesh
  axes: tuple[str, ...] = ("data",)

  def __post_init__(self):
    if not isinstance(self.mesh, Mesh):
      raise TypeError(
        f"`Sharding(mesh)` takes a `jax.sharding.Mesh`, not a {type(self.mesh).__name__}: write"
        ' `fop_optax.Sharding(jax.make_mesh((jax.device_count(),), ("data",)))`.'
      )
    axes = (self.axes,) if isinstance(self.axes, str) else tuple(self.axes)
    object.__setattr__(self, "axes", axes)
    unknown = [axis for axis in axes if axis not in self.mesh.axis_names]
    if unknown or not axes or len(set(axes)) < len(axes):
      raise ValueError(
        f"`Sharding(mesh, axes={axes!r})` should name axes of the mesh, each once: it has"
        f" {', '.join(map(repr, self.mesh.axis_names))}."
      )

  @property
  def devices(self) -> int:
    """Number of owners."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes)

  @property
  def spec(self) -> PartitionSpec:
    """Of arrays with a leading axis of owners."""
    return PartitionSpec(self.axes if len(self.axes) > 1 else self.axes[0])

  @property
  def explicit(self) -> bool:
    return AxisType.Explicit in self.mesh.axis_types

  def owned(self, array: Any) -> NamedSharding:
    """Of an array with a leading axis of owners."""
    return self._named(array, *self.spec)

  def whole(self, array: Any) -> NamedSharding:
    """Of a replicated array."""
    return self._named(array)

  def _named(self, array, *axes):
    if self.explicit:  # as JAX spells it after a step
      axes += (None,) * (array.ndim - len(axes))
    return NamedSharding(self.mesh, PartitionSpec(*axes))


_noted: contextvars.ContextVar[list[Sharding]] = contextvars.ContextVar("noted")


def note(sharding: Sharding) -> None:
  """Tells `noted`, around it, that a state has owners."""
  if (found := _noted.get(None)) is not None:
    found.append(sharding)


def noted(init: Callable[[Any], Any], params: Any) -> tuple[Any, list[Sharding]]:
  """Shapes of `init(params)`, and the sharding of each curvature state in it.

  Nothing in a tree of shapes says what mesh they are for.
  """
  found: list[Sharding] = []
  token = _noted.set(found)
  try:  # a function of its own: a trace that JAX remembers would tell nothing
    return jax.eval_shape(lambda params: init(params), params), found
  finally:
    _noted.reset(token)


class Owners(NamedTuple):
  """Where blocks are; places count along the leading axis of the arrays of a stack."""

  slots: tuple[int, ...]  # of each stack, on every device
  places: tuple[tuple[int, ...], ...]  # of each stack: for each block device * slots + slot
  loads: tuple[int, ...]  # of each device: the sum of d^3 over the sides of its blocks


@functools.cache
def plan_owners(stacks: tuple[Stack, ...], devices: int) -> Owners:
  """Owners of the blocks of all stacks: the longest first, each to who has least to do.

  Among devices of equal load it goes to the one with the fewest entries, then to the first.
  """
  sides = [list(zip(stack.dims, stack.diagonal, strict=True)) for stack in stacks]
  time, entries = (
    [sum(d if diagonal else d**power for d, diagonal in own) for own in sides] for power in (3, 2)
  )
  blocks = [
    (-time[k], -entries[k], k, b) for k, own in enumerate(stacks) for b in range(own.blocks)
  ]
  heap = [(0, 0, device) for device in range(devices)]
  owned: list[list[list[int]]] = [[[] for _ in range(devices)] for _ in stacks]
  for *_, k, b in sorted(blocks):
    load, size, device = heap[0]
    heapq.heapreplace(heap, (load + time[k], size + entries[k], device))
    owned[k][device].append(b)
  slots = tuple(max(map(len, own)) for own in owned)
  places = tuple(tuple(_places(own, most)) for own, most in zip(owned, slots, strict=True))
  loads = {device: load for load, _, device in heap}
  return Owners(slots, places, tuple(loads[device] for device in range(devices)))


def _places(owned: Sequence[Sequence[int]], slots: int) -> list[int]:
  """For each block where it is, of the blocks that each device owns."""
  found = {
    b: device * slots + slot for device, own in enumerate(owned) for slot, b in enumerate(own)
  }
  return [found[b] for b in range(len(found))]


class Share(NamedTuple):
  """The blocks in the slots of this device, those of one stack after those of another."""

  block: jax.Array  # int32, shape=(slots,): which of all blocks, their number in an empty slot
  slots: tuple[int, ...]  # of each stack
  starts: tuple[int, ...]  # of each stack: its first block among all
  full: bool  # whether no device has an empty slot

  @property
  def filled(self) -> jax.Array | None:
    """Which slots have a block; None: all."""
    return None if self.full else self.block < self.starts[-1]

  def numbers(self, tree: Any) -> Any:
    """Of numbers of all blocks those of its blocks; a number without axes stays."""
    return jax.tree.map(lambda x: _take(x, self.block) if x.ndim else x, tree)

  def stack(self, index: int, tree: Any) -> Any:
    """Of arrays of all blocks of a stack those of its blocks."""
    first = sum(self.slots[:index])
    own = self.block[first : first + self.slots[index]] - self.starts[index]
    return jax.tree.map(lambda x: _take(x, own), tree)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  return x.at[index].get(mode="fill", fill_value=0)


class Gathered(NamedTuple):
  """What all devices have worked out, in the order of blocks."""

  stacks: list[jax.Array]  # [blocks, ...] of each
  numbers: Any  # of all blocks
  total: jax.Array  # of a number of each device the sum


class Exchange(NamedTuple):
  """The places of blocks, and how what devices work out for theirs becomes that of all."""

  sharding: Sharding
  places: tuple[jax.Array, ...]  # int32, shape=(blocks,), of each stack
  slots: tuple[int, ...]  # of each stack

  @property
  def starts(self) -> tuple[int, ...]:
    """The first block of each stack among all, and how many there are."""
    return tuple(np.cumsum([0, *map(len, self.places)]).tolist())

  def share(self) -> Share:
    """That of this device, inside `jax.shard_map`."""
    devices, blocks = self.sharding.devices, self.starts[-1]
    # for each device the slots of all its stacks
    table = jnp.full(devices * sum(self.slots), blocks, jnp.int32)
    table = table.at[self._rows()].set(jnp.arange(blocks, dtype=jnp.int32))
    own = table.reshape(devices, -1)[jax.lax.axis_index(self.sharding.axes)]
    return Share(own, self.slots, self.starts, len(table) == blocks)

  def gather(self, stacks: Sequence[jax.Array], numbers: Any, number: jax.Array) -> Gathered:
    """All of it on every device, by one gather for each dtype there is, inside `jax.shard_map`."""
    flat, treedef = jax.tree.flatten(numbers)
    found = self._flat([*stacks, *flat, number])
    rows = self._rows()
    columns = zip(found, self.places, strict=False)
    return Gathered(
      [x.reshape(-1, *x.shape[2:])[place] for x, place in columns],
      treedef.unflatten([x.reshape(-1, *x.shape[2:])[rows] for x in found[len(stacks) : -1]]),
      jnp.sum(found[-1]),
    )

  def _rows(self) -> jax.Array:
    """Of each block its place among the slots of all stacks, device after device."""
    firsts = np.cumsum([0, *self.slots]).tolist()
    return jnp.concatenate(
      [
        place // slots * firsts[-1] + first + place % slots
        for place, slots, first in zip(self.places, self.slots, firsts, strict=False)
      ]
    )

  def _flat(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Each array with an axis of devices before its own."""
    by_dtype: dict[Any, list[int]] = {}
    for index, x in enumerate(arrays):
      by_dtype.setdefault(x.dtype, []).append(index)
    out = list(arrays)
    for members in by_dtype.values():
      own = jnp.concatenate([arrays[index].reshape(-1) for index in members])
      found = jax.lax.all_gather(own, self.sharding.axes)
      start = 0
      for index in members:
        x = arrays[index]
        out[index] = found[:, start : start + x.size].reshape(len(found), *x.shape)
        start += x.size
    return out


def on_owners(
  sharding: Sharding, function: Callable[..., Any], owned: Any, whole: Any
) -> tuple[Any, Any]:
  """`function(owned, whole)` on every device: what it owns and what all have, before and after.

  Outside of `shard_map` XLA would gather the stacks to invert them.
  """
  check_not_manual(sharding)
  return jax.shard_map(
    function,
    mesh=sharding.mesh,
    in_specs=(sharding.spec, PartitionSpec()),
    out_specs=(sharding.spec, PartitionSpec()),
    check_vma=False,  # what `gather` returns is the same everywhere, but not by its type
  )(owned, whole)


def check_not_manual(sharding: Sharding) -> None:
  """Checks that no device is alone here.

  Raises:
    ValueError: if it is, inside a `jax.shard_map` over some of the axes.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes
  if found := [axis for axis in sharding.mesh.axis_names if axis in manual]:
    raise ValueError(
      f"`sharding=` deals curvature over the mesh itself, but this is inside a `jax.shard_map` over"
      f" {', '.join(map(repr, found))}: call `tx.init` and `tx.update` outside of it, under"
      " `jax.jit` alone, or leave `sharding` out."
    )


def placed(make: Callable[[], Any], shardings: Any) -> Any:
  """`make()`, each array made where it belongs, also while traced."""

  def made():
    tree = make()
    if jax.sharding.get_abstract_mesh().empty:
      return tree
    return jax.tree.map(laid, tree, shardings)

  return jax.jit(made, out_shardings=shardings)()


def laid(array: jax.Array, sharding: NamedSharding) -> jax.Array:
  """`array` so sharded, by its type where the axes are explicit."""
  if AxisType.Explicit in sharding.mesh.axis_types:
    return jax.sharding.reshard(array, sharding)
  return jax.lax.with_sharding_constraint(array, sharding)


def whole(array: Any) -> Any:
  """`array` on every device of its mesh, if it is known to be on one."""
  if not isinstance(array, jax.Array):
    return array
  traced = isinstance(array, jax.core.Tracer)
  sharding = jax.typeof(array).sharding if traced else array.sharding
  if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
    return array
  explicit = AxisType.Explicit in sharding.mesh.axis_types
  if traced and not explicit:  # XLA sees to it
    return array
  spec = [None] * array.ndim if explicit else []
  return laid(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
