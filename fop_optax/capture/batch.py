"""How the batch is cut into chunks, and how their results are put together.

Example `i` belongs to group `i mod groups`, and within it to one of `micro_batches` chunks: a
reshape `[B] -> [B / chunks, chunks]`, which leaves a sharded batch axis sharded.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture.arguments import Arguments, is_typed_key
from fop_optax.capture.second_moments import Statistics
from fop_optax.group_gradients import wide

PyTree = Any


class Shards(NamedTuple):
  """How the leading axis of an array is sharded."""

  mesh: Any = None
  axes: tuple[str, ...] = ()

  @property
  def number(self) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes)

  def wider(self, params: Sequence[Any], examples: int) -> "Shards":
    """With the axes too along which types say that parameters are sharded, if examples suffice.

    There activations are sharded by features, of which second moments take all of a row.
    """
    if self.mesh is None or jax.sharding.AxisType.Explicit not in self.mesh.axis_types:
      return self
    specs = [jax.typeof(leaf).sharding.spec for leaf in params]
    names = [axis for spec in specs for axis in spec if axis is not None]
    found = {one for axis in names for one in (axis if isinstance(axis, tuple) else (axis,))}
    more = [axis for axis in self.mesh.axis_names if axis in found and axis not in self.axes]
    wide = self._replace(axes=(*self.axes, *more))
    return self if examples % wide.number else wide

  def zeros(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Zeros with an axis of the shards behind the first: under explicit axes each at its device."""
    zeros = jnp.zeros((shape[0], self.number, *shape[1:]), dtype)
    if not self.axes or jax.sharding.AxisType.Explicit not in self.mesh.axis_types:
      return zeros
    spec = jax.sharding.PartitionSpec(None, self.axes)
    return jax.sharding.reshard(zeros, jax.sharding.NamedSharding(self.mesh, spec))


def _shards(leaf: Any) -> Shards:
  """As far as its type or placement says."""
  sharding = jax.typeof(leaf).sharding
  if not isinstance(leaf, jax.core.Tracer) and isinstance(leaf, jax.Array):
    sharding = leaf.sharding
  if not isinstance(sharding, jax.sharding.NamedSharding) or not len(sharding.spec):
    return Shards()
  axes = sharding.spec[0] or ()
  axes = axes if isinstance(axes, tuple) else (axes,)
  return Shards(sharding.mesh, tuple(axis for axis in axes if axis in sharding.mesh.shape))


def _automatic(leaf: Any) -> Shards:
  """On a mesh of one automatic axis, of which types say nothing: presumably sharded over it."""
  mesh = jax.typeof(leaf).sharding.mesh
  wide = [axis for axis, size in mesh.shape.items() if size > 1]
  automatic = set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  return Shards(mesh, tuple(wide)) if automatic and len(wide) == 1 else Shards()


def fold_in(key: jax.Array, data: Any) -> jax.Array:
  fold = jax.random.fold_in
  for _ in range(key.ndim if is_typed_key(key) else 0):
    fold = jax.vmap(fold, (0, None))
  return fold(key, data)


class Loops(NamedTuple):
  """Which chunks are worked off in a loop; the others are written out one after the other.

  A loop compiles its body once, and holds the activations of one chunk. Written out, convolutions
  are far quicker on CPU, where their gradients are slow in a loop.
  """

  groups: bool
  micro_batches: bool


