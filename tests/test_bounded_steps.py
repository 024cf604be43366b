"""What goes with a bounded step: momentum, units of the loss, weights, a bound that gives way."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax
from fop_optax.optimizers.common import Options
from fop_optax.optimizers.momentum import with_momentum

pytestmark = pytest.mark.usefixtures("x64")
ONE = lambda state: jnp.ones(())  # a rate


def scaled(factor):
  """Directions that are so many times the gradient."""
  return optax.with_extra_args_support(optax.scale(factor))


@pytest.mark.parametrize("nesterov", (False, True))
@pytest.mark.parametrize("restart", (False, True))
def test_the_trace_against_its_equations(restart, nesterov):
  """Of gradients that turn around: for some steps the old trace points uphill, then it does not."""
  gradients = (
    np.random.default_rng(0).normal(size=(30, 2, 3)) + np.sin(np.arange(30))[:, None, None]
  )
  tx = with_momentum(scaled(2.0), 0.9, nesterov, rate=ONE, restart=restart)
  state = tx.init({"a": jnp.zeros(3), "b": jnp.zeros(3)})
  v, restarts = np.zeros((2, 3)), 0
  for g in gradients:
    updates, state = tx.update({"a": jnp.asarray(g[0]), "b": jnp.asarray(g[1])}, state)
    d = 2 * g
    uphill = np.sum(g * (0.9 * v + d)) < 0
    restarts += uphill
    v = d if restart and uphill else 0.9 * v + d
    want = d + 0.9 * v if nesterov else v
    np.testing.assert_allclose(np.stack([updates["a"], updates["b"]]), want, rtol=1e-12)
  assert 0 < restarts < 15


def test_a_trace_keeps_its_steps_short_where_the_rate_rises():
  """In units of steps, where the rate does not fall: `s <- mu s + alpha d`."""
  rates = jnp.array([0.0, 0.0, 0.1, 0.2, 0.3, 0.3, 0.1, 0.2])
  counted = optax.GradientTransformation(
    lambda params: jnp.zeros((), jnp.int32), lambda g, count, params=None: (g, count + 1)
  )
  tx = with_momentum(counted, 0.9, False, rate=lambda count: rates[count], restart=True)
  state, s, v, last = tx.init(jnp.zeros(3)), np.zeros(3), np.zeros(3), 0.0
  gradients = 1 + 0.1 * np.random.default_rng(0).normal(size=(len(rates), 3))
  for g, rate in zip(gradients, np.asarray(rates), strict=True):
    updates, state = tx.update(jnp.asarray(g), state)
    s = 0.9 * s * (rate / last if rate < last else 1) + rate * g
    v, last = s / rate if rate > 0 else 0.9 * v + g, rate
    np.testing.assert_allclose(updates, v, rtol=1e-12)
  assert s[0] > 0.2


def test_the_trace_of_gradients_of_single_examples():
  """It begins anew by their mean."""
  gradients = np.random.default_rng(0).normal(size=(20, 4, 3))
  mean = optax.stateless(lambda grads, params: jax.tree.map(lambda g: jnp.mean(g, axis=0), grads))
  ours = with_momentum(mean, 0.9, False, rate=ONE, restart=True, examples=True)
  plain = with_momentum(optax.identity(), 0.9, False, rate=ONE, restart=True)
  state, expected, restarts = ours.init(jnp.zeros(3)), plain.init(jnp.zeros(3)), 0
  for g in gradients:
    restarts += bool(g.mean(0) @ (0.9 * expected.trace.trace + g.mean(0)) < 0)
    updates, state = ours.update(jnp.asarray(g), state)
    want, expected = plain.update(jnp.asarray(g.mean(0)), expected)
    np.testing.assert_allclose(updates, want, rtol=1e-12)
  assert 0 < restarts < 15


def held_back(norm_scale):
  """Directions that are the gradient, so many times shorter, times the looseness."""

  class State(NamedTuple):
    norm_scale: jax.Array

  def update(updates, state, params=None, *, looseness):
    return jax.tree.map(lambda g: state.norm_scale * looseness * g, updates), state

  init = lambda params: State(jnp.asarray(norm_scale))
  return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("norm_scale", (0.5, 1.0))
def test_a_bound_that_gives_way(norm_scale):
  """Of gradients that stay for a while, turn, and stay again; not where nothing was held back."""
  noise = np.random.default_rng(0).normal(size=(40, 3))
  along = np.where(np.arange(40)[:, None] % 20 < 12, 1.0, 0.0) * np.array([1.0, 2.0, 3.0])
  tx = with_momentum(held_back(norm_scale), 0.5, False, rate=ONE, loosen=True)
  state = tx.init(jnp.zeros(3))
  v, loose, slope, seen = np.zeros(3), 1.0, 0.0, []
  for g in along + 0.1 * noise:
    updates, state = tx.update(jnp.asarray(g), state)
    before = loose  # it is the next step that is bounded anew
    d = norm_scale * before * g
    gathered = g @ d < 2 * 0.5 * (g @ (0.5 * v + d))
    if g @ v > 0.9 * slope > 0 and norm_scale < 1 and gathered:
      loose *= 1.5
    elif loose > 1:
      loose = max(1.0, loose / 2) if g @ v < 0.5 * slope else loose
    elif slope > 0:
      left = g @ v / (abs(g @ v) + norm_scale / (1 - 0.5) * slope)
      loose = min(1.0, loose * np.exp(left / 10))
    v = 0.5 * v + d
    slope = g @ v
    seen.append(loose)
    np.testing.assert_allclose(updates, v, rtol=1e-12)
    np.testing.assert_allclose(state.looseness, loose)
  assert (max(seen) > 50) == (norm_scale < 1) and min(np.diff(seen)) < 0


def test_masked_leaves_and_narrow_dtypes():
  tx = with_momentum(scaled(1.0), 0.5, False, rate=ONE, restart=True)
  params = {"a": jnp.ones(3, jnp.bfloat16), "b": optax.MaskedNode()}
  state = tx.init(params)
  _, state = tx.update(params, state)
  updates, state = tx.update({"a": -0.1 * params["a"], "b": optax.MaskedNode()}, state)
  np.testing.assert_allclose(np.asarray(updates["a"], np.float32), -0.1, rtol=1e-2)
  assert updates["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("method", "groups"), ((fop_optax.kfac, 1), (fop_optax.fop, 2)))
def test_layers_that_mend_the_same_error_together(method, groups):
  """Six layers side by side, each reckoned alone: the curvature along all is six times as large."""
  keys = jax.random.split(jax.random.key(0), 8)
  x = jax.random.normal(keys[0], (64, 8))
  y = x @ jax.random.normal(keys[1], (8, 4))
  params = [jnp.zeros((8, 4)) for _ in range(6)]

  def loss(params, x, y):
    return fop_optax.squared_error(sum(x @ w for w in params), y)

  captured = fop_optax.capture(loss, params, x, y, groups=groups, fisher="exact")

  def losses(**options):
    tx = method(0.3, captured.layers, **options)

    @jax.jit
    def step(carry, _):
      params, state = carry
      value, grads, stats = captured.value_and_grad(params, x, y)
      updates, state = tx.update(grads, state, stats=stats)  # so that weights bound nothing
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), length=60)[1]

  # A bound that is never reached restarts; none does not.
  rises = lambda curve: float(jnp.sum(jnp.maximum(jnp.diff(curve), 0)))
  restarted, carried = losses(norm_constraint=1e9), losses(norm_constraint=None)
  assert rises(restarted) < 0.1 * rises(carried)
  assert restarted[-1] < 1e-6 * carried[-1]


def regression(factor=1.0, residual=10.0, offset=0.0):
  """Two layers, targets far away; the loss so many times, beside an offset."""
  keys = jax.random.split(jax.random.key(1), 4)
  x = jax.random.normal(keys[0], (32, 5))
  y = residual * jax.random.normal(keys[1], (32, 2))
  params = {"v": jax.random.normal(keys[2], (5, 6)), "w": jax.random.normal(keys[3], (6, 2))}

  def loss(params, x, y):
    rows = jnp.sum((jnp.tanh(x @ params["v"]) @ params["w"] - y) ** 2, axis=1)
    return factor * jnp.mean(rows) / 2 + offset

  return loss, params, x, y


def first_step(method, problem, fisher=None, **options):
  """Its update, the statistics it is of, and the loss."""
  loss, params, x, y = problem
  captured = fop_optax.capture(loss, params, x, y, groups=1 if method is fop_optax.kfac else 2)
  layers = captured.layers
  if fisher is not None:
    layers = dataclasses.replace(layers, fisher=fisher)
  tx = method(0.1, layers, **options)

  @jax.jit
  def step(params):
    value, grads, stats = captured.value_and_grad(params, x, y)
    return tx.update(grads, tx.init(params), params, stats=stats)[0], stats, value

  return step(params)


@pytest.mark.parametrize(
  ("method", "residual", "offset"),
  (
    (fop_optax.kfac, 10.0, 0.0),
    (fop_optax.fop, 10.0, 1e3),
    (fop_optax.kfac, 10.0, -1e3),
    (fop_optax.kfac, 0.1, 0.0),
  ),
)
def test_a_step_in_units_of_the_loss(method, residual, offset):
  """Many nats of a squared error: the step is as many times what other labels would make of it."""
  problem = regression(residual=residual, offset=offset)
  updates, stats, value = first_step(method, problem)
  plain, _, _ = first_step(method, problem, fisher="sampled")
  traces = [np.trace(factors.G[0]) for factors in stats.factors]
  half = float(np.median(traces)) / 2
  unit = min(1.0, max(abs(float(value)), max(traces) / 2))
  size = max(unit, min(float(value), half))
  assert (size > 10) == (residual == 10.0 and offset >= 0)
  for name, update in updates.items():
    np.testing.assert_allclose(update, size * plain[name], rtol=1e-6)


@pytest.mark.parametrize("offset", (0.0, -1e3))
@pytest.mark.parametrize("residual", (1.0, 10.0))
def test_behind_a_head_of_zeros(residual, offset):
  """Only its own gradients tell the unit: those of the layers before it are zero."""
  loss, params, *batch = regression(residual=residual, offset=offset)
  problem = loss, params | {"w": jnp.zeros((6, 2))}, *batch
  updates, stats, value = first_step(fop_optax.kfac, problem)
  plain, *_ = first_step(fop_optax.kfac, problem, fisher="sampled")
  v, w = (float(np.trace(factors.G[0])) / 2 for factors in stats.factors)
  assert v == 0 < w
  size = max(min(1.0, max(float(value), w)), min(float(value), w))
  np.testing.assert_allclose(updates["w"], size * plain["w"], rtol=1e-6)
  assert jnp.any(updates["w"] != 0)


def test_behind_a_small_head():
  """Of a loss of zero, as a policy gradient's: the largest gradients tell the unit."""
  start, params, *batch = regression(residual=1.0, offset=0.0)
  params = params | {"w": 1e-3 * params["w"]}
  loss = lambda *args: start(*args) - jax.lax.stop_gradient(start(*args))
  updates, stats, value = first_step(fop_optax.kfac, (loss, params, *batch))
  plain, *_ = first_step(fop_optax.kfac, (loss, params, *batch), fisher="sampled")
  v, w = (float(np.trace(factors.G[0])) / 2 for factors in stats.factors)
  assert value == 0 < v < 1e-3 * w
  np.testing.assert_allclose(updates["w"], min(1.0, w) * plain["w"], rtol=1e-6)


