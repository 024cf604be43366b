"""What a scaling, a way to make and use damped inverses, consists of, and what all of them share.

Factors of one side, or nearly, are inverted together, whether `A` or `G` and of whichever stack,
and numbers of all blocks are worked out as one vector: XLA compiles each operation once for each
shape that it has.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import Size, resolution_of, traces
from fop_optax.curvature.precondition import multiply, norm
from fop_optax.curvature.stacks import by_block, by_shape, padded, per_stack
from fop_optax.layers import Factors


class SplitDamping(NamedTuple):
  """Damping of the factors of each block, when its inverse was made."""

  damping_A: jax.Array  # shape=(blocks,): pi sqrt(lambda), or its rounding
  damping_G: jax.Array  # shape=(blocks,): sqrt(lambda) / pi
  added_A: jax.Array  # shape=(blocks,): what of it was added because less would be rounding
  added_G: jax.Array  # shape=(blocks,)


class WholeDamping(NamedTuple):
  """Damping of each block, when its inverse was made."""

  damping: jax.Array  # shape=(blocks,): lambda, or its rounding
  added: jax.Array  # shape=(blocks,): what of it was added because less would be rounding


UsedDamping = SplitDamping | WholeDamping


class Scaling(NamedTuple):
  """How one kind of inverse is made, for all stacks, and used, for one block."""

  empty: Callable[[Factors], Any]  # factors of a block -> an inverse that takes all to zero
  damping: type[UsedDamping]  # what is told of the damping
  # Factors of each stack, damping, which blocks are due (None: all), inverses so far, how many of
  # each block -> inverses of each stack; of all blocks their damping, and whether they are sound.
  invert: Callable[..., tuple[list[Any], UsedDamping, jax.Array]]
  solve: Callable[[Any, Any, jax.Array], jax.Array]  # inverse, its damping, V -> M^-1 V
  damped: Callable[[Any, Any, Factors, jax.Array], jax.Array]  # inverse, its damping, .., V -> M V
  fisher: Callable[[Any, Factors, jax.Array], jax.Array]  # V -> F V
  norm: Callable[[Any, Factors], jax.Array]  # |F|_F
  squares: bool = False  # whether its inverses have an `S`


def sizes(stacks: Sequence[Factors]) -> tuple[Size, Size]:
  """Sizes of `A` and of `G` of all blocks, stack after stack."""
  of_A, of_G = [f.A for f in stacks], [f.G for f in stacks]
  factors = [*of_A, *of_G]
  trace = jnp.concatenate([traces(of_A), traces(of_G)])
  unit = jnp.where(trace > 0, trace, 1)  # no entry is larger: no square overflows
  squares = by_shape(
    jax.vmap(lambda f, unit: jnp.sum((f / unit.astype(f.dtype)) ** 2)),
    padded(factors),
    per_stack(unit, list(map(len, factors))),
  )
  constant = lambda number: jnp.concatenate(
    [jnp.full(len(f), number(f), trace.dtype) for f in factors]
  )
  both = Size(
    trace=trace,
    norm=unit * jnp.sqrt(jnp.concatenate(squares)),
    dim=constant(lambda f: f.shape[1]),
    resolution=constant(lambda f: resolution_of(f.shape[1:], f.dtype)),
  )
  blocks = len(trace) // 2
  return Size(*(x[:blocks] for x in both)), Size(*(x[blocks:] for x in both))


def each_side(function, stacks, dampings, due, pad=False):
  """`function(factor, dim, damping)` of both factors of each block that is due, stack by stack."""
  of_both = lambda A, G: _sides(by_stack(A, stacks), by_stack(G, stacks))
  factors = _sides([f.A for f in stacks], [f.G for f in stacks])
  dims = [jnp.full(len(f), f.shape[1], jnp.int32) for f in factors]
  columns = [padded(factors) if pad else factors, dims, of_both(*dampings)]
  if due is not None:
    columns.append(of_both(due, due))
  found = by_shape(
    lambda factor, dim, damping, due=None: each(function, due, factor, dim, damping), *columns
  )
  return found[::2], found[1::2]


def _sides(A: Sequence[Any], G: Sequence[Any]) -> list[Any]:
  return [side for pair in zip(A, G, strict=True) for side in pair]


def each(function, due, *columns):
  """`function` of each block, along the leading axes; zeros for those that are not due."""
  shapes = jax.eval_shape(jax.vmap(function), *columns)
  nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), shapes)
  return by_block(function, nothing, *columns, due=due)


def by_stack(flat: Any, stacks: Sequence[Factors]) -> list[Any]:
  """Numbers of all blocks (or None), stack by stack."""
  return per_stack(flat, [len(factors.A) for factors in stacks])


def kronecker_fisher(inverse, factors, V):
  """`F V` for `F = A (x) G`, whatever the inverse."""
  del inverse
  return multiply(factors, V)


def kronecker_norm(inverse, factors):
  """`|F|_F` of it."""
  del inverse
  return norm(factors)
