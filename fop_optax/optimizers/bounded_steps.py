"""The way out of a step of K-FAC or FOP: how far it goes, and the directions as a tree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.stacks import per_stack, stack_matrices, unstack
from fop_optax.layers import Layers
from fop_optax.optimizers.common import Options, Step, value_at

LONGEST = 2.0  # step, in lengths of the weights that it moves


def finish(
  options: Options,
  layers: Layers,
  step: Step,
  count: jax.Array,
  params: optax.Params | None,
  looseness: jax.typing.ArrayLike,
) -> tuple[Any, jax.Array]:
  """The directions as a tree like the gradient, as far as they go; the factor of the norm's bound.

  In units of the loss, and within the size of the weights where `params` tell it. `looseness` is
  that of the norm's bound.
  """
  factor = constrain(options, step.found.norm2, count, looseness)
  scale = step.size * factor
  directions = jax.tree.map(lambda d: scale.astype(d.dtype) * d, step.found.directions)
  if options.own_bounds and params is not None:
    rate = value_at(options.learning_rate, count) / (LONGEST * _share(options, count))
    directions = within_weights(step, layers, directions, params, rate)
  if step.layout is not None:
    leaves = step.layout.join(directions, step.leaves)
  else:
    leaves = unstack(step.stacks, layers, directions, step.leaves)
  return layers.tree(step.updates, leaves), factor


def constrain(
  options: Options, norm2: jax.Array, count: jax.Array, looseness: jax.typing.ArrayLike = 1.0
) -> jax.Array:
  r"""The factor that keeps a step within `norm_constraint`, 1 where there is none.

  With kappa the constraint, times its looseness, alpha the rate and mu the momentum all layers are
  scaled by one factor

  .. math::
    \nu = \min\Big(1, (1 - \mu) \sqrt{\kappa / (\alpha^2 \textstyle\sum_l d_l^\top M_l d_l)}\Big)

  (Ba, Grosse and Martens, 2017, but for 1 - mu), so that of the step taken, alpha times the trace
  of directions, the squared length in `M` is at most kappa: twice the KL divergence `M` predicts.
  The sum of geometrically weighted lengths bounds it, with Nesterov's momentum too, while `M`
  stays: where alpha rises, the trace keeps its steps; of a kappa that falls it is the largest that
  momentum remembers.
  Weight decay and the fallback have no part in it: the one is known beforehand, the other has no
  metric. `norm2` is the sum over layers. Where it overflows nu is NaN: the step is skipped, as no
  direction is known.
  """
  if options.norm_constraint is None:
    return jnp.ones((), norm2.dtype)
  value = lambda x: value_at(x, count).astype(norm2.dtype)
  share = _share(options, count).astype(norm2.dtype)
  kappa = value(options.norm_constraint) * jnp.asarray(looseness, norm2.dtype) * share**2
  size = value(options.learning_rate) ** 2 * jnp.abs(norm2)
  nu2 = jnp.where(size > kappa, kappa / jnp.where(size > kappa, size, 1), 1)
  # The root last: XLA works out numbers that are quicker anew for each leaf.
  return jnp.sqrt(jnp.where(jnp.isfinite(size), nu2, jnp.nan))


def _share(options: Options, count: jax.Array) -> jax.Array:
  """1 - mu: what of a step may be a direction's own, where momentum adds up all like it."""
  return 1 - value_at(0.0 if options.momentum is None else options.momentum, count)


def within_weights(
  step: Step, layers: Layers, directions: Any, params: optax.Params, rate: jax.Array
) -> Any:
  r"""Directions of which no step is longer than twice the weights that it moves.

  With `W` the matrix of a block, its bias in it, alpha the learning rate and mu the momentum, so
  that `rate` is alpha / (2 (1 - mu)),

  .. math::
    d \leftarrow \min\Big(1, \frac{2 (1 - \mu) |W|_F}{\alpha |d|_F}\Big) \, d
    \quad\text{(where W = 0: } |W| \text{ of all blocks)}

  Layers multiply: their first-order changes add up to what they do together only while each is
  small beside its weights. A network that starts with small ones, or behind a small scale, has
  little curvature, and would leave its start by a thousand times its size. Weights that are zero
  have no size of their own, and may do much while nothing that other layers do there counts yet:
  they take that of all weights together.
  """
  leaves = layers.leaves(params, "params")
  if step.layout is None:
    sizes = [stack.blocks for stack in step.stacks]
    pairs = zip(step.stacks, directions, strict=True)
    weights = [stack_matrices(stack, layers, leaves, d.dtype) for stack, d in pairs]
    square = lambda x: jnp.sum(x**2, axis=range(1, x.ndim))
    squares = [jnp.concatenate(list(map(square, tree))) for tree in (weights, directions)]
  else:
    sizes = [len(own.places) for own in step.layout.families]
    squares = step.layout.squares_by_block(step.layout.split(leaves), directions)
  W, d = map(jnp.sqrt, squares)
  W = jnp.where(W > 0, W, jnp.linalg.norm(W))
  longer = (W > 0) & (rate * d > W)
  shares = per_stack(jnp.where(longer, W / jnp.where(longer, rate * d, 1), 1), sizes)
  scaled = lambda x, own: own.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype) * x
  rows = zip(directions, shares, strict=True)
  return [jax.tree.map(lambda x, own=own: scaled(x, own), tree) for tree, own in rows]
