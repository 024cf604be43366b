"""Damped inverses of one block, and when they are made anew.

A *scaling* says what `M`, the damped Fisher block, is and how its inverse is kept:

- "factored": `M = (A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)`, the inverses of both;
- "exact": `M = A (x) G + lambda I`, the eigenvectors and eigenvalues of both.

Damping below the rounding of `F` in its precision is raised to it, block by block: inverted as they
are, eigenvalues that ought to be zero would blow up what rounding left of the gradient there.

Each is one row of `SCALINGS`, handed on as it is. A block without an inverse has zeros for it: its
direction is zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import (
  Damping,
  add_damping,
  block_rounding,
  rounding,
  split_damping,
)
from fop_optax.curvature.positive import positive_inverse
from fop_optax.curvature.precondition import Side, multiply, sandwich, transposed
from fop_optax.layers import Factors

Split = Callable[[Factors, jax.Array], tuple[jax.Array, jax.Array]]


class FactoredInverse(NamedTuple):
  """Inverses of both damped factors."""

  A: jax.Array  # like the factor
  G: jax.Array
  damping_A: jax.Array  # shape=(): pi sqrt(lambda) when the inverse was made, or its rounding
  damping_G: jax.Array  # shape=(): sqrt(lambda) / pi
  added_A: jax.Array  # shape=(): what of it was added because less would be rounding
  added_G: jax.Array  # shape=()


class ExactInverse(NamedTuple):
  """Eigenvectors (None for a diagonal factor) and eigenvalues of both factors."""

  basis_A: Side
  basis_G: Side
  values_A: jax.Array
  values_G: jax.Array
  damping: jax.Array  # shape=(): lambda when the inverse was made, or its rounding
  added: jax.Array  # shape=(): what of it was added because less would be rounding


class Scaling(NamedTuple):
  """How one kind of inverse is made and used, for one block."""

  empty: Callable[[Factors], Any]  # factors -> inverse of zeros
  invert: Callable[[Factors, jax.Array], tuple[Any, jax.Array]]  # -> inverse, whether it is sound
  solve: Callable[[Any, jax.Array], jax.Array]  # V -> M^-1 V
  damped: Callable[[Any, Factors, jax.Array], jax.Array]  # V -> M V


def _factored_empty(factors):
  zeros = (jnp.zeros((), factors.A.dtype) for _ in range(4))
  return FactoredInverse(jnp.zeros_like(factors.A), jnp.zeros_like(factors.G), *zeros)


def factored_invert(
  factors: Factors, damping: jax.Array, split: Split = split_damping
) -> tuple[FactoredInverse, jax.Array]:
  """Both damped factors inverted, and whether that is sound; `split` shares the damping out."""
  asked_A, asked_G = split(factors, damping)
  damping_A, damping_G = split(factors, jnp.maximum(damping, block_rounding(factors)))
  damping_A = jnp.maximum(damping_A, rounding(factors.A))
  damping_G = jnp.maximum(damping_G, rounding(factors.G))
  inverse = FactoredInverse(
    A=_damped_inverse(add_damping(factors.A, damping_A)),
    G=_damped_inverse(add_damping(factors.G, damping_G)),
    damping_A=damping_A,
    damping_G=damping_G,
    added_A=damping_A - asked_A,
    added_G=damping_G - asked_G,
  )
  return inverse, _all_finite(inverse)


def _factored_solve(inverse, V):
  return sandwich(inverse.A, V, inverse.G)


def _factored_damped(inverse, factors, V):
  A = add_damping(factors.A, inverse.damping_A)
  G = add_damping(factors.G, inverse.damping_G)
  return sandwich(A, V, G)


def _damped_inverse(factor):
  """Inverse of a positive definite matrix; NaN (or an infinity, on a diagonal) if it is not."""
  if factor.ndim == 1:
    return jnp.where(factor > 0, 1 / factor, jnp.nan)
  return positive_inverse(factor)


def _exact_empty(factors):
  return ExactInverse(
    basis_A=jnp.zeros_like(factors.A) if factors.A.ndim == 2 else None,
    basis_G=jnp.zeros_like(factors.G) if factors.G.ndim == 2 else None,
    values_A=jnp.full(len(factors.A), jnp.inf, factors.A.dtype),
    values_G=jnp.full(len(factors.G), jnp.inf, factors.G.dtype),
    damping=jnp.zeros((), factors.A.dtype),
    added=jnp.zeros((), factors.A.dtype),
  )


def _exact_invert(factors, asked):
  values_A, basis_A = _eigen(factors.A)
  values_G, basis_G = _eigen(factors.G)
  damping = jnp.maximum(asked, block_rounding(factors))
  inverse = ExactInverse(basis_A, basis_G, values_A, values_G, damping, damping - asked)
  # The smallest eigenvalue of M is all there is to fear: at lambda = 0 it may be zero.
  smallest = jnp.min(values_A) * jnp.min(values_G) + damping
  return inverse, _all_finite(inverse) & jnp.isfinite(1 / smallest)


def _eigen(factor):
  if factor.ndim == 1:
    return jnp.maximum(factor, 0), None
  values, basis = jnp.linalg.eigh(factor)
  return jnp.maximum(values, 0), basis  # rounding may make them negative


def _exact_solve(inverse, V):
  # vec(V) -> (U_A (x) U_G) (l_A (x) l_G + lambda)^-1 (U_A (x) U_G)' vec(V)
  rotated = sandwich(transposed(inverse.basis_A), V, inverse.basis_G)
  rotated /= jnp.outer(inverse.values_A, inverse.values_G) + inverse.damping
  return sandwich(inverse.basis_A, rotated, transposed(inverse.basis_G))


def _exact_damped(inverse, factors, V):
  return multiply(factors, V) + inverse.damping * V


SCALINGS = {
  "factored": Scaling(_factored_empty, factored_invert, _factored_solve, _factored_damped),
  "exact": Scaling(_exact_empty, _exact_invert, _exact_solve, _exact_damped),
}


class Inverse(NamedTuple):
  """A block's inverse, or those of a stack of blocks with a leading axis everywhere."""

  value: FactoredInverse | ExactInverse
  made: jax.Array  # int32, shape=(): inverses stored
  failed: jax.Array  # int32, shape=(): inverses refused because they were not finite


def init_inverse(factors: Factors, scaling: Scaling) -> Inverse:
  """Inverses of a stack before any statistics."""
  made, failed = (jnp.zeros(len(factors.A), jnp.int32) for _ in range(2))
  return Inverse(jax.vmap(scaling.empty)(factors), made, failed)


def remake(
  inverse: Inverse, factors: Factors, folds: jax.Array, damping: Damping, scaling: Scaling
) -> Inverse:
  """One block's inverse made anew; the last good one stays if that fails, which is counted.

  A block without statistics (`folds` is zero) is left without an inverse.
  """
  value, sound = scaling.invert(factors, damping.of(factors))
  known = folds > 0
  return Inverse(
    value=jax.tree.map(lambda new, old: jnp.where(known & sound, new, old), value, inverse.value),
    made=inverse.made + (known & sound),
    failed=inverse.failed + (known & ~sound),
  )


def _all_finite(tree):
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
