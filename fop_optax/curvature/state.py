"""The curvature state of an optimizer, and one step of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import Damping
from fop_optax.curvature.factors import Fold, Running, init_running, old_weight
from fop_optax.curvature.inverse import EigenvalueInverse, Inverse, Scaling, init_inverse, remake
from fop_optax.curvature.stacks import Stack, dtype_of, stack_factors, stack_squares
from fop_optax.curvature.steps import Finite, Period, Steps, no_steps, whole_period
from fop_optax.layers import Layers, Stats


class StackState(NamedTuple):
  """Curvature of one stack of blocks; every array has the blocks as its leading axis."""

  running: Running
  inverse: Inverse
  layer: jax.Array  # int32, shape=(blocks,): the layer of each block, -1 for none

  @property
  def dtype(self):
    return self.running.factors.A.dtype


class CurvatureState(NamedTuple):
  """Curvature of all layers. `refresh_due` knows it by its fields' names."""

  steps: Steps
  curvature_update_period: jax.Array  # int32, shape=(): at the step to come
  inverse_update_period: jax.Array  # int32, shape=()
  stacks: tuple[StackState, ...]

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
  states = []
  for stack in stacks:
    members = [leaf for i in stack.layers for leaf in layers[i].leaves]
    dtypes = [dtype_of(leaves[leaf]) for leaf in members] if leaves is not None else []
    dtype = jnp.result_type(jnp.float32, *dtypes)
    running = init_running(stack.factor_shapes, stack.blocks, dtype)
    owners = [jnp.full(layers[i].stack, i, jnp.int32) for i in stack.layers]
    states.append(
      StackState(
        running=running,
        inverse=init_inverse(running.factors, options.scaling),
        layer=jnp.concatenate(owners or [jnp.full(1, -1, jnp.int32)]),
      )
    )
  return empty_curvature(options.periods(0), tuple(states))


def empty_curvature(
  periods: tuple[jax.Array, jax.Array], stacks: tuple[StackState, ...]
) -> CurvatureState:
  """State before any step."""
  curvature, inverse = map(jnp.copy, periods)
  return CurvatureState(no_steps(), curvature, inverse, stacks)


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
  refresh = stats.refresh & finite.both
  running, kept = _folded(state, stacks, stats, refresh, options)
  due = refresh
  if options.stagger:
    due = _turns(kept, running, state.steps.count % inverse_period, inverse_period) & finite.both
  elif options.inverse_update_period is not None:
    due = jnp.any(_waiting(kept, running)) | (state.steps.count % inverse_period == 0)
    due &= finite.both
  inverse = _remake(kept, running, due, damping, options.scaling)

  steps = state.steps.counted(finite)
  curvature_period, inverse_period = options.periods(steps.count)
  return state._replace(
    steps=steps,
    curvature_update_period=curvature_period,
    inverse_update_period=inverse_period,
    stacks=tuple(
      StackState(r, i, s.layer) for r, i, s in zip(running, inverse, state.stacks, strict=True)
    ),
  )


def _folded(
  state: CurvatureState,
  stacks: Sequence[Stack],
  stats: Stats,
  refresh: jax.Array,
  options: CurvatureOptions,
) -> tuple[tuple[Running, ...], tuple[Inverse, ...]]:
  """Running factors, and inverses with running second moments, after statistics if `refresh`."""
  decay = jnp.asarray(options.decay)
  fold = jax.vmap(options.fold, (0, 0, 0, None))
  kept = tuple(s.inverse for s in state.stacks)

  def fold_stack(stack, old, inverse):
    running, S = old
    new, sound = stack_factors(stack, stats.factors, running.factors.A.dtype)
    if S is None:
      return fold(running, new, sound, decay), None
    new_S, finite = stack_squares(stack, stats.second_moments, S.dtype)
    sound &= finite
    running = fold(running, new, sound, decay)
    measured = sound & (inverse.made > 0)  # else there was no basis to measure them in
    measured, weight = (
      x[:, None, None] for x in (measured, old_weight(running.folds, decay, S.dtype))
    )
    return running, jnp.where(measured, weight * S + (1 - weight) * new_S, S)

  S = [i.value.S if isinstance(i.value, EigenvalueInverse) else None for i in kept]
  pairs = tuple(zip((s.running for s in state.stacks), S, strict=True))
  fold_all = lambda pairs: tuple(map(fold_stack, stacks, pairs, kept))
  pairs = jax.lax.cond(refresh, fold_all, lambda pairs: pairs, pairs)
  inverses = (i if S is None else i.with_S(S) for i, (_, S) in zip(kept, pairs, strict=True))
  return tuple(running for running, _ in pairs), tuple(inverses)


def _remake(kept, running, due, damping, scaling):
  """Inverses made anew if they are `due`: one for all, or one a block."""

  def make(kept):
    known = jnp.concatenate([r.folds > 0 for r in running])
    each = due if due.ndim else None
    return remake(kept, [r.factors for r in running], known, damping, scaling, each)

  return jax.lax.cond(jnp.any(due), make, lambda kept: kept, kept)


def _turns(kept, running, turn, period):
  """Which blocks are due: block `i` (over all stacks) at `turn == i % period`, and new ones."""
  waiting = _waiting(kept, running)
  return waiting | (turn == jnp.arange(len(waiting)) % period)


def _waiting(kept: Sequence[Inverse], running: Sequence[Running]) -> jax.Array:
  """Which blocks have statistics that nobody has tried to invert."""
  waiting = [(r.folds > 0) & (i.made + i.failed == 0) for i, r in zip(kept, running, strict=True)]
  return jnp.concatenate(waiting)
