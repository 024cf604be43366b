"""Products of Kronecker factors with one block's gradient: two matrix products each.

A side is a matrix `[d, d]`, a diagonal `[d]`, or None for the identity. Products are in full
precision: on accelerators the default rounds float32 operands to fewer bits, which the inverse of
an ill-conditioned factor multiplies.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from fop_optax.layers import Factors

Side = jax.Array | None

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def sandwich(left: Side, V: jax.Array, right: Side) -> jax.Array:
  """`left V right` for `V` of shape `[rows, outputs]`."""
  if left is not None:
    V = matmul(left, V) if left.ndim == 2 else left[:, None] * V
  if right is not None:
    V = matmul(V, right) if right.ndim == 2 else V * right
  return V


def multiply(factors: Factors, V: jax.Array) -> jax.Array:
  """`F V = A V G`."""
  return sandwich(factors.A, V, factors.G)


def in_basis(
  A: Side, G: Side, function: Callable[[jax.Array], jax.Array], V: jax.Array
) -> jax.Array:
  """`A f(A' V G) G'`, a function of entries in the bases `A` and `G`."""
  return sandwich(A, function(sandwich(transposed(A), V, G)), transposed(G))


def transposed(side: Side) -> Side:
  return None if side is None else side.T


def norm(factors: Factors) -> jax.Array:
  """`|A|_F |G|_F`, a bound of the norm of `F`."""
  return jnp.sqrt(jnp.sum(factors.A**2)) * jnp.sqrt(jnp.sum(factors.G**2))
