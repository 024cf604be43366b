"""Steps that are taken for all parameters or for none, from states where the parameters are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.state import CurvatureState
from fop_optax.curvature.steps import Steps
from fop_optax.moments import SMALL
from fop_optax.optimizers import checks


def whole_steps(
  inner: optax.GradientTransformationExtraArgs,
  kind: type,
  check: Callable[[Any, Any], None] = checks.check_gradient,
) -> optax.GradientTransformationExtraArgs:
  """`inner`, a step of which is taken for all parameters or for none.

  If loss, gradient or update are not finite (the update in the dtypes of the parameters, so that
  what overflows on the way there counts too), the update is zero and the state stays as it was,
  momentum and fallback included, but for the counters. Its `Steps` say whether loss and gradient
  were; it, or the curvature state around it, settles its own part.

  Before that the state is checked, which has one of that `kind` in it, and the gradient beside the
  parameters.
  """
  is_counted = lambda x: isinstance(x, CurvatureState | Steps)

  @jax.jit  # so that an update outside of a user's jit is not one small program for each array
  def settle(updates, state, before):
    now, was = (
      next(filter(is_counted, jax.tree.leaves(tree, is_leaf=is_counted)))
      for tree in (state, before)
    )
    steps = lambda x: x.steps if isinstance(x, CurvatureState) else x
    finite = all_finite(updates)
    taken = steps(now).taken(steps(was)) & finite

    def keep(new, old):
      return new.settled(old, finite) if is_counted(new) else jnp.where(taken, new, old)

    updates = jax.tree.map(lambda u: jnp.where(taken, u, jnp.zeros_like(u)), updates)
    return updates, jax.tree.map(keep, state, before, is_leaf=is_counted)

  def update(updates, state, params=None, *more, **extra_args):
    if more:
      raise TypeError(
        "`tx.update(grads, opt_state, params, ...)` takes further arguments by their names: write"
        " `tx.update(grads, opt_state, params, stats=stats)`."
      )
    checks.check_kind(state, kind)
    check(updates, params)
    return settle(*inner.update(updates, state, params, **extra_args), state)

  def init(params):
    return placed_like(params, inner.init(params))

  return optax.GradientTransformationExtraArgs(init, update)


def all_finite(tree: Any, whole: bool = False) -> jax.Array:
  """Whether every entry of a tree is finite.

  By sums of `0 x`, each zero or NaN: XLA makes of a conjunction several kernels for each array.
  Behind the barrier all these sums are one array; without it they are copied into each `where`.
  Of arrays that are `whole`, on every device, small ones are looked through side by side.
  """
  leaves = list(map(jnp.asarray, jax.tree.leaves(tree)))
  small = [leaf for leaf in leaves if whole and leaf.size <= SMALL]
  if len(small) > 1:
    leaves = [leaf for leaf in leaves if leaf.size > SMALL]
    leaves.append(jnp.concatenate([leaf.reshape(-1) for leaf in small]))
  gaps = list(map(_gap, leaves))
  if not gaps:
    return jnp.asarray(True)
  return jnp.sum(jax.lax.optimization_barrier(jnp.stack(gaps))) == 0


def _gap(array: jax.Array) -> jax.Array:
  if jnp.iscomplexobj(array):
    return _gap(array.real) + _gap(array.imag)
  if not jnp.issubdtype(array.dtype, jnp.inexact):
    return jnp.zeros(())
  wide = array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array
  return jnp.sum(wide * 0).astype(jnp.float32)


def placed_like(params: Any, state: Any) -> Any:
  """`state` on the mesh of `params`, replicated where it is not on it already.

  There it is after a step: as it is from the start, and as JAX spells it then, the step is
  compiled once.
  """
  concrete = lambda x: isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
  on_mesh = lambda x: concrete(x) and isinstance(x.sharding, jax.sharding.NamedSharding)
  meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(params) if on_mesh(leaf)]
  if not meshes:
    return state

  def place(leaf):
    if not concrete(leaf):
      return leaf
    mesh, spec = (leaf.sharding.mesh, leaf.sharding.spec) if on_mesh(leaf) else (meshes[0], ())
    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    if on_mesh(leaf) and not explicit:
      return leaf
    spec = [*spec, *[None] * (leaf.ndim - len(spec))] if explicit else []
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.device_put(leaf, sharding)

  return jax.tree.map(place, state)
