"""The damped empirical Fisher itself, through the Gram matrix of per-example gradients.

With the gradients of `B` examples, all parameters of each side by side, as the rows of `X`,

    F = X' X / B  [parameters, parameters]          K = X X' / B = U diag(S) U'  [B, B]

A mean of gradients, or a contrast, is `X' w` with weights `w`, and (Woodbury)

    (F + lambda I)^-1 X' w = X' (K + lambda I)^-1 w

so that nothing larger than `K` is formed. In the orthonormal basis `X' U (B S)^-1/2` of the span
of the gradients, `X' w` has the coordinates `y = sqrt(B S) U' w`, and `F` is `diag(S)`: inner
products in any of the metrics are sums over the coordinates. Directions are formed from the
weights, where no small `S` divides.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax import moments
from fop_optax.curvature.damping import Damping
from fop_optax.curvature.precondition import matmul
from fop_optax.factorizations import eigh


class Gram(NamedTuple):
  """Eigenvectors and eigenvalues of `K`."""

  U: jax.Array  # [B, B]
  S: jax.Array  # [B], at least 0
  finite: jax.Array  # bool, shape=(): whether all gradients are finite, and their squares

  def damping(self, damping: Damping, parameters: int) -> jax.Array:
    """Lambda; the mean eigenvalue of `F` is `sum S` over the number of parameters."""
    absolute, relative = (x.astype(self.S.dtype) for x in damping[:2])
    return absolute + relative * jnp.sum(self.S) / parameters


def gram(gradients: Sequence[jax.Array], dtype: jax.typing.DTypeLike) -> Gram:
  """`K` of per-example gradients, leaves `[B, ...]`; of zeros if it is not finite."""
  batch = len(gradients[0])
  K = jnp.zeros((batch, batch), dtype)
  for leaf in gradients:
    roles = moments.Roles(rows=tuple(range(1, leaf.ndim)), stack=(), features=(0,))
    K += moments.second_moment(leaf, roles, False, dtype)[0] / batch
  finite = jnp.all(jnp.isfinite(K))
  S, U = eigh(jnp.where(finite, K, 0))
  return Gram(U, jnp.maximum(S, 0), finite)


def coordinates(of: Gram, weights: jax.Array) -> jax.Array:
  """`sqrt(B S) U' w` for weights `[..., B]`."""
  return jnp.sqrt(len(of.S) * of.S) * matmul(weights, of.U)


def divide(of: Gram, y: jax.Array, damping: jax.Array) -> jax.Array:
  """`(S + lambda)^-1 y`; zero where `S + lambda` is rounding next to the largest `S`.

  That takes a damping as small; at lambda = 0 the result is the shortest of the solutions.
  """
  damped = of.S + damping
  floor = len(of.S) * jnp.finfo(of.S.dtype).eps * jnp.max(of.S)
  return jnp.where(damped > floor, y / jnp.where(damped > floor, damped, 1), 0)


def solve_weights(of: Gram, weights: jax.Array, damping: jax.Array) -> jax.Array:
  """`(K + lambda I)^-1 w`."""
  return matmul(of.U, divide(of, matmul(weights, of.U), damping))


def combine(gradient: jax.Array, weights: jax.Array) -> jax.Array:
  """One leaf of `X' w`, in the dtype of the weights."""
  return jax.lax.dot_general(
    weights,
    gradient.astype(weights.dtype),
    (((0,), (0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    out_sharding=moments.replicated(gradient),
  )
