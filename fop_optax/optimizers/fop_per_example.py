"""FOP from per-example gradients: Kronecker factors of products, or the Fisher."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature import gram
from fop_optax.curvature.gram import Gram
from fop_optax.dimensions import Dimensions
from fop_optax.optimizers import common, completion, per_example
from fop_optax.optimizers.common import Options, Scalar, ScalarOrSchedule
from fop_optax.optimizers.fop import FopOptions, Projection, ScaleByFopState, no_projection, project
from fop_optax.optimizers.per_example import Settings, Share, Weights
from fop_optax.optimizers.whole_steps import whole_steps
from fop_optax.projection import fop_direction


def scale_by_fop_per_example(
  *,
  groups: int = 2,
  curvature: str = "kronecker",
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
  norm_constraint: ScalarOrSchedule | None = None,
  learning_rate: ScalarOrSchedule = 1.0,
  dimension_numbers: Dimensions = None,
  max_dim: int = 8192,
  max_vector: int = 1024,
) -> optax.GradientTransformationExtraArgs:
  """Turns per-example gradients `[B, *param]` into FOP's direction; no rate and no sign.

  See :func:`fop_optax.fop_per_example` for more details: all arguments, and errors, are as there.
  But there is no `norm_constraint` unless it is given, and `learning_rate` is only what it reckons
  with.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> params, grads = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> tx = fop_optax.scale_by_fop_per_example(curvature="exact", damping=1e-6)
    >>> direction, _ = tx.update(grads, tx.init(params), params)
    >>> print(direction.round(3))  # K-FAC's is (1, 0.5)
    [1.202 0.293]
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
    per_example=True,
  )
  fop_options = FopOptions(projection_metric, total_gradient, adaptive_step, beta)
  settings = Settings(curvature, dimension_numbers, max_dim, max_vector, groups)
  return whole_steps(_project(options, fop_options, settings), ScaleByFopState, settings.check)


def _project(
  options: Options, fop_options: FopOptions, settings: Settings
) -> optax.GradientTransformationExtraArgs:
  fop_options.check()
  if settings.groups < 2:
    raise ValueError(
      f"FOP needs at least two groups of examples, not groups={settings.groups}: leave `groups` at"
      " 2, or use `fop_optax.kfac_per_example`."
    )
  fop_options.check_beta(settings.groups)
  if settings.curvature == "kronecker":
    inner = lambda layers: project(options, fop_options, layers)
    return per_example.kronecker(settings, options, inner)

  def start(curvature, dtype):
    projection = no_projection(1, settings.groups - 1, dtype)
    return ScaleByFopState(curvature, projection, jnp.ones(()))

  share = functools.partial(_projected, fop_options)
  return per_example.exact(settings, options, start, share)


def _projected(
  fop_options: FopOptions,
  of: Gram,
  weights: Weights,
  damping: jax.Array,
  count: jax.Array,
  resolution: float,
) -> Share:
  """`eta M^-1 (g_avg + sum_i beta_i (c_i - s_i g_avg))`, all as weights of the examples."""
  multiply, fisher_norm = {
    "fisher": (lambda y: of.S * y, jnp.linalg.norm(of.S)),
    "damped": (lambda y: (of.S + damping) * y, 0.0),
    "inverse": (None, 0.0),
  }[fop_options.projection_metric]
  r = fop_direction(
    gram.coordinates(of, weights.mean),
    gram.coordinates(of, weights.contrasts),
    lambda y: gram.divide(of, y, damping),
    multiply,
    fisher_norm=fisher_norm,
    total_gradient=fop_options.total_gradient,
    adaptive_step=fop_options.adaptive_step,
    beta=None if fop_options.beta is None else common.value_at(fop_options.beta, count),
    resolution=resolution,
  )
  perpendicular = weights.contrasts - r.s[:, None] * weights.mean
  combined = weights.mean + r.beta @ perpendicular
  projection = Projection(*(x[None] for x in (r.beta, r.eta, r.rho2, r.residual, r.s)))
  return Share(r.eta * gram.solve_weights(of, combined, damping), r.norm2, projection)