@dataclasses.dataclass(frozen=True)
class Chunks:
  """The batch of one step, dealt to groups and cut into micro-batches.

  Attributes:
    arguments: roles of the leaves.
    leaves: all leaves of the arguments.
    groups: number of groups.
    micro_batches: number of pieces of each group.
    every: statistics are of every that many-th example.
  """

  arguments: Arguments
  leaves: list[Any]
  groups: int
  micro_batches: int
  every: int

  @property
  def count(self) -> int:
    return self.groups * self.micro_batches

  @property
  def size(self) -> int:
    """Number of examples in one chunk.

    Raises:
      ValueError: if the batch cannot be divided.
    """
    batch = self.arguments.size(self.leaves)
    if batch == 0 or batch % self.count:
      raise ValueError(
        f"The batch of {batch} cannot be divided into groups={self.groups} times micro_batches="
        f"{self.micro_batches}. Drop or pad the last examples to a multiple of {self.count}, or"
        " capture with other numbers (K-FAC needs no groups)."
      )
    unit = self.count * self.every
    if batch % unit:
      raise ValueError(
        f"The batch of {batch} in groups={self.groups} times micro_batches={self.micro_batches} has"
        f" {batch // self.count} examples in each piece, of which `curvature_fraction="
        f"1/{self.every}` is no whole number. Use a multiple of {unit}."
      )
    for leaf, role, path in zip(
      self.leaves, self.arguments.roles, self.arguments.paths, strict=True
    ):
      devices = _shards(leaf).number if role == "batch" else 1
      if batch // unit % devices:
        fraction = "" if self.every == 1 else f", of which `curvature_fraction=1/{self.every}`,"
        raise ValueError(
          f"The batch of {batch} in {path} is sharded over {devices} devices, and cannot be divided"
          f" into groups={self.groups} times micro_batches={self.micro_batches}{fraction} on each."
          f" Use a multiple of {unit * devices}, so that no example has to change its device."
        )
    return batch // self.count

  @contextlib.contextmanager
  def explained(self) -> Iterator[None]:
    """Errors of the loss say that it got a piece of the batch."""
    size = self.size  # one that cannot be divided is no error of the loss
    try:
      yield
    except Exception as error:
      if self.count > 1:
        error.add_note(
          f"fop_optax traces the loss on {size} examples, one piece of {self.count} (groups="
          f"{self.groups}, micro_batches={self.micro_batches}). If a batch size is written into the"
          " loss, take it from the arrays at hand, as `len(x)`."
        )
      raise

  def shards(self, params: Sequence[Any]) -> Shards:
    """How rows are summed over devices: as the examples are sharded, as far as that is known.

    And along axes of a mesh along which parameters are, see `Shards.wider`.
    """
    roles = zip(self.leaves, self.arguments.roles, strict=True)
    found = [_shards(leaf) for leaf, role in roles if role == "batch"]
    found += [_automatic(leaf) for leaf in self.leaves[:1] if isinstance(leaf, jax.core.Tracer)]
    shards = max(found, key=lambda shards: shards.number)
    if (examples := self.size // self.every) % shards.number:
      return Shards()
    return shards.wider(params, examples)

  def chunk(self, group: int, micro: Any) -> list[Any]:
    """The traced leaves of piece `micro` (a number, or traced) of `group`."""
    out = []
    for leaf, role in zip(self.leaves, self.arguments.roles, strict=True):
      if role == "batch" and self.count > 1:
        shape = (self.size, self.micro_batches, self.groups, *leaf.shape[1:])
        leaf = jnp.asarray(leaf).reshape(shape)[:, micro, group]
      elif role == "key" and self.count > 1:
        leaf = fold_in(leaf, group + self.groups * micro)
      if role != "static":
        out.append(leaf)
    return out

  def run(
    self, backward: Callable[[list[Any], Any], "Result"], loops: "Loops", key: jax.Array | None
  ) -> list["Result"]:
    """One result a group: means over its micro-batches, aux stacked `[micro_batches, ...]`.

    Under a trace groups that are written out share one inner `jit`, so that they are traced once.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in self.leaves)

    def of_chunk(chunk, key):  # of an object, which has no source line, JAX would print all fields
      return backward(chunk, key)

    of_chunk = jax.jit(of_chunk) if traced else of_chunk

    def one(group, micro):
      own = None if key is None else fold_in(key, group + self.groups * micro)
      return of_chunk(self.chunk(group, micro), own)

    def every(micro):
      if self.groups == 1 or not (traced and loops.groups):
        return [one(group, micro) for group in range(self.groups)]
      stacked = jax.lax.map(lambda group: one(group, micro), jnp.arange(self.groups))
      leaves, treedef = jax.tree.flatten(stacked)
      return [treedef.unflatten([a[group] for a in leaves]) for group in range(self.groups)]

    if self.micro_batches == 1:
      results = every(0)
      return [r._replace(aux=jax.tree.map(lambda a: jnp.asarray(a)[None], r.aux)) for r in results]

    def step(total, micro):
      results = every(micro)
      sums = jax.tree.map(wide, [r._replace(aux=()) for r in results])
      return jax.tree.map(jnp.add, total, sums), [r.aux for r in results]

    pieces = jnp.arange(self.micro_batches)
    like = jax.eval_shape(lambda: every(pieces[0]))
    like = [r._replace(aux=()) for r in like]
    zeros = jax.tree.map(lambda a: wide(_compat.sharded_like(jnp.zeros(a.shape, a.dtype), a)), like)
    zeros = _compat.vary(zeros, _compat.varying(self.arguments.dynamic(self.leaves)))
    unroll = 1 if loops.micro_batches else self.micro_batches
    sums, auxes = jax.lax.scan(step, zeros, pieces, unroll=unroll)
    means = jax.tree.map(lambda a, b: (a / self.micro_batches).astype(b.dtype), sums, like)
    return [mean._replace(aux=aux) for mean, aux in zip(means, auxes, strict=True)]


class Result(NamedTuple):
  """What the backward pass of a chunk gives."""

  loss: jax.Array
  aux: PyTree
  grads: list[jax.Array]
  statistics: tuple[Statistics, ...]
