"""The curvature state of an optimizer, and one step of it."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import Damping
from fop_optax.curvature.factors import Fold, old_weight
from fop_optax.curvature.inverse import (
  EigenvalueInverse,
  Inverse,
  Inversions,
  Scaling,
  UsedDamping,
  init_inversions,
  remake,
)
from fop_optax.curvature.stacks import (
  Stack,
  dtype_of,
  per_stack,
  stack_factors,
  stack_squares,
)
from fop_optax.curvature.steps import Finite, Period, Steps, no_steps, whole_period
from fop_optax.layers import Factors, Layers, Stats


class StackState(NamedTuple):
  """Matrices of one stack of blocks; every array has the blocks as its leading axis."""

  factors: Factors  # running averages
  inverse: Inverse

  @property
  def dtype(self):
    return self.factors.A.dtype

  @property
  def blocks(self) -> int:
    return len(self.factors.A)


class BlockNumbers(NamedTuple):
  """Numbers of all blocks, those of one stack after those of another.

  As one vector they are one operation, however many stacks there are: programs of many small ones
  take long to compile.
  """

  layer: jax.Array  # int32, shape=(blocks,): the layer of each block, -1 for none
  folds: jax.Array  # int32, shape=(blocks,): statistics folded in
  nonfinite: jax.Array  # int32, shape=(blocks,): statistics refused because they were not finite
  inversions: Inversions

  @property
  def waiting(self) -> jax.Array:
    """Which blocks have statistics that nobody has tried to invert."""
    return (self.folds > 0) & (self.inversions.made + self.inversions.failed == 0)


class CurvatureState(NamedTuple):
  """Curvature of all layers. `refresh_due` knows it by its fields' names."""

  steps: Steps
  curvature_update_period: jax.Array  # int32, shape=(): at the step to come
  inverse_update_period: jax.Array  # int32, shape=()
  blocks: BlockNumbers | None  # None where there are no stacks
  stacks: tuple[StackState, ...]

  @property
  def damping(self) -> list[UsedDamping]:
    """That of the inverses, stack by stack."""
    if self.blocks is None:
      return []
    own = self.per_stack(self.blocks.inversions.damping)
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    return [cast(tree, stack.dtype) for tree, stack in zip(own, self.stacks, strict=True)]

  def per_stack(self, flat: Any) -> list[Any]:
    """Numbers of all blocks (or None), stack by stack."""
    return per_stack(flat, [stack.blocks for stack in self.stacks])

  def settled(self, before: "CurvatureState", finite: jax.Array) -> "CurvatureState":
    """With the count of `before` the step if its update is not `finite`, which is counted.

    Statistics that were finite stay folded in: to undo that would be a pass over all factors at
    every step.
    """
    keep = lambda new, old: jnp.where(finite, new, old)
    return self._replace(
      steps=self.steps.settled(before.steps, finite),
      curvature_update_period=keep(self.curvature_update_period, before.curvature_update_period),
      inverse_update_period=keep(self.inverse_update_period, before.inverse_update_period),
    )


