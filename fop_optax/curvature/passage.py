"""How pieces of gradients get to the owners of their blocks, and pieces of directions back.

Inside `jax.shard_map`. With S the axes of the mesh along which pieces are sharded and O those over
which blocks have owners, a device sends to each other one along S what it has of the blocks that
are owned there, by one all-to-all (of each dtype there is). A piece that several devices along S
have is cut: each sends its part. Directions come back by an all-to-all along the axes that S and O
have in common, in which each device gets its own pieces, and a gather along the rest of O.
"""

from collections.abc import Mapping, Sequence
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax.curvature.layouts import Layout, Piece
from fop_optax.sharding import Axes, Exchange, beside_one_another

Coordinates = Mapping[str, int]  # along some axes of a mesh; elsewhere those of this device


class Passage:
  """The way there and back of one step.

  Attributes:
    layout: where the pieces are.
    exchange: the places of blocks.
  """

  def __init__(self, layout: Layout, exchange: Exchange):
    self.layout, self.exchange = layout, exchange
    owners = layout.sharding.axes
    self.back = tuple(axis for axis in layout.axes if axis in owners)
    self.rest = tuple(axis for axis in owners if axis not in layout.axes)

  def to_owners(
    self, pieces: Sequence[Sequence[jax.Array]], dtypes: Sequence[Any]
  ) -> list[jax.Array]:
    """Of each stack what is in its slots here, `[slots, n, *dims]`, of pieces `[blocks, n, ...]`.

    Nothing is sent of a piece that all devices have.
    """
    axes, families = self.layout.axes, self.layout.families
    there = jnp.stack([self._owner(at) for at in self._along(axes)])
    here = self._owner({})
    found: dict[tuple[int, int], jax.Array] = {}
    sent: dict[tuple[int, int], jax.Array] = {}
    for f, (own, arrays) in enumerate(zip(families, pieces, strict=True)):
      for p, (piece, x) in enumerate(zip(own.pieces, arrays, strict=True)):
        owned = jnp.asarray(own.owned)
        if piece.axes:
          sent[f, p] = _take(self._cut(piece, x), owned[there])
        else:
          found[f, p] = _take(x, owned[here])
    send = lambda x: jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
    for (f, p), x in zip(sent, beside_one_another(send, list(sent.values())), strict=True):
      found[f, p] = self._whole(families[f].pieces[p], x, pieces[f][p].shape[1:])
    joined = [
      jnp.concatenate(
        [found[f, p].astype(dtypes[own.stack]) for p in range(len(own.pieces))], axis=2
      )
      for f, own in enumerate(families)
    ]
    groups = pieces[0][0].shape[1]
    return [self._stack(k, joined, groups, dtype, here) for k, dtype in enumerate(dtypes)]

  def from_owners(
    self, directions: Sequence[jax.Array], numbers: Any, number: jax.Array
  ) -> tuple[list[list[jax.Array]], Any, jax.Array]:
    """The pieces that this device has of all directions, `[blocks, ...]`, numbers of all blocks.

    And the sum of a number over the owners; `numbers` are of the slots of all stacks.
    """
    here, places = self._owner({}), self._along(self.back)
    sent, tables = [], []
    for own in self.layout.families:
      x = _take(directions[own.stack], jnp.asarray(own.ranks)[here])
      start = 0
      for piece in own.pieces:
        stop = start + piece.shape[0]
        sent.append(self._pieces(piece, x[:, start:stop], places))
        tables.append(_Table(own.places, jnp.asarray(own.owned)))
        start = stop
    flat, treedef = jax.tree.flatten(numbers)
    sent += [jnp.broadcast_to(x, (len(places), *x.shape)) for x in (*flat, number[None])]
    tables += [_Table(self.exchange.rows(), self.exchange.table())] * len(flat)
    if self.back:
      send = lambda x: jax.lax.all_to_all(x, self.back, 0, 0, tiled=True)
      sent = beside_one_another(send, sent)
    *found, total = self._collect(sent, tables)
    arrays = iter(found)
    pieces = [[next(arrays) for _ in own.pieces] for own in self.layout.families]
    return pieces, treedef.unflatten(arrays), total

  def _along(self, axes: Axes) -> list[Coordinates]:
    """The coordinates of devices along some axes, the first the slowest."""
    sizes = [range(self._size(axis)) for axis in axes]
    return [dict(zip(axes, at, strict=True)) for at in itertools.product(*sizes)]

  def _size(self, *axes: str) -> int:
    return math.prod(self.layout.sharding.mesh.shape[axis] for axis in axes)

  def _index(self, axes: Axes, at: Coordinates) -> jax.Array:
    """Of a device among those along some axes, the first the slowest."""
    index = jnp.zeros((), jnp.int32)
    for axis in axes:
      index = index * self._size(axis) + (at[axis] if axis in at else jax.lax.axis_index(axis))
    return index

  def _owner(self, at: Coordinates) -> jax.Array:
    return self._index(self.layout.sharding.axes, at)

  def _missing(self, piece: Piece) -> Axes:
    return tuple(axis for axis in self.layout.axes if axis not in piece.axes)

  def _cut(self, piece: Piece, x: jax.Array) -> jax.Array:
    """The part of a piece that this device sends, `[blocks, entries]`, others have the rest."""
    missing, flat = self._missing(piece), x.reshape(len(x), -1)
    parts = self._size(*missing)
    flat = jnp.pad(flat, [(0, 0), (0, -flat.shape[1] % parts)])
    return flat.reshape(len(x), parts, -1)[:, self._index(missing, {})]

  def _whole(self, piece: Piece, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A piece put together from parts `[senders, slots, entries]`; `shape` is that of a part."""
    axes, slots = self.layout.axes, x.shape[1]
    order = (*piece.axes, *self._missing(piece))
    x = x.reshape(*map(self._size, axes), slots, -1)
    x = x.transpose(len(axes), *map(axes.index, order), len(axes) + 1)
    cuts = self._cuts(piece)
    x = x.reshape(slots, *cuts, -1)[..., : math.prod(shape)].reshape(slots, *cuts, *shape)
    k = len(cuts)  # now [slots, *cuts, n, *rest], of which each cut goes before its axis
    pairs = ((1 + axis, 2 + k + axis) for axis in range(k))
    x = x.transpose(0, 1 + k, *itertools.chain.from_iterable(pairs))
    return x.reshape(slots, shape[0], *piece.shape)

  def _stack(
    self, k: int, joined: Sequence[jax.Array], groups: int, dtype: Any, here: jax.Array
  ) -> jax.Array:
    """The slots of a stack out of those of its families."""
    slots, stack = self.exchange.slots[k], self.layout.stacks[k]
    own = [f for f, family in enumerate(self.layout.families) if family.stack == k]
    if not own:
      return jnp.zeros((slots, groups, *stack.dims), dtype)
    if len(own) == 1:
      return joined[own[0]]
    families = [self.layout.families[f] for f in own]
    starts = np.cumsum([0, *(family.slots for family in families)])
    order = np.full((self.layout.sharding.devices, slots + 1), starts[-1], np.int32)
    for family, start in zip(families, starts, strict=False):
      for owner, ranks in enumerate(family.ranks):  # an empty one is past the last
        order[owner, ranks] = start + np.arange(family.slots)
    return _take(jnp.concatenate([joined[f] for f in own]), jnp.asarray(order[:, :slots])[here])

  def _pieces(self, piece: Piece, x: jax.Array, places: Sequence[Coordinates]) -> jax.Array:
    """What devices at these places have of `x[slots, *shape]`, `[places, slots, ...]`."""
    cuts = self._cuts(piece)
    split = [(cut, n // cut) for cut, n in zip(cuts, piece.shape, strict=True)]
    axes = range(len(cuts))
    x = x.reshape(len(x), *itertools.chain.from_iterable(split))
    x = x.transpose(*(1 + 2 * axis for axis in axes), 0, *(2 + 2 * axis for axis in axes))
    x = x.reshape(-1, *x.shape[len(cuts) :])
    return x[jnp.stack([self._index(piece.axes, at) for at in places])]

  def _cuts(self, piece: Piece) -> list[int]:
    """Into how many parts each axis of a piece is cut."""
    return [self._size(*own) for own in piece.along]

  def _collect(self, arrays: list[jax.Array], tables: Sequence["_Table"]) -> list[jax.Array]:
    """Of all blocks `[blocks, ...]` what came from owners along `back`, `[back, slots, ...]`.

    The rest is gathered; where empty slots make that more than a sum, which moves all twice, it is
    a sum. The last array is of one number a device, and added up.
    """
    gathered = self._size(*self.rest) * sum(x.size for x in arrays)
    summed = 2 * sum(
      len(own.places) * math.prod(x.shape[2:]) for x, own in zip(arrays, tables, strict=False)
    )
    if self.rest and summed < gathered:
      senders = jnp.stack([self._owner(at) for at in self._along(self.back)])
      *found, number = arrays
      zeros = [
        jnp.zeros((len(own.places), *x.shape[2:]), x.dtype)
        .at[own.owned[senders]]
        .set(x, mode="drop")
        for x, own in zip(found, tables, strict=True)
      ]
      add = lambda x: jax.lax.psum(x, self.rest)
      own = beside_one_another(add, [x[None] for x in (*zeros, jnp.sum(number))])
      return [x[0] for x in own]
    *found, number = beside_one_another(self._gather, arrays)
    by_place = (x.reshape(-1, *x.shape[2:]) for x in found)
    return [*(x[own.places] for x, own in zip(by_place, tables, strict=True)), jnp.sum(number)]

  def _gather(self, x: jax.Array) -> jax.Array:
    """What all owners have, `[owners, ...]`, of what those along `back` have."""
    if self.rest:
      x = jax.lax.all_gather(x, self.rest)
    axes, owners = (*self.rest, *self.back), self.layout.sharding.axes
    x = x.reshape(*map(self._size, axes), -1)
    x = x.transpose(*map(axes.index, owners), len(axes))
    return x.reshape(-1, x.shape[-1])


class _Table(NamedTuple):
  """Where blocks are with their owners."""

  places: Any  # int32, shape=(blocks,): owner * slots + slot
  owned: jax.Array  # int32, [owners, slots]: which block it is, past the last in an empty slot


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  return x.at[index].get(mode="fill", fill_value=0)
