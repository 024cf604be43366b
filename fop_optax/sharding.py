"""Curvature owned over a mesh: which device keeps, inverts and applies which blocks.

Inverting replicated curvature costs each of `n` devices what it costs one. Here each block, its `A`
and its `G` together, has one owner. Who owns what is planned in `curvature/owners.py`.

Blocks of one stack that a device owns are in its *slots*: the arrays of a stack are `[n * slots,
...]`, the device's own along the leading axis, `slots` the most that one of them owns. A slot that
stays empty has zeros, which nobody inverts.
"""

from collections.abc import Callable, Sequence
import contextvars
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

Axes = tuple[str, ...]  # of a mesh, the slowest first
Spec = tuple[Axes, ...]  # for each axis of an array those along which it is sharded


def axes_of(spec: PartitionSpec) -> Spec:
  """A `PartitionSpec` with a tuple for each axis of the array; without those at its end."""
  axes = [() if own is None else (own,) if isinstance(own, str) else tuple(own) for own in spec]
  while axes and not axes[-1]:
    axes.pop()
  return tuple(axes)


@dataclasses.dataclass(frozen=True)
class Sharding:
  """Over which devices the blocks of curvature are dealt: static and hashable.

  Attributes:
    mesh: the mesh on which parameters and batches are.
    axes: names of those of its axes over which blocks have owners; along the others the owners'
      arrays are replicated. One name may stand for itself.
    params: how parameters are sharded, where they are (FSDP, tensor parallel): a tree like them of
      `NamedSharding` or `PartitionSpec`, or the parameters themselves where they are placed; kept
      as a `PartitionSpec` of each leaf. Under explicit axes types tell, and it can be left out;
      under automatic ones without it gradients are gathered.

  Raises:
    TypeError: if the mesh is none, or `params` has something else.
    ValueError: if it has no such axes, or one is named twice.

  Example:
    >>> import fop_optax, jax
    >>> sharding = fop_optax.Sharding(jax.make_mesh((1,), ("data",)), axes=("data",))
    >>> print(sharding.devices)
    1
  """

  mesh: Mesh
  axes: tuple[str, ...] = ("data",)
  params: Any = None

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
    if self.params is not None:
      object.__setattr__(self, "params", self._specs(self.params))

  def _specs(self, params: Any) -> tuple[PartitionSpec, ...]:
    """Of each leaf, in the order of `jax.tree.leaves`."""
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec)
    found = []
    for leaf in jax.tree.leaves(params, is_leaf=is_spec):
      sharding = getattr(leaf, "sharding", leaf)
      spec = PartitionSpec() if sharding is None else getattr(sharding, "spec", sharding)
      if not isinstance(spec, PartitionSpec):
        raise TypeError(
          f"`Sharding(mesh, params=...)` has a {type(leaf).__name__} where it should say how a"
          " parameter is sharded: pass `jax.tree.map(lambda x: x.sharding, params)` of parameters"
          " on a mesh, or a tree of `PartitionSpec`."
        )
      found.append(PartitionSpec(*(axes or None for axes in axes_of(spec))))
    named = {axis for own in found for axes in axes_of(own) for axis in axes}
    if unknown := named - {*self.mesh.axis_names}:
      raise ValueError(
        f"`Sharding(mesh, params=...)` shards a parameter along {sorted(unknown)}, and the mesh has"
        f" {', '.join(map(repr, self.mesh.axis_names))}."
      )
    return tuple(found)

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
    return named(self.mesh, array, *self.spec)

  def whole(self, array: Any) -> NamedSharding:
    """Of a replicated array."""
    return named(self.mesh, array)

  def like(self, array: Any, spec: PartitionSpec) -> NamedSharding:
    """Of a parameter that is so sharded."""
    return named(self.mesh, array, *spec)