class CurvatureOptions(NamedTuple):
  """When and how a step updates the curvature."""

  decay: jax.typing.ArrayLike
  scaling: Scaling
  fold: Fold  # how statistics go into the running factors
  curvature_update_period: Period
  inverse_update_period: Period | None
  stagger: bool

  def periods(self, count: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both periods at a step; an inverse period of None is that of the statistics."""
    curvature = whole_period(self.curvature_update_period, count)
    if self.inverse_update_period is None:
      return curvature, curvature
    return curvature, whole_period(self.inverse_update_period, count)


def init_curvature(
  layers: Layers, stacks: Sequence[Stack], leaves: Sequence[Any] | None, options: CurvatureOptions
) -> CurvatureState:
  """State before any step: zeros of the final shapes and dtypes, from shapes alone.

  Arithmetic is in the widest dtype of a stack's parameters and in float32 at least. No two arrays
  are one buffer, so that a state can be donated.
  """
  states, owners = [], []
  for stack in stacks:
    members = [leaf for i in stack.layers for leaf in layers[i].leaves]
    dtypes = [dtype_of(leaves[leaf]) for leaf in members] if leaves is not None else []
    dtype = jnp.result_type(jnp.float32, *dtypes)
    factors = Factors(*(jnp.zeros(shape, dtype) for shape in stack.factor_shapes))
    states.append(StackState(factors, jax.vmap(options.scaling.empty)(factors)))
    owners += [index for i in stack.layers for index in [i] * layers[i].stack] or [-1]
  dtype = jnp.result_type(jnp.float32, *(own.dtype for own in states))
  numbers = BlockNumbers(
    layer=jnp.asarray(owners, jnp.int32),
    folds=jnp.zeros(len(owners), jnp.int32),
    nonfinite=jnp.zeros(len(owners), jnp.int32),
    inversions=init_inversions(len(owners), options.scaling, dtype),
  )
  return empty_curvature(options.periods(0), numbers if states else None, tuple(states))


def empty_curvature(
  periods: tuple[jax.Array, jax.Array],
  blocks: BlockNumbers | None = None,
  stacks: tuple[StackState, ...] = (),
) -> CurvatureState:
  """State before any step."""
  curvature, inverse = map(jnp.copy, periods)
  return CurvatureState(no_steps(), curvature, inverse, blocks, stacks)


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
  _, inverse_period = options.periods(state.steps.count)
  refresh, turn = stats.refresh & finite.both, state.steps.count % inverse_period
  blocks, kept = state.blocks, state.stacks
  if blocks is not None:
    blocks, kept = _folded(blocks, kept, stacks, stats, refresh, options)
    due = refresh
    if options.stagger:  # block i has its turn, and those that have no inverse yet
      own = jnp.arange(len(blocks.folds)) % inverse_period
      due = (blocks.waiting | (turn == own)) & finite.both
    elif options.inverse_update_period is not None:
      due = (jnp.any(blocks.waiting) | (turn == 0)) & finite.both
    blocks, kept = _remade(blocks, kept, due, damping, options.scaling)

  steps = state.steps.counted(finite)
  curvature_period, inverse_period = options.periods(steps.count)
  return CurvatureState(steps, curvature_period, inverse_period, blocks, kept)


Kept = tuple[BlockNumbers, tuple[StackState, ...]]


def _folded(
  blocks: BlockNumbers,
  kept: tuple[StackState, ...],
  stacks: Sequence[Stack],
  stats: Stats,
  refresh: jax.Array,
  options: CurvatureOptions,
) -> Kept:
  """With statistics in the running factors, and in EKFAC's second moments, if `refresh`."""
  sizes, dtypes = [own.blocks for own in kept], [own.dtype for own in kept]
  # where there was a basis to measure them in
  known = blocks.inversions.made > 0

  def fold_all(folds, nonfinite, averages, S):
    new, new_S, sound = _statistics(stats, stacks, dtypes, S)
    folds = folds + sound
    weight = old_weight(folds, jnp.asarray(options.decay), jnp.result_type(*dtypes))
    numbers = per_stack((sound, weight), sizes), per_stack((sound & known, weight), sizes)
    averages = tuple(map(functools.partial(_fold, options.fold), averages, new, numbers[0]))
    return folds, nonfinite + ~sound, averages, tuple(map(_averaged, S, new_S, numbers[1]))

  inverses = [own.inverse for own in kept]
  S = tuple(own.S if isinstance(own, EigenvalueInverse) else None for own in inverses)
  folds, nonfinite, averages, S = jax.lax.cond(
    refresh,
    fold_all,
    lambda *same: same,
    *(blocks.folds, blocks.nonfinite, tuple(own.factors for own in kept), S),
  )
  blocks = blocks._replace(folds=folds, nonfinite=nonfinite)
  return blocks, tuple(map(StackState, averages, map(_with_S, inverses, S)))


def _statistics(stats, stacks, dtypes, S):
  """Factors and second moments (or None) stack by stack, and which blocks' are finite."""
  new, traces = [], []
  for stack, dtype in zip(stacks, dtypes, strict=True):
    factors, own = stack_factors(stack, stats.factors, dtype)
    new.append(factors)
    traces.append(own)
  tell = [jnp.concatenate(side) for side in zip(*traces, strict=True)]
  if S[0] is None:
    return new, S, jnp.all(jnp.isfinite(jnp.stack(tell)), axis=0)
  squares = [
    stack_squares(stack, stats.second_moments, dtype)
    for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  tell.append(jnp.concatenate([gap for _, gap in squares]))
  return new, [own for own, _ in squares], jnp.all(jnp.isfinite(jnp.stack(tell)), axis=0)


def _fold(function, average, new, numbers):
  finite, weight = numbers
  return jax.vmap(function)(average, new, finite, weight.astype(new.A.dtype))


def _averaged(old, new, numbers):
  if old is None:
    return None
  measured, weight = (x[:, None, None] for x in numbers)
  weight = weight.astype(old.dtype)
  return jnp.where(measured, weight * old + (1 - weight) * new, old)


def _with_S(inverse, S):
  return inverse if S is None else inverse._replace(S=S)


def _remade(
  blocks: BlockNumbers,
  kept: tuple[StackState, ...],
  due: jax.Array,
  damping: Damping,
  scaling: Scaling,
) -> Kept:
  """With the inverses that are `due`: one for all, or one a block."""
  factors = [own.factors for own in kept]
  each = due if due.ndim else None
  known = blocks.folds > 0
  inverses, inversions = jax.lax.cond(
    jnp.any(due),
    lambda old, before: remake(old, before, factors, known, damping, scaling, each),
    lambda *same: same,
    *(tuple(own.inverse for own in kept), blocks.inversions),
  )
  return blocks._replace(inversions=inversions), tuple(map(StackState, factors, inverses))
