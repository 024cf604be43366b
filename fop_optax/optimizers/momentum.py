"""Momentum that never carries a step uphill, and a bound that gives way on a straight slope."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.optimizers import checks

STRAIGHT, BENT = 0.9, 0.5  # how much of the slope along the last step is left
GROWTH, DECAY = 1.5, 2.0  # of looseness, a step


class MomentumState(NamedTuple):
  """Of `with_momentum`."""

  direction: Any  # state of what makes the directions
  trace: Any  # of `optax.trace`
  slope: jax.Array  # shape=(): along the last step, by the gradient that it was made of
  looseness: jax.Array  # shape=(): how many times the bound was loosened


def with_momentum(
  direction: optax.GradientTransformation,
  momentum: jax.typing.ArrayLike,
  nesterov: bool,
  *,
  restart: bool = False,
  loosen: bool | jax.Array = False,
  examples: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""The trace of what `direction` makes of the gradient, begun anew where it would point uphill.

  With g the gradient, d its direction and v the trace

  .. math::
    v \leftarrow \mu v + d, \quad\text{and with } \texttt{restart} \quad
    v \leftarrow d \;\text{ where }\; \langle g, \mu v + d \rangle < 0

  (the gradient scheme of O'Donoghue and Candes, 2015, "Adaptive restart for accelerated gradient
  schemes"). A trace that was right for the curvature of a few steps ago carries on where it rises:
  blocks that are each reckoned alone overshoot together.

  With `loosen` the bound of the direction is ours to loosen: what is handed to it at the next step
  as `looseness` is

  .. math::
    l \leftarrow \begin{cases}
      1.5 \, l & q > 0.9 \text{, the bound held the last step back, v has gathered} \\
      \max(1, l / 2) & q < 0.5 \end{cases}, \qquad
    q = \frac{\langle g, v \rangle}{\langle g_{last}, v \rangle}

  with the last trace v. Where nearly all of the slope is left the loss is straight, which the
  curvature of gradients does not tell: that of a saturated cross entropy is as large as of another.
  The state of `direction` says as `norm_scale` whether its bound held it back. The first steps of a
  trace are shorter than the bound, and straight for that: v has gathered where a direction is less
  than twice the share that it has at last, in the slope along the step.

  With `examples` gradients are of single examples, `[B, *param]`: g is their mean.
  """
  direction = optax.with_extra_args_support(direction)
  trace = optax.trace(momentum, nesterov)
  may_loosen = loosen is not False  # an array, where hyperparameters are injected

  def init(params: optax.Params) -> MomentumState:
    return MomentumState(direction.init(params), trace.init(params), jnp.zeros(()), jnp.ones(()))

  def update(updates, state, params=None, **extra_args):
    gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), updates) if examples else updates
    if may_loosen:
      extra_args = {**extra_args, "looseness": jnp.where(loosen, state.looseness, 1)}
    directions, inner = direction.update(updates, state.direction, params, **extra_args)
    old, slope, looseness = state.trace, state.slope, state.looseness
    checks.check_trace(old.trace, gradient)
    if restart or may_loosen:  # both products at once: a sum over devices each
      carried, own = inner_product(gradient, old.trace), inner_product(gradient, directions)
      slope = momentum * carried + own
      if may_loosen:
        gathered = own < 2 * (1 - momentum) * slope
        looseness = jnp.where(loosen, _loosened(state, carried, gathered), 1)
      if restart:
        uphill = slope < 0
        old = jax.tree.map(lambda v: jnp.where(uphill, jnp.zeros_like(v), v), old)
        slope = jnp.where(uphill, own, slope)
    directions, new = trace.update(directions, old)
    return directions, MomentumState(inner, new, slope, looseness)

  return optax.GradientTransformationExtraArgs(init, update)


def _loosened(state: MomentumState, carried: jax.Array, gathered: jax.Array) -> jax.Array:
  """The looseness for the next step, with the slope that is left along the last one."""
  loose, held_back = state.looseness, state.direction.norm_scale < 1
  straight = (carried > STRAIGHT * state.slope) & (state.slope > 0) & held_back & gathered
  less = jnp.where(carried < BENT * state.slope, jnp.maximum(loose / DECAY, 1), loose)
  return jnp.where(straight, GROWTH * loose, less)


def inner_product(a: Any, b: Any) -> jax.Array:
  """The sum of products of two trees' entries, in float32 at least."""
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # no `vdot`: it flattens, which a sharded array may not
  dots = jax.tree.map(lambda x, y: jnp.sum((wide(x).conj() * wide(y)).real), a, b)
  return sum(jax.tree.leaves(dots), start=jnp.zeros(()))
