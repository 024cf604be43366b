"""Factorisations of one matrix, whose `vmap` is a loop on CPU.

There jaxlib deals a batch of them to XLA's threads and waits for all on one of the threads; as many
batches at a time as there are threads wait for each other for ever (two stacks of layers on two
cores). Elsewhere batches are what the hardware is for.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` of one matrix, or of several: on CPU it sees no batch but where differentiated."""

  @functools.wraps(function)
  def one(*matrices):
    if jax.default_backend() != "cpu":
      return function(*matrices)
    # A loop by `vmap` has no derivative of its own.
    turn = jax.custom_jvp(jax.custom_batching.sequential_vmap(function))
    turn.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return turn(*matrices)

  return one


@in_turn
def cholesky(matrix: jax.Array) -> jax.Array:
  """The lower factor of a symmetric matrix, of which the upper triangle is read.

  What stands above the diagonal is no part of it.
  """
  # The transpose, as it is symmetric: LAPACK wants columns first, so that nothing is copied.
  return lax.linalg.cholesky_p.bind(matrix.T)


@in_turn
def solve_lower(lower: jax.Array, right: jax.Array) -> jax.Array:
  """`L^-1 B`."""
  return lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)


@in_turn
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues, rising, and eigenvectors in the columns."""
  values, vectors = jnp.linalg.eigh(matrix)
  return values, vectors


@in_turn
def eigvalsh(matrix: jax.Array) -> jax.Array:
  """Eigenvalues, rising."""
  return jnp.linalg.eigvalsh(matrix)


@in_turn
def orthonormal(matrix: jax.Array) -> jax.Array:
  """`Q` of `Q R = matrix`."""
  return jnp.linalg.qr(matrix)[0]


@in_turn
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`U`, the singular values and `V'`, as many of each as the shorter side is long."""
  U, s, Vt = jnp.linalg.svd(matrix, full_matrices=False)
  return U, s, Vt
