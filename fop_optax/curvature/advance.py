"""One step of the curvature: statistics folded into the running factors, inverses remade."""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import Damping, traces
from fop_optax.curvature.eigenvalue_inverse import EigenvalueInverse
from fop_optax.curvature.factors import fold, old_weight
from fop_optax.curvature.inverse import remake
from fop_optax.curvature.scaling import Scaling
from fop_optax.curvature.stacks import Stack, per_stack, stack_factors, stack_squares
from fop_optax.curvature.state import BlockNumbers, CurvatureOptions, CurvatureState, StackState
from fop_optax.curvature.steps import Finite
from fop_optax.layers import Stats
from fop_optax.sharding import Share


class Turn(NamedTuple):
  """What a step has to do."""

  finite: Finite
  refresh: jax.Array  # bool, shape=(): whether there are statistics to fold in
  phase: jax.Array  # int32, shape=(): of the step within the period of inverses
  inverse_period: jax.Array  # int32, shape=()
  decay: jax.typing.ArrayLike
  damping: Damping


def advance(
  state: CurvatureState,
  stacks: Sequence[Stack],
  stats: Stats,
  finite: Finite,
  damping: Damping,
  options: CurvatureOptions,
) -> CurvatureState:
  """One step: folds statistics in if there are some, remakes the inverses that are due.

  A step whose loss or gradient is not `finite` is counted and changes nothing else; the count
  stands still, so that a refresh that fell on it is made up for by the next.
  """
  turn = turn_of(state, stats, finite, damping, options)
  blocks, kept = state.blocks, state.stacks
  if blocks is not None:
    blocks, kept = renew(blocks, kept, stacks, stats, turn, options)
  return counted(state, finite, options)._replace(blocks=blocks, stacks=kept)


def turn_of(
  state: CurvatureState, stats: Stats, finite: Finite, damping: Damping, options: CurvatureOptions
) -> Turn:
  """The turn of the step to come."""
  _, period = options.periods(state.steps.count)
  refresh, phase = stats.refresh & finite.both, state.steps.count % period
  return Turn(finite, refresh, phase, period, options.decay, damping)


def counted(state: CurvatureState, finite: Finite, options: CurvatureOptions) -> CurvatureState:
  """After a step with such a loss and gradient, with the matrices of before."""
  steps = state.steps.counted(finite)
  curvature_period, inverse_period = options.periods(steps.count)
  periods = {"curvature_update_period": curvature_period, "inverse_update_period": inverse_period}
  return state._replace(steps=steps, **periods)


Kept = tuple[BlockNumbers, tuple[StackState, ...]]


def renew(
  blocks: BlockNumbers,
  kept: tuple[StackState, ...],
  stacks: Sequence[Stack],
  stats: Stats,
  turn: Turn,
  options: CurvatureOptions,
  share: Share | None = None,
) -> Kept:
  """Statistics folded in, inverses remade: of all blocks, or of the `share` that one device owns.

  Of a share `kept` has the matrices, and what comes back of `blocks.inversions` is of it alone.
  """
  blocks, kept = _folded(blocks, kept, stacks, stats, turn, options, share)
  due = turn.refresh
  if options.stagger:  # block i has its turn, and those that have no inverse yet
    own = jnp.arange(len(blocks.folds)) % turn.inverse_period
    due = (blocks.waiting | (turn.phase == own)) & turn.finite.both
  elif options.inverse_update_period is not None:
    due = (jnp.any(blocks.waiting) | (turn.phase == 0)) & turn.finite.both
  damping = turn.damping
  if options.fold is fold:  # factors of products have other traces: they go without a floor
    damping = damping._replace(floor=_floor(blocks, stacks))
  return _remade(blocks, kept, due, damping, options.scaling, share)


