"""EKFAC: `M = (U_A (x) U_G) diag(S + lambda) (U_A (x) U_G)'`, in eigenvectors of both factors.

`S` is a running average of second moments of gradients in that basis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import block_rounding, size
from fop_optax.curvature.exact_inverse import EXACT, eigenvectors
from fop_optax.curvature.precondition import Side, in_basis, matmul, sandwich, transposed
from fop_optax.curvature.scaling import Scaling, WholeDamping, by_stack, each, each_side, sizes


class EigenvalueInverse(NamedTuple):
  """Eigenvectors of both factors (None for a diagonal one), second moments of gradients in them."""

  basis_A: Side
  basis_G: Side
  S: jax.Array  # [rows, outputs], of now


def _invert(stacks, damping, due, kept, made):
  A, G = sizes(stacks)
  of_A, of_G = each_side(eigenvectors, stacks, (A.trace, G.trace), due)
  turns, known = by_stack(due, stacks), by_stack(made > 0, stacks)
  columns = zip(turns, of_A, of_G, kept, known, strict=True)
  S = [each(_carried, *own) for own in columns]
  of_S = [jax.vmap(size)(s.reshape(len(s), -1)) for s in S]
  asked = damping.at(jnp.concatenate([own.mean for own in of_S]))
  rounding = block_rounding(A, G, jnp.concatenate([own.norm for own in of_S]))
  raised = jnp.maximum(asked, rounding)
  low = jnp.concatenate([jnp.min(s, axis=(1, 2)) for s in S])
  low_A, low_G = (jnp.concatenate([low for *_, low in side]) for side in (of_A, of_G))
  used = WholeDamping(raised, raised - asked)
  found = jnp.stack([low_A, low_G, 1 / (low + raised), *used])
  inverses = [EigenvalueInverse(a, g, s) for (a, *_), (g, *_), s in zip(of_A, of_G, S, strict=True)]
  return inverses, used, jnp.all(jnp.isfinite(found), axis=0)


def _carried(of_A, of_G, old, known):
  """`S` in a new basis."""
  # Statistics are measured in the basis that the state holds: S is in the old one. What has the
  # diagonal S there, F = U_old diag(S) U_old', has in the new one the diagonal P_A S P_G' with the
  # squared overlaps P = (U_new' U_old)^2. Their rows and columns add up to one: S stays positive
  # and keeps its trace. The first statistics find no basis: theirs is that of A (x) G, which
  # counts as theirs in the average and fades with them.
  (basis_A, values_A, _), (basis_G, values_G, _) = of_A, of_G
  overlap = lambda new, old: None if new is None else matmul(new.T, old) ** 2
  P_A, P_G = overlap(basis_A, old.basis_A), overlap(basis_G, old.basis_G)
  carried = sandwich(P_A, old.S, transposed(P_G))
  return jnp.where(known, carried, jnp.outer(values_A, values_G))


def _empty(factors):
  empty, ones = EXACT.empty(factors), jnp.ones((len(factors.A), len(factors.G)), factors.A.dtype)
  return EigenvalueInverse(empty.basis_A, empty.basis_G, ones)


def _solve(inverse, used, V):
  # vec(V) -> (U_A (x) U_G) diag(S + lambda)^-1 (U_A (x) U_G)' vec(V)
  values = inverse.S + used.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: rotated / values, V)


def _damped(inverse, used, factors, V):
  del factors
  values = inverse.S + used.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: values * rotated, V)


def _fisher(inverse, factors, V):
  del factors
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: inverse.S * rotated, V)


def _norm(inverse, factors):
  del factors
  return jnp.linalg.norm(inverse.S)


EIGENVALUE = Scaling(
  empty=_empty,
  damping=WholeDamping,
  invert=_invert,
  solve=_solve,
  damped=_damped,
  fisher=_fisher,
  norm=_norm,
  squares=True,
)
