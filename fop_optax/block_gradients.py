"""Gradients of many blocks with their metric, and the arithmetic of `fop_optax.projection` on them.

Numbers of blocks are one vector over all blocks, those of one stack after those of another, however
many stacks there are: the program has each operation once, and compiles quickly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax.moments import SMALL

Product = Callable[[jax.Array], jax.Array]


class Gradients(NamedTuple):
  """Gradients of blocks of one shape, along the leading axis of every array, and their metric."""

  average: jax.Array  # [blocks, ...]
  contrasts: jax.Array  # [blocks, k, ...]
  solve: Product  # V -> M^-1 V of all blocks: [blocks, ...]
  multiply: Product | None
  fisher_norm: jax.typing.ArrayLike  # shape=(blocks,), or a number
  resolution: jax.typing.ArrayLike | None = None

  @property
  def dtype(self) -> Any:
    return jnp.promote_types(self.average.dtype, jnp.float32)


def joining(stacks):
  """How numbers of each stack become vectors over all blocks, and those parts of them again."""
  dtype = jnp.result_type(*(own.dtype for own in stacks))
  ends = np.cumsum([len(own.average) for own in stacks])
  starts = [0, *ends[:-1]]

  def join(numbers):
    if len(numbers) == 1:
      return numbers[0]
    return [
      jnp.concatenate([x.astype(dtype) for x in column]) for column in zip(*numbers, strict=True)
    ]

  def split(x):
    pieces = zip(stacks, starts, ends, strict=True)
    return [x[start:end].astype(own.dtype) for own, start, end in pieces]

  return join, split


def of_each(function, leads, *columns):
  """`function` of the arrays of each stack, of which zeros behind so many leading axes add nothing.

  Small ones go side by side: XLA compiles sums over each shape that is small, and those over large
  ones are library calls.
  """
  rows = list(zip(*columns, strict=True))
  small = [k for k, (first, *_) in enumerate(rows) if first.size <= SMALL]
  if len(small) < 2 or len({first.dtype for first, *_ in rows}) > 1:
    return [function(*row) for row in rows]
  width = max(rows[k][0][0].size for k in small)

  def beside(arrays, lead):
    flat = [x.reshape(*x.shape[:lead], -1) for x in arrays]
    edges = [[(0, 0)] * lead + [(0, width - x.shape[-1])] for x in flat]
    return jnp.concatenate(list(map(jnp.pad, flat, edges)))

  columns = [[rows[k][i] for k in small] for i in range(len(leads))]
  found, start, out = function(*map(beside, columns, leads)), 0, {}
  for k in small:
    stop = start + len(rows[k][0])
    out[k] = tuple(x[start:stop] for x in found)
    start = stop
  return [out[k] if k in out else function(*row) for k, row in enumerate(rows)]


class Constants(NamedTuple):
  """For each block, or one for all: numbers that do not depend on gradients."""

  eps: jax.typing.ArrayLike  # of the arithmetic
  tiny: jax.typing.ArrayLike  # what is rounding of the gradients
  limit: jax.typing.ArrayLike  # of the exponent of a scale
  norm: jax.typing.ArrayLike  # of F


def constants_of(stacks: Sequence[Gradients]) -> Constants:
  """As Python numbers where those of all stacks are one."""

  def each(number):
    values = [number(own) for own in stacks]
    if all(isinstance(x, float | int) for x in values) and len(set(values)) == 1:
      return values[0]
    return jnp.concatenate(
      [jnp.broadcast_to(x, len(own.average)) for x, own in zip(values, stacks, strict=True)]
    )

  eps = lambda own: float(jnp.finfo(own.dtype).eps)
  fine = lambda own: float(jnp.finfo(own.average.dtype).eps)
  spacing = lambda own: fine(own) if own.resolution is None else own.resolution

  def tiny(own):
    rounding = spacing(own)
    larger = max if isinstance(rounding, float) else jnp.maximum
    return larger(1e3 * eps(own), 4 * rounding)

  # neither a scale nor its reciprocal may underflow
  limit = lambda own: int(-1 - jnp.finfo(own.dtype).minexp)
  return Constants(each(eps), each(tiny), each(limit), each(lambda own: own.fisher_norm))


def power_of_two(largest, limit):
  """The nearest one; 1 for zero and for what is not finite."""
  known = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  nearest = jax.lax.reduce_precision(known, jnp.finfo(known.dtype).nexp, 0)
  return jnp.clip(nearest, 2.0**-limit, 2.0**limit)


def largest_entries(x):
  """The largest absolute entry of each block."""
  return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)


def dot(x, y, lead=1):
  """Inner products along all but so many leading axes."""
  return jnp.sum(x * y, axis=tuple(range(lead, x.ndim)))


def along(numbers, x):
  """Numbers of the leading axes of `x`, with axes of one entry behind them."""
  return numbers.reshape(*numbers.shape, *[1] * (x.ndim - numbers.ndim))
