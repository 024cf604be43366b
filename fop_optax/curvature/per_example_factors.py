"""Kronecker factors where only products are known: `V_n = a_n g_n'`, neither `a_n` nor `g_n`.

For a block with per-example gradients `V_n`, `[rows, outputs]`, an average over the examples is

    L = mean_n V_n V_n'        R = mean_n V_n' V_n        F = L (x) R / tr L        tr L = tr R

If `|a_n|` and `|g_n|` do not depend on `n`, then `L = |g|^2 A`, `R = |a|^2 G` and `F = A (x) G`, as
K-FAC has it; otherwise examples count in `L` by the size of their output gradient as well, and in
`R` by that of their input. A block of one row is a vector `g_n'`: `L` is the number `tr R` and `F`
is `mean_n g_n g_n'`, exact.

Statistics are `Factors(L, R)`; running factors are kept as `Factors(L / tr L, R)` of the averages,
whose Kronecker product is `F`: what is read from them is as for K-FAC.
"""

import functools

import jax
import jax.numpy as jnp

from fop_optax import moments
from fop_optax.curvature import factored_inverse, factors
from fop_optax.curvature.damping import Size, split_damping, trace_of
from fop_optax.curvature.exact_inverse import EXACT
from fop_optax.curvature.factored_inverse import FACTORED
from fop_optax.layers import Factors


def statistics(V: jax.Array, diagonal: tuple[bool, bool]) -> Factors:
  """`L` and `R` of per-example gradients `[examples, stack, rows, outputs]`, stacked."""
  dtype = jnp.promote_types(V.dtype, jnp.float32)
  L = moments.second_moment(V, moments.Roles((0, 3), (1,), (2,)), diagonal[0], dtype)
  R = moments.second_moment(V, moments.Roles((0, 2), (1,), (3,)), diagonal[1], dtype)
  return Factors(L / len(V), R / len(V))


def fold(average: Factors, new: Factors, finite: jax.Array, weight: jax.Array) -> Factors:
  """As `fop_optax.curvature.factors.fold`, of the averages of `L` and `R`."""
  A, G = average
  L, R = factors.fold(Factors(A * trace_of(G), G), new, finite, weight)
  size = trace_of(R)
  A = jnp.where(finite, L / jnp.where(size > 0, size, 1), A)
  return Factors(A, R)


def _split(A: Size, G: Size, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Damping of both factors; that of a vector, `R + lambda I`, needs no sharing out."""
  of_A, of_G = split_damping(A, G, damping)
  vector = A.dim == 1  # A is 1, and 0 before there was a gradient
  return jnp.where(vector, 1 - A.trace, of_A), jnp.where(vector, damping, of_G)


SCALINGS = {
  "factored": FACTORED._replace(invert=functools.partial(factored_inverse.invert, split=_split)),
  "exact": EXACT,
}
