"""From a direction to an optimizer: momentum, decay, rate, and what leaves in no layer get."""

from collections.abc import Hashable
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.layouts import laid_like
from fop_optax.layers import Layers, is_masked
from fop_optax.optimizers import checks
from fop_optax.optimizers.common import Options, Scalar, ScalarOrSchedule, value_at
from fop_optax.optimizers.momentum import with_momentum
from fop_optax.optimizers.whole_steps import all_finite, whole_steps
from fop_optax.sharding import Sharding

FALLBACK_RATE = 0.03  # of the learning rate


def by_layer(
  layers: Layers,
  inside: optax.GradientTransformation,
  outside: optax.GradientTransformation,
  kind: type,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Leaves in a layer go through `inside`, the others through `outside`; frozen ones stay.

  `kind` is the type of the state that `inside` has.

  All are sharded like their parameters, where `sharding` says how: XLA is free to choose otherwise.
  """
  covered, frozen = layers.covered, layers.frozen

  def label(index, leaf):
    if is_masked(leaf):
      return leaf
    return "layers" if index in covered else "frozen" if index in frozen else "fallback"

  def labels(tree):
    if not jax.tree.leaves(tree, is_leaf=is_masked):
      return "layers"  # the placeholder of optax.tree.map_params
    leaves = layers.leaves(tree, "The tree of parameters or gradients")
    return layers.tree(tree, [label(index, leaf) for index, leaf in enumerate(leaves)])

  parts: dict[Hashable, optax.GradientTransformation] = {"layers": inside}
  if frozen:
    parts["frozen"] = optax.set_to_zero()
  if len(covered | frozen) < len(layers.shapes):
    parts["fallback"] = outside
  inner = optax.partition(parts, labels)

  def update(updates, state, params=None, **extra_args):
    leaves = layers.leaves(updates, "The gradient")
    if sharding is not None and sharding.params is not None:
      leaves = laid_like(sharding, layers, leaves)
      updates = layers.tree(updates, leaves)
    others = [leaf for index, leaf in enumerate(leaves) if index not in covered]
    finite = all_finite(others)
    return inner.update(updates, state, params, fallback_finite=finite, **extra_args)

  return whole_steps(optax.GradientTransformationExtraArgs(inner.init, update), kind)


def complete(
  options: Options,
  precondition: optax.GradientTransformation,
  nesterov: bool,
  weight_decay: Scalar,
  mask: Any,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer out of a direction: momentum, weight decay, rate.

  A bounded step is meant to go downhill: with `norm_constraint` momentum starts anew where not.
  """
  checks.check("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
  if isinstance(mask, bool | jax.Array) or any(
    isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(mask)
  ):
    raise ValueError(
      f"`mask={mask}` should be a tree of Python bools like params, or a callable that makes one."
      " `optax.inject_hyperparams` takes any callable for a schedule: declare it with"
      ' `optax.inject_hyperparams(..., static_args="mask")`.'
    )
  if options.momentum is not None:
    traced = with_momentum(
      precondition,
      options.momentum,
      nesterov,
      rate=lambda state: value_at(options.learning_rate, state.curvature.steps.count),
      restart=options.norm_constraint is not None,
      loosen=options.loosens,
      examples=options.per_example,
    )
    precondition = keep_dtypes(traced)
  rest = optax.chain(*_decay_and_rate(options.learning_rate, weight_decay, mask))
  return optax.chain(precondition, keep_dtypes(rest))


def keep_dtypes(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """`inner` with updates and state in the dtypes they came in.

  A rate or momentum that is an array of float32 (every injected hyperparameter, if one parameter is
  float32) would make bfloat16 updates and traces float32, and the state no longer what `init` made.
  """
  inner = optax.with_extra_args_support(inner)
  cast = lambda new, old: jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)

  def update(updates, state, params=None, **extra_args):
    new, new_state = inner.update(updates, state, params, **extra_args)
    return cast(new, updates), cast(new_state, state)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def or_default(
  fallback: optax.GradientTransformation | None, default: optax.GradientTransformation
) -> optax.GradientTransformation:
  """What takes care of leaves in no layer: what the user gave, or else `default`."""
  if fallback is None:
    return default
  checks.check_optimizer("fallback", fallback)
  return fallback


def slow_adamw(
  learning_rate: ScalarOrSchedule, weight_decay: Scalar, mask: Any
) -> optax.GradientTransformation:
  """What takes care of leaves in no layer by default: Adam at a fraction of the rate.

  Weight decay is that of the leaves in layers: times the rate itself.
  """
  adam = (wide_adam(), optax.scale(FALLBACK_RATE))
  return optax.chain(*adam, *_decay_and_rate(learning_rate, weight_decay, mask))


def wide_adam() -> optax.GradientTransformation:
  """Adam's direction in float32 or better: in 16 and 8 bits its epsilon would be zero."""
  adam = optax.scale_by_adam()

  def wide(leaf):
    if jnp.finfo(leaf.dtype).bits >= 32:
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
    return leaf.astype(jnp.float32)

  def init(params):
    return adam.init(jax.tree.map(wide, params))

  def update(updates, state, params=None):
    del params
    directions, state = adam.update(jax.tree.map(wide, updates), state)
    return jax.tree.map(lambda d, u: d.astype(u.dtype), directions, updates), state

  return optax.GradientTransformation(init, update)


def _decay_and_rate(rate, weight_decay, mask):
  stages = [optax.scale_by_learning_rate(rate)]
  if not (isinstance(weight_decay, numbers.Real) and weight_decay == 0):
    stages.insert(0, optax.add_decayed_weights(weight_decay, mask))  # alone needs params
  return stages
