"""What K-FAC and FOP share: options, checks of what comes in, and the way into a step."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax import _compat
from fop_optax.curvature import factors, per_example_factors
from fop_optax.curvature.advance import advance
from fop_optax.curvature.damping import Damping
from fop_optax.curvature.inverse import SCALINGS
from fop_optax.curvature.layouts import Layout, plan_layout
from fop_optax.curvature.owned import Directions, Method, StackedGradients, advance_owned
from fop_optax.curvature.scaling import Scaling
from fop_optax.curvature.stacks import (
  Stack,
  dtype_of,
  plan_stacks,
  stack_matrices,
)
from fop_optax.curvature.state import (
  CurvatureOptions,
  CurvatureState,
  factor_shapes,
  init_curvature,
)
from fop_optax.curvature.steps import Finite
from fop_optax.layers import Layers, Stats, is_masked
from fop_optax.optimizers import checks
from fop_optax.optimizers.bases import check_second_moments
from fop_optax.optimizers.refresh import WarmupPeriod
from fop_optax.optimizers.whole_steps import all_finite
from fop_optax.sharding import Sharding

# Defaults, chosen over many workloads: `python -m experiments.benchmarks.defaults`.
RELATIVE_DAMPING = 1.0
NORM_CONSTRAINT = 0.1
UPDATE_PERIOD = WarmupPeriod(steps=20, period=10)

Scalar = float | jax.Array
ScalarOrSchedule = Scalar | optax.Schedule


@dataclasses.dataclass(frozen=True)
class Options:
  """Hyperparameters that K-FAC and FOP share; checked where they are Python numbers."""

  damping: ScalarOrSchedule | None
  relative_damping: ScalarOrSchedule | None
  decay: Scalar
  scaling: str
  curvature_update_period: ScalarOrSchedule
  inverse_update_period: ScalarOrSchedule | None
  stagger: bool
  norm_constraint: ScalarOrSchedule | None
  learning_rate: ScalarOrSchedule
  momentum: Scalar | None = None
  sharding: Sharding | None = None
  factor_dtype: Any = None
  per_example: bool = False  # whether statistics are those of `curvature.per_example_factors`

  def __post_init__(self):
    if self.scaling == "adam":
      raise ValueError(
        "`scaling='adam'` is no damped inverse: Adam's moments in the eigenbasis of the Fisher"
        " factors are `fop_optax.soap(learning_rate, layers=captured.layers, fisher=True)`."
      )
    checks.one_of("scaling", self.scaling, tuple(self._scalings))
    for name in ("damping", "relative_damping"):
      checks.check(name, getattr(self, name), lambda x: x >= 0, "at least 0")
    checks.check("decay", self.decay, lambda x: 0 <= x < 1, "in [0, 1)")
    for name in ("curvature_update_period", "inverse_update_period"):
      checks.check_period(name, getattr(self, name))
    checks.check("norm_constraint", self.norm_constraint, lambda x: x > 0, "above 0")
    checks.check_given("learning_rate", self.learning_rate)
    checks.check("learning_rate", self.learning_rate, lambda x: x >= 0, "at least 0")
    checks.check("momentum", self.momentum, lambda x: 0 <= x < 1, "in [0, 1)")
    checks.check_dtype("factor_dtype", self.factor_dtype)
    checks.check_sharding(self.sharding)

  def in_units_of_the_loss(self, layers: Layers) -> bool:
    """Whether steps grow with the loss.

    Other labels than those given make a curvature that needs nothing of the kind.
    """
    return self.own_bounds and not self.per_example and layers.fisher == "empirical"

  @property
  def own_bounds(self) -> bool:
    """Whether steps have the bounds that are ours beside `norm_constraint`.

    Where damping is in the curvature's units alone: values of papers mean what they mean there.
    """
    return self.norm_constraint is not None and self.damping is None

  @property
  def loosens(self) -> bool | jax.Array:
    """Whether the norm's bound gives way: the default one, injected or not; another is held."""
    kappa = self.norm_constraint
    if kappa is None or callable(kappa) or not self.own_bounds:
      return False
    # Equal too: XLA divides float16 by a number that is not rounded to it.
    return (kappa == NORM_CONSTRAINT) | (abs(kappa / NORM_CONSTRAINT - 1) < 1e-6)

  def damping_at(self, count: jax.Array) -> Damping:
    """Damping at a step: what was given, and the default where nothing was."""
    relative = self.relative_damping
    if self.damping is None and relative is None:
      relative = RELATIVE_DAMPING
    value = lambda x: jnp.zeros(()) if x is None else value_at(x, count)
    return Damping(value(self.damping), value(relative))

  @property
  def curvature(self) -> CurvatureOptions:
    """The part of it that the curvature needs."""
    return CurvatureOptions(
      self.decay,
      self._scalings[self.scaling],
      per_example_factors.fold if self.per_example else factors.fold,
      self.curvature_update_period,
      self.inverse_update_period,
      self.stagger,
      self.sharding,
      self.factor_dtype,
    )

  @property
  def _scalings(self) -> Mapping[str, Scaling]:
    return per_example_factors.SCALINGS if self.per_example else SCALINGS


def value_at(value: ScalarOrSchedule, count: jax.Array) -> jax.Array:
  """A hyperparameter at a step, whether a number, an array or a schedule."""
  array = jnp.asarray(value(count) if callable(value) else value)
  if array.ndim:
    raise ValueError(
      f"A schedule returned {array.dtype}{list(array.shape)} where it should return one number."
    )
  return array


