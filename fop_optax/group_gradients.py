"""What is made of the gradients of groups of examples: their mean, contrasts, a tree of these."""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np


def mean(arrays: Sequence[jax.Array]) -> jax.Array:
  """The mean of some arrays, summed in float32 or better."""
  total = functools.reduce(jnp.add, map(wide, arrays))
  return (total / len(arrays)).astype(arrays[0].dtype)


def contrasts(arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """`c_i = sqrt(2) sum_j H_ij g_j`, `H` the Helmert matrix: two groups give `g_1 - g_2`."""
  group, out = list(map(wide, arrays)), []
  for i in range(1, len(group)):  # row i of H: the mean of the first i less the next, normalised
    difference = sum(group[:i]) / i - group[i]
    out.append((difference * np.sqrt(2 * i / (i + 1))).astype(arrays[0].dtype))
  return out


def wide(array: jax.Array) -> jax.Array:
  """`array` in float32, or in its own better (or complex) precision."""
  # promote_types refuses 8-bit floats
  return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array


def tree_of(groups: int) -> list[np.ndarray]:
  """For each level of a binary tree its contrasts out of `contrasts`, `[2^level, k]`.

  The groups are halved level by level; a contrast is the difference of the means of two halves, of
  the length of the others: `sqrt(2) W g` with the Haar matrix `W`, where `contrasts` has Helmert's
  `H`, and `W g = W H' (H g)` as both have orthonormal rows that sum to zero.
  """
  if groups & (groups - 1):
    raise ValueError(f"A binary tree of contrasts takes 2, 4, 8, ... groups, not {groups}.")
  helmert = np.stack(contrasts(list(np.eye(groups))))  # sqrt(2) H
  levels, width = [], groups
  while width > 1:
    signs = np.kron(np.eye(groups // width), np.repeat([1.0, -1.0], width // 2))
    haar = signs * (2 / width) ** 0.5  # rows of sqrt(2) W
    levels.append(haar @ helmert.T / 2)
    width //= 2
  return levels
