"""A batch sharded over a mesh of eight devices: the numbers of one, and one all-reduce."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

import fop_optax

N, T, D, C = 64, 3, 16, 4


def loss(p, x, y):
  x = x + p["positions"]
  for w, b in zip(p["w"], p["b"], strict=True):
    x = jnp.tanh(x @ w + b)
  return fop_optax.softmax_cross_entropy(x.mean(1) @ p["head"], y)


def scanned(p, x, y):
  block = jax.checkpoint(lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), None))
  x, _ = jax.lax.scan(block, x, (p["stack"], p["shift"]))
  return loss(p, x, y)


def inputs(n=N):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(D), "float32")
  params = {
    "w": [draw(D, D) for _ in range(3)],
    "b": [draw(D) for _ in range(3)],
    "stack": draw(2, D, D),
    "shift": draw(2, D),
    "head": draw(D, C),
    "positions": draw(T, D),
  }
  return params, draw(n, T, D), jnp.arange(n) % C


def mesh_of(kind):
  return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def put(mesh, params, *batch):
  place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
  return (
    jax.device_put(params, place(())),
    *(jax.device_put(leaf, place(("data",))) for leaf in batch),
  )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
  "options",
  [{}, {"micro_batches": 2}, {"groups": 4}, {"fisher": "exact"}, {"curvature_fraction": 0.5}],
  ids=str,
)
def test_eight_devices_are_one(kind, options):
  params, x, y = inputs()
  captured = fop_optax.capture(scanned, params, x, y, **{"groups": 2} | options)
  tx = fop_optax.fop(0.1, captured.layers, damping=0.1)

  def step(params, x, y):
    loss, grads, stats = captured.value_and_grad(params, x, y)
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    return loss, grads, stats.factors, updates

  expected = jax.jit(step)(params, x, y)
  with jax.set_mesh(mesh_of(kind)):
    ours = jax.jit(step)(*put(mesh_of(kind), params, x, y))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("fraction", [1, 0.5])
def test_one_all_reduce_and_no_gather(kind, fraction):
  params, x, y = inputs()
  captured = fop_optax.capture(loss, params, x, y, groups=2, curvature_fraction=fraction)
  with jax.set_mesh(mesh_of(kind)):
    args = put(mesh_of(kind), params, x, y)
    text = jax.jit(captured.value_and_grad).lower(*args).compile().as_text()
  assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
  assert "all-gather" not in text
  assert "all-to-all" not in text
  assert "collective-permute" not in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_batch_that_would_change_devices_is_refused(kind):
  params, x, y = inputs()
  captured = fop_optax.capture(loss, params, x, y, groups=2)
  with (
    jax.set_mesh(mesh_of(kind)),
    pytest.raises(ValueError, match=r"sharded over 8 devices.*groups=2.*multiple of 16"),
  ):
    captured.value_and_grad(*put(mesh_of(kind), params, x[:8], y[:8]))
  captured = fop_optax.capture(loss, params, x, y, groups=2, curvature_fraction=0.25)
  with (
    jax.set_mesh(mesh_of(kind)),
    pytest.raises(ValueError, match=r"8 devices.*`curvature_fraction=1/4`.*multiple of 64"),
  ):
    captured.value_and_grad(*put(mesh_of(kind), params, x[:32], y[:32]))
