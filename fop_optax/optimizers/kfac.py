"""K-FAC: natural gradient with Kronecker-factored curvature (Martens and Grosse, 2015)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.owned import Directions
from fop_optax.curvature.state import CurvatureState
from fop_optax.layers import Layers
from fop_optax.optimizers import checks, common, completion
from fop_optax.optimizers.bounded_steps import finish
from fop_optax.optimizers.common import Options, Scalar, ScalarOrSchedule
from fop_optax.sharding import Sharding


class ScaleByKfacState(NamedTuple):
  """State of the layers' part of `scale_by_kfac`."""

  curvature: CurvatureState
  norm_scale: jax.Array  # shape=(): nu of `norm_constraint` at the last step


def scale_by_kfac(
  layers: Layers,
  *,
  damping: ScalarOrSchedule | None = None,
  relative_damping: ScalarOrSchedule | None = None,
  decay: Scalar = 0.95,
  scaling: str = "factored",
  curvature_update_period: ScalarOrSchedule = common.UPDATE_PERIOD,
  inverse_update_period: ScalarOrSchedule | None = None,
  stagger: bool = False,
  norm_constraint: ScalarOrSchedule | None = None,
  learning_rate: ScalarOrSchedule = 1.0,
  fallback: optax.GradientTransformation | None = None,
  factor_dtype: Any = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Rescales gradients by K-FAC's inverse; no rate and no sign.

  See :func:`fop_optax.kfac` for more details: all arguments, and errors, are as there. But there
  is no `norm_constraint` unless it is given, and `learning_rate` is only what it reckons with;
  `fallback` is a direction for the leaves in no layer, by default `optax.scale_by_adam()`.

  Example:
    Of least squares the exact Fisher matrix is the Hessian: the step is Newton's.

    >>> import fop_optax, jax.numpy as jnp, optax
    >>> loss = lambda params, x, y: fop_optax.squared_error(x @ params["w"], y)
    >>> params, x = {"w": jnp.zeros((2, 1))}, jnp.array([[1.0, 1.0], [1.0, -2.0]])
    >>> y = x @ jnp.array([[3.0], [-1.0]])
    >>> captured = fop_optax.capture(loss, params, x, y, fisher="exact")
    >>> newton = fop_optax.scale_by_kfac(captured.layers, damping=1e-6)
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
  inner = precondition(options, checks.check_layers(layers))
  outside = completion.or_default(fallback, completion.wide_adam())
  return completion.by_layer(layers, inner, outside, ScaleByKfacState, sharding)


def precondition(options: Options, layers: Layers) -> optax.GradientTransformationExtraArgs:
  """K-FAC on the leaves that are in layers; the others have to be masked."""
  solve = jax.vmap(options.curvature.scaling.solve)

  def method(stacks, damping, gradients):
    columns = stacks, damping, gradients.matrices
    directions = [solve(s.inverse, used, V) for s, used, V in zip(*columns, strict=True)]
    # d' M d = V' M^-1 V
    norm2 = sum(
      (jnp.sum(V * d) for V, d in zip(gradients.matrices, directions, strict=True)),
      start=jnp.zeros(()),
    )
    return Directions(directions, norm2)

  def init(params: optax.Params) -> Any:
    _, curvature = common.init(options, layers, params)
    return ScaleByKfacState(curvature, jnp.ones(()))

  @jax.jit  # so that an update outside of a user's jit does not compile its branches every time
  def apply(updates, state, params, stats, fallback_finite, looseness):
    step = common.begin(
      options, layers, updates, state.curvature, stats, False, fallback_finite, method
    )
    updates, nu = finish(options, layers, step, state.curvature.steps.count, params, looseness)
    return updates, ScaleByKfacState(step.curvature, nu.astype(state.norm_scale.dtype))

  return common.transformation(options, layers, init, apply)


def kfac(
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
  norm_constraint: ScalarOrSchedule | None = common.NORM_CONSTRAINT,
  fallback: optax.GradientTransformation | None = None,
  factor_dtype: Any = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""K-FAC: natural gradient with Kronecker-factored curvature.

  The Fisher block of a layer `y = x W + b` is taken for :math:`A \otimes G`, with `A` the second
  moment of its inputs (a one appended for the bias) and `G` that of the gradients at its outputs.
  With running averages of both and :math:`V = [\nabla W; \nabla b]` the direction is

  .. math::
    M^{-1} V = (A + \pi \sqrt\lambda I)^{-1} \, V \, (G + \sqrt\lambda / \pi \, I)^{-1}

  or, with `scaling="exact"`, :math:`(A \otimes G + \lambda I)^{-1} V`. With `"eigenvalue"` (EKFAC)
  only the eigenvectors of the factors are kept, and the rest is measured in their basis:

  .. math::
    M^{-1} V = U_A \big[ (U_A^\top V U_G) / (S + \lambda) \big] U_G^\top, \qquad
    S = E_n \big[ (U_A^\top V_n U_G)^2 \big]

  entry by entry, with the gradient `V_n` of example n's own loss, so that `S` is the diagonal of
  the Fisher block in that basis. It comes from `captured.value_and_grad(...,
  basis=fop_optax.bases(opt_state))`, which says what counts as one gradient, and is averaged like
  the factors. The first statistics find no basis: they count with the diagonal of `A (x) G`. Under
  a new basis `S` is carried over by the squared overlaps of the eigenvectors, not begun anew.

  Then come momentum, decoupled weight decay and the learning rate. Statistics of the present batch
  enter before its gradient is preconditioned, so that the first step is exact.

  Steps are in units of the loss. With the labels given (`fisher="empirical"`) the Fisher matrix of
  a squared error is about twice the loss times its Gauss-Newton matrix, so that a step that is
  bounded, with `relative_damping` alone, is

  .. math::
    s = \max(u, \min(L, \operatorname{median}_l t_l)), \qquad
    u = \min(1, \max(|L_0|, \max_l t_l)), \qquad t_l = \tfrac{1}{2} \operatorname{tr} G_l

  times as large, L the present loss and the median that of layers with a gradient: 1 of a cross
  entropy, more of large residuals, less of a loss that starts small (u is of the first step, and at
  least a hundredth of what came later). And where momentum would carry a bounded step uphill, by
  the present gradient, it begins anew (O'Donoghue and Candes, 2015); where the rate rises it is
  what it was in the steps of the last one.

  Nor is a step longer than twice the weights that it moves. Layers multiply, and a network that
  starts with small weights, or behind a small scale, has so little curvature that its first bounded
  step would leave the start by a thousand times its size. With `relative_damping` alone and a
  bound, a block's direction is, `params` given,

  .. math::
    d \leftarrow \min\Big(1, \frac{2 (1 - \mu) |W|_F}{\alpha |d|_F}\Big) \, d

  with alpha the rate, mu the momentum and the bias in `W`; of weights that are zero `|W|` is that
  of all together.

  And the default bound, with `relative_damping` alone, goes with what a step leaves of the slope
  along it. Where the slope has turned, steps are longer than the way down, and go back and forth on
  the noise of their batches: by up to a tenth a step the bound falls, down to a millionth, or comes
  back to 0.1, so that a step ends where the slope along it does. So steps get shorter as a training
  comes to the floor of its noise, at small batches soon, and at a constant rate too. Where nine
  tenths are left of a step that it held back the loss is straight: it is half as much again, and
  half as much, down to 0.1, where less than half is left. So a network that starts in a saturated
  cross entropy (inputs up to 255) gets out of it. The equations are in
  `fop_optax/optimizers/momentum.py`. A bound other than the default is held as it was given.

  If the loss, a gradient or the update is not finite, the whole step is skipped: the update is zero
  for every parameter, and momentum, weight decay and fallback stand still with the count. Skipped
  steps are counted by their cause, as are statistics that are not finite and inverses that fail
  (the last good one stays): see :func:`fop_optax.diagnostics`. Damping below the rounding of the
  Fisher block, `4 eps |A| |G|`, is raised to it.

  A parameter that no gradient of the loss reaches is left as it is, without decay.

  `optax.MultiSteps` hands on the `stats` of its last micro-step only: accumulate with
  `fop_optax.capture(..., micro_batches=...)` instead.

  Args:
    learning_rate: a number, an array or a schedule.
    layers: `captured.layers` of `captured = fop_optax.capture(loss, params, ...)`.
    damping: lambda, a number, an array or a schedule of the step, in units of the loss' curvature.
      Given alone, that is all; where neither is given, `relative_damping` is 1.
    relative_damping: lambda in units of each block's mean eigenvalue,
      :math:`\mathrm{tr} A \, \mathrm{tr} G / (\dim A \dim G)`, with `scaling="eigenvalue"` the mean
      of `S`: what is damped does not depend on the units of the loss then, nor on how far it has
      come down. A layer of several blocks (experts, scanned layers) has at least its mean over
      them, as an expert that hardly a row came to has next to no curvature. With both, their sum.
    decay: weight of the old average when statistics are folded in; less in the beginning, so that
      the average starts exact.
    momentum: decay of the trace of directions, None for none: then the bound stays as it
      is, too. See above for where it begins anew.
    nesterov: whether momentum looks ahead.
    weight_decay: decoupled decay, times the learning rate; of leaves in layers and of those that
      the default `fallback` takes care of.
    mask: which leaves decay, a tree of bools or a callable of params, as in `optax.adamw`. Under
      `optax.inject_hyperparams` declare a callable with `static_args="mask"`.
    scaling: `"factored"`, `"exact"` or `"eigenvalue"`.
    curvature_update_period: statistics every that many steps, a number or a schedule of the step,
      through :func:`fop_optax.refresh_due`; statistics that come are folded in whatever the period.
      By default :class:`fop_optax.WarmupPeriod`: at each of the first 20 steps, then every 10.
    inverse_update_period: inverses (or eigenbases) every that many steps, likewise; None: whenever
      statistics came.
    stagger: whether blocks take turns to remake their inverses, so that no step pays for all.
    norm_constraint: kappa, a number or a schedule: the step that is taken, rate and momentum in it,
      has at most this squared length in the damped Fisher metric, which is twice the KL divergence
      it predicts (times s squared, s as above; the default moves, as above). Without decay
      and fallback, which have no part in it. None: no bound, and nothing else of what goes with it.
    fallback: a complete optimizer for leaves that are in no layer, applied as it is; by default
      Adam at 0.03 of `learning_rate`, with `weight_decay` and `mask` as above.
    factor_dtype: in which the running factors are held, as `jnp.bfloat16`, with which they take
      half the bytes; the arithmetic, and inverses, are in float32 or better all the same. Rounded
      so, an entry stays that new statistics would change by less than its rounding. Tried with the
      default damping; one far below it may not survive the rounding. None: as the arithmetic.
    sharding: :class:`fop_optax.Sharding`: each block of curvature is kept, inverted and applied by
      one device of its mesh, the directions brought to all once a step. For batches sharded over
      the mesh, and parameters that are replicated or sharded (`Sharding(mesh, params=...)`; a
      gradient then goes to the owners piece by piece, and directions come back so); updates are
      equal to rounding. With `scaling="eigenvalue"` the bases are gathered besides where statistics
      are taken, as every device measures in them. None: every device has all of it, the gradient
      too.

  Returns:
    A transformation whose `update` takes `stats=`.

  Raises:
    ValueError: for hyperparameters out of range; in `init` and `update` for trees, statistics or
      states that are not of these layers, and layers that are masked in part.
    TypeError: if `layers`, `stats`, `sharding` or `fallback` are of another type.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp, optax
    >>> def loss(params, x, y):
    ...   return fop_optax.squared_error(x @ params["w"] + params["b"], y)
    >>> params = {"w": jnp.zeros((3, 1)), "b": jnp.zeros(1)}
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> y = x @ jnp.array([[1.0], [-2.0], [3.0]]) + 0.5
    >>> captured = fop_optax.capture(loss, params, x, y, fisher="exact")
    >>> tx = fop_optax.kfac(0.1, captured.layers)
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
    Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
    <https://arxiv.org/abs/1503.05671>`_, 2015

    George et al., `Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis
    <https://arxiv.org/abs/1806.03884>`_, 2018
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
  inner = precondition(options, checks.check_layers(layers))
  outside = completion.or_default(
    fallback, completion.slow_adamw(learning_rate, weight_decay, mask)
  )
  return completion.by_layer(
    layers,
    completion.complete(options, inner, nesterov, weight_decay, mask),
    completion.keep_dtypes(outside),
    ScaleByKfacState,
    sharding,
  )
