"""`M = (A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)`: both damped factors inverted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import (
  Damping,
  Size,
  add_damping,
  block_rounding,
  split_damping,
  traces,
)
from fop_optax.curvature.positive import positive_inverse
from fop_optax.curvature.precondition import sandwich
from fop_optax.curvature.scaling import (
  Scaling,
  SplitDamping,
  each_side,
  kronecker_fisher,
  kronecker_norm,
  sizes,
)
from fop_optax.factorizations import in_turn
from fop_optax.layers import Factors

Split = Callable[[Size, Size, jax.Array], tuple[jax.Array, jax.Array]]


class FactoredInverse(NamedTuple):
  """Inverses of both damped factors."""

  A: jax.Array  # like the factor
  G: jax.Array


def invert(
  stacks: Sequence[Factors],
  damping: Damping,
  due: jax.Array | None,
  kept: Sequence[FactoredInverse],
  made: jax.Array,
  split: Split = split_damping,
) -> tuple[list[FactoredInverse], SplitDamping, jax.Array]:
  """Both damped factors of each block inverted; `split` shares the damping out."""
  del kept, made
  A, G = sizes(stacks)
  asked = damping.of(A, G)
  asked_A, asked_G = split(A, G, asked)
  damping_A, damping_G = split(A, G, jnp.maximum(asked, block_rounding(A, G)))
  damping_A, damping_G = jnp.maximum(damping_A, A.rounding), jnp.maximum(damping_G, G.rounding)
  of_A, of_G = each_side(_damped_inverse, stacks, (damping_A, damping_G), due, pad=True)
  used = SplitDamping(damping_A, damping_G, damping_A - asked_A, damping_G - asked_G)
  cut = lambda inverse, like: jax.lax.slice(inverse, [0] * like.ndim, like.shape)
  inverses = [
    FactoredInverse(cut(a, own.A), cut(g, own.G))
    for a, g, own in zip(of_A, of_G, stacks, strict=True)
  ]
  # Positive matrices: no entry is larger than the trace.
  found = [traces([own.A for own in inverses]), traces([own.G for own in inverses])]
  return inverses, used, jnp.all(jnp.isfinite(jnp.stack([*found, *used])), axis=0)


def _damped_inverse(factor, dim, damping):
  """NaN, or an infinity on a diagonal, if it is not positive definite.

  Of a factor of side `dim` with rows and columns of zeros behind it: of the identity there.
  """
  damping = damping.astype(factor.dtype)
  if factor.ndim == 2:
    # Behind the barrier it is one array; without it each use is one more kernel.
    identity = jax.lax.optimization_barrier(jnp.eye(len(factor), dtype=factor.dtype))
    return _damped_matrix_inverse(factor, dim, damping, identity)
  damped = add_damping(factor, damping)
  return jnp.where(damped > 0, 1 / damped, jnp.nan)


@in_turn  # not only the inverse: all damped matrices are never held
def _damped_matrix_inverse(factor, dim, damping, identity):
  diagonal = jnp.where(jnp.arange(len(factor)) < dim, damping, 1)
  return positive_inverse(factor + diagonal * identity, identity)


def _empty(factors):
  return FactoredInverse(jnp.zeros_like(factors.A), jnp.zeros_like(factors.G))


def _solve(inverse, used, V):
  del used
  return sandwich(inverse.A, V, inverse.G)


def _damped(inverse, used, factors, V):
  del inverse
  A = add_damping(factors.A, used.damping_A)
  G = add_damping(factors.G, used.damping_G)
  return sandwich(A, V, G)


FACTORED = Scaling(
  empty=_empty,
  damping=SplitDamping,
  invert=invert,
  solve=_solve,
  damped=_damped,
  fisher=kronecker_fisher,
  norm=kronecker_norm,
)
