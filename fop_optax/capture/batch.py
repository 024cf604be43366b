"""Which arguments have the batch, how it is cut into chunks, and how results are put together.

Example `i` belongs to group `i mod groups`, and within it to one of `micro_batches` chunks: a
reshape `[B] -> [B / chunks, chunks]`, which leaves a sharded batch axis sharded.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax.layers import Factors

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Arguments:
  """The arguments of a loss beside its parameters, as leaves.

  Attributes:
    treedef: of the tuple of arguments.
    roles: for each leaf `"batch"`, `"key"` (folded anew for each chunk), `"array"`, or `"static"`.
    paths: printable path of each leaf.
  """

  treedef: Any
  roles: tuple[str, ...]
  paths: tuple[str, ...]

  def dynamic(self, leaves: Sequence[Any]) -> list[Any]:
    """The leaves that are traced."""
    return [leaf for leaf, role in zip(leaves, self.roles, strict=True) if role != "static"]

  @property
  def batch(self) -> list[bool]:
    """For each traced leaf, whether it differs between chunks."""
    return [role in ("batch", "key") for role in self.roles if role != "static"]

  def rebuild(self, dynamic: Sequence[Any], leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The tuple of arguments, its traced leaves replaced by `dynamic`."""
    traced = iter(dynamic)
    full = [
      leaf if role == "static" else next(traced)
      for leaf, role in zip(leaves, self.roles, strict=True)
    ]
    return jax.tree.unflatten(self.treedef, full)

  def size(self, leaves: Sequence[Any]) -> int:
    """The batch size.

    Raises:
      ValueError: if there is no batch, or leading axes differ.
    """
    sizes = {
      path: leaf.shape[0]
      for leaf, role, path in zip(leaves, self.roles, self.paths, strict=True)
      if role == "batch"
    }
    if not sizes:
      raise ValueError(
        "No argument of the loss has a batch axis. Pass the batch as an argument instead of closing"
        " over it: `capture(loss, params, x, y)` for `loss(params, x, y)`."
      )
    if len(set(sizes.values())) > 1:
      listed = ", ".join(f"{path}: {size}" for path, size in sizes.items())
      raise ValueError(
        f"The leading axes of the arguments differ ({listed}), so they cannot all be the batch."
        " Name the arguments that have it: `capture(loss, params, *args, batch_argnums=(0, 1))`"
        " counts within `args`; state, keys and constants are left out."
      )
    return next(iter(sizes.values()))

  def resized(self, leaves: Sequence[Any], size: int) -> list[Any]:
    """Shapes of the traced leaves with a batch of `size`."""
    out = []
    for leaf, role in zip(leaves, self.roles, strict=True):
      if role != "static":
        shape = (size, *leaf.shape[1:]) if role == "batch" else leaf.shape
        out.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
    return out


def classify(args: tuple[Any, ...], batch_argnums: int | Sequence[int] | None) -> Arguments:
  """Finds the leaves with the batch axis: by default all arrays but keys and scalars.

  Raises:
    ValueError: if `batch_argnums` names no argument, or one with a scalar.
  """
  implied = batch_argnums is None
  numbers = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums or ())
  for number in numbers:
    if not 0 <= number < len(args):
      raise ValueError(
        f"batch_argnums={numbers} names argument {number}, but the loss has"
        f" {len(args)} arguments after params (counted from 0)."
      )
  flat, treedef = jax.tree_util.tree_flatten_with_path(args)
  roles = []
  for path, leaf in flat:
    explicit = path[0].idx in numbers
    if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
      roles.append("static")
    elif _is_key(leaf) and not (explicit and _keys(leaf)):
      roles.append("key")
    elif (explicit or implied) and leaf.ndim > 0:
      roles.append("batch")
    else:
      roles.append("array")
  paths = tuple("args" + jax.tree_util.keystr(path) for path, _ in flat)
  return Arguments(treedef, tuple(roles), paths)