def named(mesh: Mesh | AbstractMesh, array: Any, *axes: Any) -> NamedSharding:
  """Of an array, along these axes of a mesh, as JAX spells it after a step."""
  if AxisType.Explicit in mesh.axis_types:
    axes += (None,) * (jnp.ndim(array) - len(axes))
  return NamedSharding(mesh, PartitionSpec(*axes))


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
    return jax.tree.map(lambda x: _take(x, self.within(index)), tree)

  def within(self, index: int) -> jax.Array:
    """Which of the blocks of a stack are in its slots; past the last of them in an empty one."""
    first = sum(self.slots[:index])
    return self.block[first : first + self.slots[index]] - self.starts[index]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  return x.at[index].get(mode="fill", fill_value=0)


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
    table = self.table()
    own = table[jax.lax.axis_index(self.sharding.axes)]
    return Share(own, self.slots, self.starts, table.size == self.starts[-1])

  def table(self) -> jax.Array:
    """Which of all blocks is in each slot of each device, `[devices, slots]`, or their number."""
    devices, blocks = self.sharding.devices, self.starts[-1]
    table = jnp.full(devices * sum(self.slots), blocks, jnp.int32)
    table = table.at[self.rows()].set(jnp.arange(blocks, dtype=jnp.int32))
    return table.reshape(devices, -1)

  def collect(
    self, stacks: Sequence[jax.Array], numbers: Any, number: jax.Array
  ) -> tuple[list[jax.Array], Any, jax.Array]:
    """On every device arrays of all blocks of each stack, numbers of all blocks, and a sum.

    Inside `jax.shard_map`, from what each device has for its slots: by one operation for each dtype
    there is. A gather moves empty slots too; where that is more it is a sum, in which each device
    has zeros for the blocks of others and which moves everything twice.
    """
    flat, treedef = jax.tree.flatten(numbers)
    arrays = [*stacks, *flat]
    entries = [math.prod(x.shape[1:]) for x in arrays]
    blocks = [*map(len, self.places), *[self.starts[-1]] * len(flat)]
    gathered = self.sharding.devices * sum(x.size for x in arrays)
    summed = 2 * sum(n * own for n, own in zip(blocks, entries, strict=True))
    *found, total = (self._gather if gathered <= summed else self._sum)(arrays, number)
    return found[: len(stacks)], treedef.unflatten(found[len(stacks) :]), total

  def _gather(self, arrays, number):
    rows = [*self.places, *[self.rows()] * (len(arrays) - len(self.places))]
    collect = lambda x: jax.lax.all_gather(x, self.sharding.axes)
    *found, each = _by_dtype(collect, [*arrays, number])
    ordered = [x.reshape(-1, *x.shape[2:])[own] for x, own in zip(found, rows, strict=True)]
    return [*ordered, jnp.sum(each)]

  def _sum(self, arrays, number):
    share, stacks = self.share(), len(self.places)
    rows = [*map(share.within, range(stacks)), *[share.block] * (len(arrays) - stacks)]
    blocks = [*map(len, self.places), *[self.starts[-1]] * (len(arrays) - stacks)]
    whole = [
      jnp.zeros((n, *x.shape[1:]), x.dtype).at[own].set(x, mode="drop")
      for x, own, n in zip(arrays, rows, blocks, strict=True)
    ]
    collect = lambda x: jax.lax.psum(x, self.sharding.axes)[None]
    return [x[0] for x in _by_dtype(collect, [*whole, number])]

  def rows(self) -> jax.Array:
    """Of each block its place among the slots of all stacks, device after device."""
    firsts = np.cumsum([0, *self.slots]).tolist()
    return jnp.concatenate(
      [
        place // slots * firsts[-1] + first + place % slots
        for place, slots, first in zip(self.places, self.slots, firsts, strict=False)
      ]
    )


def _by_dtype(
  function: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
  """`function` of all arrays of a dtype as one vector, which makes an axis before it, split."""
  return beside_one_another(lambda x: function(x[0]), [x[None] for x in arrays])


def beside_one_another(
  function: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
  """`function` of all arrays of a dtype as the rows `[n, ...]` of one matrix, split."""
  members: dict[Any, list[int]] = {}
  for index, x in enumerate(arrays):
    members.setdefault(x.dtype, []).append(index)
  out = list(arrays)
  for own in members.values():
    flat = [arrays[index].reshape(len(arrays[index]), -1) for index in own]
    found = function(jnp.concatenate(flat, axis=1))
    start = 0
    for index, x in zip(own, flat, strict=True):
      stop = start + x.shape[1]
      out[index] = found[:, start:stop].reshape(len(found), *arrays[index].shape[1:])
      start = stop
  return out


def on_owners(
  sharding: Sharding,
  function: Callable[..., Any],
  owned: Any,
  whole: Any,
  pieces: Any = (),
  specs: tuple[Any, Any] | None = None,
) -> tuple[Any, Any, Any]:
  """`function(owned, whole, pieces)` on every device: what it owns, what all have, and pieces.

  Before and after; pieces are sharded by `specs` before and after. Outside of `shard_map` XLA would
  gather the stacks to invert them.
  """
  check_not_manual(sharding)
  of_pieces = specs or (PartitionSpec(), PartitionSpec())
  return jax.shard_map(
    function,
    mesh=sharding.mesh,
    in_specs=(sharding.spec, PartitionSpec(), of_pieces[0]),
    out_specs=(sharding.spec, PartitionSpec(), of_pieces[1]),
    check_vma=False,  # what `gather` returns is the same everywhere, but not by its type
  )(owned, whole, pieces)


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
