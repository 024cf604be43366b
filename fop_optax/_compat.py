"""The only file that branches on the JAX version, by the parameters that are present."""

from collections.abc import Mapping, Sequence
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
  text = single(jaxpr, equation)[0].pretty_print(source_info=True)
  text = text[text.rfind("\n{ lambda") + 1 :]  # what `let` defines above it has lines of its own
  line = next((line for line in text.splitlines() if " # " in line), "")
  return line.rpartition(" # ")[2].strip()


@functools.cache
def unexported() -> Mapping[str, Any]:
  """Primitives that JAX exports nowhere: each taken once from a function that uses it."""

  def primitives_of(function, shape):
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, "float32")))
    return [equation.primitive for equation in jaxpr.eqns]

  found = {
    "split": primitives_of(lambda x: jax.lax.split(x, [2, 2]), (4,))[0],
    "optimization_barrier": primitives_of(jax.lax.optimization_barrier, (4,))[0],
  }
  pieces = primitives_of(list, (2, 2))
  if len(pieces) == 1:  # from 0.11 one `unstack`; before, slices
    found["unstack"] = pieces[0]
  return found
