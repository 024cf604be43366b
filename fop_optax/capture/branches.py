"""Branches that a program fixes: a `cond` at a constant index is a call of one of its branches.

A Python bool leaves such an equation behind, as in `lax.cond(True, lambda p: p, stop_gradient, p)`.
"""

from typing import Any

from jax.extend import core
from jax.extend.core import primitives

from fop_optax import _compat
from fop_optax.capture import flow


def settled(jaxpr: Any) -> Any:
  """The open `jaxpr` with calls in place of the branches that it fixes, nested ones included."""
  equations = list(map(_settled, jaxpr.eqns))
  same = all(new is old for new, old in zip(equations, jaxpr.eqns, strict=True))
  return jaxpr if same else jaxpr.replace(eqns=equations)


def _settled(equation: Any) -> Any:
  if equation.primitive is primitives.cond_p and isinstance(equation.invars[0], core.Literal):
    index, branches = int(equation.invars[0].val), equation.params["branches"]
    equation = equation.replace(
      primitive=primitives.closed_call_p,
      invars=equation.invars[1:],
      params={"call_jaxpr": branches[min(max(index, 0), len(branches) - 1)]},
    )
  if equation.primitive not in (*flow.INLINED, primitives.scan_p):
    return equation
  inner = flow.inner_jaxpr(equation)
  before, _ = _compat.open_jaxpr(inner)
  after = settled(before)
  if after is before:
    return equation
  name = "jaxpr" if "jaxpr" in equation.params else "call_jaxpr"
  whole = after if before is inner else inner.replace(jaxpr=after)
  return equation.replace(params={**equation.params, name: whole})
