"""The curvature state of an optimizer: what is in it, and what it is before any step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.factors import Fold
from fop_optax.curvature.inverse import Inverse, Inversions, init_inversions
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.scaling import Scaling, UsedDamping
from fop_optax.curvature.stacks import Stack, dtype_of, per_stack
from fop_optax.curvature.steps import Period, Steps, no_steps, whole_period
from fop_optax.layers import Factors, Layers, side_shapes
from fop_optax.sharding import Sharding, check_not_manual, note, placed, whole


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
  trace_A: jax.Array  # shape=(blocks,): running average
  trace_G: jax.Array  # shape=(blocks,)
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
  unit: jax.Array  # float32, shape=(): the least `size_of`, at most 1; 0: no step yet

  @property
  def damping(self) -> list[UsedDamping]:
    """That of the inverses, stack by stack."""
    if self.blocks is None:
      return []
    own = self.per_stack(self.blocks.inversions.damping)
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    return [cast(tree, stack.dtype) for tree, stack in zip(own, self.stacks, strict=True)]

  def size_of(self, loss: jax.typing.ArrayLike) -> jax.Array:
    r"""How many nats of a likelihood a loss stands for, by its gradients.

    With the labels given the Fisher matrix of a squared error :math:`r^2 / 2` is :math:`r^2` times
    its Gauss-Newton matrix: twice the loss, half the square of its gradient. Of a cross entropy it
    is about that matrix, and half the square below 1. So

    .. math::
      s = \max(u, \min(L, \operatorname{median}_l t_l)), \qquad
      u = \min(1, \max(|L_0|, \max_l t_l)), \qquad
      t_l = \tfrac{1}{2} \operatorname{tr} G_l

    with the present loss L, which may have an offset, and the traces' running averages, where they
    are not zero: behind a head of zeros most are, and behind a small one next to it, for which the
    unit takes the largest. It is 1 of a cross entropy, and less of a loss that starts small: that
    of the first step, which does not shrink as the loss comes down; it is at least a hundredth of
    what came later.
    """
    median = jnp.nan_to_num(jnp.nanmedian(self._half_traces()))
    return jnp.maximum(self.unit, jnp.minimum(loss, median))

  def in_unit_of(self, loss: jax.typing.ArrayLike, finite: jax.Array) -> "CurvatureState":
    """With the unit brought up to date by the loss of a step that is `finite`."""
    largest = jnp.nan_to_num(jnp.nanmax(self._half_traces()))
    now = jnp.clip(jnp.maximum(jnp.abs(loss), largest), 0, 1).astype(self.unit.dtype)
    later = jnp.maximum(self.unit, now / 100)
    unit = jnp.where(self.unit > 0, later, now)
    return self._replace(unit=jnp.where(finite, unit, self.unit))

  def _half_traces(self) -> jax.Array:
    """Of all blocks, NaN where it is zero."""
    if self.blocks is None:
      return jnp.zeros(1)
    return jnp.where(self.blocks.trace_G > 0, self.blocks.trace_G / 2, jnp.nan)

  def per_stack(self, flat: Any) -> list[Any]:
    """Numbers of all blocks (or None), stack by stack."""
    return per_stack(flat, [stack.blocks for stack in self.stacks])

  def settled(self, before: "CurvatureState", finite: jax.Array) -> "CurvatureState":
    """With count and unit of `before` the step if its update is not `finite`, which is counted.

    Statistics that were finite stay folded in: to undo that would be a pass over all factors at
    every step.
    """
    keep = lambda new, old: jnp.where(finite, new, old)
    return self._replace(
      steps=self.steps.settled(before.steps, finite),
      curvature_update_period=keep(self.curvature_update_period, before.curvature_update_period),
      inverse_update_period=keep(self.inverse_update_period, before.inverse_update_period),
      unit=keep(self.unit, before.unit),
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
    trace_A=jnp.zeros(len(owners), dtype),
    trace_G=jnp.zeros(len(owners), dtype),
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
  return CurvatureState(no_steps(), curvature, inverse, blocks, stacks, jnp.zeros((), jnp.float32))
