"""K-FAC over many steps against the dense reference, and what the alias adds to the direction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from reference import Reference, damped_inverse

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ("fc0", "fc1", "fc2")


def matrix(tree, name):
  return np.concatenate([tree[name]["w"], tree[name]["b"][None]])


def setup(groups=2):
  params = problems.make_params(dtype=jnp.float64)
  return params, problems.layers_of(params, groups)


def one_step(tx, params, seed=0, groups=2):
  batch = problems.make_batch(seed=seed, dtype=jnp.float64)
  _, grads, stats = problems.value_and_grad(params, batch, groups=groups)
  updates, state = tx.update(grads, tx.init(params), params, stats=stats)
  return updates, state, grads, stats


# Statistics and inverses by schedules of their own, or inverses whenever there are statistics.
WARMUP = fop_optax.WarmupPeriod(steps=4, period=3)
CASES = {
  "factored": {"scaling": "factored", "curvature_update_period": 3, "inverse_update_period": 2},
  "exact": {"scaling": "exact", "curvature_update_period": 3},
  "relative": {
    "scaling": "factored",
    "relative_damping": lambda count: 0.5 - 0.02 * jnp.asarray(count, jnp.float64),
    "curvature_update_period": WARMUP,
    "inverse_update_period": fop_optax.WarmupPeriod(steps=2, period=4),
  },
  "relative, exact": {
    "scaling": "exact",
    "relative_damping": 0.3,
    "curvature_update_period": WARMUP,
  },
  "held in bfloat16": {
    "scaling": "factored",
    "relative_damping": 0.5,
    "curvature_update_period": WARMUP,
    "factor_dtype": jnp.bfloat16,
  },
}


@pytest.mark.parametrize("make", [fop_optax.kfac, fop_optax.fop])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twenty_steps(make, case):
  params, layers = setup()
  rate = lambda count: 0.3 * 0.5 ** (jnp.asarray(count, jnp.float64) / 10)
  damping = lambda count: jnp.maximum(0.1 - 0.006 * jnp.asarray(count, jnp.float64), 0.01)
  options = {"damping": damping, "decay": 0.6, "momentum": 0.8, "norm_constraint": None}
  tx = make(rate, layers, **options, **case)
  is_fop = make is fop_optax.fop
  schedule = lambda value: value if callable(value) else lambda count: value
  statistics = schedule(case["curvature_update_period"])
  inverses = schedule(case.get("inverse_update_period", statistics))
  relative = schedule(case.get("relative_damping", 0.0))
  references = {
    name: Reference(
      *(rate, damping, 0.6, 0.8, case["scaling"], statistics, inverses, is_fop, relative),
      held=case.get("factor_dtype", "float64"),
    )
    for name in NAMES
  }

  @jax.jit
  def step(state, grads, stats):
    stats = stats._replace(refresh=fop_optax.refresh_due(state))
    return tx.update(grads, state, params, stats=stats)

  state = tx.init(params)
  dtypes = jax.tree.map(lambda x: x.dtype, state)
  for seed in range(20):
    batch = problems.make_batch(seed=seed, dtype=jnp.float64)
    _, grads, stats = problems.value_and_grad(params, batch)
    updates, state = step(state, grads, stats)
    for index, (name, reference) in enumerate(references.items()):
      A, G = (np.asarray(x[0]) for x in stats.factors[index])
      want = reference.step(A, G, matrix(grads, name), matrix(stats.contrasts[0], name))
      np.testing.assert_allclose(matrix(updates, name), want, rtol=1e-7, atol=1e-9)
  assert jax.tree.map(lambda x: x.dtype, state) == dtypes
  if is_fop:
    report = fop_optax.diagnostics(state, layers)["layers"].values()
    for layer, reference in zip(report, references.values(), strict=True):
      got = layer["beta"][0, 0], layer["eta"][0]
      np.testing.assert_allclose(got, reference.log[-1], rtol=1e-7)


def test_stages_of_the_alias():
  params, layers = setup()
  direction, _, grads, _ = one_step(fop_optax.scale_by_kfac(layers), params)
  kwargs = {
    "norm_constraint": None,
    "weight_decay": 0.3,
    "mask": lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
  }
  updates, _, _, _ = one_step(
    fop_optax.kfac(0.1, layers, nesterov=True, momentum=0.5, **kwargs), params
  )
  for name in NAMES:
    want = -0.1 * (1.5 * direction[name]["w"] + 0.3 * params[name]["w"])
    np.testing.assert_allclose(updates[name]["w"], want, rtol=1e-12)
    np.testing.assert_allclose(updates[name]["b"], -0.15 * direction[name]["b"], rtol=1e-12)
  adam = optax.scale_by_adam()
  want, _ = adam.update(grads["gain"], adam.init(params["gain"]))
  np.testing.assert_allclose(direction["gain"], want, rtol=1e-12)


def test_fallback_is_adam_at_a_fraction_of_the_rate():
  """It decays as leaves in layers do: `weight_decay` times the rate itself, where `mask` says."""
  params, layers = setup()
  none = lambda tree: jax.tree.map(lambda _: False, tree)
  schedule = optax.exponential_decay(0.2, 10, 0.5)
  for rate, decay, mask in ((0.2, 0.0, None), (schedule, 0.3, None), (0.2, 0.3, none)):
    tx = fop_optax.kfac(rate, layers, weight_decay=decay, mask=mask)
    updates, _, grads, _ = one_step(tx, params)
    adam = optax.adam(0.03 * 0.2)
    want, _ = adam.update(grads["gain"], adam.init(params["gain"]))
    want -= 0.2 * (0 if mask else decay) * params["gain"]
    np.testing.assert_allclose(updates["gain"], want, rtol=1e-6)  # optax's schedules are single
  updates, _, grads, _ = one_step(fop_optax.kfac(0.2, layers, fallback=optax.sgd(3.0)), params)
  np.testing.assert_allclose(updates["gain"], -3 * grads["gain"], rtol=1e-12)


def test_params_are_needed_for_weight_decay_only():
  params, layers = setup()
  _, grads, stats = problems.value_and_grad(params, problems.make_batch(dtype=jnp.float64))
  free = fop_optax.kfac(0.1, layers, fallback=optax.sgd(0.1))
  free.update(grads, free.init(params), stats=stats)
  decaying = fop_optax.kfac(0.1, layers, weight_decay=0.1, fallback=optax.sgd(0.1))
  with pytest.raises(ValueError, match="params"):
    decaying.update(grads, decaying.init(params), stats=stats)


@pytest.mark.parametrize(
  ("make", "scaling"),
  [
    (fop_optax.scale_by_kfac, "exact"),
    (fop_optax.scale_by_fop, "factored"),
    pytest.param(fop_optax.scale_by_kfac, "factored", marks=pytest.mark.slow),
    pytest.param(fop_optax.scale_by_fop, "exact", marks=pytest.mark.slow),
  ],
)
def test_norm_constraint_is_one_factor_over_all_layers(make, scaling):
  params, layers = setup()
  kwargs = {"damping": 1e-2, "scaling": scaling}
  free, _, _, stats = one_step(make(layers, **kwargs), params)
  rate = 0.5
  squares = 0.0
  for index, name in enumerate(NAMES):  # d' M d, dense
    A, G = (np.asarray(x[0]) for x in stats.factors[index])
    M = np.linalg.inv(damped_inverse(A, G, 1e-2, scaling))
    d = matrix(free, name).ravel()
    squares += d @ M @ d
  for kappa in (1e-3 * squares, 10 * squares):
    bound, _, _, _ = one_step(
      make(layers, norm_constraint=kappa, learning_rate=rate, **kwargs), params
    )
    nu = min(1, np.sqrt(kappa / (rate**2 * squares)))
    for name in NAMES:
      np.testing.assert_allclose(matrix(bound, name), nu * matrix(free, name), rtol=1e-8)
    np.testing.assert_allclose(bound["gain"], free["gain"])


@pytest.mark.parametrize(("momentum", "nesterov"), [(None, False), (0.9, False), (0.9, True)])
def test_norm_constraint_bounds_the_step_that_is_taken(momentum, nesterov):
  """Its squared length in `M`, momentum and all; reached where gradients agree, as they do here."""
  params, layers = setup()
  kappa = 1e-4
  tx = fop_optax.kfac(
    lambda count: 0.5 / (1 + 0.001 * count),
    layers,
    damping=1e-2,
    momentum=momentum,
    nesterov=nesterov,
    norm_constraint=kappa,
  )
  _, state, grads, stats = one_step(tx, params)
  stats = stats._replace(refresh=jnp.asarray(False))
  inverses = [
    damped_inverse(*(np.asarray(x[0]) for x in factors), 1e-2, "factored")
    for factors in stats.factors
  ]
  update = jax.jit(tx.update)
  for _ in range(60):
    updates, state = update(grads, state, params, stats=stats)
    steps = [matrix(updates, name).ravel() for name in NAMES]
    length = sum(u @ np.linalg.solve(C, u) for u, C in zip(steps, inverses, strict=True))
    assert length < kappa * (1 + 1e-6)
  assert length > 0.9 * kappa


def test_damping_that_is_given_or_not():
  """Relative by default; absolute alone where only that is given; both add up."""
  params, layers = setup()
  step = lambda **kwargs: one_step(fop_optax.scale_by_kfac(layers, **kwargs), params)[0]
  equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  equal(step(), step(relative_damping=1.0))
  equal(step(damping=1e-2), step(damping=1e-2, relative_damping=0.0))
  equal(step(relative_damping=0.2), step(damping=0.0, relative_damping=0.2))
  both, alone = step(damping=1e-2, relative_damping=1.0), step(damping=1e-2)
  assert all(not np.allclose(both[n]["w"], alone[n]["w"], rtol=1e-2) for n in NAMES)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_counted_and_harmless():
  for make in (fop_optax.kfac, fop_optax.fop):
    params, layers = setup()
    tx = make(0.1, layers, momentum=None)
    first, state, grads, stats = one_step(tx, params)
    spoilt = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, bad = jax.jit(tx.update)(spoilt, state, params, stats=stats)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    one, two = (s.inner_states["layers"].inner_state[0] for s in (state, bad))
    before, after = one.curvature.steps, two.curvature.steps
    assert (before.nonfinite_gradients, after.nonfinite_gradients) == (0, 1)
    steps = before._replace(nonfinite_gradients=jnp.asarray(1))
    counted = one._replace(curvature=one.curvature._replace(steps=steps))
    jax.tree.map(np.testing.assert_array_equal, counted, two)
    jax.tree.map(
      np.testing.assert_array_equal, state.inner_states["fallback"], bad.inner_states["fallback"]
    )
    # The next step is as if nothing had been.
    after, _ = tx.update(grads, bad, params, stats=stats)
    want, _ = tx.update(grads, state, params, stats=stats)
    jax.tree.map(np.testing.assert_array_equal, after, want)


def test_zero_gradients_and_statistics_are_harmless():
  for make in (fop_optax.kfac, fop_optax.fop):
    params, layers = setup()
    tx = make(0.1, layers)
    _, grads, stats = problems.value_and_grad(params, problems.make_batch(dtype=jnp.float64))
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    stats = stats._replace(factors=zeros(stats.factors), contrasts=zeros(stats.contrasts))
    updates, _ = tx.update(zeros(grads), tx.init(params), params, stats=stats)
    for name in NAMES:
      np.testing.assert_array_equal(matrix(updates, name), 0)
