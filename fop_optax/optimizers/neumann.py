"""The Neumann optimizer: a Newton step's series, a term a step (Krishnan et al., 2018)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.stacks import dtype_of
from fop_optax.curvature.steps import Finite, Steps, no_steps
from fop_optax.layers import is_masked
from fop_optax.optimizers import by_tensor, checks, common, completion
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.optimizers.whole_steps import all_finite, whole_steps

RESETS = ("doubling", "doubled modulus", "linear", "constant", "never")
WARMUP_EPOCHS, RESET_EPOCHS = 5, 10  # table 1
REPULSION = 1e-5  # beta over the number of variables: table 1
CLOSEST = 1e-2  # r at which the repulsion stops growing, over that of equilibrium; ours


class ScaleByNeumannState(NamedTuple):
  """State of `scale_by_neumann`; trees like params, in float32 or better."""

  steps: Steps
  mu: jax.Array  # shape=(): the momentum of the last step, 0 before the first
  m: optax.Updates  # the series' iterate
  v: optax.Params  # moving average of the parameters


@dataclasses.dataclass(frozen=True)
class NeumannOptions:
  """Hyperparameters; checked where they are Python numbers."""

  learning_rate: ScalarOrSchedule
  steps_per_epoch: Scalar
  alpha: Scalar
  beta: Scalar | None
  gamma: Scalar
  num_sgd_steps: Scalar | None
  reset_period: Scalar | None
  resets: str
  reset_moves: bool
  momentum_unit: Scalar
  min_momentum: Scalar
  max_momentum: Scalar

  def __post_init__(self):
    checks.one_of("resets", self.resets, RESETS)
    for name in ("learning_rate", "alpha", "beta", "num_sgd_steps"):
      checks.check(name, getattr(self, name), lambda x: x >= 0, "at least 0")
    for name in ("gamma", "min_momentum", "max_momentum"):
      checks.check(name, getattr(self, name), lambda x: 0 <= x < 1, "in [0, 1)")
    for name in ("steps_per_epoch", "reset_period"):
      checks.check_period(name, getattr(self, name))
    checks.check("momentum_unit", self.momentum_unit, lambda x: x > 0, "above 0")

  def momentum(self, t: jax.Array, dtype: Any) -> jax.Array:
    """`mu(t) = 1 - 1 / (1 + t)` within its range, t in units of `momentum_unit` steps."""
    mu = 1 - 1 / (1 + t.astype(dtype) / self.momentum_unit)
    return jnp.clip(mu, self.min_momentum, self.max_momentum).astype(dtype)

  def iteration(self, count: jax.Array) -> jax.Array:
    """t: which iteration comes, from one; not above zero in the warm-up."""
    warmup = self.num_sgd_steps
    warmup = WARMUP_EPOCHS * self.steps_per_epoch if warmup is None else warmup
    return count + 1 - jnp.asarray(warmup).astype(jnp.int32)

  def resets_at(self, t: jax.Array) -> jax.Array:
    """Whether the series starts anew at iteration t: at the first, and then every K."""
    period = self.reset_period
    period = RESET_EPOCHS * self.steps_per_epoch if period is None else period
    past, within = jnp.divmod(t - 1, jnp.asarray(period).astype(jnp.int32))
    return (t > 0) & (within == 0) & self._which(past)

  def _which(self, k: jax.Array) -> jax.Array:
    """Which multiples `k K` of the period, from 0, are resets."""
    if self.resets == "doubling":  # 0, 1, 3, 7: K doubles at each
      return (k + 1) & k == 0
    if self.resets == "doubled modulus":  # 0, 2, 4, 8: t = 1 (mod K) with a K that doubled at each
      return (k != 1) & (k & (k - 1) == 0)
    if self.resets == "linear":  # 0, 1, 3, 6: K grows by itself at each
      j = jnp.floor((jnp.sqrt(8.0 * k + 1) - 1) / 2 + 0.5).astype(k.dtype)
      return j * (j + 1) == 2 * k
    return jnp.full_like(k, self.resets == "constant", bool)


def scale_by_neumann(
  learning_rate: ScalarOrSchedule,
  steps_per_epoch: Scalar,
  *,
  alpha: Scalar = 1e-7,
  beta: Scalar | None = None,
  gamma: Scalar = 0.99,
  num_sgd_steps: Scalar | None = None,
  reset_period: Scalar | None = None,
  resets: str = "doubling",
  reset_moves: bool = False,
  momentum_unit: Scalar = 1,
  min_momentum: Scalar = 0.5,
  max_momentum: Scalar = 0.9,
) -> optax.GradientTransformation:
  """Turns gradients into the Neumann optimizer's step, but for its sign.

  See :func:`fop_optax.neumann` for more details: all arguments, and errors, are as there. The rate
  is part of it: the series adds up gradients times the rate at their step.

  Example:
    >>> import fop_optax, jax.numpy as jnp, optax
    >>> params, grads = jnp.ones(2), jnp.array([4.0, 1.0])
    >>> tx = optax.chain(fop_optax.scale_by_neumann(0.1, steps_per_epoch=10), optax.scale(-1.0))
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates.round(3))  # gradient descent: the warm-up
    [-0.4 -0.1]
  """
  options = NeumannOptions(
    learning_rate=learning_rate,
    steps_per_epoch=steps_per_epoch,
    alpha=alpha,
    beta=beta,
    gamma=gamma,
    num_sgd_steps=num_sgd_steps,
    reset_period=reset_period,
    resets=resets,
    reset_moves=reset_moves,
    momentum_unit=momentum_unit,
    min_momentum=min_momentum,
    max_momentum=max_momentum,
  )
  return whole_steps(_neumann(options), ScaleByNeumannState)


def _neumann(options: NeumannOptions) -> optax.GradientTransformationExtraArgs:
  def init(params: optax.Params) -> ScaleByNeumannState:
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, _wide(p)), params)
    v = jax.tree.map(_copy, params)
    return ScaleByNeumannState(no_steps(), jnp.zeros(()), zeros, v)

  @jax.jit  # so that an update outside of a user's jit is not one small program for each array
  def apply(updates, state, params):
    count = state.steps.count
    g, w = (jax.tree.map(lambda x: x.astype(_wide(x)), tree) for tree in (updates, params))
    t = options.iteration(count)
    warmup, reset = t <= 0, options.resets_at(t)
    eta = common.value_at(options.learning_rate, count)
    mu = jnp.where(warmup, 0, options.momentum(t, state.mu.dtype))
    away = _away_from_average(options, w, state.v)

    def leaf(g, away, w, m, v):
      """The step `u`, m and v: lines 7 to 12 of algorithm 2; in the warm-up `u = -eta g`."""
      rate, momentum = eta.astype(m.dtype), mu.astype(m.dtype)
      # m <- mu m - eta d,   u = mu m - eta d,   v <- w + u + gamma (v - w - u)
      d = g + jnp.where(reset, 0, away)
      new_m = jnp.where(reset, -rate * g, momentum * m - rate * d)
      u = momentum * new_m - rate * d
      if not options.reset_moves:
        u = jnp.where(reset, 0, u)
      gamma = jnp.asarray(options.gamma, m.dtype)
      moved = w + u
      new_v = moved + gamma * (v - moved)
      still = warmup if options.reset_moves else warmup | reset
      u = jnp.where(warmup, -rate * g, u)
      return u, jnp.where(warmup, m, new_m), jnp.where(still, v, new_v)

    results = jax.tree.map(leaf, g, away, w, state.m, state.v)
    u, m, v = jax.tree.transpose(jax.tree.structure(g), jax.tree.structure((0, 0, 0)), results)
    finite = Finite(jnp.asarray(True), all_finite(updates))
    updates = jax.tree.map(lambda u, g: -u.astype(g.dtype), u, updates)
    return updates, ScaleByNeumannState(state.steps.counted(finite), mu, m, v)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        "No `params`: the Neumann optimizer averages them. Write"
        " `tx.update(grads, opt_state, params)`."
      )
    return apply(updates, state, params)

  return optax.GradientTransformationExtraArgs(init, update)


def _away_from_average(options: NeumannOptions, w: Any, v: Any) -> Any:
  """Gradient of the regularisers: `(alpha r^2 - beta / r^2) (w - v) / r`, with `r = |w - v|`.

  One `r` over all parameters; nothing where it is zero. The repulsion stops growing at a hundredth
  of the `r` at which both are equal, which is not in the paper: `beta / r^2` knows no bound.
  """
  apart = jax.tree.map(jnp.subtract, w, v)
  r = optax.tree.norm(apart)
  beta, alpha = options.beta, jnp.asarray(options.alpha, r.dtype)
  beta = REPULSION * sum(leaf.size for leaf in jax.tree.leaves(w)) if beta is None else beta
  beta = jnp.asarray(beta, r.dtype)
  attracted = alpha > 0
  closest = jnp.where(attracted, CLOSEST * (beta / jnp.where(attracted, alpha, 1)) ** 0.25, CLOSEST)
  force = alpha * r**2 - beta / jnp.maximum(r, closest) ** 2
  share = jnp.where(r > 0, force / jnp.where(r > 0, r, 1), 0)
  return jax.tree.map(lambda x: share.astype(x.dtype) * x, apart)


def _wide(leaf: Any) -> Any:
  return jnp.promote_types(dtype_of(leaf), jnp.float32)


def _copy(leaf: Any) -> Any:
  """A leaf in a buffer of its own, so that params and state can be donated together."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape, _wide(leaf), sharding=leaf.sharding)
  return jnp.array(leaf, _wide(leaf))


