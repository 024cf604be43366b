"""What is taken in: parameters, and which of the other arguments have the batch or are keys."""

from collections import Counter
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Arguments:
  """The arguments of a loss beside its parameters, as leaves.

  Attributes:
    treedef: of the tuple of arguments.
    roles: for each leaf `"batch"`, `"key"` (folded anew for each chunk), `"array"`, or `"static"`.
    paths: printable path of each leaf.
    argument: number of the argument each leaf stands in.
  """

  treedef: Any
  roles: tuple[str, ...]
  paths: tuple[str, ...]
  argument: tuple[int, ...]

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
        + self._suggestion(leaves)
      )
    return next(iter(sizes.values()))

  def _suggestion(self, leaves: Sequence[Any]) -> str:
    """What to write where leading axes differ: the arguments that share the most common one."""
    sizes: dict[int, set[int]] = {}
    for leaf, role, argument in zip(leaves, self.roles, self.argument, strict=True):
      if role == "batch":
        sizes.setdefault(argument, set()).add(leaf.shape[0])
    common = Counter(size for own in sizes.values() for size in own).most_common(1)[0][0]
    whole = [number for number, own in sizes.items() if own == {common}]
    mixed = [number for number, own in sizes.items() if common in own and len(own) > 1]
    text = ""
    if whole:
      numbers = str(whole[0]) if len(whole) == 1 else str(tuple(whole))
      text += (
        f" If the batch has {common} examples, write"
        f" `capture(loss, params, *args, batch_argnums={numbers})`, counted within `args`: state"
        " and constants are left out. If it is another axis of an argument, hand that over with the"
        " batch as its leading axis, and transpose it in the loss."
      )
    for number in mixed:
      text += f" args[{number}] has leaves with {common} and others: make two arguments of it."
    return text

  def resized(self, leaves: Sequence[Any], size: int) -> list[Any]:
    """Types of the traced leaves with a batch of `size`."""
    out = []
    for leaf, role in zip(leaves, self.roles, strict=True):
      if role != "static":
        like = type_of(leaf)
        out.append(like.update(shape=(size, *like.shape[1:])) if role == "batch" else like)
    return out


def type_of(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of an array as a trace sees it: with its weak type, sharding and mesh."""
  like = jax.eval_shape(lambda leaf: leaf, leaf)
  own = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf).sharding
  if like.sharding is not None or not isinstance(own, jax.sharding.NamedSharding):
    return like
  # `eval_shape` drops a mesh of Auto axes, at which a loss may look: Flax's dropout does.
  if {*own.mesh.axis_types} != {jax.sharding.AxisType.Auto}:
    return like
  spec = jax.sharding.PartitionSpec(*[None] * like.ndim)
  return like.update(sharding=jax.sharding.NamedSharding(own.mesh, spec))


def classify(
  args: tuple[Any, ...],
  batch_argnums: int | Sequence[int] | None,
  numbers: frozenset[int] = frozenset(),
) -> Arguments:
  """Finds the leaves with the batch axis: those of the arguments named, by default all but keys.

  Scalars have no axis and are the same for all examples, keys folded anew for each chunk. An array
  of typed keys in no named argument is the batch's if its leading axis is that of the others.

  Args:
    args: arguments of the loss after params.
    batch_argnums: as of `capture`.
    numbers: indices of leaves `uint32[2]` that are no keys.

  Raises:
    ValueError: if `batch_argnums` names no argument, one twice, or one without an axis.
  """
  named = None if batch_argnums is None else _argnums(batch_argnums, len(args))
  flat, treedef = jax.tree_util.tree_flatten_with_path(args)
  roles = []
  for index, (path, leaf) in enumerate(flat):
    if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
      roles.append("static")
    elif leaf.ndim == 0:
      roles.append("key" if is_typed_key(leaf) else "array")
    elif named is not None and path[0].idx in named:
      roles.append("batch")
    elif is_typed_key(leaf) or (is_raw_key(leaf) and index not in numbers):
      roles.append("key")
    else:
      roles.append("batch" if named is None else "array")
  argument = tuple(path[0].idx for path, _ in flat)
  for number in named or ():
    if "batch" not in {role for role, own in zip(roles, argument, strict=True) if own == number}:
      raise ValueError(
        f"batch_argnums={batch_argnums} names argument {number}, which has no array with an axis."
        " It cannot be the batch: leave it out."
      )
  if named is None:
    sizes = Counter(leaf.shape[0] for (_, leaf), r in zip(flat, roles, strict=True) if r == "batch")
    for index, (_, leaf) in enumerate(flat):
      if roles[index] == "key" and is_typed_key(leaf) and leaf.ndim:
        roles[index] = "batch" if leaf.shape[0] in sizes else "key"
  paths = tuple("args" + jax.tree_util.keystr(path) for path, _ in flat)
  return Arguments(treedef, tuple(roles), paths, argument)


def _argnums(batch_argnums: Any, count: int) -> tuple[int, ...]:
  """`batch_argnums` as numbers of arguments, each named once."""
  given = batch_argnums if isinstance(batch_argnums, Sequence) else (batch_argnums,)
  if isinstance(given, str) or any(
    isinstance(n, bool) or not hasattr(n, "__index__") for n in given
  ):
    raise ValueError(
      f"`capture(batch_argnums={batch_argnums!r})` takes the number of an argument after params, or"
      " several, counted from 0, as `batch_argnums=(0, 1)`."
    )
  named = tuple(map(int, given))
  for number in named:
    if not 0 <= number < count:
      raise ValueError(
        f"batch_argnums={batch_argnums} names argument {number}, but the loss has"
        f" {count} arguments after params (counted from 0)."
      )
  if len(set(named)) < len(named):
    raise ValueError(f"batch_argnums={batch_argnums} names an argument twice: name each once.")
  return named


def check_params(leaves: Sequence[Any], paths: Sequence[str]) -> None:
  """Checks that the parameters have gradients.

  Raises:
    ValueError: if there are none, or one is no floating (or complex) array.
  """
  if not leaves:
    raise ValueError("`capture(loss, params, ...)` got params without leaves.")
  for leaf, path in zip(leaves, paths, strict=True):
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
      raise ValueError(
        f"params{path} is a {type(leaf).__name__}, not an array. Split the tree first, for example"
        " `params, static = equinox.partition(model, equinox.is_inexact_array)`."
      )
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      raise ValueError(
        f"params{path} is {leaf.dtype}{list(leaf.shape)}: only floating arrays have gradients. Hand"
        " it to the loss in a further argument, and leave that out of `batch_argnums`."
      )


def is_typed_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_raw_key(leaf: Any) -> bool:
  """Whether `leaf` has the form of a key of `jax.random.PRNGKey`; it can be two numbers as well."""
  return leaf.dtype == jnp.uint32 and leaf.shape == (2,)
