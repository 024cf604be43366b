"""FOP as a transformation: its options, its groups, and how it meets K-FAC."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")


def first_step(make, params, batch, groups=2, spoil=lambda stats: stats, **kwargs):
  layers = problems.layers_of(params, groups)
  tx = make(layers, damping=1e-2, **kwargs)
  _, grads, stats = problems.value_and_grad(params, batch, groups=groups)
  updates, state = tx.update(grads, tx.init(params), params, stats=spoil(stats))
  return updates, fop_optax.diagnostics(state, layers)["layers"]


def assert_close(tree, other, tol=1e-9):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), tree, other)


@pytest.fixture(scope="module")
def problem(x64):
  return problems.make_params(dtype=jnp.float64), problems.make_batch(24, dtype=jnp.float64)


def test_equal_groups_are_kfac(problem):
  params, batch = problem
  twice = problems.Batch(*(jnp.repeat(x, 2, axis=0) for x in batch))
  kfac, _ = first_step(fop_optax.scale_by_kfac, params, twice)
  fop, report = first_step(fop_optax.scale_by_fop, params, twice)
  assert_close(fop, kfac, 1e-14)
  for layer in report.values():
    assert (layer["beta"], layer["eta"], layer["rho2"]) == (0, 1, 0)


@pytest.mark.slow
def test_options(problem):
  params, batch = problem
  run = lambda **kwargs: first_step(fop_optax.scale_by_fop, params, batch, **kwargs)
  kfac, _ = first_step(fop_optax.scale_by_kfac, params, batch)
  base, report = run()
  total, total_report = run(total_gradient="sum")
  plain, plain_report = run(adaptive_step=False)
  control, _ = run(projection_metric="inverse")
  none, _ = run(beta=0.0)
  layers_only = lambda tree: {name: tree[name] for name in ("fc0", "fc1", "fc2")}
  assert_close(layers_only(total), jax.tree.map(lambda x: 2 * x, layers_only(base)))
  assert_close(control, kfac)
  assert_close(none, kfac)
  for name in ("fc0", "fc1", "fc2"):
    path = f"['{name}']['w']"
    assert report[path]["rho2"] > 1e-4
    assert report[path]["residual"] < 1e-12
    assert plain_report[path]["eta"] == 1
    np.testing.assert_allclose(total_report[path]["eta"], 2 * report[path]["eta"])
    scaled = jax.tree.map(lambda x, eta=report[path]["eta"]: x / eta, base[name])
    assert_close(plain[name], scaled)
  betas = {
    metric: np.concatenate([layer["beta"] for layer in run(projection_metric=metric)[1].values()])
    for metric in ("fisher", "damped")
  }
  assert np.all(np.abs(betas["damped"]) < np.abs(betas["fisher"]))


def test_groups_in_any_order_and_basis(problem):
  params, batch = problem
  base, report = first_step(fop_optax.scale_by_fop, params, batch, groups=4)
  turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))

  def turned(stats):
    stacked = jax.tree.map(lambda *c: jnp.stack(c), *stats.contrasts)
    mixed = jax.tree.map(lambda c: jnp.tensordot(jnp.asarray(turn), c, 1), stacked)
    return stats._replace(
      contrasts=tuple(jax.tree.map(lambda c, i=i: c[i], mixed) for i in range(3))
    )

  other, _ = first_step(fop_optax.scale_by_fop, params, batch, groups=4, spoil=turned)
  assert_close(other, base, 1e-10)
  for layer in report.values():
    assert layer["beta"].shape == (1, 3)
    assert 0 < layer["rho2"] <= 1


@pytest.mark.slow
def test_a_tree_of_contrasts_through_the_optimizer():
  params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
  x = jax.random.normal(jax.random.key(0), (16, 3))
  loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - 0.3) ** 2)

  def run(groups, **options):
    captured = fop_optax.capture(loss, params, x, groups=groups)
    tx = fop_optax.fop(0.1, captured.layers, **options)

    @jax.jit
    def step(params, state):
      value, grads, stats = captured.value_and_grad(params, x)
      updates, state = tx.update(grads, state, params, stats=stats)
      return optax.apply_updates(params, updates), state, value

    own, state, values = params, tx.init(params), []
    for _ in range(5):
      own, state, value = step(own, state)
      values.append(float(value))
    (numbers,) = fop_optax.diagnostics(state, captured.layers)["layers"].values()
    return own, values, numbers

  tree, values, numbers = run(4, contrast_tree=True)
  joint, *_ = run(4)
  assert values[-1] < values[0]
  assert numbers["beta"].shape == (1, 3)
  assert any(
    np.any(a != b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(joint), strict=True)
  )
  jax.tree.map(np.testing.assert_array_equal, run(2, contrast_tree=True)[0], run(2)[0])
  with pytest.raises(ValueError, match="takes 2, 4, 8, .* groups, not 3"):
    captured = fop_optax.capture(loss, params, x[:15], groups=3)
    fop_optax.fop(0.1, captured.layers, contrast_tree=True)
