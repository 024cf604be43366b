"""The only file that branches on the JAX version, by the parameters that are present."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
from typing import Any

import jax
from jax.extend import core

Jaxpr = Any
Equation = Any


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, tuple[Any, ...]]:
  """A jaxpr and its constants, whether it is closed (0.10), open, or both at once (from 0.11)."""
  return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()) or ())


def scan_split(params: Mapping[str, Any], operands: int) -> tuple[int, int]:
  """How many of the operands of a scan are constants, and how many are carried.

  Raises:
    NotImplementedError: if this JAX keeps the split in a form that is not known here.
  """
  if "num_consts" in params:  # 0.10
    consts, carry = params["num_consts"], params["num_carry"]
    scanned = operands - consts - carry
  elif "ft_in" in params:  # from 0.11
    consts, carry, scanned = (len(part) for part in params["ft_in"].unpack())
  else:
    consts = carry = scanned = -1
  if min(consts, carry, scanned) < 0 or consts + carry + scanned != operands:
    raise NotImplementedError(
      f"fop_optax does not know how jax {jax.__version__} lays out `lax.scan` (parameters"
      f" {sorted(params)}). Please report it, and pin a supported jax meanwhile (see the README)."
    )
  return consts, carry


def single(jaxpr: Jaxpr, equation: Equation) -> tuple[Jaxpr, list[Any]]:
  """`equation` as a jaxpr of its own, and the variables it reads, in order."""
  inputs = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, core.Literal)))
  one = jaxpr.replace(constvars=[], invars=inputs, outvars=list(equation.outvars), eqns=[equation])
  return one, inputs


def evaluate_equation(jaxpr: Jaxpr, equation: Equation, operands: Sequence[Any]) -> list[Any]:
  """Evaluates one equation by JAX's own evaluator, on operands in the equation's order."""
  one, inputs = single(jaxpr, equation)
  values = dict(zip_variables(equation.invars, operands))
  return jax.core.eval_jaxpr(one, (), *(values[v] for v in inputs))


def zip_variables(atoms: Sequence[Any], values: Sequence[Any]) -> list[tuple[Any, Any]]:
  """Pairs of variable and value, literals left out."""
  pairs = zip(atoms, values, strict=True)
  return [(atom, value) for atom, value in pairs if not isinstance(atom, core.Literal)]


def source_of(jaxpr: Jaxpr, equation: Equation) -> str:
  """The source line an equation comes from, as `file:line:column (function)`; empty if unknown."""
  text = single(jaxpr, equation)[0].pretty_print(source_info=True, use_color=False)
  text = text[text.rfind("\n{ lambda") + 1 :]  # what `let` defines above it has lines of its own
  line = next((line for line in text.splitlines() if " # " in line), "")
  return line.rpartition(" # ")[2].strip()


def varying(tree: Any) -> frozenset[Any]:
  """The manual mesh axes over which some leaf may differ, by its type (in `jax.shard_map`)."""
  types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
  axes = [t.vma if hasattr(t, "vma") else t.manual_axis_type.varying for t in types]
  return frozenset[Any]().union(*axes)


def vary(tree: Any, axes: frozenset[Any]) -> Any:
  """`tree` with leaves that may differ, by their type, over these manual mesh axes too."""

  def one(leaf):
    missing = tuple(sorted(axes - varying(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(one, tree) if axes else tree


def sharded_like(array: jax.Array, aval: Any) -> jax.Array:
  """`array` with the sharding of a type, where that has one (under explicit mesh axes)."""
  sharding = _explicit(aval.sharding)
  there = sharding is None or jax.typeof(array).sharding == sharding
  return array if there else jax.sharding.reshard(array, sharding)


def shape_of(aval: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a type, with its sharding where it says one (under explicit mesh axes)."""
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=_explicit(aval.sharding))


def _explicit(sharding: Any) -> jax.sharding.NamedSharding | None:
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return None
  explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
  return sharding if explicit else None


def leading_like(array: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
  """`array` with its first axis sharded like the second one of `like`, and no other."""
  sharding = _explicit(like.sharding)
  if sharding is None or jax.typeof(array).sharding.mesh.axis_types != sharding.mesh.axis_types:
    return array
  spec = jax.sharding.PartitionSpec(sharding.spec[1], *[None] * (array.ndim - 1))
  return jax.sharding.reshard(array, jax.sharding.NamedSharding(sharding.mesh, spec))


@contextlib.contextmanager
def mesh_of(arrays: Any) -> Iterator[Callable[[Any], Any]]:
  """Enters the mesh of the arrays' types, another than that of the context inside `auto_axes`.

  What is yielded brings other arrays on it.
  """
  meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays)]
  context = jax.sharding.get_abstract_mesh()
  other = [mesh for mesh in meshes if not mesh.empty and mesh.axis_types != context.axis_types]
  if context.empty or not other:
    yield lambda tree: tree
    return
  whole = jax.sharding.NamedSharding(other[0], jax.sharding.PartitionSpec())
  with jax.sharding.use_abstract_mesh(other[0]):
    yield lambda tree: jax.tree.map(lambda x: jax.sharding.reshard(x, whole), tree)


@functools.cache
def unexported() -> Mapping[str, Any]:
  """Primitives that JAX exports nowhere: each taken once from a function that uses it."""

  def primitives_of(function, shape, dtype="float32"):
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype)))
    return [equation.primitive for equation in jaxpr.eqns]

  found = {
    "split": primitives_of(lambda x: jax.lax.split(x, [2, 2]), (4,))[0],
    "optimization_barrier": primitives_of(jax.lax.optimization_barrier, (4,))[0],
    "random_wrap": primitives_of(jax.random.wrap_key_data, (2,), "uint32")[0],
  }
  pieces = primitives_of(list, (2, 2))
  if len(pieces) == 1:  # from 0.11 one `unstack`; before, slices
    found["unstack"] = pieces[0]
  tiled = primitives_of(lambda x: jax.numpy.tile(x, 2), (4,))
  if len(tiled) == 1:  # from 0.10.2 one `tile`; before, a broadcast and a reshape
    found["tile"] = tiled[0]
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  found["reshard"] = primitives_of(lambda x: jax.reshard(x, whole), (4,))[0]
  stacked = primitives_of(lambda x: jax.numpy.stack([x, x]), (4,))
  if len(stacked) == 1:  # from 0.10.2 one `stack`; before, broadcasts and a `concatenate`
    found["stack"] = stacked[0]
  return found
