"""Running Kronecker factors of one block: an exponential average that starts exact.

The weight of the old average at the t-th statistics folded in is `min(1 - 1/t, decay)` (Martens and
Grosse, 2015, section 5): the plain mean until the decay bites, so the first is taken as it is and
no zero start has to be divided out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.layers import Factors


class Running(NamedTuple):
  """Running factors of a block, or of a stack of them with a leading axis everywhere."""

  factors: Factors
  folds: jax.Array  # int32, shape=(): statistics folded in
  nonfinite: jax.Array  # int32, shape=(): statistics refused because they were not finite


# One block: running, new, whether that is finite, decay.
Fold = Callable[[Running, Factors, jax.Array, jax.Array], Running]


def init_running(shapes: tuple[tuple[int, ...], ...], blocks: int, dtype) -> Running:
  """Running factors of a stack before any statistics."""
  return Running(
    factors=Factors(*(jnp.zeros(shape, dtype) for shape in shapes)),
    folds=jnp.zeros(blocks, jnp.int32),
    nonfinite=jnp.zeros(blocks, jnp.int32),
  )


def fold(running: Running, new: Factors, finite: jax.Array, decay: jax.Array) -> Running:
  """Folds new statistics into a block's factors, unless they are not finite: those are counted."""
  folds = running.folds + finite
  weight = old_weight(folds, decay, new.A.dtype)
  factors = jax.tree.map(
    lambda old, new: jnp.where(finite, weight * old + (1 - weight) * new, old),
    running.factors,
    new,
  )
  return Running(factors, folds, running.nonfinite + ~finite)


def old_weight(folds: jax.Array, decay: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """The weight of the old average when the `folds`-th statistics come."""
  t = jnp.maximum(folds, 1).astype(dtype)
  return jnp.minimum(1 - 1 / t, decay.astype(dtype))
