"""What K-FAC and FOP share: options, checks of what comes in, and the way in and out of a step."""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature import factors, per_example_factors
from fop_optax.curvature.inverse import SCALINGS
from fop_optax.curvature.stacks import (
  Stack,
  dtype_of,
  plan_stacks,
  stack_matrices,
  unstack,
)
from fop_optax.curvature.state import CurvatureOptions, CurvatureState, advance, init_curvature
from fop_optax.layers import Layers, Stats, is_masked

Scalar = float | jax.Array
ScalarOrSchedule = Scalar | optax.Schedule


@dataclasses.dataclass(frozen=True)
class Options:
  """Hyperparameters that K-FAC and FOP share; checked where they are Python numbers."""

  damping: ScalarOrSchedule
  decay: Scalar
  scaling: str
  curvature_update_period: Scalar
  inverse_update_period: Scalar | None
  stagger: bool
  norm_constraint: ScalarOrSchedule | None
  learning_rate: ScalarOrSchedule
  per_example: bool = False  # whether statistics are those of `curvature.per_example_factors`

  def __post_init__(self):
    one_of("scaling", self.scaling, tuple(SCALINGS))
    check("damping", self.damping, lambda x: x >= 0, "at least 0")
    check("decay", self.decay, lambda x: 0 <= x < 1, "in [0, 1)")
    for name in ("curvature_update_period", "inverse_update_period"):
      whole = lambda x: x >= 1 and x == int(x)
      check(name, getattr(self, name), whole, "a whole number of steps, at least 1")
    check("norm_constraint", self.norm_constraint, lambda x: x > 0, "above 0")

  @property
  def curvature(self) -> CurvatureOptions:
    """The part of it that the curvature needs."""
    scalings, fold = SCALINGS, factors.fold
    if self.per_example:
      scalings, fold = per_example_factors.SCALINGS, per_example_factors.fold
    return CurvatureOptions(
      self.decay,
      scalings[self.scaling],
      fold,
      self.curvature_update_period,
      self.inverse_update_period,
      self.stagger,
    )


def check_layers(layers: Any) -> Layers:
  """Checks that `layers` are what `capture` found, and some."""
  if not isinstance(layers, Layers):
    raise TypeError(
      f"`layers` is a {type(layers).__name__}, not a `Layers`. Pass `captured.layers` of"
      " `captured = fop_optax.capture(loss, params, ...)`."
    )
  if not layers:
    raise ValueError("`layers` is empty: the loss has no layer to precondition.")
  return layers


