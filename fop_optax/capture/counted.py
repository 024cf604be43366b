"""How many terms a mean counts where it has weights, as of a mask of tokens.

Terms that a mask leaves out are among the `N R` of the shapes. With the weights `w` of the terms in
the mean `sum_i w_i l_i / sum_i w_i` as many terms of one weight would count as

    n = (sum w)^2 / sum w^2,

which of a mask is their number, and no other for weights twice as large. With `dy_i = w_i g_i /
sum w` it makes of `G = n sum dy dy'` the mean `sum w^2 g g' / sum w^2`, whatever share counts. In a
mean over the examples of such means, each over its own sum, the weights are those over their sums.
"""

from collections.abc import Iterable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import flow
from fop_optax.capture.values import Path, Use


class Weights(NamedTuple):
  """Where the weights of the terms of a loss are summed up, and over which of their axes."""

  path: Path
  axes: tuple[int, ...]


def weights_of(jaxpr: Any, uses: Iterable[Use], found: tuple[Path, int] | None) -> Weights | None:
  """The weights of a loss: those summed at a path, so many of them to a sum.

  None where it is not clear, and where some rows are no examples': weights say nothing of these.
  """
  equation = found and _sum_at(jaxpr, found[0])
  if not found or equation is None or any(use.fixed for use in uses):
    return None
  shape = equation.invars[0].aval.shape
  for axes in (tuple(range(len(shape))), tuple(equation.params["axes"])):
    if math.prod(shape[axis] for axis in axes) == found[1]:
      return Weights(found[0], axes)
  return None


def still_there(jaxpr: Any, weights: Weights | None) -> Weights | None:
  """The weights of a loss, if in its program for other arguments too there is such a sum."""
  equation = weights and _sum_at(jaxpr, weights.path)
  return weights if equation and equation.invars[0].aval.ndim > max(weights.axes) else None


def _sum_at(jaxpr: Any, path: Path) -> Any:
  """The sum at a path, if an evaluation of the loss comes to it once."""
  *outer, last = path
  for index in outer:
    equation = jaxpr.eqns[index] if index < len(jaxpr.eqns) else None
    if equation is None or equation.primitive not in flow.INLINED:
      return None
    jaxpr, _ = _compat.open_jaxpr(flow.inner_jaxpr(equation))
  found = jaxpr.eqns[last] if last < len(jaxpr.eqns) else None
  return found if found is not None and found.primitive.name == "reduce_sum" else None


def share(weights: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
  """n over the number of weights: the share of the terms that count, 0 where none does."""
  w = jnp.asarray(weights).astype(jnp.promote_types(dtype, jnp.float32))
  over = lambda a, b: jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)
  w = over(w, jnp.sum(w, axes, keepdims=True))
  return over(jnp.sum(w) ** 2, jnp.sum(w**2)) / w.size
