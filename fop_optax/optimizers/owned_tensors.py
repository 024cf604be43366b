"""Stacks of tensors whose blocks have owners: each device takes the step of its slots alone.

What differs between devices is the state of the stacks. Gradients come in on every device,
directions go out on every device, by one gather or sum; or pieces of both where parameters are
sharded, by one all-to-all each (see `fop_optax.curvature.passage`). In between nothing moves.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.layouts import Layout
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.passage import Passage
from fop_optax.curvature.stacks import Stack
from fop_optax.curvature.steps import whole_period
from fop_optax.sharding import (
  Exchange,
  Sharding,
  Share,
  check_not_manual,
  note,
  on_owners,
  placed,
  whole,
)


class OwnedStack(NamedTuple):
  """State of a stack of tensors whose blocks have owners."""

  slots: Any  # a `TensorState` with the slots of all owners along the leading axis of its arrays
  place: jax.Array  # int32, shape=(blocks,): where each block is

  @property
  def dims(self) -> tuple[int, ...]:
    """`[devices * slots, *dims]`."""
    return self.slots.dims

  @property
  def dtype(self):
    return self.slots.dtype

  def in_order(self, tree: Any) -> Any:
    """Of arrays of slots those of the blocks in their order, on every device."""
    return jax.tree.map(lambda x: whole(x)[self.place], tree)


def rows_of(stacks: Sequence[Stack], sharding: Sharding | None) -> tuple[Stack, ...]:
  """The stacks, with as many blocks as owners have slots for where there are owners."""
  if sharding is None:
    return tuple(stacks)
  slots = plan_owners(tuple(stacks), sharding.devices).slots
  pairs = zip(stacks, slots, strict=True)
  return tuple(dataclasses.replace(own, blocks=sharding.devices * n) for own, n in pairs)


def start_owned(
  start: Callable[[Stack, Any], Any],
  stacks: Sequence[Stack],
  dtypes: Sequence[Any],
  sharding: Sharding,
) -> tuple[OwnedStack, ...]:
  """State of stacks before the first step, made where it belongs."""
  if not stacks:
    return ()
  check_not_manual(sharding)
  note(sharding)
  make = lambda: tuple(map(start, rows_of(stacks, sharding), dtypes))
  slots = placed(make, jax.tree.map(sharding.owned, jax.eval_shape(make)))
  places = plan_owners(tuple(stacks), sharding.devices).places
  pairs = zip(slots, places, strict=True)
  return tuple(OwnedStack(own, jnp.asarray(place, jnp.int32)) for own, place in pairs)


def step_owned(
  step: Callable[..., tuple[list[jax.Array], tuple[Any, ...]]],
  options: Any,
  stacks: Sequence[Stack],
  count: jax.Array,
  states: Sequence[OwnedStack],
  gradients: list[Any],
  more: dict[str, Any],
  layout: Layout | None = None,
) -> tuple[list[Any], tuple[OwnedStack, ...]]:
  """A `by_tensor.Step` of all stacks, of which each device takes that of its blocks.

  What `more` has as lists is stack by stack, as the gradients; all else is of all of them. With a
  `layout` gradients are pieces `[blocks, groups, ...]`, of the gradient and then the contrasts, and
  so are the directions, `[blocks, ...]`.
  """
  sharding: Sharding = options.sharding
  slots = plan_owners(tuple(stacks), sharding.devices).slots

  def local(owned, given, pieces):
    places, arrays, count, gradients, more = given
    exchange = Exchange(sharding, places, slots)
    share = exchange.share()
    mine = lambda given: [share.stack(k, own) for k, own in enumerate(given)]
    more = {name: mine(x) if isinstance(x, list) else x for name, x in more.items()}
    here, passage = _with_arrays(options, arrays), None
    if layout is None:
      gradients = mine(gradients)
    else:
      passage = Passage(layout, exchange)
      found = passage.to_owners(pieces, [own.dtype for own in owned])
      gradients = [g[:, 0] for g in found]
      if options.contrast:
        more["contrasts"] = [g[:, 1:] for g in found]
    directions, after = step(here, count, owned, gradients, share=share, **more)
    nothing = jnp.zeros((), directions[0].dtype)
    collect = exchange.collect if passage is None else passage.from_owners
    directions, _, _ = collect(directions, (), nothing)
    return after, *((directions, []) if passage is None else ([], directions))

  places = tuple(own.place for own in states)
  whole, pieces = (gradients, []) if layout is None else ([], gradients)
  given = places, _arrays(options, count), count, whole, more
  specs = None if layout is None else (layout.specs_of(1), layout.specs_of(0))
  owned = tuple(own.slots for own in states)
  after, whole, pieces = on_owners(sharding, local, owned, given, pieces, specs)
  pairs = zip(states, after, strict=True)
  after = tuple(own._replace(slots=new) for own, new in pairs)
  return whole if layout is None else pieces, after


def numbers_of(blocks: int, share: Share | None) -> jax.Array:
  """Among all blocks the number of each of these: of all, or of the share of one device."""
  return jnp.arange(blocks) if share is None else share.block


def of_blocks(due: jax.Array, share: Share | None) -> jax.Array:
  """What is `due`, but nothing in empty slots."""
  return due if share is None or share.filled is None else due & share.filled


def _arrays(options: Any, count: jax.Array) -> dict[str, Any]:
  """The arrays among hyperparameters, as injected ones are, and the period at this step.

  Where mesh axes are explicit a function over the mesh cannot close over arrays.
  """
  found = _fields(options)
  return found | {"inverse_update_period": whole_period(options.inverse_update_period, count)}


def _fields(options: Any) -> dict[str, Any]:
  values = {own.name: getattr(options, own.name) for own in dataclasses.fields(options)}
  nested = {name: _fields(x) for name, x in values.items() if dataclasses.is_dataclass(x)}
  arrays = {name: x for name, x in values.items() if isinstance(x, jax.Array)}
  return arrays | {name: own for name, own in nested.items() if own}


def _with_arrays(options: Any, arrays: dict[str, Any]) -> Any:
  """The hyperparameters with others of these arrays in their place."""
  own = {
    name: _with_arrays(getattr(options, name), x) if isinstance(x, dict) else x
    for name, x in arrays.items()
  }
  return dataclasses.replace(options, **own)