def _folded(
  blocks: BlockNumbers,
  kept: tuple[StackState, ...],
  stacks: Sequence[Stack],
  stats: Stats,
  turn: Turn,
  options: CurvatureOptions,
  share: Share | None,
) -> Kept:
  """With statistics in the running factors, and in EKFAC's second moments, if there are some."""
  sizes, dtypes = [own.blocks for own in kept], [own.dtype for own in kept]
  # where there was a basis to measure them in
  known = blocks.inversions.made > 0
  mine = (lambda numbers: numbers) if share is None else share.numbers

  def fold_all(folds, nonfinite, trace_A, trace_G, averages, S):
    new, new_S, sound, traces_of = _statistics(stats, stacks, dtypes, S, share)
    folds = folds + sound
    weight = old_weight(folds, jnp.asarray(turn.decay), jnp.result_type(*dtypes))
    blend = lambda old, new: jnp.where(sound, weight * old + (1 - weight) * new, old)
    trace_A, trace_G = map(blend, (trace_A, trace_G), traces_of)
    folded = per_stack(mine((sound, weight)), sizes)
    measured = per_stack(mine((sound & known, weight)), sizes)
    averages = tuple(map(functools.partial(_fold, options.fold), averages, new, folded))
    S = tuple(map(_averaged, S, new_S, measured))
    return folds, nonfinite + ~sound, trace_A, trace_G, averages, S

  inverses = [own.inverse for own in kept]
  S = tuple(own.S if isinstance(own, EigenvalueInverse) else None for own in inverses)
  numbers = blocks.folds, blocks.nonfinite, blocks.trace_A, blocks.trace_G
  *numbers, averages, S = jax.lax.cond(
    turn.refresh,
    fold_all,
    lambda *same: same,
    *(*numbers, tuple(own.factors for own in kept), S),
  )
  folds, nonfinite, trace_A, trace_G = numbers
  blocks = BlockNumbers(blocks.layer, folds, nonfinite, trace_A, trace_G, blocks.inversions)
  rows = zip(kept, averages, map(_with_S, inverses, S), strict=True)
  return blocks, tuple(own._replace(factors=a, inverse=i) for own, a, i in rows)


def _statistics(stats, stacks, dtypes, S, share):
  """Factors and second moments (or None) stack by stack; of all blocks: finite or not, traces."""
  mine = (lambda index, tree: tree) if share is None else share.stack
  found = [
    stack_factors(stack, stats.factors, dtype) for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  new = list(itertools.starmap(mine, enumerate(found)))
  # Of a sum of squares no entry is larger than the diagonal's, or not a number where that is one.
  both = traces([own.A for own in found]), traces([own.G for own in found])
  if S[0] is None:
    return new, S, jnp.all(jnp.isfinite(jnp.stack(both)), axis=0), both
  squares = [
    stack_squares(stack, stats.second_moments, dtype)
    for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  tell = *both, jnp.concatenate([gap for _, gap in squares])
  squares_of = [mine(index, own) for index, (own, _) in enumerate(squares)]
  return new, squares_of, jnp.all(jnp.isfinite(jnp.stack(tell)), axis=0), both


def _fold(function, average, new, numbers):
  """In the dtype of the arithmetic; what is held keeps its own."""
  finite, weight = numbers
  like = lambda tree, other: jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)
  wide = jax.vmap(function)(like(average, new), new, finite, weight.astype(new.A.dtype))
  return like(wide, average)


def _averaged(old, new, numbers):
  if old is None:
    return None
  measured, weight = (x[:, None, None] for x in numbers)
  weight = weight.astype(old.dtype)
  return jnp.where(measured, weight * old + (1 - weight) * new, old)


def _with_S(inverse, S):
  return inverse if S is None else inverse._replace(S=S)


def _floor(blocks: BlockNumbers, stacks: Sequence[Stack]) -> jax.Array | None:
  """What damping takes each block's mean eigenvalue to be at least: the mean over its layer.

  An expert that one row of a batch comes to has next to no curvature, and would have as little
  damping. None where each layer is one block.
  """
  if all(stack.blocks <= max(len(stack.layers), 1) for stack in stacks):
    return None
  dims = [math.prod(stack.dims) for stack in stacks for _ in range(stack.blocks)]
  mean = blocks.trace_A * blocks.trace_G / jnp.asarray(dims, blocks.trace_A.dtype)
  own = blocks.layer[:, None] == blocks.layer
  count = jnp.sum(own, axis=1)
  # no product of matrices: a mean that overflows would be NaN in other layers' sums
  return jnp.where(count > 1, jnp.sum(jnp.where(own, mean, 0), axis=1) / count, 0)


def _remade(
  blocks: BlockNumbers,
  kept: tuple[StackState, ...],
  due: jax.Array,
  damping: Damping,
  scaling: Scaling,
  share: Share | None,
) -> Kept:
  """With the inverses that are `due`: one for all, or one a block."""
  factors = [own.running for own in kept]
  known, before = blocks.folds > 0, blocks.inversions
  if share is not None:
    due, known, before, floor = share.numbers((due, known, before, damping.floor))
    damping = damping._replace(floor=floor)
    due = due if share.filled is None else due & share.filled
  each = due if due.ndim else None
  inverses, inversions = jax.lax.cond(
    jnp.any(due),
    lambda old, before: remake(old, before, factors, known, damping, scaling, each),
    lambda *same: same,
    *(tuple(own.inverse for own in kept), before),
  )
  blocks = blocks._replace(inversions=inversions)
  return blocks, tuple(
    own._replace(inverse=inverse) for own, inverse in zip(kept, inverses, strict=True)
  )