@pytest.mark.parametrize("factor", (3.0, 1e4, 1e-2, 1e-4))
def test_a_loss_in_other_units_takes_the_same_step(factor):
  ours, *_ = first_step(fop_optax.kfac, regression())
  times, *_ = first_step(fop_optax.kfac, regression(factor))
  for name in ours:
    np.testing.assert_allclose(times[name], ours[name], rtol=1e-5)


@pytest.mark.parametrize("options", ({"damping": 1e-2}, {"norm_constraint": None}))
def test_values_of_papers_mean_what_they_mean_there(options):
  ours, *_ = first_step(fop_optax.kfac, regression(), **options)
  plain, *_ = first_step(fop_optax.kfac, regression(), fisher="sampled", **options)
  for name in ours:
    np.testing.assert_array_equal(ours[name], plain[name])


def narrow(scale, head=1.0):
  """A network of five layers whose weights start so many times their usual size."""
  keys = jax.random.split(jax.random.key(2), 6)
  sides = (12, 16, 16, 16, 16, 3)
  x = jax.random.normal(keys[0], (64, sides[0]))
  y = jnp.argmax(x[:, : sides[-1]], axis=1)
  params = [
    {
      "w": scale * jax.random.normal(key, (a, b)) / a**0.5,
      "b": scale * jax.random.normal(jax.random.fold_in(key, 1), (b,)),
    }
    for key, a, b in zip(keys[1:], sides, sides[1:], strict=False)
  ]
  params[-1] = jax.tree.map(lambda w: head * w, params[-1])

  def loss(params, x, y):
    for own in params[:-1]:
      x = jax.nn.relu(x @ own["w"] + own["b"])
    return fop_optax.softmax_cross_entropy(x @ params[-1]["w"] + params[-1]["b"], y)

  return loss, params, x, y


