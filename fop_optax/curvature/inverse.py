"""Damped inverses of all blocks, and when they are made anew.

A *scaling* says what `M`, the damped Fisher block, is and how its inverse is kept:

- "factored": `M = (A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)`, the inverses of both;
- "exact": `M = A (x) G + lambda I`, the eigenvectors and eigenvalues of both;
- "eigenvalue": `M = (U_A (x) U_G) diag(S + lambda) (U_A (x) U_G)'`, the eigenvectors of both, and
  `S`, a running average of second moments of gradients in that basis (EKFAC).

Each has a file of its own, and is handed on as it is. A block without an inverse has zeros for it:
its direction is zero.

Damping below the rounding of `F` in its precision is raised to it, block by block: inverted as they
are, eigenvalues that ought to be zero would blow up what rounding left of the gradient there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import Damping
from fop_optax.curvature.eigenvalue_inverse import EIGENVALUE, EigenvalueInverse
from fop_optax.curvature.exact_inverse import EXACT, ExactInverse
from fop_optax.curvature.factored_inverse import FACTORED, FactoredInverse
from fop_optax.curvature.scaling import Scaling, UsedDamping, by_stack
from fop_optax.curvature.stacks import renewed
from fop_optax.layers import Factors

Inverse = FactoredInverse | ExactInverse | EigenvalueInverse


class Inversions(NamedTuple):
  """Numbers of all blocks' inversions, those of one stack after those of another."""

  made: jax.Array  # int32, shape=(blocks,): inverses stored
  failed: jax.Array  # int32, shape=(blocks,): inverses refused because they were not finite
  damping: UsedDamping


SCALINGS = {"factored": FACTORED, "exact": EXACT, "eigenvalue": EIGENVALUE}


def init_inversions(blocks: int, scaling: Scaling, dtype: Any) -> Inversions:
  """Before any statistics. No two arrays are one buffer, so that a state can be donated."""
  made, failed = (jnp.zeros(blocks, jnp.int32) for _ in range(2))
  damping = scaling.damping(*(jnp.zeros(blocks, dtype) for _ in scaling.damping._fields))
  return Inversions(made, failed, damping)


def remake(
  kept: tuple[Inverse, ...],
  before: Inversions,
  stacks: Sequence[Factors],
  known: jax.Array,
  damping: Damping,
  scaling: Scaling,
  due: jax.Array | None = None,
) -> tuple[tuple[Inverse, ...], Inversions]:
  """Inverses made anew; of a block where that fails the last good one stays, which is counted.

  Blocks that are not `known`, without statistics, are left without an inverse; those that are not
  `due` (None: all are) with the one they have.
  """
  found, used, sound = scaling.invert(stacks, damping, due, kept, before.made)
  tried = known if due is None else known & due
  stored = tried & sound

  inverses = tuple(map(renewed, kept, found, by_stack(stored, stacks)))
  cast = lambda new, old: jnp.where(stored, new.astype(old.dtype), old)
  return inverses, Inversions(
    made=before.made + stored,
    failed=before.failed + (tried & ~sound),
    damping=jax.tree.map(cast, used, before.damping),
  )
