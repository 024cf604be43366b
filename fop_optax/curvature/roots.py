"""Inverse roots of positive semidefinite matrices: `(A + eps I)^-e`.

- `eigh_root`: by eigenvalues, for any exponent;
- `newton_root`: by a coupled Newton iteration of matrix products (Guo and Higham, 2006), for
  exponents `1 / r`: it needs no eigenvectors, which accelerators are slow to find.

Both are those of Distributed Shampoo, so that its numbers hold. Of a matrix that is not finite, or
for which the iteration does not end, the root is NaN.
"""

import jax
from jax import lax
import jax.numpy as jnp

from fop_optax.curvature.precondition import matmul
from fop_optax.factorizations import eigh

NEWTON_STEPS = 100
NEWTON_TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
ACCEPTED = 0.1  # of `max |M - I|` where the iteration stalls: the root is a rough one


def eigh_root(A: jax.Array, eps: jax.Array, exponent: float) -> jax.Array:
  """`Q l^-e Q'` of `A + eps I = Q l Q'`, with the least eigenvalue raised to eps."""
  values, basis = eigh(A + eps * jnp.eye(len(A), dtype=A.dtype))
  low = values[0]  # they rise
  # rounding may have left eigenvalues below eps, or below zero
  values = jnp.where(low < eps, values - low + eps, values)
  return matmul(basis * values**-exponent, basis.T)


def newton_root(A: jax.Array, eps: jax.Array, root: int) -> jax.Array:
  """`(A + eps I)^(-1/r)` by

      X_0 = z^(1/r) I,   M_0 = z (A + eps I),   z = (r + 1) / (2 |A + eps I|_F)
      T = (1 + 1/r) I - M/r,   X <- X T,   M <- T^r M

  until `M`, which is `X^r (A + eps I)`, is the identity within a tolerance.
  """
  eye = jnp.eye(len(A), dtype=A.dtype)
  A = A + eps * eye
  largest = jnp.max(jnp.abs(A))  # its square may overflow
  z = (root + 1) / (2 * largest * jnp.sqrt(jnp.sum((A / largest) ** 2)))
  tolerance = NEWTON_TOLERANCE[A.dtype.name]
  error = lambda M: jnp.max(jnp.abs(M - eye))

  def unfinished(carry):
    step, _, M = carry
    return (step < NEWTON_STEPS) & (error(M) > tolerance)

  def improve(carry):
    step, X, M = carry
    T = (1 + 1 / root) * eye - M / root
    return step + 1, matmul(X, T), matmul(_power(T, root), M)

  start = jnp.zeros((), jnp.int32), z ** (1 / root) * eye, z * A
  _, X, M = lax.while_loop(unfinished, improve, start)
  return jnp.where(error(M) <= ACCEPTED, X, jnp.nan)


def _power(T: jax.Array, exponent: int) -> jax.Array:
  """`T^exponent` by repeated squaring."""
  if exponent == 1:
    return T
  half = _power(T, exponent // 2)
  square = matmul(half, half)
  return matmul(square, T) if exponent % 2 else square
