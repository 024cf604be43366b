"""The curvature state of an optimizer, and one step of it."""

from collections.abc import Sequence
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import Damping, traces
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
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.stacks import (
  Stack,
  dtype_of,
  per_stack,
  stack_factors,
  stack_squares,
)
from fop_optax.curvature.steps import Finite, Period, Steps, no_steps, whole_period
from fop_optax.layers import Factors, Layers, Stats, side_shapes
from fop_optax.sharding import Sharding, Share, check_not_manual, note, placed, whole


class StackState(NamedTuple):
  """Matrices of one stack of blocks; every array has the blocks as its leading axis.

  Where the blocks have owners it has their slots, and `place` says where each block is.
  """

  factors: Factors  # running averages
  inverse: Inverse
  place: jax.Array | None = None  # int32, shape=(blocks,); None: in order

  @property
  def dtype(self):
    """Of the arithmetic; factors may be held in a narrower one."""
    return jax.tree.leaves(self.inverse)[0].dtype

  @property
  def running(self) -> Factors:
    """The factors in the dtype of the arithmetic."""
    return jax.tree.map(lambda x: x.astype(self.dtype), self.factors)

  @property
  def blocks(self) -> int:
    return len(self.factors.A if self.place is None else self.place)


class BlockNumbers(NamedTuple):
  """Numbers of all blocks, those of one stack after those of another.

  As one vector they are one operation, however many stacks there are: programs of many small ones
  take long to compile.
  """

  layer: jax.Array  # int32, shape=(blocks,): the layer of each block, -1 for none
  folds: jax.Array  # int32, shape=(blocks,): statistics folded in
  nonfinite: jax.Array  # int32, shape=(blocks,): statistics refused because they were not finite
  residual: jax.Array  # float32, shape=(blocks,): running average of half the trace of G
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

  def size_of(self, loss: jax.typing.ArrayLike) -> jax.Array:
    r"""How many nats of a likelihood a loss stands for, by its gradients and at least one.

    With the labels given the Fisher matrix of a squared error :math:`r^2 / 2` is :math:`r^2` times
    its Gauss-Newton matrix: twice the loss, half the square of its gradient. Of a cross entropy it
    is about that matrix, and half the square below 1. So

    .. math::
      s = \max(1, \min(L, \tfrac{1}{2} \operatorname{median}_l \operatorname{tr} G_l))

    with the present loss L, which may have an offset, and the traces' running averages.
    """
    if self.blocks is None:
      return jnp.ones(())
    known = jnp.where(self.blocks.layer >= 0, self.blocks.residual, jnp.nan)
    return jnp.maximum(1, jnp.minimum(loss, jnp.nan_to_num(jnp.nanmedian(known))))

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


def in_order(state: CurvatureState) -> CurvatureState:
  """Of a state whose blocks have owners: with the matrices of the blocks in their order."""

  def ordered(own: StackState) -> StackState:
    if own.place is None:
      return own
    of_blocks = lambda x: whole(x)[own.place]
    return StackState(*jax.tree.map(of_blocks, (own.factors, own.inverse)))

  return state._replace(stacks=tuple(map(ordered, state.stacks)))


class CurvatureOptions(NamedTuple):
  """When and how a step updates the curvature."""

  decay: jax.typing.ArrayLike
  scaling: Scaling
  fold: Fold  # how statistics go into the running factors
  curvature_update_period: Period
  inverse_update_period: Period | None
  stagger: bool
  sharding: Sharding | None = None  # over which devices blocks have owners
  factor_dtype: Any = None  # in which running factors are held; None: that of the arithmetic

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
  dtypes, owners = [], []
  for stack in stacks:
    members = [leaf for i in stack.layers for leaf in layers[i].leaves]
    own = [dtype_of(leaves[leaf]) for leaf in members] if leaves is not None else []
    dtypes.append(jnp.result_type(jnp.float32, *own))
    owners += [index for i in stack.layers for index in [i] * layers[i].stack] or [-1]
  states = _empty_stacks(stacks, dtypes, options)
  dtype = jnp.result_type(jnp.float32, *(own.dtype for own in states))
  numbers = BlockNumbers(
    layer=jnp.asarray(owners, jnp.int32),
    folds=jnp.zeros(len(owners), jnp.int32),
    nonfinite=jnp.zeros(len(owners), jnp.int32),
    residual=jnp.zeros(len(owners), jnp.float32),
    inversions=init_inversions(len(owners), options.scaling, dtype),
  )
  return empty_curvature(options.periods(0), numbers if states else None, states)


