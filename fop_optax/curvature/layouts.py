"""How the blocks of layers (or tensors) are sharded, where parameters are.

A gradient that is sharded like its parameter need not be whole on a device that does not own its
block. A *piece* is what a device has of a weight, as tensors `[blocks, *dims]`, or of its bias, as
one row each: the two are joined where the block is owned, along axes that are whole there.
Layers of one stack whose pieces are alike are a *family*, their blocks side by side.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from fop_optax import views
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.stacks import Blocks, Stack, dtype_of
from fop_optax.layers import Layer, Layers, bias_row, is_masked, spread_biases
from fop_optax.sharding import Axes, Sharding, Spec, axes_of, laid
from fop_optax.tensors import Tensor


class Piece(NamedTuple):
  """The weight or the bias of a family of layers, `[blocks, *shape]`, and its sharding."""

  number: int  # 0 the weight, 1 the bias
  shape: tuple[int, ...]
  along: Spec  # of each axis of `shape`

  @property
  def axes(self) -> Axes:
    return sum(self.along, ())

  @property
  def spec(self) -> Spec:
    return (), *self.along


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """Layers of one stack whose pieces are sharded alike.

  Attributes:
    stack: which stack they are of.
    layers: their indices.
    pieces: the weight and, where there is one, the bias.
    places: int32, shape=(blocks,): of each of its blocks where it is owned, owner * slots + slot.
    owned: int32, [owners, slots]: which of its blocks each owner has; as many as there are in a
      slot that stays empty.
    ranks: int32, [owners, slots]: in which slot of the stack that is; past the last likewise.
  """

  stack: int
  layers: tuple[int, ...]
  pieces: tuple[Piece, ...]
  places: np.ndarray
  owned: np.ndarray
  ranks: np.ndarray

  @property
  def slots(self) -> int:
    return self.owned.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """Where the gradient of the layers of some stacks is.

  Attributes:
    sharding: which devices own the blocks.
    layers: the layers, or the tensors.
    stacks: their stacks.
    specs: of each leaf of the parameters.
  """

  sharding: Sharding
  layers: Blocks
  stacks: tuple[Stack, ...]
  specs: tuple[Spec, ...]

  @functools.cached_property
  def families(self) -> tuple[Family, ...]:
    plan = plan_owners(self.stacks, self.sharding.devices)
    out = []
    rows = zip(self.stacks, plan.slots, plan.places, strict=True)
    for k, (stack, slots, places) in enumerate(rows):
      members: dict[tuple[Piece, ...], list[tuple[int, range]]] = {}
      start = 0
      for index in stack.layers:
        stop = start + self.layers[index].stack
        members.setdefault(self._pieces(index), []).append((index, range(start, stop)))
        start = stop
      for pieces, own in members.items():
        at = [places[b] for _, blocks in own for b in blocks]
        tables = _tables(at, slots, self.sharding.devices)
        out.append(Family(k, tuple(index for index, _ in own), pieces, *tables))
    return tuple(out)

  @functools.cached_property
  def axes(self) -> Axes:
    """Those of the mesh along which some piece is sharded."""
    found = {axis for own in self.families for piece in own.pieces for axis in piece.axes}
    return tuple(axis for axis in self.sharding.mesh.axis_names if axis in found)

  def specs_of(self, lead: int) -> list[list[PartitionSpec]]:
    """Of the pieces of each family, with so many axes behind that of the blocks."""
    spec = lambda piece: _spec((piece.spec[0], *[()] * lead, *piece.spec[1:]))
    return [[spec(piece) for piece in own.pieces] for own in self.families]

  def split(self, leaves: Sequence[Any]) -> list[list[jax.Array]]:
    """The pieces of each family out of the leaves of a tree like params, in their dtypes."""

    def part(index, piece):
      own = self._usable(index, piece.number)
      known = {leaf: self.laid(jnp.asarray(leaves[leaf]), spec) for leaf, spec in own.items()}
      return self.laid(_gather(self.layers[index], piece.number, known), piece.spec)

    each = lambda own, piece: _joined([part(index, piece) for index in own.layers])
    return [[each(own, piece) for piece in own.pieces] for own in self.families]

  def join(self, pieces: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    """`leaves` with those in a layer replaced by what the pieces hold for them.

    In their dtype, each sharded like the parameter that it is of.
    """
    shares: dict[int, jax.Array] = {}
    for own, arrays in zip(self.families, pieces, strict=True):
      start = 0
      for index in own.layers:
        stop = start + self.layers[index].stack
        for piece, array in zip(own.pieces, arrays, strict=True):
          for leaf, share in self._spread(index, piece.number, array[start:stop]).items():
            shares[leaf] = shares[leaf] + share if leaf in shares else share
        start = stop
    out = list(leaves)
    for leaf, share in shares.items():
      out[leaf] = share.astype(dtype_of(leaves[leaf]))
    return out

  def finite(self, pieces: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """Whether all of some pieces is, by one sum over devices: XLA would make one of each leaf."""

    def gap(pieces):
      gaps = [jnp.sum(x - x).astype(jnp.float32) for x in jax.tree.leaves(pieces)]
      return jax.lax.psum(sum(gaps), self.axes)

    return self._on_pieces(gap, pieces) == 0

  def squares(self, pieces: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """The sum of squares of each piece over all devices, in float32 or better."""

    def sums(pieces):
      own = zip(jax.tree.leaves(pieces), sum(self._copies, []), strict=True)
      return jax.lax.psum(jnp.stack([jnp.sum(_square(x)) / n for x, n in own]), self.axes)

    return self._on_pieces(sums, pieces)

  def squares_by_block(self, *trees: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """Of each block the sum of squares of its pieces, for some trees of them, by one sum.

    Pieces are `[blocks, ...]`; the blocks of a family come after those of the one before.
    """
    wide = [jax.tree.map(lambda x: x[:, None], tree) for tree in trees]

    def sums(*trees):
      each = lambda x: jnp.sum(_square(x), axis=range(1, x.ndim))
      blocks = lambda own, copies: sum(each(x) / n for x, n in zip(own, copies, strict=True))
      found = [jnp.concatenate(list(map(blocks, tree, self._copies))) for tree in trees]
      return jax.lax.psum(jnp.stack(found), self.axes)

    return list(self._on_pieces(sums, *wide))

  @functools.cached_property
  def _copies(self) -> list[list[int]]:
    """How many devices along `axes` have the same piece, family by family."""
    size = lambda axes: math.prod(self.sharding.mesh.shape[axis] for axis in axes)
    return [[size(self.axes) // size(piece.axes) for piece in own.pieces] for own in self.families]

  def _on_pieces(self, function: Callable[..., jax.Array], *trees: Any) -> jax.Array:
    """`function` on each device of its pieces `[blocks, n, ...]`."""
    return jax.shard_map(
      function,
      mesh=self.sharding.mesh,
      in_specs=(self.specs_of(1),) * len(trees),
      out_specs=PartitionSpec(),
      check_vma=False,
    )(*trees)

  def laid(self, array: jax.Array, spec: Spec) -> jax.Array:
    return laid(array, NamedSharding(self.sharding.mesh, _spec(spec)))

  def _spread(self, index: int, number: int, array: jax.Array) -> dict[int, jax.Array]:
    layer, own = self.layers[index], self._usable(index, number)
    array = self.laid(array, self._axes(index, number))
    mesh, typed = self.sharding.mesh, self.sharding.explicit
    like = {leaf: NamedSharding(mesh, _spec(spec)) if typed else None for leaf, spec in own.items()}
    found = _scatter(layer, number, array, self.layers.shapes, like)
    return {leaf: self.laid(share, self.specs[leaf]) for leaf, share in found.items()}

  def _pieces(self, index: int) -> tuple[Piece, ...]:
    layer, mesh = self.layers[index], self.sharding.mesh
    rows, *rest = layer.dims
    shapes = [(rows - bool(layer.biases), *rest), (1, *rest)][: 1 + bool(layer.biases)]
    moved = lambda number, shape: _along(self._axes(index, number), shape, mesh)
    return tuple(Piece(i, shape, moved(i, shape)) for i, shape in enumerate(shapes))

  def _usable(self, index: int, number: int) -> dict[int, Spec]:
    """The shardings in which a layer takes its leaves: whole where its view could not go along."""
    layer = self.layers[index]
    leaves = [layer.weight] if number == 0 else [bias.leaf for bias in layer.biases]
    own = {leaf: self.specs[leaf] for leaf in leaves}
    if _viewed(layer, number, self.layers.shapes, tuple(own.items()), self.sharding.mesh) is None:
      return {leaf: ((),) * len(spec) for leaf, spec in own.items()}
    return own

  def _axes(self, index: int, number: int) -> Spec:
    own = tuple(self._usable(index, number).items())
    found = _viewed(self.layers[index], number, self.layers.shapes, own, self.sharding.mesh)
    assert found is not None
    return found


def plan_layout(
  sharding: Sharding, layers: Blocks, stacks: Sequence[Stack], leaves: Sequence[Any]
) -> Layout | None:
  """The layout of a gradient with these leaves; None where every device has all of it.

  Under explicit axes types tell, or else `sharding.params`.

  Raises:
    ValueError: if `sharding.params` is of other parameters.
  """
  typed = lambda x: sharding.explicit and not is_masked(x)
  given = sharding.params
  if given is None:
    none = PartitionSpec()
    given = [jax.typeof(x).sharding.spec if typed(x) else none for x in leaves]
  specs = _whole(layers, given, leaves)
  size = sharding.mesh.shape
  wide = [tuple(tuple(a for a in axes if size[a] > 1) for axes in spec) for spec in specs]
  own = {leaf for stack in stacks for i in stack.layers for leaf in layers[i].leaves}
  if not any(any(wide[leaf]) for leaf in own):
    return None
  return Layout(sharding, layers, tuple(stacks), tuple(wide))


def laid_like(sharding: Sharding, layers: Blocks, leaves: Sequence[Any]) -> list[Any]:
  """Leaves of a tree like params, sharded as `sharding.params` says.

  Raises:
    ValueError: if that is of other parameters.
  """
  specs = map(_spec, _whole(layers, sharding.params, leaves))
  put = lambda x, spec: laid(x, NamedSharding(sharding.mesh, spec))
  return [x if is_masked(x) else put(x, spec) for x, spec in zip(leaves, specs, strict=True)]


def _whole(layers: Blocks, specs: Sequence[PartitionSpec], leaves: Sequence[Any]) -> list[Spec]:
  """With an entry for each axis of each leaf; none of one that is masked."""
  if len(specs) != len(layers.shapes):
    captured = isinstance(layers, Layers)
    here = "these layers were captured from params" if captured else "the gradient is a tree"
    raise ValueError(
      f"`Sharding(mesh, params=...)` has the shardings of {len(specs)} parameters, but {here} with"
      f" {len(layers.shapes)}. Pass a tree like those, as `jax.tree.map(lambda x: x.sharding,"
      " params)`; where a whole subtree is masked, mask each leaf of it."
    )
  out = []
  rows = zip(map(axes_of, specs), layers.shapes, layers.paths, leaves, strict=True)
  for spec, shape, path, leaf in rows:
    if is_masked(leaf):
      spec = ()
    if len(spec) > len(shape):
      raise ValueError(
        f"`Sharding(mesh, params=...)` shards {len(spec)} axes of {path}, which has shape {shape}."
      )
    out.append((*spec, *[()] * (len(shape) - len(spec))))
  return out


def _spec(spec: Spec) -> PartitionSpec:
  return PartitionSpec(*(axes or None for axes in spec))


def _square(x: jax.Array) -> jax.Array:
  return x.astype(jnp.result_type(x, jnp.float32)) ** 2


def _joined(arrays: Sequence[jax.Array]) -> jax.Array:
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _tables(places: Sequence[int], slots: int, owners: int) -> tuple[np.ndarray, ...]:
  """`places`, `owned` and `ranks` of a family whose blocks are at these places of the stack."""
  by_owner: list[list[tuple[int, int]]] = [[] for _ in range(owners)]
  for number, place in enumerate(places):
    by_owner[place // slots].append((place % slots, number))
  most = max(map(len, by_owner))
  found = np.zeros(len(places), np.int32)
  owned = np.full((owners, most), len(places), np.int32)
  ranks = np.full((owners, most), slots, np.int32)
  for owner, own in enumerate(by_owner):
    for slot, (rank, number) in enumerate(sorted(own)):
      found[number] = owner * most + slot
      owned[owner, slot], ranks[owner, slot] = number, rank
  return found, owned, ranks


def _along(spec: Spec, shape: tuple[int, ...], mesh: Mesh) -> Spec:
  """Of each axis of `shape`, once those of the blocks are along one of them, the first that can.

  A device has a share of every block then, which goes to who owns it. Where none can be cut so
  often, it has all of it.
  """
  blocks, *along = spec
  for axis, n in enumerate(shape if blocks else ()):
    own = (*along[axis], *blocks)
    if n % math.prod(mesh.shape[name] for name in own) == 0:
      return *along[:axis], own, *along[axis + 1 :]
  return tuple(along)


def _gather(layer: Layer | Tensor, number: int, leaves: Mapping[int, jax.Array]) -> jax.Array:
  """The weight or the bias of a layer, `[blocks, *dims]` or `[blocks, 1, outputs]`."""
  if number == 0:
    return views.replay(layer.view, leaves[layer.weight])
  return bias_row(layer.biases, leaves, (layer.stack, layer.dims[1]))[:, None]


def _scatter(
  layer: Layer | Tensor,
  number: int,
  array: jax.Array,
  shapes: Sequence[tuple[int, ...]],
  shardings: Mapping[int, NamedSharding | None],
) -> dict[int, jax.Array]:
  """The transpose of `_gather`: what each leaf receives, so sharded by its type (or not typed)."""
  if number == 1:
    return spread_biases(array, layer.biases, shapes, {}, shardings)
  leaf = layer.weight
  return {leaf: views.transpose(layer.view, array, shapes[leaf], shardings[leaf])}


@functools.lru_cache(maxsize=4096)
def _viewed(
  layer: Layer | Tensor,
  number: int,
  shapes: tuple[tuple[int, ...], ...],
  specs: tuple[tuple[int, Spec], ...],
  mesh: Mesh,
) -> Spec | None:
  """How the weight or the bias of a layer is sharded if its leaves are; None: they have to move.

  By the rules of explicit axes, which refuse what would have to communicate.
  """
  explicit = AbstractMesh(
    mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
  )
  named = {leaf: NamedSharding(explicit, _spec(spec)) for leaf, spec in specs}
  like = {
    leaf: jax.ShapeDtypeStruct(shapes[leaf], "float32", sharding=s) for leaf, s in named.items()
  }

  def there_and_back(leaves):
    array = _gather(layer, number, leaves)
    return array, _scatter(layer, number, array, shapes, named)

  try:
    with jax.sharding.use_abstract_mesh(explicit):
      array, back = jax.eval_shape(there_and_back, like)
  except Exception:  # JAX exports no name of what it refuses with
    return None
  if any(back[leaf].sharding.spec != like[leaf].sharding.spec for leaf in like):
    return None
  spec = axes_of(array.sharding.spec)
  return (*spec, *[()] * (array.ndim - len(spec)))
