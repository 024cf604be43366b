"""Damping `F + lambda I`: its size, its shares in two Kronecker factors, how small it may be."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.layers import Factors


class Damping(NamedTuple):
  r"""Damping of each block, in units of the loss and in units of the block.

  .. math::
    \lambda = \mathrm{absolute} + \mathrm{relative} \,
      \frac{\mathrm{tr} A}{\dim A} \frac{\mathrm{tr} G}{\dim G}

  What `relative` is multiplied by is the mean eigenvalue of `A (x) G`.
  """

  absolute: jax.Array  # shape=()
  relative: jax.Array  # shape=()

  def of(self, factors: Factors) -> jax.Array:
    """Lambda of one block, in the dtype of its factors."""
    absolute, relative = (x.astype(factors.A.dtype) for x in self)
    return absolute + relative * _mean_diagonal(factors.A) * _mean_diagonal(factors.G)


def split_damping(factors: Factors, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
  r"""Damping of `A` and of `G`, one block, split by their mean traces.

  .. math::
    \pi = \sqrt{\frac{\mathrm{tr} A / \dim A}{\mathrm{tr} G / \dim G}}, \qquad
    (A + \pi \sqrt\lambda I) \otimes (G + \sqrt\lambda / \pi\, I)

  The choice of pi that makes the error `pi sqrt(lambda) I (x) G + A (x) sqrt(lambda) / pi I`
  smallest in trace norm (Martens and Grosse, 2015, section 6.3). Where a trace is zero, pi is 1:
  the block is then damped by lambda, as in `F + lambda I` (ASDL gives lambda to each factor there,
  and so lambda squared to the block).
  """
  pi = jnp.sqrt(_mean_diagonal(factors.A) / _mean_diagonal(factors.G))
  pi = jnp.where(jnp.isfinite(pi) & (pi > 0), pi, 1)
  root = jnp.sqrt(damping)
  return pi * root, root / pi


def rounding(factor: jax.Array) -> jax.Array:
  """The size of the rounding errors in a factor's small eigenvalues: `4 eps tr(factor)`.

  Both Cholesky (whose backward error is `sqrt(factor_ii factor_jj)` times some eps, entry by entry)
  and `eigh` stay below it; with as much damping singular factors of side 8 to 1,500 gave the
  direction to 4 %, with a quarter to 18 %, with a sixteenth Cholesky failed. A diagonal is
  inverted entry by entry: its rounding is relative, and this zero.
  """
  if factor.ndim == 1 or len(factor) == 1:
    return jnp.zeros((), factor.dtype)
  return 4 * jnp.finfo(factor.dtype).eps * jnp.trace(factor)


def block_rounding(factors: Factors) -> jax.Array:
  """The size of rounding errors in the small eigenvalues of `F`: `4 eps |A|_F |G|_F`.

  A gradient is not known better either: divided by less, its rounding would be the direction.
  """
  if all(factor.ndim == 1 or len(factor) == 1 for factor in factors):
    return jnp.zeros((), factors.A.dtype)
  return 4 * jnp.finfo(factors.A.dtype).eps * _norm(factors.A) * _norm(factors.G)


def _norm(factor):
  trace = jnp.trace(factor) if factor.ndim == 2 else jnp.sum(factor)
  trace = jnp.where(trace > 0, trace, 1)  # no entry is larger: no square overflows
  return trace * jnp.sqrt(jnp.sum((factor / trace) ** 2))


def add_damping(factor: jax.Array, damping: jax.Array) -> jax.Array:
  """`factor + damping I`, for a matrix or for its diagonal."""
  return factor + damping * (jnp.eye(len(factor), dtype=factor.dtype) if factor.ndim == 2 else 1)


def _mean_diagonal(factor):
  return jnp.mean(jnp.diagonal(factor) if factor.ndim == 2 else factor)