def lengths(tree):
  """Of each layer, weight and bias together."""
  return np.array([float(optax.tree.norm(own)) for own in tree])


@pytest.mark.parametrize(("method", "groups"), ((fop_optax.kfac, 1), (fop_optax.fop, 2)))
def test_a_step_no_longer_than_the_weights(method, groups):
  """By the same direction without the weights: then nobody knows how long they are."""
  loss, params, x, y = narrow(0.1, head=3.0)
  captured = fop_optax.capture(loss, params, x, y, groups=groups)
  _, grads, stats = captured.value_and_grad(params, x, y)
  tx = method(0.1, captured.layers)
  state = tx.init(params)
  free, _ = tx.update(grads, state, stats=stats)
  updates, _ = tx.update(grads, state, params, stats=stats)
  share = np.minimum(1, 2 * 0.1 * lengths(params) / lengths(free))  # of what momentum makes of it
  assert share.min() < 1e-2 and share.max() == 1
  for own, unbounded, factor in zip(updates, free, share, strict=True):
    jax.tree.map(lambda u, d, f=factor: np.testing.assert_allclose(u, f * d), own, unbounded)


@pytest.mark.parametrize("options", ({"damping": 1e-2}, {"norm_constraint": None}))
def test_weights_bound_no_step_with_values_of_papers(options):
  loss, params, x, y = narrow(0.1)
  captured = fop_optax.capture(loss, params, x, y)
  _, grads, stats = captured.value_and_grad(params, x, y)
  tx = fop_optax.kfac(0.1, captured.layers, **options)
  state = tx.init(params)
  free, _ = tx.update(grads, state, stats=stats)
  updates, _ = tx.update(grads, state, params, stats=stats)
  jax.tree.map(np.testing.assert_array_equal, updates, free)


