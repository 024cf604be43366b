"""FOP: Fisher-orthogonal projection on top of K-FAC (Lu and Armour, 2025)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.block_gradients import Gradients
from fop_optax.curvature.owned import Directions
from fop_optax.curvature.scaling import Scaling, UsedDamping
from fop_optax.curvature.state import CurvatureState, StackState
from fop_optax.group_gradients import tree_of
from fop_optax.layers import Layers
from fop_optax.optimizers import checks, common, completion
from fop_optax.optimizers.bounded_steps import finish
from fop_optax.optimizers.common import Options, Scalar, ScalarOrSchedule
from fop_optax.projection import check_total_gradient, fop_directions
from fop_optax.sharding import Sharding

METRICS = ("fisher", "damped", "inverse")


class Projection(NamedTuple):
  """What FOP found at its last step, of all blocks: see `fop_optax.projection`."""

  beta: jax.Array  # shape=(blocks, groups - 1)
  eta: jax.Array  # shape=(blocks,)
  rho2: jax.Array  # shape=(blocks,)
  residual: jax.Array  # shape=(blocks,)
  s: jax.Array  # shape=(blocks, groups - 1)


def no_projection(blocks: int, contrasts: int, dtype: Any) -> Projection:
  """Before the first step."""
  beta, s = (jnp.zeros((blocks, contrasts), dtype) for _ in range(2))
  eta, rho2, residual = (jnp.zeros(blocks, dtype) for _ in range(3))
  return Projection(beta, eta, rho2, residual, s)


class ScaleByFopState(NamedTuple):
  """State of the layers' part of `scale_by_fop`."""

  curvature: CurvatureState
  projection: Projection  # of all blocks, stack after stack
  norm_scale: jax.Array  # shape=(): nu of `norm_constraint` at the last step


class FopOptions(NamedTuple):
  """Hyperparameters that FOP has beyond K-FAC's."""

  projection_metric: str
  total_gradient: str
  adaptive_step: bool
  beta: ScalarOrSchedule | None
  contrast_tree: bool = False

  def check(self) -> None:
    checks.one_of("projection_metric", self.projection_metric, METRICS)
    check_total_gradient(self.total_gradient)
    checks.check("beta", self.beta, lambda x: True, "a number")

  def check_beta(self, groups: int) -> None:
    if self.beta is not None and groups > 2:
      raise ValueError(
        f"`beta={self.beta}` is a number, but there are groups={groups} of examples: with more than"
        " two groups it would depend on the basis of the contrasts. Leave `beta=None`, or use"
        " groups=2."
      )

  def check_layers(self, layers: Layers) -> None:
    self.check()
    if layers.groups < 2:
      raise ValueError(
        "FOP needs the gradients of at least two groups of examples, but these layers were captured"
        " with groups=1: use `fop_optax.capture(loss, params, ..., groups=2)`, or `fop_optax.kfac`."
      )
    self.check_beta(layers.groups)