def neumann_eval_params(opt_state: Any, params: optax.Params) -> optax.Params:
  r"""The parameters that the Neumann optimizer returns: :math:`w - \mu m`.

  Those that are trained, and that gradients are taken at, are displaced by `mu m`. On the literal
  reset step `m` is `-eta g` and what is returned lies uphill of `w`: evaluate at another step.

  Args:
    opt_state: state of an optimizer that holds one of :func:`fop_optax.neumann`, however deep.
    params: the parameters after the same step.

  Returns:
    A tree like params.

  Raises:
    ValueError: if there is no such state in it, or more than one.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> params = {"w": jnp.ones(2)}
    >>> tx = fop_optax.neumann(0.1, steps_per_epoch=10)
    >>> print(fop_optax.neumann_eval_params(tx.init(params), params))  # w itself in the warm-up
    {'w': Array([1., 1.], dtype=float32)}
  """
  found = checks.states_in(opt_state, ScaleByNeumannState)
  if len(found) != 1:
    raise ValueError(
      f"`neumann_eval_params(opt_state, params)` found {len(found)} states of the Neumann optimizer"
      " where it needs one. Pass the state that `tx.init(params)` made."
    )
  (state,) = found
  back = lambda m, p: p if is_masked(m) else (p - state.mu * m).astype(dtype_of(p))
  return jax.tree.map(back, state.m, params, is_leaf=is_masked)


