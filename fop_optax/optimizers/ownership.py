"""Where the arrays of an optimizer's state are, and states that know no mesh."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from fop_optax.curvature.eigenvalue_inverse import EigenvalueInverse
from fop_optax.curvature.exact_inverse import ExactInverse
from fop_optax.curvature.inverse import SCALINGS, Inverse
from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.scaling import Scaling
from fop_optax.curvature.stacks import Stack
from fop_optax.curvature.state import CurvatureState, StackState, in_order
from fop_optax.layers import is_masked
from fop_optax.optimizers.owned_tensors import OwnedStack
from fop_optax.optimizers.shampoo import ScaleByShampooState
from fop_optax.optimizers.soap import ScaleBySoapState
from fop_optax.sharding import Sharding, laid, named, noted


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
  return _like_params(tx, sharding, params, state, _by_owner(sharding, state))


def _by_owner(sharding: Sharding, state: Any) -> Any:
  """What has owners on them, all else on every device."""
  whole = lambda tree: jax.tree.map(sharding.whole, tree)

  def stack(own: StackState | OwnedStack) -> Any:
    if own.place is None:
      return whole(own)
    return jax.tree.map(sharding.owned, own)._replace(place=sharding.whole(own.place))

  is_stack = lambda x: isinstance(x, StackState | OwnedStack)
  return jax.tree.map(lambda x: stack(x) if is_stack(x) else whole(x), state, is_leaf=is_stack)


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
  rest, states, join = _split(opt_state, "to_blocks", owned=True)
  arrays = jax.tree.leaves(states)
  shardings = [x.sharding for x in arrays if _concrete(x)]
  meshes = [own.mesh for own in shardings if isinstance(own, NamedSharding)]
  if not meshes:  # traced, or on the host
    return join(rest, _ordered(states))
  whole = jax.tree.map(lambda x: named(meshes[0], x), jax.eval_shape(_ordered, states))
  return join(rest, jax.jit(_ordered, out_shardings=whole)(states))


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

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x)
    >>> sharding = fop_optax.Sharding(jax.make_mesh((1,), ("data",)))
    >>> state = fop_optax.scale_by_kfac(captured.layers).init(params)  # on one device
    >>> tx = fop_optax.scale_by_kfac(captured.layers, sharding=sharding)  # goes on over the mesh
    >>> dealt = fop_optax.to_owners(state, sharding)
    >>> print(jax.tree.structure(dealt) == jax.tree.structure(tx.init(params)))
    True
  """
  if not isinstance(sharding, Sharding):
    raise TypeError(
      "`to_owners(opt_state, sharding)` takes a `fop_optax.Sharding(mesh)`, not a"
      f" {type(sharding).__name__}."
    )
  rest, states, join = _split(opt_state, "to_owners", owned=False)
  arrive = lambda tree: jax.tree.map(lambda x: _arrived(x, sharding), tree)
  rest, deal = arrive(rest), functools.partial(_dealt, sharding=sharding)
  shardings = _by_owner(sharding, jax.eval_shape(deal, states))
  arrays = jax.tree.leaves(states)
  if any(isinstance(x, jax.core.Tracer) for x in arrays):
    return join(rest, jax.tree.map(laid, deal(states), shardings))
  if any(isinstance(x, jax.Array) for x in arrays):
    return join(rest, jax.jit(deal, out_shardings=shardings)(arrive(states)))
  return join(rest, jax.device_put(deal(states), shardings))  # from the host each has its own


def _split(opt_state: Any, who: str, owned: bool) -> tuple[list[Any], list[Any], Callable]:
  """Of a state all else, its curvature, and what puts them together."""
  is_curvature = lambda x: isinstance(x, CurvatureState | TensorStates) and bool(x.stacks)
  leaves, treedef = jax.tree.flatten(opt_state, is_leaf=is_curvature)
  found = [own for own in leaves if is_curvature(own)]
  wrong = [own for own in found if (getattr(own.stacks[0], "place", None) is not None) != owned]
  if not found or wrong:
    had = "no curvature state" if not found else f"a state whose blocks have {_NOT[owned]}"
    raise ValueError(
      f"`{who}` found {had}. Pass the state of an optimizer {_WITH[owned]} `sharding`, as"
      " `tx.init(params)` and `tx.update` return it."
    )

  def join(rest: Sequence[Any], states: Sequence[Any]) -> Any:
    others, curvature = iter(rest), iter(states)
    return treedef.unflatten(next(curvature if is_curvature(x) else others) for x in leaves)

  return [x for x in leaves if not is_curvature(x)], found, join


def _concrete(x: Any) -> bool:
  return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def _arrived(x: Any, sharding: Sharding) -> Any:
  """An array on the mesh: as it is there, or from elsewhere on every device of it."""
  if not _concrete(x):
    return x if isinstance(x, jax.core.Tracer) else jax.device_put(x, sharding.whole(x))
  there = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == sharding.mesh
  return x if there else jax.device_put(x, sharding.whole(x))


TensorStates = ScaleBySoapState | ScaleByShampooState

_NOT = {True: "no owners", False: "owners already"}
_WITH = {True: "with", False: "without"}


def _ordered(states: Sequence[Any]) -> list[Any]:
  """States whose blocks have owners, in the order of blocks."""

  def ordered(state):
    if isinstance(state, CurvatureState):
      return in_order(state)
    return state._replace(stacks=tuple(own.in_order(own.slots) for own in state.stacks))

  return list(map(ordered, states))


def _dealt(states: Sequence[Any], sharding: Sharding) -> list[Any]:
  """States in the order of blocks, with owners; on the host those that are there."""

  def dealt(state):
    stacks = tuple(map(_stack_of, state.stacks))
    plan = plan_owners(stacks, sharding.devices)
    rows = zip(state.stacks, plan.slots, plan.places, strict=True)
    return state._replace(stacks=tuple(_deal(*row, sharding.devices) for row in rows))

  return list(map(dealt, states))


def _deal(own: Any, slots: int, place: Sequence[int], devices: int) -> StackState | OwnedStack:
  index = np.array(place, np.int32)

  def deal(x, empty):
    """`x` in its slots; in the others the one row that `empty` has."""
    shape = (devices * slots, *x.shape[1:])
    if not isinstance(x, jax.Array):
      out = np.array(np.broadcast_to(np.asarray(empty, x.dtype), shape))
      out[index] = x
      return out
    return jnp.broadcast_to(empty.astype(x.dtype), shape).at[index].set(x)

  one = lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype)
  if not isinstance(own, StackState):
    return OwnedStack(jax.tree.map(deal, own, jax.tree.map(one, own)), jnp.asarray(index))
  factors = jax.tree.map(one, own.factors)
  inverse = jax.vmap(_scaling_of(own.inverse).empty)(factors)
  dealt = jax.tree.map(deal, (own.factors, own.inverse), (factors, inverse))
  return StackState(*dealt, place=jnp.asarray(index))


def _scaling_of(inverse: Inverse) -> Scaling:
  if isinstance(inverse, EigenvalueInverse):
    return SCALINGS["eigenvalue"]
  return SCALINGS["exact" if isinstance(inverse, ExactInverse) else "factored"]


def _stack_of(own: Any) -> Stack:
  """The plan of a stack, of which the owners need the sides alone."""
  if not isinstance(own, StackState):
    return Stack((), own.dims[0], own.dims[1:], own.diagonal)
  dims = tuple(x.shape[1] for x in own.factors)
  return Stack((), own.blocks, dims, tuple(x.ndim == 2 for x in own.factors))
