"""Grafting: the length of one optimizer's step under the direction of another.

The grafted optimizer divides the momentum `h` by the root of a second moment of its own,

    v = b2 v + (1 - b2) g^2        step = h / (sqrt(v / (1 - b2^t)) + eps)

of which each kind has its numbers and "sgd" none: there the step is `h`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fop_optax.optimizers import checks
from fop_optax.optimizers.common import Scalar

# kind -> b2 (1: a sum), eps, whether the second moment is corrected for its start
KINDS = {
  "sgd": (None, None, False),
  "adagrad": (1.0, 1e-10, False),
  "rmsprop": (0.99, 1e-10, False),
  "adam": (0.999, 1e-10, True),
}


@dataclasses.dataclass(frozen=True)
class Graft:
  """A grafted optimizer; `kind` is None where there is none, `b2` where it keeps nothing."""

  kind: str | None
  b2: Scalar | None
  eps: Scalar | None
  correct_bias: bool

  def step(
    self, t: jax.Array, v: jax.Array | None, gradient: jax.Array, momentum: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Its step t, and its second moment after it."""
    if v is None or self.b2 is None:
      return momentum, v
    b2, eps = (jnp.asarray(x, v.dtype) for x in (self.b2, self.eps))
    v = folded(v, gradient**2, b2)
    return momentum / (jnp.sqrt(v / correction(b2, t, self.correct_bias)) + eps), v


def grafted(kind: str | None, b2: Scalar | None, eps: Scalar | None) -> Graft:
  """The optimizer of a name, with what is given in place of its own numbers."""
  if kind is None:
    return Graft(None, None, None, False)
  checks.one_of("grafting", kind, tuple(KINDS))
  checks.check("graft_b2", b2, lambda x: 0 < x <= 1, "above 0 and at most 1")
  checks.check("graft_eps", eps, lambda x: x >= 0, "at least 0")
  own_b2, own_eps, correct_bias = KINDS[kind]
  if own_b2 is None:
    return Graft(kind, None, None, False)
  return Graft(kind, own_b2 if b2 is None else b2, own_eps if eps is None else eps, correct_bias)


def folded(old: jax.Array, new: jax.Array, decay: jax.Array) -> jax.Array:
  """An exponential average after a new term; with a decay of one a sum."""
  return decay * old + jnp.where(decay == 1, 1, 1 - decay) * new


def correction(decay: jax.Array, t: jax.Array, correct: bool) -> jax.Array:
  """The weight that an average from zero has gathered after t steps; 1 for a sum."""
  return jnp.where(decay < 1, 1 - decay**t, 1) if correct else jnp.ones_like(decay)