def _devices(leaf: Any) -> int:
  """Over how many devices the leading axis is sharded, as far as its type or placement says."""
  sharding = jax.typeof(leaf).sharding
  if not isinstance(leaf, jax.core.Tracer) and isinstance(leaf, jax.Array):
    sharding = leaf.sharding
  if not isinstance(sharding, jax.sharding.NamedSharding) or not len(sharding.spec):
    return 1
  axes = sharding.spec[0] or ()
  axes = axes if isinstance(axes, tuple) else (axes,)
  return math.prod(sharding.mesh.shape[axis] for axis in axes if axis in sharding.mesh.shape)


def _is_key(leaf: Any) -> bool:
  typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return typed or (leaf.dtype == jnp.uint32 and leaf.shape == (2,))


def _keys(leaf: Any) -> bool:
  """Whether `leaf` can be an array of keys, one an example."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.ndim > 0


def _fold_in(key: jax.Array, data: Any) -> jax.Array:
  fold = jax.random.fold_in
  batched = key.ndim - (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)
  for _ in range(batched):
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
      devices = _devices(leaf) if role == "batch" else 1
      if batch // unit % devices:
        fraction = "" if self.every == 1 else f", of which `curvature_fraction=1/{self.every}`,"
        raise ValueError(
          f"The batch of {batch} in {path} is sharded over {devices} devices, and cannot be divided"
          f" into groups={self.groups} times micro_batches={self.micro_batches}{fraction} on each."
          f" Use a multiple of {unit * devices}, so that no example has to change its device."
        )
    return batch // self.count

  def chunk(self, group: int, micro: Any) -> list[Any]:
    """The traced leaves of piece `micro` (a number, or traced) of `group`."""
    out = []
    for leaf, role in zip(self.leaves, self.arguments.roles, strict=True):
      if role == "batch" and self.count > 1:
        shape = (self.size, self.micro_batches, self.groups, *leaf.shape[1:])
        leaf = leaf.reshape(shape)[:, micro, group]
      elif role == "key" and self.count > 1:
        leaf = _fold_in(leaf, group + self.groups * micro)
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
    if traced:
      backward = jax.jit(backward)

    def one(group, micro):
      own = None if key is None else _fold_in(key, group + self.groups * micro)
      return backward(self.chunk(group, micro), own)

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
      sums = jax.tree.map(_wide, [r._replace(aux=()) for r in results])
      return jax.tree.map(jnp.add, total, sums), [r.aux for r in results]

    pieces = jnp.arange(self.micro_batches)
    like = jax.eval_shape(lambda: every(pieces[0]))
    like = [r._replace(aux=()) for r in like]
    zeros = jax.tree.map(lambda a: _wide(jnp.zeros(a.shape, a.dtype)), like)
    unroll = 1 if loops.micro_batches else self.micro_batches
    sums, auxes = jax.lax.scan(step, zeros, pieces, unroll=unroll)
    means = jax.tree.map(lambda a, b: (a / self.micro_batches).astype(b.dtype), sums, like)
    return [mean._replace(aux=aux) for mean, aux in zip(means, auxes, strict=True)]


class Result(NamedTuple):
  """What the backward pass of a chunk gives."""

  loss: jax.Array
  aux: PyTree
  grads: list[jax.Array]
  factors: tuple[Factors, ...]


def mean(arrays: Sequence[jax.Array]) -> jax.Array:
  """The mean of some arrays, summed in float32 or better."""
  total = functools.reduce(jnp.add, map(_wide, arrays))
  return (total / len(arrays)).astype(arrays[0].dtype)


def contrasts(arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """`c_i = sqrt(2) sum_j H_ij g_j`, `H` the Helmert matrix: two groups give `g_1 - g_2`."""
  wide, out = list(map(_wide, arrays)), []
  for i in range(1, len(wide)):  # row i of H: the mean of the first i less the next one, normalised
    difference = sum(wide[:i]) / i - wide[i]
    out.append((difference * np.sqrt(2 * i / (i + 1))).astype(arrays[0].dtype))
  return out


def _wide(array: jax.Array) -> jax.Array:
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))
