"""One step of curvature whose blocks have owners: each device works on its slots alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.advance import counted, renew, turn_of
from fop_optax.curvature.damping import Damping
from fop_optax.curvature.inverse import Inversions
from fop_optax.curvature.layouts import Layout
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.passage import Passage
from fop_optax.curvature.scaling import UsedDamping
from fop_optax.curvature.stacks import Stack
from fop_optax.curvature.state import CurvatureOptions, CurvatureState, StackState
from fop_optax.curvature.steps import Finite
from fop_optax.layers import Stats
from fop_optax.sharding import Exchange, on_owners

Pieces = Sequence[Sequence[jax.Array]]  # for each family those of its weight and bias


class StackedGradients(NamedTuple):
  """The gradient of a step, stack by stack; or family by family, where parameters are sharded."""

  matrices: list[jax.Array]  # [blocks, rows, outputs]
  contrasts: list[jax.Array]  # [blocks, groups - 1, rows, outputs]; none for K-FAC
  resolutions: list[float]  # machine epsilon of the gradients
  value: jax.Array | None = None  # what else the method takes
  pieces: Pieces = ()  # [blocks, groups, rows, outputs], of the gradient and then the contrasts


class Directions(NamedTuple):
  """What a method makes of it."""

  directions: Any  # [blocks, rows, outputs] of each stack, or pieces of them
  norm2: jax.Array  # shape=(): the sum of d' M d
  numbers: Any = None  # of all blocks


# stacks, the damping of their inverses, gradients -> directions
Method = Callable[[Sequence[StackState], list[UsedDamping], StackedGradients], Directions]


def advance_owned(
  state: CurvatureState,
  stacks: Sequence[Stack],
  stats: Stats,
  finite: Finite,
  damping: Damping,
  options: CurvatureOptions,
  gradients: StackedGradients,
  method: Method,
  layout: Layout | None = None,
) -> tuple[CurvatureState, Directions]:
  """`advance`, and what `method` makes of the gradients, by the owners of the blocks.

  What differs between devices are the matrices of the state. Statistics and gradients come in on
  every device; directions and numbers go out on every device, by one gather or sum. With a `layout`
  gradients are pieces, and so are the directions: see `fop_optax.curvature.passage`.
  """
  assert options.sharding is not None
  sharding, blocks = options.sharding, state.blocks
  slots = plan_owners(tuple(stacks), sharding.devices).slots
  turn = turn_of(state, stats, finite, damping, options)
  turn = turn._replace(decay=jnp.asarray(options.decay))
  stats = stats._replace(contrasts=())
  places = tuple(own.place for own in state.stacks)

  def step(owned, whole, pieces):
    blocks, places, stats, turn, matrices, contrasts, value = whole
    exchange = Exchange(sharding, places, slots)
    share, before = exchange.share(), blocks.inversions
    kept = tuple(StackState(*matrices) for matrices in owned)
    blocks, kept = renew(blocks, kept, stacks, stats, turn, options, share)
    passage = None if layout is None else Passage(layout, exchange)
    if passage is None:
      matrices = [share.stack(k, V) for k, V in enumerate(matrices)]
      contrasts = [share.stack(k, C) for k, C in enumerate(contrasts)]
    else:
      mine = passage.to_owners(pieces, [own.dtype for own in kept])
      matrices, contrasts = [V[:, 0] for V in mine], [V[:, 1:] for V in mine]
    mine = gradients._replace(matrices=matrices, contrasts=contrasts, value=value, pieces=())
    used = state._replace(blocks=blocks, stacks=kept).damping
    directions, norm2, numbers = method(kept, used, mine)
    told = _told(share.numbers(before), blocks.inversions)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(told.damping[0].dtype), tree)
    collect = exchange.collect if passage is None else passage.from_owners
    directions, (told, numbers), norm2 = collect(directions, wide((told, numbers)), wide(norm2))
    blocks = blocks._replace(inversions=_heard(before, told))
    after = [(own.factors, own.inverse) for own in kept]
    whole, pieces = (directions, []) if passage is None else ([], directions)
    return after, (blocks, norm2, numbers, whole), pieces

  after, (blocks, norm2, numbers, directions), pieces = on_owners(
    sharding,
    step,
    [(own.factors, own.inverse) for own in state.stacks],
    (blocks, places, stats, turn, gradients.matrices, gradients.contrasts, gradients.value),
    gradients.pieces,
    None if layout is None else (layout.specs_of(1), layout.specs_of(0)),
  )
  found = Directions(directions if layout is None else pieces, norm2, numbers)
  rows = zip(state.stacks, after, strict=True)
  kept = tuple(own._replace(factors=factors, inverse=inverse) for own, (factors, inverse) in rows)
  return counted(state, finite, options)._replace(blocks=blocks, stacks=kept), found


def _told(before: Inversions, after: Inversions) -> Inversions:
  """What a device tells of the inversions of its blocks; of counts what was added to them.

  That is exact in the dtype of other numbers.
  """
  made, failed = after.made - before.made, after.failed - before.failed
  return Inversions(made, failed, after.damping)


def _heard(before: Inversions, told: Inversions) -> Inversions:
  """The inversions of all blocks after what was told of them."""
  add = lambda count, more: count + more.astype(count.dtype)
  made, failed = add(before.made, told.made), add(before.failed, told.failed)
  return Inversions(made, failed, told.damping)