class Step(NamedTuple):
  """One step under way: the curvature after it, and what the method makes of the gradient."""

  stacks: tuple[Stack, ...]
  found: Directions
  curvature: CurvatureState
  updates: Any
  leaves: list[Any]
  layout: Layout | None = None  # of the gradient, where parameters are sharded
  size: jax.typing.ArrayLike = 1.0  # of the loss, in whose units a step is


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
  fallback_finite: jax.Array,
  method: Method,
  value: jax.Array | None = None,
) -> Step:
  """Checks what came in, stacks the gradient, lets the curvature and then `method` take a step.

  `fallback_finite` says whether the gradients that are in no layer are finite; `value` is handed
  to the method.
  """
  leaves = layers.leaves(updates, "The gradient")
  stacks = plan_stacks(layers, leaves)
  check_state(stacks, state, options.sharding)
  trees = [layers.leaves(tree, "A contrast in `stats`") for tree in stats.contrasts if contrasts]
  damping = options.damping_at(state.steps.count)
  resolutions = [_resolution(stack, layers, leaves) for stack in stacks]
  layout = None
  if options.sharding is not None:
    layout = plan_layout(options.sharding, layers, stacks, leaves)
  if layout is not None:
    pieces = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *map(layout.split, [leaves, *trees]))
    gradients = StackedGradients([], [], resolutions, value, pieces)
    gradients_finite = layout.finite(pieces)
  else:
    gradients = _stacked(stacks, layers, state, leaves, trees, resolutions, value)
    gradients_finite = all_finite((gradients.matrices, gradients.contrasts), whole=True)
  finite = Finite(jnp.isfinite(stats.loss), gradients_finite & fallback_finite)
  if options.sharding is None or not stacks:
    curvature = advance(state, stacks, stats, finite, damping, options.curvature)
    found = method(curvature.stacks, curvature.damping, gradients)
  else:
    curvature, found = advance_owned(
      state, stacks, stats, finite, damping, options.curvature, gradients, method, layout
    )
  curvature = curvature.in_unit_of(stats.loss, finite.both)
  size = curvature.size_of(stats.loss) if options.in_units_of_the_loss(layers) else 1.0
  return Step(stacks, found, curvature, updates, leaves, layout, size)


def _stacked(
  stacks: Sequence[Stack],
  layers: Layers,
  state: CurvatureState,
  leaves: Sequence[Any],
  trees: Sequence[Sequence[Any]],
  resolutions: list[float],
  value: jax.Array | None,
) -> StackedGradients:
  """A gradient, and contrasts, that every device has."""
  dtypes = [s.dtype for s in state.stacks]
  gather = lambda leaves: [
    stack_matrices(stack, layers, leaves, dtype)
    for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  matrices = gather(leaves)
  others = [jnp.stack(parts, axis=1) for parts in zip(*map(gather, trees), strict=True)]
  return StackedGradients(matrices, others, resolutions, value)


def transformation(
  options: Options, layers: Layers, init: optax.TransformInitFn, apply: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
  """`apply(updates, state, params, stats, fallback_finite, looseness)` once `stats` are checked.

  `fallback_finite` is as in `begin`, `looseness` how many times the norm's bound is loosened.
  """

  def update(
    updates,
    state,
    params=None,
    *,
    stats: Stats | None = None,
    fallback_finite=True,
    looseness=1.0,
    **extra_args,
  ):
    del extra_args
    stats = check_stats(options, layers, stats, updates, state)
    return apply(updates, state, params, stats, fallback_finite, looseness)

  return optax.GradientTransformationExtraArgs(init, update)


def check_stats(options: Options, layers: Layers, stats: Any, updates: Any, state: Any) -> Stats:
  """Checks that `stats` came, from a loss with these layers, and are averaged over devices."""
  if stats is None:
    raise ValueError(
      "No `stats`: curvature statistics go to `tx.update(grads, opt_state, params, stats=stats)`,"
      " with `loss, grads, stats = captured.value_and_grad(params, ...)`. Flax's"
      " `TrainState.apply_gradients` cannot hand them on: call `state.tx.update` in its place."
    )
  checks.check_factors(layers, stats)
  if options.curvature.scaling.squares:
    check_second_moments(layers, stats)
  if len(stats.contrasts) != layers.groups - 1:
    raise ValueError(
      f"`stats` have {len(stats.contrasts)} contrasts, but these layers were captured with"
      f" groups={layers.groups}. `layers` and `stats` should come from the same `captured`."
    )
  if local := sorted(_compat.varying((updates, stats)) - _compat.varying(state)):
    raise ValueError(
      f"Gradient or `stats` differ between devices along the mesh axes {local}, but the optimizer's"
      " state does not. Inside `jax.shard_map` write `loss, grads, stats = jax.lax.pmean("
      f"captured.value_and_grad(params, ...), {tuple(local)})`."
    )
  return stats._replace(refresh=jnp.asarray(stats.refresh, bool))  # a float after `pmean`


def check_state(
  stacks: Sequence[Stack], state: CurvatureState, sharding: Sharding | None = None
) -> None:
  """Checks that a state was made for these layers and owners, leading axes and all."""
  had = [tuple(tuple(x.shape) for x in s.factors) for s in state.stacks]
  need = factor_shapes(stacks, sharding)
  owned = any(s.place is not None for s in state.stacks)
  if had == need and owned == (sharding is not None and bool(stacks)):
    return
  raise ValueError(
    f"The optimizer's state is of another model or another mask: its factors have shapes {had},"
    f" but these layers need {need}. Make a state with `tx.init(params)`."
    f"{checks.of_owners(owned, sharding)}"
  )


def _resolution(stack: Stack, layers: Layers, leaves: Sequence[Any]) -> float:
  """The coarsest machine epsilon of the gradients in a stack."""
  members = [leaf for i in stack.layers for leaf in layers[i].leaves]
  return max((float(jnp.finfo(dtype_of(leaves[leaf])).eps) for leaf in members), default=0.0)
