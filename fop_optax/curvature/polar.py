"""Polar factors of stacks of matrices: of `X = U S V'` what is left with singular values of one.

By the Newton-Schulz iteration, matrix products alone: from `X <- X / |X|_F` each step

    X <- a X + (b A + c A^2) X          with A = X X'

takes every singular value s to `a s + b s^3 + c s^5`. Muon's coefficients (Jordan et al., 2024)
bring them between 0.7 and 1.2 in five steps, and never closer; (15/8, -10/8, 3/8) converge to one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax.curvature.precondition import matmul
from fop_optax.curvature.stacks import by_shape
from fop_optax.factorizations import svd

Polar = Callable[[jax.Array], jax.Array]
Triple = tuple[float, float, float]


def polar_factors(polar: Polar, stacks: Sequence[jax.Array]) -> list[jax.Array]:
  """`polar` of stacks `[blocks, rows, columns]`, in which no matrix has more rows than columns.

  Those of equal shape, or of the transposed one, go side by side through one call.
  """
  tall = [X.shape[1] > X.shape[2] for X in stacks]
  turned = lambda stacks: [
    jnp.matrix_transpose(X) if turn else X for X, turn in zip(stacks, tall, strict=True)
  ]
  return turned(by_shape(polar, turned(stacks)))


def newton_schulz(X: jax.Array, coefficients: Sequence[Triple], dtype: Any = None) -> jax.Array:
  """One step for each of the coefficients, in `dtype` (None: that of `X`)."""
  out = unit(X).astype(dtype or X.dtype)
  for a, b, c in coefficients:
    A = matmul(out, jnp.matrix_transpose(out))
    out = a * out + matmul(b * A + c * matmul(A, A), out)
  return out.astype(X.dtype)


def exact_polar(X: jax.Array) -> jax.Array:
  """`U V'` of a singular value decomposition, without singular values that are rounding."""
  U, s, Vt = jax.vmap(svd)(unit(X))
  rounding = max(X.shape[1:]) * jnp.finfo(X.dtype).eps * jnp.max(s, axis=1, keepdims=True)
  return matmul(jnp.where((s > rounding)[:, None], U, 0), Vt)


def unit(stack: jax.Array) -> jax.Array:
  """Each block over its Frobenius norm; zeros stay zeros."""
  stack = over_largest(stack)
  return over(stack, jnp.sqrt(jnp.sum(stack**2, axis=inner_axes(stack), keepdims=True)))


def over_largest(stack: jax.Array) -> jax.Array:
  """Each block over its largest entry, so that squares neither overflow nor vanish."""
  return over(stack, jnp.max(jnp.abs(stack), axis=inner_axes(stack), keepdims=True))


def over(stack: jax.Array, size: jax.Array) -> jax.Array:
  """`stack / size`, where that is zero the zeros themselves."""
  return stack / jnp.where(size > 0, size, 1)


def inner_axes(stack: jax.Array) -> tuple[int, ...]:
  """All axes but that of the blocks."""
  return tuple(range(1, stack.ndim))
