"""Marks: the equations by which `fop_optax.losses` says what distribution a term of a loss is of.

A mark passes the terms on and has the distributions' parameters beside them. Any `vmap` may have
batched it since: each operand has its new axes wherever they fell, and either may lack them. A sum
of the parameters over their classes stands inside as an alternative to the terms: its axis is that
of the classes, and its transpose brings what belongs to terms into the parameters' layout.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import flow
from fop_optax.capture.values import Path
from fop_optax.losses import NORMAL, SIGMOID, SOFTMAX


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
  """A marked loss.

  Attributes:
    path: where the equation stands.
    scans: lengths of the enclosing scans.
    distribution: name of the mark, as of `fop_optax.losses`.
    classes: axis of the classes (or outputs) among those of the parameters.
    equation: `terms = mark(switch, terms, parameters)`.
  """

  path: Path
  scans: tuple[int, ...]
  distribution: str
  classes: int
  equation: Any

  @property
  def count(self) -> int:
    """Number of terms in one evaluation of the loss."""
    return math.prod(self.scans) * math.prod(self.equation.outvars[0].aval.shape)

  def probe(self) -> jax.Array:
    """Zeros to add to the terms, scans first, whose cotangent is the weights of the terms."""
    terms = self.equation.outvars[0].aval  # has a sharding under explicit axes
    return jnp.broadcast_to(jnp.zeros_like(terms), (*self.scans, *terms.shape))

  def spread(self, weights: jax.Array, parameters: jax.Array) -> jax.Array:
    """Brings what belongs to terms into the layout of the parameters, the same for all classes.

    Where labels have a batch axis and the parameters have none, it is summed over that axis.

    Args:
      weights: one number a term, `[*scans, ...]`.
      parameters: of the distributions, `[*scans, ...]`.
    """
    jaxpr, consts = _compat.open_jaxpr(flow.inner_jaxpr(self.equation))

    def one(weights, parameters):
      total = lambda z: jax.core.eval_jaxpr(jaxpr, consts, 1, jnp.zeros_like(weights), z)[0]
      return jax.vjp(total, parameters)[1](weights)[0]

    for _ in self.scans:
      one = jax.vmap(one)
    return one(weights, parameters)


def has_mark(equation: Any) -> bool:
  """Whether a mark stands within an equation."""
  inner = [each for jaxpr in core.jaxprs_in_params(equation.params) for each in jaxpr.eqns]
  return any(read_mark(each, (), ()) is not None or has_mark(each) for each in inner)


def read_mark(equation: Any, path: Path, scans: Sequence[int]) -> Mark | None:
  """The mark that a `jit` equation is, if it is one.

  What a gradient within the loss makes of a mark is none: it has more than one output, or a bool
  in place of the switch.
  """
  name = equation.params.get("name")
  counts = len(equation.invars), len(equation.outvars)
  if name not in (SOFTMAX, NORMAL, SIGMOID) or counts != (3, 1):
    return None
  if not jnp.issubdtype(equation.invars[0].aval.dtype, jnp.integer):
    return None
  jaxpr, _ = _compat.open_jaxpr(flow.inner_jaxpr(equation))
  (total,) = (inner for inner in jaxpr.eqns if inner.primitive is primitives.reduce_sum_p)
  (classes,) = total.params["axes"]
  return Mark(path, tuple(scans), name, int(classes), equation)
