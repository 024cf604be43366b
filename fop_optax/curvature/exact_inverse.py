"""`M = A (x) G + lambda I`, by eigenvectors and eigenvalues of both factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import block_rounding
from fop_optax.curvature.precondition import Side, in_basis, multiply
from fop_optax.curvature.scaling import (
  Scaling,
  WholeDamping,
  each_side,
  kronecker_fisher,
  kronecker_norm,
  sizes,
)
from fop_optax.factorizations import eigh


class ExactInverse(NamedTuple):
  """Eigenvectors (None for a diagonal factor) and eigenvalues of both factors."""

  basis_A: Side
  basis_G: Side
  values_A: jax.Array
  values_G: jax.Array


def _invert(stacks, damping, due, kept, made):
  del kept, made
  A, G = sizes(stacks)
  asked = damping.of(A, G)
  raised = jnp.maximum(asked, block_rounding(A, G))
  of_A, of_G = each_side(eigenvectors, stacks, (raised, raised), due)
  # The smallest eigenvalue of M is all there is to fear: at lambda = 0 it may be zero.
  low_A, low_G = (jnp.concatenate([low for *_, low in side]) for side in (of_A, of_G))
  used = WholeDamping(raised, raised - asked)
  sound = jnp.all(jnp.isfinite(jnp.stack([1 / (low_A * low_G + raised), *used])), axis=0)
  inverses = [
    ExactInverse(a, g, values_a, values_g)
    for (a, values_a, _), (g, values_g, _) in zip(of_A, of_G, strict=True)
  ]
  return inverses, used, sound


def eigenvectors(factor, dim, damping):
  """Eigenvectors (None: it is a diagonal), eigenvalues and the smallest; NaN if none are found."""
  del dim, damping
  if factor.ndim == 1:
    values = jnp.maximum(factor, 0)
    return None, values, jnp.min(values)
  values, basis = eigh(factor)
  values = jnp.maximum(values, 0)  # rounding may make them negative
  found = jnp.isfinite(jnp.sum(values) + jnp.sum(basis))
  return basis, values, jnp.where(found, jnp.min(values), jnp.nan)


def _empty(factors):
  return ExactInverse(
    basis_A=jnp.zeros_like(factors.A) if factors.A.ndim == 2 else None,
    basis_G=jnp.zeros_like(factors.G) if factors.G.ndim == 2 else None,
    values_A=jnp.full(len(factors.A), jnp.inf, factors.A.dtype),
    values_G=jnp.full(len(factors.G), jnp.inf, factors.G.dtype),
  )


def _solve(inverse, used, V):
  # vec(V) -> (U_A (x) U_G) (l_A (x) l_G + lambda)^-1 (U_A (x) U_G)' vec(V)
  values = jnp.outer(inverse.values_A, inverse.values_G) + used.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: rotated / values, V)


def _damped(inverse, used, factors, V):
  del inverse
  return multiply(factors, V) + used.damping * V


EXACT = Scaling(
  empty=_empty,
  damping=WholeDamping,
  invert=_invert,
  solve=_solve,
  damped=_damped,
  fisher=kronecker_fisher,
  norm=kronecker_norm,
)