def neumann(
  learning_rate: ScalarOrSchedule,
  steps_per_epoch: Scalar,
  *,
  weight_decay: Scalar = 0.0,
  mask: Any = None,
  alpha: Scalar = 1e-7,
  beta: Scalar | None = None,
  gamma: Scalar = 0.99,
  num_sgd_steps: Scalar | None = None,
  reset_period: Scalar | None = None,
  resets: str = "doubling",
  reset_moves: bool = False,
  momentum_unit: Scalar = 1,
  min_momentum: Scalar = 0.5,
  max_momentum: Scalar = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""The Neumann optimizer: the series of a Newton step's inverse, one term from each mini-batch.

  With `v` a moving average of the parameters `w`, and :math:`r = \|w - v\|` over all of them,

  .. math::
    d &= \nabla f(w) + (\alpha r^2 - \beta / r^2) (w - v) / r \\
    m &\leftarrow \mu(t) \, m - \eta(t) \, d \\
    w &\leftarrow w + \mu(t) \, m - \eta(t) \, d \\
    v &\leftarrow w + \gamma (v - w)

  after a warm-up of plain gradient descent. From time to time the series starts anew: then
  :math:`m \leftarrow -\eta \nabla f(w)`, and nothing moves. Without regularisers and resets, at
  constant `mu` and rate, this is Nesterov's momentum. It takes one gradient a step and twice the
  memory of params.

  What is trained is displaced by `mu m` from what the paper returns: see
  :func:`fop_optax.neumann_eval_params`. The paper says nothing to :math:`r = 0` (here the term is
  zero) and leaves :math:`\beta / r^2` without a bound (here it stops growing at a hundredth of
  the `r` where both forces are equal).

  A step whose gradient or update are not finite is skipped for all parameters, and counted.

  Args:
    learning_rate: eta, a number, an array or a schedule: in the paper linear in the batch after a
      warm-up, then times 0.3 every 40 epochs.
    steps_per_epoch: the length of an epoch, in which the paper gives warm-up and resets.
    weight_decay: added to the gradient, times the parameters (not decoupled), as in the paper.
    mask: which leaves decay, a tree of bools or a callable of params, as in `optax.adamw`.
    alpha: strength of the cubic attraction to the average.
    beta: strength of the repulsion; None: 1e-5 times the number of variables.
    gamma: decay of the average.
    num_sgd_steps: length of the warm-up; None: 5 epochs.
    reset_period: K, the first interval between resets; None: 10 epochs.
    resets: when, in iterations after the warm-up: `"doubling"`: at 1, 1 + K, 1 + 3K, 1 + 7K, as K
      doubles at each; `"doubled modulus"`: at 1, 1 + 2K, 1 + 4K, the words "t = 1 (mod K)" with
      such a K; `"linear"`: at 1, 1 + K, 1 + 3K, 1 + 6K; `"constant"`: every K; or `"never"`.
    reset_moves: whether parameters move at a reset, by `mu m - eta g`; in the paper they stay.
    momentum_unit: steps in the unit of t in `mu(t) = 1 - 1 / (1 + t)`: 1, or those of an epoch.
    min_momentum: the least `mu`.
    max_momentum: the largest.

  Returns:
    A transformation whose `update` needs params.

  Raises:
    ValueError: for hyperparameters out of range; in `update` without params.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp, optax
    >>> scales = jnp.array([1.0, 10.0])
    >>> loss = lambda params: jnp.sum(scales * (params["w"] - 1.0) ** 2)
    >>> params = {"w": jnp.zeros(2)}
    >>> tx = fop_optax.neumann(0.02, steps_per_epoch=4)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(200):
    ...   params, state = step(params, state)
    >>> print(fop_optax.neumann_eval_params(state, params)["w"].round(2))
    [1. 1.]

  References:
    Krishnan, Xiao and Saurous, `Neumann Optimizer: A Practical Optimization Algorithm for Deep
    Neural Networks <https://arxiv.org/abs/1712.03298>`_, 2018
  """
  options = NeumannOptions(
    learning_rate=learning_rate,
    steps_per_epoch=steps_per_epoch,
    alpha=alpha,
    beta=beta,
    gamma=gamma,
    num_sgd_steps=num_sgd_steps,
    reset_period=reset_period,
    resets=resets,
    reset_moves=reset_moves,
    momentum_unit=momentum_unit,
    min_momentum=min_momentum,
    max_momentum=max_momentum,
  )
  decay = by_tensor.decay(weight_decay, mask)
  chain = completion.keep_dtypes(optax.chain(decay, _neumann(options), optax.scale(-1.0)))
  return whole_steps(chain, ScaleByNeumannState)
