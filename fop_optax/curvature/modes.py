"""Products along the modes of one tensor: its second moments, and rotations into bases.

A side is a matrix `[d, d]`, one a mode, or None for the identity.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fop_optax.curvature.precondition import Side, matmul


def along(matrix: jax.Array, tensor: jax.Array, mode: int) -> jax.Array:
  """`matrix` times one mode: of a matrix `M X` for mode 0 and `X M'` for mode 1."""
  if mode == tensor.ndim - 1:
    return matmul(tensor, matrix.T)
  moved = jnp.moveaxis(tensor, mode, 0)
  out = matmul(matrix, moved.reshape(len(moved), -1)).reshape(moved.shape)
  return jnp.moveaxis(out, 0, mode)


def second_moment(tensor: jax.Array, mode: int) -> jax.Array:
  """`U U'` of the unfolding `U` along a mode: of a matrix `X X'` for mode 0, `X' X` for mode 1."""
  unfolded = jnp.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
  return matmul(unfolded, unfolded.T)


def rotate(bases: Sequence[Side], tensor: jax.Array) -> jax.Array:
  """A tensor in bases that stand in the columns: of a matrix `Q_0' X Q_1`."""
  for mode, basis in enumerate(bases):
    if basis is not None:
      tensor = along(basis.T, tensor, mode)
  return tensor


def unrotate(bases: Sequence[Side], tensor: jax.Array) -> jax.Array:
  """The inverse of `rotate`: `Q_0 X Q_1'`."""
  for mode, basis in enumerate(bases):
    if basis is not None:
      tensor = along(basis, tensor, mode)
  return tensor
