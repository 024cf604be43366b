"""Running Kronecker factors of one block: an exponential average that starts exact.

The weight of the old average at the t-th statistics folded in is `min(1 - 1/t, decay)` (Martens and
Grosse, 2015, section 5): the plain mean until the decay bites, so the first is taken as it is and
no zero start has to be divided out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fop_optax.layers import Factors

# One block: the old average, new statistics, whether those are finite, the weight of the old.
Fold = Callable[[Factors, Factors, jax.Array, jax.Array], Factors]


def fold(average: Factors, new: Factors, finite: jax.Array, weight: jax.Array) -> Factors:
  """Folds new statistics into a block's running factors, unless they are not finite."""
  return jax.tree.map(
    lambda old, new: jnp.where(finite, weight * old + (1 - weight) * new, old), average, new
  )


def old_weight(folds: jax.Array, decay: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """The weight of the old average when the `folds`-th statistics come."""
  t = jnp.maximum(folds, 1).astype(dtype)
  return jnp.minimum(1 - 1 / t, decay.astype(dtype))