def check(name: str, value: Any, valid: Callable[[Any], bool], wanted: str) -> None:
  """Checks a hyperparameter that is a plain number; arrays and schedules are known at run time."""
  if isinstance(value, numbers.Real) and not valid(value):
    raise ValueError(f"`{name}={value}` should be {wanted}.")


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
  """Checks a hyperparameter that names a choice."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"`{name}={value!r}` should be one of {', '.join(map(repr, choices))}.")


def value_at(value: ScalarOrSchedule, count: jax.Array) -> jax.Array:
  """A hyperparameter at a step, whether a number, an array or a schedule."""
  return jnp.asarray(value(count) if callable(value) else value)


class Step(NamedTuple):
  """One step under way: the gradient by stack, the curvature after it."""

  stacks: tuple[Stack, ...]
  matrices: list[jax.Array]  # one a stack: [blocks, rows, outputs]
  contrasts: list[jax.Array]  # one a stack: [blocks, groups - 1, rows, outputs]; none for K-FAC
  resolutions: list[float]  # one a stack: machine epsilon of its gradients
  finite: jax.Array
  curvature: CurvatureState
  updates: Any
  leaves: list[Any]


def init(options: Options, layers: Layers, params: Any) -> tuple[tuple[Stack, ...], CurvatureState]:
  """Stacks and curvature state for `params`, of which only shapes and dtypes are read."""
  # optax.tree.map_params asks for a state with a placeholder that has no leaves: as if unmasked.
  placeholder = not jax.tree.leaves(params, is_leaf=is_masked)
  leaves = None if placeholder else layers.leaves(params, "params")
  stacks = plan_stacks(layers, leaves)
  return stacks, init_curvature(layers, stacks, leaves, options.curvature)


def begin(
  options: Options,
  layers: Layers,
  updates: Any,
  state: CurvatureState,
  stats: Stats,
  contrasts: bool,
) -> Step:
  """Checks what came in, stacks the gradient and lets the curvature take its step."""
  leaves = layers.leaves(updates, "The gradient")
  stacks = plan_stacks(layers, leaves)
  check_state(stacks, state)
  dtypes = [s.dtype for s in state.stacks]
  gather = lambda leaves: [
    stack_matrices(stack, layers, leaves, dtype)
    for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  matrices = gather(leaves)
  others: list[jax.Array] = []
  if contrasts:
    trees = [gather(layers.leaves(tree, "A contrast in `stats`")) for tree in stats.contrasts]
    others = [jnp.stack(parts, axis=1) for parts in zip(*trees, strict=True)]
  finite = all_finite(matrices + others)
  damping = value_at(options.damping, state.count)
  curvature = advance(
    state, stacks, stats.factors, stats.refresh, finite, damping, options.curvature
  )
  resolutions = [_resolution(stack, layers, leaves) for stack in stacks]
  return Step(stacks, matrices, others, resolutions, finite, curvature, updates, leaves)


def finish(
  options: Options,
  layers: Layers,
  step: Step,
  directions: list[jax.Array],
  norm2: jax.Array,
  count: jax.Array,
) -> Any:
  """The directions as a tree like the gradient; zero on a step that is skipped."""
  scale = constrain(options, norm2, count)
  directions = [jnp.where(step.finite, scale.astype(d.dtype) * d, 0) for d in directions]
  leaves = unstack(step.stacks, layers, directions, step.leaves)
  return layers.tree(step.updates, leaves)


def constrain(options: Options, norm2: jax.Array, count: jax.Array) -> jax.Array:
  r"""The factor that keeps a step within `norm_constraint`, 1 where there is none.

  With `norm_constraint` kappa all layers are scaled by one factor (Ba, Grosse and Martens, 2017):

  .. math::
    \nu = \min\Big(1, \sqrt{\kappa / (\alpha^2 \textstyle\sum_l d_l^\top M_l d_l)}\Big)

  so that a step at rate alpha has at most kappa of twice the KL divergence that `M` predicts;
  `norm2` is the sum.
  """
  if options.norm_constraint is None:
    return jnp.ones((), norm2.dtype)
  kappa = value_at(options.norm_constraint, count).astype(norm2.dtype)
  rate = value_at(options.learning_rate, count).astype(norm2.dtype)
  size = rate**2 * jnp.abs(norm2)
  return jnp.where(size > kappa, jnp.sqrt(kappa / jnp.where(size > kappa, size, 1)), 1)


def keep_if(finite: jax.Array, new: Any, old: Any) -> Any:
  """`new` where the step is finite, else `old`."""
  return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def by_layer(
  layers: Layers, inside: optax.GradientTransformation, outside: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """Leaves in a layer go through `inside`, the others through `outside` (unless not finite)."""

  def labels(tree):
    if not jax.tree.leaves(tree, is_leaf=is_masked):
      return "layers"  # the placeholder of optax.tree.map_params
    leaves = layers.leaves(tree, "The tree of parameters or gradients")
    covered = layers.covered
    out = [
      leaf if is_masked(leaf) else "layers" if index in covered else "fallback"
      for index, leaf in enumerate(leaves)
    ]
    return layers.tree(tree, out)

  parts: dict[Hashable, optax.GradientTransformation] = {"layers": inside}
  if len(layers.covered) < len(layers.shapes):
    parts["fallback"] = skip_nonfinite(outside)
  return optax.partition(parts, labels)


def skip_nonfinite(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """`inner`, but a gradient that is not finite gives no update and leaves its state as it is."""
  inner = optax.with_extra_args_support(inner)

  def update(updates, state, params=None, **extra_args):
    finite = all_finite(updates)
    new, new_state = inner.update(updates, state, params, **extra_args)
    new = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), new)
    return new, keep_if(finite, new_state, state)

  return optax.GradientTransformationExtraArgs(inner.init, update)


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


def all_finite(tree: Any) -> jax.Array:
  """Whether every entry of a tree is finite."""
  leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)


def check_stats(layers: Layers, stats: Any) -> Stats:
  """Checks that `stats` came, and from a loss with these layers."""
  if stats is None:
    raise ValueError(
      "No `stats`: curvature statistics go to `tx.update(grads, opt_state, params, stats=stats)`,"
      " with `loss, grads, stats = captured.value_and_grad(params, ...)`. Flax's"
      " `TrainState.apply_gradients` cannot hand them on: call `state.tx.update` in its place."
    )
  if not isinstance(stats, Stats):
    raise TypeError(
      f"`stats` is a {type(stats).__name__}: pass what `captured.value_and_grad` returned."
    )
  shapes = [tuple(tuple(x.shape) for x in f) for f in stats.factors]
  if shapes != [layer.factor_shapes for layer in layers]:
    raise ValueError(
      f"`stats` are of another loss: their factors have shapes {shapes}, but these layers have"
      f" {[layer.factor_shapes for layer in layers]}. `layers` and `stats` should come from the"
      " same `captured`."
    )
  if len(stats.contrasts) != layers.groups - 1:
    raise ValueError(
      f"`stats` have {len(stats.contrasts)} contrasts, but these layers were captured with"
      f" groups={layers.groups}. `layers` and `stats` should come from the same `captured`."
    )
  return stats


def check_state(stacks: Sequence[Stack], state: CurvatureState) -> None:
  """Checks that a state was made for these layers, leading axes and all."""
  had = [tuple(tuple(x.shape) for x in s.running.factors) for s in state.stacks]
  if had != [stack.factor_shapes for stack in stacks]:
    raise ValueError(
      f"The optimizer's state is of another model or another mask: its factors have shapes {had},"
      f" but these layers need {[stack.factor_shapes for stack in stacks]}. Make a state with"
      " `tx.init(params)`."
    )


def _resolution(stack: Stack, layers: Layers, leaves: Sequence[Any]) -> float:
  """The coarsest machine epsilon of the gradients in a stack."""
  members = [leaf for i in stack.layers for leaf in layers[i].leaves]
  return max((float(jnp.finfo(dtype_of(leaves[leaf])).eps) for leaf in members), default=0.0)


def complete(
  options: Options,
  precondition: optax.GradientTransformation,
  momentum: Scalar | None,
  nesterov: bool,
  weight_decay: Scalar,
  mask: Any,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer out of a direction: momentum, weight decay, rate."""
  check("learning_rate", options.learning_rate, lambda x: x >= 0, "at least 0")
  check("momentum", momentum, lambda x: 0 <= x < 1, "in [0, 1)")
  check("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
  if isinstance(mask, bool | jax.Array) or any(
    isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(mask)
  ):
    raise ValueError(
      f"`mask={mask}` should be a tree of Python bools like params, or a callable that makes one."
      " `optax.inject_hyperparams` takes any callable for a schedule: declare it with"
      ' `optax.inject_hyperparams(..., static_args="mask")`.'
    )
  rate = options.learning_rate
  stages = []
  if momentum is not None:
    stages.append(optax.trace(momentum, nesterov))
  if not (isinstance(weight_decay, numbers.Real) and weight_decay == 0):
    stages.append(optax.add_decayed_weights(weight_decay, mask))  # alone needs params
  stages.append(optax.scale_by_learning_rate(rate))
  return optax.chain(precondition, keep_dtypes(optax.chain(*stages)))


def slow_adamw(learning_rate: ScalarOrSchedule) -> optax.GradientTransformation:
  """What takes care of leaves in no layer by default: AdamW at a hundredth of the rate."""
  rate = learning_rate
  return optax.adamw((lambda count: 0.01 * rate(count)) if callable(rate) else 0.01 * rate)
