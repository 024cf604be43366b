"""One step of curvature whose blocks have owners: each device works on its slots alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import Damping
from fop_optax.curvature.inverse import Inversions, UsedDamping
from fop_optax.curvature.stacks import Stack, per_stack
from fop_optax.curvature.state import (
  CurvatureOptions,
  CurvatureState,
  StackState,
  counted,
  renew,
  turn_of,
)
from fop_optax.curvature.steps import Finite
from fop_optax.layers import Stats
from fop_optax.sharding import Exchange, on_owners, plan_owners


class StackedGradients(NamedTuple):
  """The gradient of a step, stack by stack."""

  matrices: list[jax.Array]  # [blocks, rows, outputs]
  contrasts: list[jax.Array]  # [blocks, groups - 1, rows, outputs]; none for K-FAC
  resolutions: list[float]  # machine epsilon of the gradients
  value: jax.Array | None = None  # what else the method takes


class Directions(NamedTuple):
  """What a method makes of it."""

  directions: list[jax.Array]  # [blocks, rows, outputs]
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
) -> tuple[CurvatureState, Directions]:
  """`advance`, and what `method` makes of the gradients, by the owners of the blocks.

  What differs between devices are the matrices of the state. Statistics and gradients come in on
  every device; directions and numbers go out on every device, by one gather.
  """
  assert options.sharding is not None
  sharding, blocks = options.sharding, state.blocks
  slots = plan_owners(tuple(stacks), sharding.devices).slots
  turn = turn_of(state, stats, finite, damping, options)
  turn = turn._replace(decay=jnp.asarray(options.decay))
  stats = stats._replace(contrasts=())
  places = tuple(own.place for own in state.stacks)

  def step(owned, whole):
    blocks, places, stats, turn, matrices, contrasts, value = whole
    exchange = Exchange(sharding, places, slots)
    share = exchange.share()
    before = blocks.inversions
    kept = tuple(StackState(*matrices) for matrices in owned)
    now, kept = renew(blocks, kept, stacks, stats, turn, options, share)
    mine = gradients._replace(
      matrices=[share.stack(k, V) for k, V in enumerate(matrices)],
      contrasts=[share.stack(k, C) for k, C in enumerate(contrasts)],
      value=value,
    )
    own = now.inversions
    used = [
      jax.tree.map(lambda x, dtype=stack.dtype: x.astype(dtype), tree)
      for tree, stack in zip(per_stack(own.damping, slots), kept, strict=True)
    ]
    found = method(kept, used, mine)
    # Counts travel as what was added to them: exact in the dtype of the other numbers.
    dtype = jax.tree.leaves(own.damping)[0].dtype
    was = share.numbers(before)
    added = own.made - was.made, own.failed - was.failed
    numbers = jax.tree.map(lambda x: x.astype(dtype), (added, own.damping, found.numbers))
    got = exchange.gather(found.directions, numbers, found.norm2.astype(dtype))
    (made, failed), used, numbers = got.numbers
    count = lambda old, new: old + new.astype(old.dtype)
    inversions = Inversions(count(before.made, made), count(before.failed, failed), used)
    after = [(own.factors, own.inverse) for own in kept]
    return after, (
      now._replace(inversions=inversions),
      Directions(got.stacks, got.total, numbers),
    )

  after, (blocks, found) = on_owners(
    sharding,
    step,
    [(own.factors, own.inverse) for own in state.stacks],
    (blocks, places, stats, turn, gradients.matrices, gradients.contrasts, gradients.value),
  )
  rows = zip(state.stacks, after, strict=True)
  kept = tuple(own._replace(factors=factors, inverse=inverse) for own, (factors, inverse) in rows)
  return counted(state, finite, options)._replace(blocks=blocks, stacks=kept), found
