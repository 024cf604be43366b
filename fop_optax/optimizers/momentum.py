"""Momentum that never carries a step uphill."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MomentumState(NamedTuple):
  """Of `with_momentum`."""

  direction: Any  # state of what makes the directions
  trace: Any  # of `optax.trace`


def with_momentum(
  direction: optax.GradientTransformation,
  momentum: jax.typing.ArrayLike,
  nesterov: bool,
  restart: bool,
) -> optax.GradientTransformationExtraArgs:
  r"""The trace of what `direction` makes of the gradient, begun anew where it would point uphill.

  With g the gradient, d its direction and v the trace

  .. math::
    v \leftarrow \mu v + d, \quad\text{and with } \texttt{restart} \quad
    v \leftarrow d \;\text{ where }\; \langle g, \mu v + d \rangle < 0

  (the gradient scheme of O'Donoghue and Candes, 2015, "Adaptive restart for accelerated gradient
  schemes"). A trace that was right for the curvature of a few steps ago carries on where it rises:
  blocks that are each reckoned alone overshoot together.
  """
  direction = optax.with_extra_args_support(direction)
  trace = optax.trace(momentum, nesterov)

  def init(params: optax.Params) -> MomentumState:
    return MomentumState(direction.init(params), trace.init(params))

  def update(updates, state, params=None, **extra_args):
    directions, inner = direction.update(updates, state.direction, params, **extra_args)
    old = state.trace
    if restart:
      carried = inner_product(updates, old.trace)
      uphill = momentum * carried + inner_product(updates, directions) < 0
      old = jax.tree.map(lambda v: jnp.where(uphill, jnp.zeros_like(v), v), old)
    directions, new = trace.update(directions, old)
    return directions, MomentumState(inner, new)

  return optax.GradientTransformationExtraArgs(init, update)


def inner_product(a: Any, b: Any) -> jax.Array:
  """The sum of products of two trees' entries, in float32 at least."""
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # no `vdot`: it flattens, which a sharded array may not
  dots = jax.tree.map(lambda x, y: jnp.sum((wide(x).conj() * wide(y)).real), a, b)
  return sum(jax.tree.leaves(dots), start=jnp.zeros(()))