def _empty_stacks(
  stacks: Sequence[Stack], dtypes: Sequence[Any], options: CurvatureOptions
) -> tuple[StackState, ...]:
  shapes = factor_shapes(stacks, options.sharding)

  def start(own, dtype):
    zeros = lambda dtype: Factors(*(jnp.zeros(shape, dtype) for shape in own))
    held = zeros(options.factor_dtype or dtype)
    return StackState(held, jax.vmap(options.scaling.empty)(zeros(dtype)))

  def make():
    return tuple(map(start, shapes, dtypes))

  if options.sharding is None or not stacks:
    return make()
  check_not_manual(options.sharding)
  note(options.sharding)
  states = placed(make, jax.tree.map(options.sharding.owned, jax.eval_shape(make)))
  places = plan_owners(tuple(stacks), options.sharding.devices).places
  return tuple(
    own._replace(place=jnp.asarray(place, jnp.int32))
    for own, place in zip(states, places, strict=True)
  )


def factor_shapes(
  stacks: Sequence[Stack], sharding: Sharding | None
) -> list[tuple[tuple[int, ...], ...]]:
  """Shapes of the factors of each stack: of its blocks, or of the slots of all owners."""
  if sharding is None:
    return [stack.factor_shapes for stack in stacks]
  slots = plan_owners(tuple(stacks), sharding.devices).slots
  rows = [sharding.devices * own for own in slots]
  return [side_shapes(n, own.dims, own.diagonal) for n, own in zip(rows, stacks, strict=True)]


def empty_curvature(
  periods: tuple[jax.Array, jax.Array],
  blocks: BlockNumbers | None = None,
  stacks: tuple[StackState, ...] = (),
) -> CurvatureState:
  """State before any step."""
  curvature, inverse = map(jnp.copy, periods)
  return CurvatureState(no_steps(), curvature, inverse, blocks, stacks)


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
  return CurvatureState(steps, curvature_period, inverse_period, state.blocks, state.stacks)


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
  return _remade(blocks, kept, due, turn.damping, options.scaling, share)


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

  def fold_all(folds, nonfinite, residual, averages, S):
    new, new_S, sound, traces_of_G = _statistics(stats, stacks, dtypes, S, share)
    folds = folds + sound
    weight = old_weight(folds, jnp.asarray(turn.decay), jnp.result_type(*dtypes))
    blended = weight * residual + (1 - weight) * traces_of_G / 2
    residual = jnp.where(sound, blended, residual).astype(residual.dtype)
    folded = per_stack(mine((sound, weight)), sizes)
    measured = per_stack(mine((sound & known, weight)), sizes)
    averages = tuple(map(functools.partial(_fold, options.fold), averages, new, folded))
    S = tuple(map(_averaged, S, new_S, measured))
    return folds, nonfinite + ~sound, residual, averages, S

  inverses = [own.inverse for own in kept]
  S = tuple(own.S if isinstance(own, EigenvalueInverse) else None for own in inverses)
  numbers = blocks.folds, blocks.nonfinite, blocks.residual
  *numbers, averages, S = jax.lax.cond(
    turn.refresh,
    fold_all,
    lambda *same: same,
    *(*numbers, tuple(own.factors for own in kept), S),
  )
  folds, nonfinite, residual = numbers
  blocks = blocks._replace(folds=folds, nonfinite=nonfinite, residual=residual)
  rows = zip(kept, averages, map(_with_S, inverses, S), strict=True)
  return blocks, tuple(own._replace(factors=a, inverse=i) for own, a, i in rows)


def _statistics(stats, stacks, dtypes, S, share):
  """Factors and second moments (or None) stack by stack; of all blocks: finite or not, tr G."""
  mine = (lambda index, tree: tree) if share is None else share.stack
  found = [
    stack_factors(stack, stats.factors, dtype) for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  new = list(itertools.starmap(mine, enumerate(found)))
  # Of a sum of squares no entry is larger than the diagonal's, or not a number where that is one.
  traces_of_G = traces([own.G for own in found])
  tell = [traces([own.A for own in found]), traces_of_G]
  if S[0] is None:
    return new, S, jnp.all(jnp.isfinite(jnp.stack(tell)), axis=0), traces_of_G
  squares = [
    stack_squares(stack, stats.second_moments, dtype)
    for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  tell.append(jnp.concatenate([gap for _, gap in squares]))
  squares_of = [mine(index, own) for index, (own, _) in enumerate(squares)]
  return new, squares_of, jnp.all(jnp.isfinite(jnp.stack(tell)), axis=0), traces_of_G


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
    due, known, before = share.numbers((due, known, before))
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
