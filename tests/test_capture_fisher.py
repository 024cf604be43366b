"""Sampled and exact Fisher statistics: against kfac-jax, the Gauss-Newton matrix and each other."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")
ORACLE = pathlib.Path(__file__).parent / "oracles" / "kfac_jax.npz"


def mlp(p, x, y):
  h = jnp.tanh(x @ p["w1"] + p["b1"])
  return fop_optax.softmax_cross_entropy(h @ p["w2"] + p["b2"], y)


def inputs():
  oracle = np.load(ORACLE)
  params = {name: jnp.asarray(oracle[f"p_{name}"]) for name in ("w1", "b1", "w2", "b2")}
  return params, jnp.asarray(oracle["x"]), jnp.asarray(oracle["y"]), oracle


def close(actual, desired, tolerance=1e-12):
  np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
  "groups, traced",
  [
    (1, False),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in [(1, True), (2, False), (2, True)]),
  ],
)
def test_exact_is_kfac_jax(groups, traced):
  params, x, y, oracle = inputs()
  captured = fop_optax.capture(mlp, params, x, y, groups=groups, fisher="exact")
  refresh = {"refresh": jnp.array(True)} if traced else {}
  loss, grads, stats = jax.jit(captured.value_and_grad)(params, x, y, **refresh)
  close(loss, oracle["loss"])
  for name in params:
    close(grads[name], oracle[f"g_{name}"])
  for index, (A, G) in enumerate(stats.factors, start=1):
    close(A[0], oracle[f"fisher_exact/factor_layer{index}_A"])
    close(G[0], oracle[f"fisher_exact/factor_layer{index}_B"])


@pytest.mark.slow
def test_directions_of_kfac_jax_exact_from_the_loss():
  params, x, y, oracle = inputs()
  captured = fop_optax.capture(mlp, params, x, y, fisher="exact")
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  for key, scaling in (("pi", "factored"), ("exact", "exact")):
    for damping in (0.01, 0.1):
      tx = fop_optax.kfac(
        1.0, captured.layers, damping=damping, momentum=None, scaling=scaling, norm_constraint=None
      )
      updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
      for name in params:
        close(-updates[name], oracle[f"fisher_exact/damp{damping}/{key}/prec_{name}"], 1e-10)


def test_sampled_is_exact_within_its_error():
  params, x, y, _ = inputs()
  exact = fop_optax.capture(mlp, params, x, y, fisher="exact").value_and_grad(params, x, y)
  captured = fop_optax.capture(mlp, params, x, y, fisher="sampled")
  one = lambda key: captured.value_and_grad(params, x, y, key=key)
  draws = 3000
  loss, grads, stats = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))
  close(loss[0], exact[0])
  jax.tree.map(lambda a, b: close(a[7], b), grads, exact[1])  # the labels drawn move no gradient
  for sampled, expected in zip(stats.factors, exact[2].factors, strict=True):
    close(sampled.A[3], expected.A)
    error = sampled.G.std(0) / np.sqrt(draws)
    assert np.max(np.abs(sampled.G.mean(0) - expected.G) / error) < 4.5


@pytest.mark.parametrize("terms", [1, 16])
@pytest.mark.parametrize("kind", ["normal", "softmax"])
def test_exact_is_the_gauss_newton_matrix(kind, terms):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(1, 4))  # one input for all, so that the Kronecker form is exact
  x = jnp.asarray(np.broadcast_to(inputs, (6, terms, 4)))
  w = jnp.asarray(rng.normal(size=(4, 3)))
  if kind == "normal":
    y = jnp.asarray(rng.normal(size=(6, terms, 3)))
    loss = lambda p, x, y: fop_optax.squared_error(x @ p["w"], y)
  else:
    y = jnp.asarray(rng.integers(3, size=(6, terms)))
    loss = lambda p, x, y: fop_optax.softmax_cross_entropy(x @ p["w"], y)
  captured = fop_optax.capture(loss, {"w": w}, x, y, fisher="exact")
  (A, G) = jax.jit(captured.value_and_grad)({"w": w}, x, y)[2].factors[0]
  hessian = jax.hessian(lambda w: loss({"w": w}, x, y))(w).reshape(12, 12)
  close(np.kron(A[0], G[0]), hessian)


def test_micro_batches_and_scanned_layers():
  params, x, y, _ = inputs()
  whole = fop_optax.capture(mlp, params, x, y, fisher="exact")
  pieces = fop_optax.capture(mlp, params, x, y, groups=2, micro_batches=3, fisher="exact")
  ours, theirs = (jax.jit(c.value_and_grad)(params, x, y)[2].factors for c in (pieces, whole))
  jax.tree.map(close, ours, theirs)


def test_what_is_missing_is_said():
  params, x, y, _ = inputs()
  unmarked = lambda p, x, y: jnp.mean((x @ p["w1"] @ p["w2"])[jnp.arange(len(y)), y])
  for fisher in ("sampled", "exact"):
    with pytest.raises(ValueError, match=r"distribution of the model's output.*fop_optax.softmax"):
      fop_optax.capture(unmarked, params, x, y, fisher=fisher)
  captured = fop_optax.capture(mlp, params, x, y, fisher="sampled")
  with pytest.raises(ValueError, match=r"pass `value_and_grad\(..., key=key\)`"):
    captured.value_and_grad(params, x, y)
  captured.value_and_grad(params, x, y, refresh=False)  # draws nothing
