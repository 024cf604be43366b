"""Other people's numbers, from the loss: gradients, factors and directions.

Conventions differ between projects; each conversion stands where it is used.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax

ORACLES = pathlib.Path(__file__).parent / "oracles"


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def precision(request):
  """A dtype and the relative tolerance it must meet."""
  with jax.enable_x64(request.param == "float64"):
    yield request.param, {"float64": 1e-10, "float32": 1e-4}[request.param]


def close(actual, desired, tolerance):
  desired = np.asarray(desired)
  np.testing.assert_allclose(
    actual, desired, rtol=tolerance, atol=tolerance * np.abs(desired).max()
  )


def kfac_direction(captured, params, batch, damping, scaling):
  """The first direction of K-FAC (its update at rate 1, negated) and the factors."""
  tx = fop_optax.kfac(
    1.0, captured.layers, damping=damping, momentum=None, scaling=scaling, norm_constraint=None
  )
  state = tx.init(params)
  basis = fop_optax.bases(state) if scaling == "eigenvalue" else None
  _, grads, stats = captured.value_and_grad(params, *batch, basis=basis)
  updates, _ = tx.update(grads, state, params, stats=stats)
  return jax.tree.map(jnp.negative, updates), stats


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ("groups", "scaling"),
  [(1, "factored"), (2, "exact"), SLOW(2, "factored"), SLOW(1, "exact"), SLOW(1, "eigenvalue")],
)
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_kfac_jax_from_the_loss(precision, groups, scaling, damping):
  dtype, tolerance = precision
  oracle = np.load(ORACLES / "kfac_jax.npz")
  x, y = jnp.asarray(oracle["x"], dtype), jnp.asarray(oracle["y"])
  params = {name: jnp.asarray(oracle[f"p_{name}"], dtype) for name in ("w1", "b1", "w2", "b2")}

  def loss(p, x, y):
    h = jnp.tanh(x @ p["w1"] + p["b1"])
    return fop_optax.softmax_cross_entropy(h @ p["w2"] + p["b2"], y)

  captured = fop_optax.capture(loss, params, x, y, groups=groups)
  value, grads, _ = jax.jit(captured.value_and_grad)(params, x, y)
  close(value, oracle["loss"], tolerance)
  for name in params:
    close(grads[name], oracle[f"g_{name}"], tolerance)

  # kfac-jax's empirical B has one further 1/N, so that its F is ours over N: with damping l,
  # (F/N + l)^-1 = N (F + N l)^-1.
  n = len(x)
  updates, stats = kfac_direction(captured, params, (x, y), n * damping, scaling)
  for index, factors in enumerate(stats.factors, start=1):
    close(factors.A[0], oracle[f"fisher_empirical/factor_layer{index}_A"], tolerance)
    close(factors.G[0] / n, oracle[f"fisher_empirical/factor_layer{index}_B"], tolerance)
  key = {"factored": "pi"}.get(scaling, "exact")
  for name in params:
    expected = oracle[f"fisher_empirical/damp{damping}/{key}/prec_{name}"]
    close(n * updates[name], expected, tolerance)


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_asdl_from_the_loss(precision, damping):
  dtype, tolerance = precision
  oracle = np.load(ORACLES / "asdl_kfac_mlp.npz")
  x, y = jnp.asarray(oracle["x"], dtype), jnp.asarray(oracle["y"])
  names = ("l1", "l2", "l3")
  params = {  # PyTorch's layout: weights [out, in]
    name: {part: jnp.asarray(oracle[f"{name}/{part}"], dtype) for part in ("weight", "bias")}
    for name in names
  }

  def loss(p, x, y):
    for name in names:
      x = x @ p[name]["weight"].T + p[name]["bias"]
      x = jnp.tanh(x) if name != "l3" else x
    return fop_optax.softmax_cross_entropy(x, y)

  captured = fop_optax.capture(loss, params, x, y)
  value, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  close(value, oracle["loss"], tolerance)
  for name, layer, factors in zip(names, captured.layers, stats.factors, strict=True):
    assert layer.path == f"['{name}']['weight']"
    close(grads[name]["weight"], oracle[f"{name}/grad_weight"], tolerance)
    close(grads[name]["bias"], oracle[f"{name}/grad_bias"], tolerance)
    # ASDL's A has no homogeneous coordinate: ours without its last row and column.
    close(factors.A[0, :-1, :-1], oracle[f"{name}/A"], tolerance)
    close(factors.G[0], oracle[f"{name}/B"], tolerance)

  # The same network with its biases in no layer has ASDL's weights' directions; the bias's is
  # G^-1 times its gradient, with the damping of that same G.
  biases = {name: params[name]["bias"] for name in names}
  weights = {name: params[name]["weight"] for name in names}

  def loss_of_weights(w, biases, x, y):
    return loss({name: {"weight": w[name], "bias": biases[name]} for name in names}, x, y)

  captured = fop_optax.capture(loss_of_weights, weights, biases, x, y, batch_argnums=(1, 2))
  updates, stats = kfac_direction(captured, weights, (biases, x, y), damping, "factored")
  for name, factors in zip(names, stats.factors, strict=True):
    key = f"damp{damping}/{name}"
    close(updates[name], oracle[f"{key}/prec_weight"], tolerance)
    A, G = np.asarray(factors.A[0], np.float64), np.asarray(factors.G[0], np.float64)
    pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
    G_inv = np.linalg.inv(G + np.sqrt(damping) / pi * np.eye(len(G)))
    close(G_inv @ grads[name]["bias"], oracle[f"{key}/prec_bias"], tolerance)


def test_asdl_convolutions_from_the_loss(precision):
  dtype, tolerance = precision
  oracle = np.load(ORACLES / "asdl_kfac_cnn.npz")
  x, y = jnp.asarray(oracle["x"], dtype), jnp.asarray(oracle["y"])  # NCHW
  names = ("c1", "c2", "fc")
  weights = {name: jnp.asarray(oracle[f"{name}/weight"], dtype) for name in names}
  biases = {name: jnp.asarray(oracle[f"{name}/bias"], dtype) for name in names}

  def loss(w, biases, x, y):
    for name, stride in (("c1", 1), ("c2", 2)):
      x = jax.lax.conv_general_dilated(
        x, w[name], (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NCHW", "OIHW", "NCHW")
      )
      x = jax.nn.relu(x + biases[name][:, None, None])
    return fop_optax.softmax_cross_entropy(x.reshape(len(y), -1) @ w["fc"].T + biases["fc"], y)

  # ASDL has no homogeneous coordinate: the biases are in no layer here.
  captured = fop_optax.capture(loss, weights, biases, x, y, batch_argnums=(1, 2))
  value, grads, stats = jax.jit(captured.value_and_grad)(weights, biases, x, y)
  close(value, oracle["loss"], tolerance)
  for name, factors in zip(names, stats.factors, strict=True):
    close(grads[name], oracle[f"{name}/grad_weight"], tolerance)
    close(factors.A[0], oracle[f"{name}/A"], tolerance)
    close(factors.G[0], oracle[f"{name}/B"], tolerance)
  for damping in (0.01, 0.1):
    updates, _ = kfac_direction(captured, weights, (biases, x, y), damping, "factored")
    for name in names:
      close(updates[name], oracle[f"damp{damping}/{name}/prec_weight"], tolerance)
