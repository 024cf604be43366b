"""Momentum that never carries a step uphill, and a bound that goes with what is left of a slope."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.optimizers import checks

STRAIGHT, BENT = 0.9, 0.5  # how much of the slope along the last step is left
GROWTH, DECAY = 1.5, 2.0  # of a looseness above 1, a step
SPEED, LEAST = 0.1, 1e-6  # of one below 1: by how much it moves in a step at most, and its floor


class MomentumState(NamedTuple):
  """Of `with_momentum`."""

  direction: Any  # state of what makes the directions
  trace: Any  # of `optax.trace`
  slope: jax.Array  # shape=(): along the last step, by the gradient that it was made of
  looseness: jax.Array  # shape=(): times the bound
  rate: jax.Array  # shape=(): that the last step was multiplied by


def with_momentum(
  direction: optax.GradientTransformation,
  momentum: jax.typing.ArrayLike,
  nesterov: bool,
  *,
  rate: Callable[[Any], jax.Array],
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
  blocks that are each reckoned alone overshoot together. Where the rate alpha rises, v is
  first multiplied by :math:`\alpha_{last} / \alpha`: a direction that was bounded for a small rate,
  or for none at the start of a warm-up, is not carried into steps of a large one.

  With `loosen` the bound of the direction is ours to move: what is handed to it at the next step as
  `looseness` is, with the last trace v and the norm's factor :math:`\nu`,

  .. math::
    l &\leftarrow \begin{cases}
      1.5 \, l & q > 0.9 \text{, the bound held the last step back, v has gathered} \\
      \max(1, l / 2) & \text{else, where } l > 1, q < 0.5 \\
      \min(1, l \, e^{r / 10}) & \text{else, where } l \le 1 \end{cases} \\
    q &= \frac{\langle g, v \rangle}{\langle g_{last}, v \rangle}, \qquad
    r = \frac{\langle g, v \rangle}{|\langle g, v \rangle| + h \langle g_{last}, v \rangle}, \qquad
    h = \frac{\alpha \nu}{1 - \mu}

  Where nearly all of the slope is left (q) the loss is straight, which the curvature of gradients
  does not tell: that of a saturated cross entropy is as large as of another. The first steps of a
  trace are shorter than the bound, and straight for that: v has gathered where a direction is less
  than twice the share that it has at last, in the slope along the step.

  r is what is left of left and used: h is the share that a step of a gathered trace uses up if the
  metric is the Hessian. Noise is in v and g alike, so that q alone would tell little of small steps
  of small batches. Where r is below 0 steps are longer than the way down along them, and go back
  and forth on the floor of their own noise (at which Pflug, 1990, stops) or across a valley: the
  bound is steered to where r is 0, at least to 1e-6 of what it was.

  `rate` tells alpha by the state of `direction`. With `examples` gradients are of single examples,
  `[B, *param]`: g is their mean.
  """
  direction = optax.with_extra_args_support(direction)
  trace = optax.trace(momentum, nesterov)
  may_loosen = loosen is not False  # an array, where hyperparameters are injected

  def init(params: optax.Params) -> MomentumState:
    slope, looseness, rate = jnp.zeros(()), jnp.ones(()), jnp.zeros(())  # no buffer twice
    return MomentumState(direction.init(params), trace.init(params), slope, looseness, rate)

  def update(updates, state, params=None, **extra_args):
    gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), updates) if examples else updates
    if may_loosen:
      extra_args = {**extra_args, "looseness": jnp.where(loosen, state.looseness, 1)}
    now = state.rate
    directions, inner = direction.update(updates, state.direction, params, **extra_args)
    old, slope, looseness = state.trace, state.slope, state.looseness
    checks.check_trace(old.trace, gradient)
    if (restart or may_loosen) and jax.tree.leaves(gradient):
      now = rate(state.direction).astype(state.rate.dtype)
      # both products at once: a sum over devices each
      carried, own = inner_product(gradient, old.trace), inner_product(gradient, directions)
      rises = now > state.rate
      part = jnp.where(rises, state.rate / jnp.where(rises, now, 1), 1) if restart else 1
      slope = momentum * part * carried + own
      if may_loosen:
        gathered = own < 2 * (1 - momentum) * slope
        looseness = jnp.where(loosen, _loosened(state, momentum, carried, gathered), 1)
      if restart:
        uphill = slope < 0
        kept = jnp.where(uphill, 0, part)
        old = jax.tree.map(lambda v: kept.astype(v.dtype) * v, old)
        slope = jnp.where(uphill, own, slope)
    directions, new = trace.update(directions, old)
    return directions, MomentumState(inner, new, slope, looseness, now)

  return optax.GradientTransformationExtraArgs(init, update)


def _loosened(
  state: MomentumState, momentum: jax.typing.ArrayLike, carried: jax.Array, gathered: jax.Array
) -> jax.Array:
  """The looseness for the next step, with the slope that is left along the last one."""
  loose, slope, scale = state.looseness, state.slope, state.direction.norm_scale
  known = slope > 0
  size = jnp.abs(carried) + state.rate * scale / (1 - momentum) * slope
  left = carried / jnp.where(size > 0, size, 1)  # r
  tight = jnp.clip(loose * jnp.exp(SPEED * left), LEAST, 1)
  less = jnp.where(carried < BENT * slope, jnp.maximum(loose / DECAY, 1), loose)
  other = jnp.where(loose > 1, less, jnp.where(known, tight, loose))
  straight = known & (carried > STRAIGHT * slope) & (scale < 1) & gathered
  return jnp.where(straight, GROWTH * loose, other)


def inner_product(a: Any, b: Any) -> jax.Array:
  """The sum of products of two trees' entries, in float32 at least."""
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # no `vdot`: it flattens, which a sharded array may not
  dots = jax.tree.map(lambda x, y: jnp.sum((wide(x).conj() * wide(y)).real), a, b)
  return sum(jax.tree.leaves(dots), start=jnp.zeros(()))