def test_weights_that_are_zero_are_free():
  loss, params, x, y = narrow(1.0, head=0.0)
  captured = fop_optax.capture(loss, params, x, y)
  _, grads, stats = captured.value_and_grad(params, x, y)
  tx = fop_optax.kfac(0.1, captured.layers)
  updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
  assert lengths(updates)[-1] > 0.01


@pytest.mark.parametrize(("method", "groups"), ((fop_optax.kfac, 1), (fop_optax.fop, 2)))
@pytest.mark.parametrize("scale", (0.03, 0.1))
def test_networks_that_start_small(method, groups, scale):
  """Layers multiply: each first step alone would be small, all of them together leave the start."""
  curve = losses(method, groups, *narrow(scale))
  assert jnp.max(curve) < 1.5 * curve[0]
  assert curve[-1] < 0.1


@pytest.mark.parametrize(("method", "groups"), ((fop_optax.kfac, 1), (fop_optax.fop, 2)))
def test_a_warm_up_from_zero_bounds_its_first_steps(method, groups):
  """With a rate of zero no direction is too long."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)
  curve = losses(method, groups, *narrow(0.03), rate=schedule)
  assert jnp.max(curve) < 1.5 * curve[0]
  assert curve[-1] < 0.5


@pytest.mark.parametrize(("method", "groups"), ((fop_optax.kfac, 1), (fop_optax.fop, 2)))
def test_a_long_training_at_a_constant_rate_comes_to_rest(method, groups):
  """Batches of a regression that can be learned: steps get shorter as it comes down."""
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (512, 8))
  target = jnp.tanh(2 * x @ jax.random.normal(keys[1], (8, 4)))
  draw = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
  params = {"w": draw(keys[2], 8, 16), "v": draw(keys[3], 16, 4)}

  def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

  captured = fop_optax.capture(loss, params, x[:32], target[:32], groups=groups)
  tx = method(0.1, captured.layers)

  def step(carry, key):
    params, state = carry
    batch = jax.random.choice(key, 512, (32,))
    due = fop_optax.refresh_due(state)
    value, grads, stats = captured.value_and_grad(params, x[batch], target[batch], refresh=due)
    updates, state = tx.update(grads, state, params, stats=stats)
    return (optax.apply_updates(params, updates), state), value

  run = jax.jit(lambda *carry: jax.lax.scan(step, carry, jax.random.split(keys[0], 1500)))
  (params, state), curve = run(params, tx.init(params))
  assert jnp.mean(curve[-100:]) < 0.1 * jnp.mean(curve[150:250])
  assert optax.tree.get(state, "looseness") < 0.1


@pytest.mark.parametrize("options", ({}, {"damping": 0.0, "relative_damping": 1.0}))
def test_a_saturated_start(options):
  """Inputs that nobody scaled: the loss starts far above a nat, and is straight for long."""
  loss, params, x, y = narrow(2.0)
  curve = losses(fop_optax.kfac, 1, loss, params, 30 * x, y, **options)
  assert curve[0] > 100
  assert (curve[-1] < 0.1 * curve[0]) == (not options)
  assert curve[-1] < 0.9 * curve[0]


def losses(method, groups, loss, params, x, y, rate=0.1, **options):
  """Of 120 steps."""
  captured = fop_optax.capture(loss, params, x, y, groups=groups)
  tx = method(rate, captured.layers, **options)

  @jax.jit
  def step(carry, _):
    params, state = carry
    refresh = fop_optax.refresh_due(state)
    value, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    updates, state = tx.update(grads, state, params, stats=stats)
    return (optax.apply_updates(params, updates), state), value

  return jax.lax.scan(step, (params, tx.init(params)), length=120)[1]


@pytest.mark.parametrize("curvature", ("kronecker", "exact"))
def test_gradients_of_single_examples(curvature):
  """A straight loss loosens the bound."""
  loss, params, x, y = narrow(2.0)
  one = lambda params, x, y: loss(params, x[None], y[None])
  tx = fop_optax.kfac_per_example(0.1, curvature=curvature)

  @jax.jit
  def step(carry, _):
    params, state = carry
    grads = jax.vmap(jax.grad(one), (None, 0, 0))(params, 30 * x, y)
    updates, state = tx.update(grads, state, params)
    looseness = optax.tree.get(state, "looseness")
    return (optax.apply_updates(params, updates), state), looseness

  (params, _), looseness = jax.lax.scan(step, (params, tx.init(params)), length=40)
  assert jnp.max(looseness) > 2
  assert loss(params, 30 * x, y) < 0.9 * loss(narrow(2.0)[1], 30 * x, y)


def test_a_leaf_bounds_the_step_of_single_examples():
  """Weight and bias are blocks of their own there."""
  loss, params, x, y = narrow(0.1, head=3.0)
  one = lambda params, x, y: loss(params, x[None], y[None])
  grads = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
  tx = fop_optax.kfac_per_example(0.1)
  updates, _ = tx.update(grads, tx.init(params), params)
  norms = lambda tree: np.array(list(map(jnp.linalg.norm, jax.tree.leaves(tree))))
  ratios = norms(updates) / norms(params)
  np.testing.assert_allclose(ratios.max(), 2 * 0.1)  # of what momentum makes of it
  assert ratios.min() < 0.1


def test_a_bound_that_was_given_is_held():
  """Over steps so short any loss is straight: only the default gives way, injected or not."""
  loss, params, x, y = narrow(2.0)
  captured = fop_optax.capture(loss, params, 30 * x, y)
  injected = optax.inject_hyperparams(fop_optax.kfac, static_args="layers")
  schedule = lambda count: 0.1

  def last_looseness(tx):
    @jax.jit
    def step(carry, _):
      params, state = carry
      _, grads, stats = captured.value_and_grad(params, 30 * x, y)
      updates, state = tx.update(grads, state, params, stats=stats)
      return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=15)
    return float(optax.tree.get(state, "looseness"))

  for make in (fop_optax.kfac, injected):
    default = last_looseness(make(0.1, captured.layers))
    assert default > 2
    assert last_looseness(make(0.1, captured.layers, norm_constraint=0.1)) == default
    assert last_looseness(make(0.1, captured.layers, norm_constraint=0.05)) == 1
  assert last_looseness(fop_optax.kfac(0.1, captured.layers, norm_constraint=schedule)) == 1


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))
def test_the_default_bound_is_known_in_any_dtype(dtype):
  """`optax.inject_hyperparams` makes it an array like the parameters; steps are compiled."""
  loss, params, x, y = narrow(2.0)
  layers = fop_optax.capture(loss, params, x, y).layers
  params = jax.tree.map(lambda p: p.astype(dtype), params)

  @jax.jit
  def loosens(kappa):
    return Options(
      damping=None,
      relative_damping=None,
      decay=0.95,
      scaling="factored",
      curvature_update_period=10,
      inverse_update_period=None,
      stagger=False,
      norm_constraint=kappa,
      learning_rate=0.1,
    ).loosens

  for given, want in ((0.1, True), (0.099, False)):
    tx = optax.inject_hyperparams(fop_optax.kfac)(0.1, layers, norm_constraint=given)
    kappa = tx.init(params).hyperparams["norm_constraint"]
    assert kappa.dtype == dtype
    assert loosens(kappa) == want
