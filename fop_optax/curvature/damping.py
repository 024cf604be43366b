"""Damping `F + lambda I`: its size, its shares in two Kronecker factors, how small it may be."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Size(NamedTuple):
  """How large a factor is; of one, or of many along an axis."""

  trace: jax.Array
  norm: jax.Array  # Frobenius
  dim: jax.Array
  resolution: jax.Array  # 4 eps, or 0 of a diagonal

  @property
  def mean(self) -> jax.Array:
    """The mean eigenvalue."""
    return self.trace / self.dim

  @property
  def rounding(self) -> jax.Array:
    """The size of the rounding errors in the factor's small eigenvalues: `4 eps tr(factor)`.

    Both Cholesky (whose backward error is `sqrt(factor_ii factor_jj)` times some eps, entry by
    entry) and `eigh` stay below it; with as much damping singular factors of side 8 to 1,500 gave
    the direction to 4 %, with a quarter to 18 %, with a sixteenth Cholesky failed. A diagonal is
    inverted entry by entry: its rounding is relative, and this zero.
    """
    return self.resolution * self.trace


def size(factor: jax.Array) -> Size:
  """The size of one factor `[d, d]`, or of a diagonal one `[d]`."""
  trace = trace_of(factor)
  unit = jnp.where(trace > 0, trace, 1)  # no entry is larger: no square overflows
  norm = unit * jnp.sqrt(jnp.sum((factor / unit) ** 2))
  constant = lambda x: jnp.asarray(x, factor.dtype)
  resolution = resolution_of(factor.shape, factor.dtype)
  return Size(trace, norm, constant(len(factor)), constant(resolution))


def resolution_of(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> float:
  """`4 eps` of a matrix of this shape, 0 of a diagonal."""
  return 0.0 if len(shape) == 1 or shape[0] == 1 else 4 * float(jnp.finfo(dtype).eps)


def trace_of(factor: jax.Array) -> jax.Array:
  """The trace of a matrix, of which only the diagonal is read, or of a diagonal."""
  return jnp.sum(factor if factor.ndim == 1 else factor.reshape(-1)[:: len(factor) + 1])


def traces(stacks: Sequence[jax.Array]) -> jax.Array:
  """The traces of all factors of several stacks `[n, d, d]` or `[n, d]`, as one vector."""
  widest = max([x.shape[1] for x in stacks if x.ndim == 3], default=1)

  def diagonals(x):
    if x.ndim == 2:
      x = jnp.sum(x, axis=1, keepdims=True)
    else:
      x = x.reshape(len(x), -1)[:, :: x.shape[1] + 1]
    return jnp.pad(x, [(0, 0), (0, widest - x.shape[1])])

  return jnp.sum(jnp.concatenate(list(map(diagonals, stacks))), axis=1)


class Damping(NamedTuple):
  r"""Damping of each block, in units of the loss and in units of the block.

  .. math::
    \lambda = \mathrm{absolute} + \mathrm{relative} \,
      \frac{\mathrm{tr} A}{\dim A} \frac{\mathrm{tr} G}{\dim G}

  What `relative` is multiplied by is the mean eigenvalue of `A (x) G`, or `floor` where that is
  more.
  """

  absolute: jax.Array  # shape=()
  relative: jax.Array  # shape=()
  floor: jax.Array | None = None  # shape=(blocks,)

  def of(self, A: Size, G: Size) -> jax.Array:
    """Lambda, in the dtype of the factors."""
    return self.at(A.mean * G.mean)

  def at(self, mean: jax.Array) -> jax.Array:
    """Lambda for blocks of this mean eigenvalue, in its dtype."""
    absolute, relative = (x.astype(mean.dtype) for x in self[:2])
    if self.floor is not None:
      mean = jnp.maximum(mean, self.floor.astype(mean.dtype))
    return absolute + relative * mean


def split_damping(A: Size, G: Size, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
  r"""Damping of `A` and of `G`, split by their mean traces.

  .. math::
    \pi = \sqrt{\frac{\mathrm{tr} A / \dim A}{\mathrm{tr} G / \dim G}}, \qquad
    (A + \pi \sqrt\lambda I) \otimes (G + \sqrt\lambda / \pi\, I)

  The choice of pi that makes the error `pi sqrt(lambda) I (x) G + A (x) sqrt(lambda) / pi I`
  smallest in trace norm (Martens and Grosse, 2015, section 6.3). Where a trace is zero, pi is 1:
  the block is then damped by lambda, as in `F + lambda I` (ASDL gives lambda to each factor there,
  and so lambda squared to the block).
  """
  pi = jnp.sqrt(A.mean / G.mean)
  pi = jnp.where(jnp.isfinite(pi) & (pi > 0), pi, 1)
  root = jnp.sqrt(damping)
  return pi * root, root / pi


def block_rounding(A: Size, G: Size, norm: jax.Array | None = None) -> jax.Array:
  """The size of rounding errors in the small eigenvalues of `F`: `4 eps |F|_F`.

  A gradient is not known better either: divided by less, its rounding would be the direction. The
  `norm` of `F` is `|A|_F |G|_F` unless it is given.
  """
  return jnp.maximum(A.resolution, G.resolution) * (A.norm * G.norm if norm is None else norm)


def add_damping(factor: jax.Array, damping: jax.Array) -> jax.Array:
  """`factor + damping I`, for a matrix or for its diagonal."""
  return factor + damping * (jnp.eye(len(factor), dtype=factor.dtype) if factor.ndim == 2 else 1)