def fop_per_example(
  learning_rate: ScalarOrSchedule,
  *,
  groups: int = 2,
  curvature: str = "kronecker",
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
  norm_constraint: ScalarOrSchedule | None = common.NORM_CONSTRAINT,
  dimension_numbers: Dimensions = None,
  max_dim: int = 8192,
  max_vector: int = 1024,
) -> optax.GradientTransformationExtraArgs:
  r"""FOP from the gradients of single examples, without capture and layers.

  `tx.update(per_example_grads, state, params)` takes leaves `[B, *param]`, as
  `jax.vmap(jax.grad(loss), (None, 0))` gives them. Example `i` belongs to group `i mod groups`, as
  in :func:`fop_optax.capture`: for a loss that is the mean over examples, mean gradient and
  contrasts are those of the captured way in. With the gradients :math:`g_1, g_2` of two groups,

  .. math::
    g_\perp = (g_1 - g_2) - s \, g_{avg}, \quad
    s = \frac{(g_1 - g_2)^\top F g_{avg}}{g_{avg}^\top F g_{avg}}, \quad
    \eta \, M^{-1} (g_{avg} + \beta \, g_\perp)

  with beta and eta as in :func:`fop_optax.fop`, and `F` and its damped `M` as in
  :func:`fop_optax.kfac_per_example`: Kronecker factors out of the products
  :math:`V_n = a_n g_n^\top`, leaf by leaf, which are **not K-FAC's**, each leaf with a beta and an
  eta of its own; or, with `curvature="exact"`, the empirical Fisher of all leaves together, with
  one beta and one eta. What is said there of memory, of steps that are not finite, and of what
  optax puts around it holds here too.

  Args:
    learning_rate: a number, an array or a schedule.
    groups: number of groups of examples, two or more; the batch is a multiple of it.
    curvature: `"kronecker"` or `"exact"`.
    damping: see :func:`fop_optax.kfac_per_example`, as for all that have no word here.
    relative_damping: damping in units of a block's mean eigenvalue.
    decay: weight of the old average of the factors.
    momentum: decay of the trace of directions, None for none.
    nesterov: whether momentum looks ahead.
    weight_decay: decoupled decay, times the learning rate.
    mask: which leaves decay.
    scaling: `"factored"` or `"exact"`.
    curvature_update_period: statistics every that many steps.
    inverse_update_period: inverses every that many steps; None: whenever statistics came.
    stagger: whether blocks take turns to remake their inverses.
    projection_metric: the matrix in `s`: `"fisher"`, `"damped"` or `"inverse"`, as in
      :func:`fop_optax.fop`, as for the next three.
    total_gradient: `"mean"` or `"sum"`, the gradient eta weighs a step with.
    adaptive_step: whether eta scales each block's step; else eta is 1.
    beta: None for the formula, or a number or schedule in its place (two groups only).
    norm_constraint: a bound of the squared length of the step that is taken in the damped Fisher
      metric, eta in it.
    dimension_numbers: how leaves with two or more axes are matrices. Kronecker only.
    max_dim: the largest side of a matrix whose factor is kept whole; above, its diagonal is.
    max_vector: the largest vector whose block is kept whole; above, its diagonal is.

  Returns:
    A transformation whose `update` takes per-example gradients, and needs params.

  Raises:
    ValueError: as `kfac_per_example`; with fewer than two groups, or if a `beta` is given with
      more; in `update` if the batch cannot be divided into groups.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp, optax
    >>> def loss(params, x, y):  # of one example
    ...   logits = x @ params["w"] + params["b"]
    ...   return optax.softmax_cross_entropy_with_integer_labels(logits, y)
    >>> params = {"w": jnp.zeros((3, 3)), "b": jnp.zeros(3)}
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> y = jnp.argmax(x, axis=1)
    >>> tx = fop_optax.fop_per_example(0.1)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
    ...   updates, state = tx.update(grads, state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(20):
    ...   params, state = step(params, state)
    >>> print(jnp.mean(jnp.argmax(x @ params["w"] + params["b"], axis=1) == y) > 0.95)
    True

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
    per_example=True,
  )
  fop_options = FopOptions(projection_metric, total_gradient, adaptive_step, beta)
  settings = Settings(curvature, dimension_numbers, max_dim, max_vector, groups)
  inner = _project(options, fop_options, settings)
  complete = completion.complete(options, inner, nesterov, weight_decay, mask)
  return whole_steps(complete, ScaleByFopState, settings.check)
