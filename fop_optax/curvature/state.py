"""The curvature state of an optimizer, and one step of it."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.damping import Damping
from fop_optax.curvature.factors import Fold, Running, init_running
from fop_optax.curvature.inverse import Inverse, Scaling, init_inverse, remake
from fop_optax.curvature.stacks import Stack, dtype_of, stack_factors
from fop_optax.layers import Factors, Layers


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

  count: jax.Array  # int32, shape=(): steps taken
  curvature_update_period: jax.Array  # int32, shape=(): at the step to come
  inverse_update_period: jax.Array  # int32, shape=()
  nonfinite_losses: jax.Array  # int32, shape=(): steps skipped for their loss
  nonfinite_gradients: jax.Array  # int32, shape=(): for their gradient (or the loss and it)
  nonfinite_directions: jax.Array  # int32, shape=(): for their update, of a finite gradient
  stacks: tuple[StackState, ...]

  def counted(self, finite: "Finite") -> "CurvatureState":
    """After a step with such a loss and gradient: taken, or skipped and why."""
    return self._replace(
      count=jnp.where(finite.both, optax.safe_increment(self.count), self.count),
      nonfinite_losses=self.nonfinite_losses + ~finite.loss,
      nonfinite_gradients=self.nonfinite_gradients + ~finite.gradients,
    )

  def settled(self, before: "CurvatureState", finite: jax.Array) -> "CurvatureState":
    """With the count of `before` the step if its update is not `finite`, which is counted."""
    keep = lambda new, old: jnp.where(finite, new, old)
    return self._replace(
      count=keep(self.count, before.count),
      curvature_update_period=keep(self.curvature_update_period, before.curvature_update_period),
      inverse_update_period=keep(self.inverse_update_period, before.inverse_update_period),
      nonfinite_directions=self.nonfinite_directions + (self.taken(before) & ~finite),
    )

  def taken(self, before: "CurvatureState") -> jax.Array:
    """Whether loss and gradient of the step since `before` were finite."""
    losses = self.nonfinite_losses == before.nonfinite_losses
    return losses & (self.nonfinite_gradients == before.nonfinite_gradients)


class Finite(NamedTuple):
  """What of a step is finite."""

  loss: jax.Array  # bool, shape=()
  gradients: jax.Array  # bool, shape=(): of all parameters

  @property
  def both(self) -> jax.Array:
    return self.loss & self.gradients


Period = jax.typing.ArrayLike | optax.Schedule


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
    curvature = _whole(self.curvature_update_period, count)
    if self.inverse_update_period is None:
      return curvature, curvature
    return curvature, _whole(self.inverse_update_period, count)


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
  zero = lambda: jnp.zeros((), jnp.int32)
  curvature, inverse = map(jnp.copy, periods)
  return CurvatureState(zero(), curvature, inverse, zero(), zero(), zero(), stacks)


def advance(
  state: CurvatureState,
  stacks: Sequence[Stack],
  factors: Sequence[Factors],
  refresh: jax.Array,
  finite: Finite,
  damping: Damping,
  options: CurvatureOptions,
) -> CurvatureState:
  """One step: folds statistics in if `refresh`, remakes the inverses that are due.

  A step whose loss or gradient is not `finite` is counted and changes nothing else; the count
  stands still, so that a refresh that fell on it is made up for by the next.
  """
  _, inverse_period = options.periods(state.count)
  refresh = jnp.asarray(refresh) & finite.both
  decay = jnp.asarray(options.decay)

  def fold_all(running):
    return tuple(
      jax.vmap(options.fold, (0, 0, None))(old, stack_factors(stack, factors, s.dtype), decay)
      for old, stack, s in zip(running, stacks, state.stacks, strict=True)
    )

  running = tuple(s.running for s in state.stacks)
  running = jax.lax.cond(refresh, fold_all, lambda running: running, running)

  kept = tuple(s.inverse for s in state.stacks)
  if options.stagger:
    phase = state.count % inverse_period, inverse_period
    inverse = _remake_in_turn(kept, running, finite.both, phase, damping, options.scaling)
  else:
    due = refresh
    if options.inverse_update_period is not None:
      waiting = [jnp.any(_waiting(i, r)) for i, r in zip(kept, running, strict=True)]
      due = functools.reduce(jnp.logical_or, waiting, state.count % inverse_period == 0)
      due &= finite.both
    inverse = _remake_all(kept, running, due, damping, options.scaling)

  state = state.counted(finite)
  curvature_period, inverse_period = options.periods(state.count)
  return state._replace(
    curvature_update_period=curvature_period,
    inverse_update_period=inverse_period,
    stacks=tuple(
      StackState(r, i, s.layer) for r, i, s in zip(running, inverse, state.stacks, strict=True)
    ),
  )


def _remake_all(kept, running, due, damping, scaling):
  def remake_all(kept):
    make = jax.vmap(functools.partial(remake, scaling=scaling), (0, 0, 0, None))
    return tuple(
      make(old, r.factors, r.folds, damping) for old, r in zip(kept, running, strict=True)
    )

  return jax.lax.cond(due, remake_all, lambda kept: kept, kept)


def _remake_in_turn(kept, running, finite, phase, damping, scaling):
  """Remakes block `i` (over all stacks) at `count % period == i % period`, and its first at once.

  A loop over the blocks with a `cond` each: a batched `cond` would make them all.
  """
  turn, period = phase

  def one(block):
    index, old, r = block

    def make(old):
      return remake(old, r.factors, r.folds, damping, scaling)

    due = finite & ((turn == index % period) | _waiting(old, r))
    return jax.lax.cond(due, make, lambda old: old, old)

  out, first = [], 0
  for old, r in zip(kept, running, strict=True):
    indices = first + jnp.arange(len(r.folds), dtype=jnp.int32)
    out.append(jax.lax.map(one, (indices, old, r)))
    first += len(indices)
  return tuple(out)


def _waiting(inverse: Inverse, running: Running) -> jax.Array:
  """Whether a block has statistics and nobody has tried to invert them."""
  return (running.folds > 0) & (inverse.made + inverse.failed == 0)


def _whole(period: Period, count: jax.typing.ArrayLike) -> jax.Array:
  """A period at a step: whole steps, at least one."""
  value = period(jnp.asarray(count)) if callable(period) else period
  return jnp.maximum(jnp.asarray(value).astype(jnp.int32), 1)
