"""Where the arrays of an optimizer's state are, and states that know no mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import optax

from fop_optax.curvature.inverse import (
  SCALINGS,
  EigenvalueInverse,
  ExactInverse,
  Inverse,
  Scaling,
)
from fop_optax.curvature.stacks import Stack
from fop_optax.curvature.state import CurvatureState, StackState, in_order
from fop_optax.layers import is_masked
from fop_optax.optimizers.owned_tensors import OwnedStack
from fop_optax.optimizers.shampoo import ScaleByShampooState
from fop_optax.optimizers.soap import ScaleBySoapState
from fop_optax.owners import plan_owners
from fop_optax.sharding import Sharding, laid, noted


def state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
  """Where each array of `tx.init(params)` is: what has owners on them, all else on every device.

  What it has of each parameter, as momentum, is sharded as the parameter is: by
  `Sharding(mesh, params=...)`, or as `params` are placed.

  For `jax.jit(step, out_shardings=...)`, for `jax.device_put`, and for what Orbax restores into
  on the devices that the state was saved from (for others see :func:`fop_optax.to_blocks`).

  Args:
    tx: an optimizer with `sharding=fop_optax.Sharding(mesh)`, however deep in optax's wrappers.
    params: parameters, or their shapes.

  Returns:
    A tree of `NamedSharding` like the state.

  Raises:
    ValueError: if nothing in `tx` has a `sharding`, or two have different ones.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x)
    >>> sharding = fop_optax.Sharding(jax.make_mesh((1,), ("data",)))
    >>> tx = fop_optax.scale_by_kfac(captured.layers, sharding=sharding)
    >>> shardings = fop_optax.state_shardings(tx, params)
    >>> print(sum("data" in own.spec for own in jax.tree.leaves(shardings)))  # A, G, inverses
    4
  """
  state, found = noted(tx.init, params)
  if len(set(found)) != 1:
    had = "no `sharding`" if not found else f"{len(set(found))} different `sharding`s"
    raise ValueError(
      f"`state_shardings(tx, params)` found {had} in `tx`: make the optimizer with one, as"
      " `fop_optax.kfac(..., sharding=fop_optax.Sharding(mesh))`. An optimizer without is on every"
      " device: `NamedSharding(mesh, PartitionSpec())` for each of its arrays."
    )
  (sharding,) = set(found)
  whole = lambda tree: jax.tree.map(sharding.whole, tree)

  def stack(own: StackState | OwnedStack) -> Any:
    if own.place is None:
      return whole(own)
    return jax.tree.map(sharding.owned, own)._replace(place=sharding.whole(own.place))

  is_stack = lambda x: isinstance(x, StackState | OwnedStack)
  out = jax.tree.map(lambda x: stack(x) if is_stack(x) else whole(x), state, is_leaf=is_stack)
  return _like_params(tx, sharding, params, state, out)


def _like_params(
  tx: optax.GradientTransformation, sharding: Sharding, params: Any, state: Any, shardings: Any
) -> Any:
  """`shardings` of a state, with those of parameters for what it has of each."""
  leaves, treedef = jax.tree.flatten(params)
  specs = sharding.params or list(map(_spec_of, leaves))
  own = [sharding.like(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]

  def place(found, param, own):
    return own if not is_masked(found) and found.shape == jnp.shape(param) else found

  placed = optax.tree.map_params(
    tx.init, place, state, params, treedef.unflatten(own), is_leaf=is_masked
  )
  named = lambda x: isinstance(x, NamedSharding)
  return jax.tree.map(lambda own, other: own if named(own) else other, placed, shardings)


def _spec_of(leaf: Any) -> PartitionSpec:
  sharding = getattr(leaf, "sharding", None)
  return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def to_blocks(opt_state: Any) -> Any:
  """The state as the same optimizer without `sharding` has it, its blocks in order: for any mesh.

  Checkpoints of it know no mesh: restored, it goes on as it is on one device, or over any others
  by :func:`fop_optax.to_owners`. It is whole on every device; `jax.device_get` before keeps it on
  the host.

  Args:
    opt_state: the state of an optimizer with `sharding`, however deep, as `tx.init(params)` made
      it: its curvature is told by its type, which a Flax NNX `State` has not.

  Returns:
    A state like that of the optimizer without `sharding`.

  Raises:
    ValueError: if no curvature in it has owners.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x)
    >>> sharding = fop_optax.Sharding(jax.make_mesh((1,), ("data",)))
    >>> tx = fop_optax.kfac(0.1, captured.layers, sharding=sharding)
    >>> state = fop_optax.to_blocks(tx.init(params))
    >>> plain = fop_optax.kfac(0.1, captured.layers).init(params)
    >>> jax.tree.structure(state) == jax.tree.structure(plain)
    True
  """
  return _converted(opt_state, "to_blocks", True, _ordered)


def to_owners(opt_state: Any, sharding: Sharding) -> Any:
  """The inverse of `to_blocks`: each block with the device that owns it.

  Args:
    opt_state: what `to_blocks` returned, or the state of an optimizer without `sharding`.
    sharding: that of the optimizer that goes on with it.

  Returns:
    A state like that of the optimizer with that `sharding`, on its mesh.

  Raises:
    ValueError: if it has no curvature, or one that has owners already.
    TypeError: if `sharding` is none.
  """
  if not isinstance(sharding, Sharding):
    raise TypeError(
      "`to_owners(opt_state, sharding)` takes a `fop_optax.Sharding(mesh)`, not a"
      f" {type(sharding).__name__}."
    )
  return _converted(opt_state, "to_owners", False, lambda state: _dealt(state, sharding), sharding)


def _converted(
  opt_state: Any,
  who: str,
  owned: bool,
  convert: Callable[[Any], Any],
  sharding: Sharding | None = None,
) -> Any:
  is_curvature = lambda x: isinstance(x, CurvatureState | TensorStates)
  leaves, treedef = jax.tree.flatten(opt_state, is_leaf=is_curvature)
  found = [own for own in leaves if is_curvature(own) and own.stacks]
  wrong = [own for own in found if (getattr(own.stacks[0], "place", None) is not None) != owned]
  if not found or wrong:
    had = "no curvature state" if not found else f"a state whose blocks have {_NOT[owned]}"
    raise ValueError(
      f"`{who}` found {had}. Pass the state of an optimizer {_WITH[owned]} `sharding`, as"
      " `tx.init(params)` and `tx.update` return it."
    )

  def place(x):
    there = sharding is None or getattr(getattr(x, "sharding", None), "mesh", None) == sharding.mesh
    return x if there else _put(x, sharding.whole(x))

  out = [convert(own) if is_curvature(own) and own.stacks else place(own) for own in leaves]
  return treedef.unflatten(out)


TensorStates = ScaleBySoapState | ScaleByShampooState

_NOT = {True: "no owners", False: "owners already"}
_WITH = {True: "with", False: "without"}


def _ordered(state: Any) -> Any:
  """A state whose blocks have owners, in the order of blocks."""
  if isinstance(state, CurvatureState):
    return in_order(state)
  return state._replace(stacks=tuple(own.in_order(own.slots) for own in state.stacks))


def _dealt(state: Any, sharding: Sharding) -> Any:
  """A state in the order of blocks, with owners."""
  deal = _dealt_tensors if isinstance(state, TensorStates) else _dealt_curvature
  return deal(state, sharding)


def _dealt_tensors(state: Any, sharding: Sharding) -> Any:
  stacks = tuple(Stack((), own.dims[0], own.dims[1:], own.diagonal) for own in state.stacks)
  plan = plan_owners(stacks, sharding.devices)

  def deal(own: Any, slots: int, place: Any) -> OwnedStack:
    index = jnp.asarray(place, jnp.int32)
    rows = lambda x: jnp.zeros((sharding.devices * slots, *x.shape[1:]), x.dtype).at[index].set(x)
    dealt = jax.tree.map(lambda x: _put(rows(x), sharding.owned(x)), own)
    return OwnedStack(dealt, _put(index, sharding.whole(index)))

  steps = jax.tree.map(lambda x: _put(x, sharding.whole(x)), state.steps)
  return type(state)(steps, tuple(map(deal, state.stacks, plan.slots, plan.places)))


def _dealt_curvature(state: CurvatureState, sharding: Sharding) -> CurvatureState:
  plan = plan_owners(tuple(map(_stack_of, state.stacks)), sharding.devices)

  def deal(own: StackState, slots: int, place: Any) -> StackState:
    index = jnp.asarray(place, jnp.int32)
    rows = lambda x: jnp.zeros((sharding.devices * slots, *x.shape[1:]), x.dtype)
    factors = jax.tree.map(rows, own.factors)
    empty = factors, jax.vmap(_scaling_of(own.inverse).empty)(factors)
    deal_one = lambda empty, x: _put(empty.at[index].set(x), sharding.owned(empty))
    dealt = jax.tree.map(deal_one, empty, (own.factors, own.inverse))
    return StackState(*dealt, place=_put(index, sharding.whole(index)))

  whole = lambda tree: jax.tree.map(lambda x: _put(x, sharding.whole(x)), tree)
  stacks = tuple(map(deal, state.stacks, plan.slots, plan.places))
  return whole(state._replace(stacks=()))._replace(stacks=stacks)


def _scaling_of(inverse: Inverse) -> Scaling:
  if isinstance(inverse, EigenvalueInverse):
    return SCALINGS["eigenvalue"]
  return SCALINGS["exact" if isinstance(inverse, ExactInverse) else "factored"]


def _stack_of(own: StackState) -> Stack:
  """The plan of a stack, of which the owners need the sides alone."""
  sides = tuple(own.factors)
  dims = tuple(x.shape[1] for x in sides)
  return Stack((), own.blocks, dims, tuple(x.ndim == 2 for x in sides))


def _put(x: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
  return laid(x, sharding) if isinstance(x, jax.core.Tracer) else jax.device_put(x, sharding)