def scale_by_fop(
  layers: Layers,
  *,
  damping: ScalarOrSchedule | None = None,
  relative_damping: ScalarOrSchedule | None = None,
  decay: Scalar = 0.95,
  scaling: str = "factored",
  curvature_update_period: ScalarOrSchedule = common.UPDATE_PERIOD,
  inverse_update_period: ScalarOrSchedule | None = None,
  stagger: bool = False,
  projection_metric: str = "fisher",
  total_gradient: str = "mean",
  adaptive_step: bool = True,
  beta: ScalarOrSchedule | None = None,
  contrast_tree: bool = False,
  norm_constraint: ScalarOrSchedule | None = None,
  learning_rate: ScalarOrSchedule = 1.0,
  fallback: optax.GradientTransformation | None = None,
  factor_dtype: Any = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Turns gradients into FOP's direction; no rate and no sign.

  See :func:`fop_optax.fop` for more details: all arguments, and errors, are as there. But there is
  no `norm_constraint` unless it is given, and `learning_rate` is only what it reckons with;
  `fallback` is a direction for the leaves in no layer, by default `optax.scale_by_adam()`.

  Example:
    Both halves of the batch are equal, so that nothing is projected: the step is K-FAC's, which of
    least squares with the exact Fisher matrix is Newton's.

    >>> import fop_optax, jax.numpy as jnp, optax
    >>> loss = lambda params, x, y: fop_optax.squared_error(x @ params["w"], y)
    >>> params, half = {"w": jnp.zeros((2, 1))}, jnp.array([[1.0, 1.0], [1.0, -2.0]])
    >>> x = jnp.repeat(half, 2, axis=0)  # example i is in group i mod 2
    >>> y = x @ jnp.array([[3.0], [-1.0]])
    >>> captured = fop_optax.capture(loss, params, x, y, groups=2, fisher="exact")
    >>> newton = fop_optax.scale_by_fop(captured.layers, damping=1e-6)
    >>> tx = optax.chain(newton, optax.scale(-1.0))
    >>> _, grads, stats = captured.value_and_grad(params, x, y)
    >>> updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    >>> print(updates["w"].round(1).ravel())
    [ 3. -1.]
  """
  options = Options(
    damping=damping,
    relative_damping=relative_damping,
    decay=decay,
    scaling=scaling,
    curvature_update_period=curvature_update_period,
    inverse_update_period=inverse_update_period,
    stagger=stagger,
    norm_constraint=norm_constraint,
    learning_rate=learning_rate,
    factor_dtype=factor_dtype,
    sharding=sharding,
  )
  fop_options = FopOptions(projection_metric, total_gradient, adaptive_step, beta, contrast_tree)
  inner = project(options, fop_options, checks.check_layers(layers))
  outside = completion.or_default(fallback, completion.wide_adam())
  return completion.by_layer(layers, inner, outside, ScaleByFopState, sharding)


def project(
  options: Options, fop_options: FopOptions, layers: Layers
) -> optax.GradientTransformationExtraArgs:
  """FOP on the leaves that are in layers; the others have to be masked."""
  fop_options.check_layers(layers)
  scaling = options.curvature.scaling
  tree = tree_of(layers.groups) if fop_options.contrast_tree else None

  def method(stacks, damping, gradients):
    if not stacks:  # everything is masked
      return Directions([], jnp.zeros(()))
    directions, numbers = fop_directions(
      list(
        map(
          functools.partial(_gradients, scaling, fop_options.projection_metric),
          stacks,
          damping,
          gradients.matrices,
          gradients.contrasts,
          gradients.resolutions,
        )
      ),
      total_gradient=fop_options.total_gradient,
      adaptive_step=fop_options.adaptive_step,
      beta=gradients.value,
      tree=tree,
    )
    projection = Projection(*numbers[: len(Projection._fields)])
    return Directions(directions, jnp.sum(numbers.norm2), projection)

  def init(params: optax.Params) -> Any:
    stacks, curvature = common.init(options, layers, params)
    blocks = sum(stack.blocks for stack in stacks)
    dtype = jnp.result_type(jnp.float32, *(s.dtype for s in curvature.stacks))
    projection = no_projection(blocks, layers.groups - 1, dtype)
    return ScaleByFopState(curvature, projection, jnp.ones(()))

  @jax.jit  # so that an update outside of a user's jit does not compile its branches every time
  def apply(updates, state, params, stats, fallback_finite, looseness):
    count = state.curvature.steps.count
    beta = None if fop_options.beta is None else common.value_at(fop_options.beta, count)
    step = common.begin(
      options, layers, updates, state.curvature, stats, True, fallback_finite, method, beta
    )
    if not step.stacks:
      return updates, state._replace(curvature=step.curvature)
    updates, nu = finish(options, layers, step, count, params, looseness)
    nu = nu.astype(state.norm_scale.dtype)
    return updates, ScaleByFopState(step.curvature, step.found.numbers, nu)

  return common.transformation(options, layers, init, apply)


def _gradients(
  scaling: Scaling,
  projection_metric: str,
  state: StackState,
  damping: UsedDamping,
  average: jax.Array,
  contrasts: jax.Array,
  resolution: float,
) -> Gradients:
  """The gradients of a stack with the metric and the inverses of its blocks."""
  factors, inverse = state.running, state.inverse
  solve = functools.partial(jax.vmap(scaling.solve), inverse, damping)
  multiply, fisher_norm = {
    "fisher": (
      functools.partial(jax.vmap(scaling.fisher), inverse, factors),
      lambda: jax.vmap(scaling.norm)(inverse, factors),
    ),
    # M with the running factors of now, damped as when they were last inverted.
    "damped": (functools.partial(jax.vmap(scaling.damped), inverse, damping, factors), lambda: 0.0),
    "inverse": (None, lambda: 0.0),
  }[projection_metric]
  return Gradients(average, contrasts, solve, multiply, fisher_norm(), resolution)


def fop(
  learning_rate: ScalarOrSchedule,
  layers: Layers,
  *,
  damping: ScalarOrSchedule | None = None,
  relative_damping: ScalarOrSchedule | None = None,
  decay: Scalar = 0.95,
  momentum: Scalar | None = 0.9,
  nesterov: bool = False,
  weight_decay: Scalar = 0.0,
  mask: Any = None,
  scaling: str = "factored",
  curvature_update_period: ScalarOrSchedule = common.UPDATE_PERIOD,
  inverse_update_period: ScalarOrSchedule | None = None,
  stagger: bool = False,
  projection_metric: str = "fisher",
  total_gradient: str = "mean",
  adaptive_step: bool = True,
  beta: ScalarOrSchedule | None = None,
  contrast_tree: bool = False,
  norm_constraint: ScalarOrSchedule | None = common.NORM_CONSTRAINT,
  fallback: optax.GradientTransformation | None = None,
  factor_dtype: Any = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""FOP: natural gradient plus what the difference of two half-batch gradients tells.

  With the gradients :math:`g_1, g_2` of two halves of a batch, per layer,

  .. math::
    g_{avg} = (g_1 + g_2) / 2, \quad
    g_\perp = (g_1 - g_2) - s \, g_{avg}, \quad
    s = \frac{(g_1 - g_2)^\top F g_{avg}}{g_{avg}^\top F g_{avg}}

  .. math::
    \eta \, M^{-1} (g_{avg} + \beta \, g_\perp), \quad
    \beta = \frac{g_{avg}^\top M^{-1} g_\perp}{g_\perp^\top M^{-1} g_\perp}

  with the running Kronecker factors' `F` and its damped `M` as in :func:`fop_optax.kfac`, and eta
  as in `fop_optax.projection`, which has the equations, their form for more groups and the guards.
  Weight and bias of a layer are one block. The sign of beta tells nothing (the halves can be
  swapped); rho^2 says how much FOP differs from K-FAC. Everything else is as in `kfac`, with which
  it shares all arguments but these:

  Args:
    learning_rate: a number, an array or a schedule.
    layers: `captured.layers` of a loss captured with `groups=2` or more.
    damping: see :func:`fop_optax.kfac`, as for all that follow here.
    relative_damping: damping in units of each block's mean eigenvalue.
    decay: weight of the old average of the factors.
    momentum: decay of the trace of directions, None for none.
    nesterov: whether momentum looks ahead.
    weight_decay: decoupled decay, times the learning rate.
    mask: which leaves decay.
    scaling: `"factored"`, `"exact"` or `"eigenvalue"`; with the last `F` is EKFAC's,
      `(U_A (x) U_G) diag(S) (U_A (x) U_G)'`.
    curvature_update_period: statistics every that many steps (the paper's curvature interval); at
      each of the first 20, then every 10.
    inverse_update_period: inverses every that many steps; None: whenever statistics came.
    stagger: whether blocks take turns to remake their inverses.
    projection_metric: the matrix in `s`: `"fisher"`, the undamped running `F` (the paper's equation
      4); `"damped"`, `M`; `"inverse"`, `M^-1` (its Algorithm 1 hands over nothing else): beta is
      then zero and FOP is K-FAC, a control.
    total_gradient: `"mean"` or `"sum"`, the gradient eta weighs a step with. The paper's equation 8
      says the sum, its prose fits the mean; with the sum, steps are twice as long.
    adaptive_step: whether eta scales each layer's step; else eta is 1.
    beta: None for the formula, or a number or schedule in its place (two groups only).
    contrast_tree: whether the contrasts of 4, 8, ... groups are folded level by level of a binary
      tree and not all at once, each level on the combination that the one above made; ours.
    norm_constraint: a bound of the squared length of the step that is taken in the damped Fisher
      metric, eta in it.
    fallback: a complete optimizer for leaves that are in no layer; by default Adam at 0.03 of
      `learning_rate`, with `weight_decay` and `mask`.
    factor_dtype: in which the running factors are held; None: as the arithmetic.
    sharding: over which devices blocks of curvature have owners; None: every device has all of it.

  Returns:
    A transformation whose `update` takes `stats=`.

  Raises:
    ValueError: as `kfac`; if the loss was captured with `groups=1`; if a `beta` is given with more
      than two groups, or a tree asked for of a number that is no power of two.
    TypeError: if `layers`, `stats`, `sharding` or `fallback` are of another type.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp, optax
    >>> def loss(params, x, y):
    ...   return fop_optax.squared_error(x @ params["w"] + params["b"], y)
    >>> params = {"w": jnp.zeros((3, 1)), "b": jnp.zeros(1)}
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> y = x @ jnp.array([[1.0], [-2.0], [3.0]]) + 0.5
    >>> captured = fop_optax.capture(loss, params, x, y, groups=2, fisher="exact")
    >>> tx = fop_optax.fop(0.1, captured.layers)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   refresh = fop_optax.refresh_due(state)
    ...   _, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    ...   updates, state = tx.update(grads, state, params, stats=stats)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(100):
    ...   params, state = step(params, state)
    >>> print(params["w"].round(1).ravel(), params["b"].round(1))
    [ 1. -2.  3.] [0.5]

  References:
    Lu and Armour, `Fisher-Orthogonal Projection Methods for Natural Gradient Descent with Large
    Batches <https://arxiv.org/abs/2508.13898>`_, 2025
  """
  options = Options(
    damping=damping,
    relative_damping=relative_damping,
    decay=decay,
    scaling=scaling,
    curvature_update_period=curvature_update_period,
    inverse_update_period=inverse_update_period,
    stagger=stagger,
    norm_constraint=norm_constraint,
    learning_rate=learning_rate,
    momentum=momentum,
    factor_dtype=factor_dtype,
    sharding=sharding,
  )
  fop_options = FopOptions(projection_metric, total_gradient, adaptive_step, beta, contrast_tree)
  inner = project(options, fop_options, checks.check_layers(layers))
  outside = completion.or_default(
    fallback, completion.slow_adamw(learning_rate, weight_decay, mask)
  )
  return completion.by_layer(
    layers,
    completion.complete(options, inner, nesterov, weight_decay, mask),
    completion.keep_dtypes(outside),
    ScaleByFopState,
    sharding,
  )
