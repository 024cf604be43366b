"""A batch sharded over a mesh of eight devices: the numbers of one, and one all-reduce."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
from selection import slow_but

from experiments.benchmarks.hlo import collectives
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


@pytest.mark.parametrize(
  "options",
  slow_but(
    [{}, {"micro_batches": 2}, {"groups": 4}, {"fisher": "exact"}, {"curvature_fraction": 0.5}]
  ),
)
def test_eight_devices_are_one(options):
  params, x, y = inputs()
  captured = fop_optax.capture(scanned, params, x, y, **{"groups": 2} | options)
  tx = fop_optax.fop(0.1, captured.layers, damping=0.1)

  def step(params, x, y):
    loss, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    return loss, grads, stats.factors, updates

  expected = jax.jit(step)(params, x, y)
  for mesh in map(mesh_of, (AxisType.Auto, AxisType.Explicit)):
    with jax.set_mesh(mesh):
      ours = jax.jit(step)(*put(mesh, params, x, y))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    jax.tree.map(close, ours, expected)


def size(tree):
  return 4 * sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("fraction", "traced"), [(1, False), (0.5, True)])
def test_one_all_reduce_and_no_gather(kind, fraction, traced):
  """Of the gradients of two groups, and of the mean of their factors."""
  params, x, y = inputs()
  params = {name: params[name] for name in ("w", "b", "head", "positions")}
  captured = fop_optax.capture(loss, params, x, y, groups=2, curvature_fraction=fraction)

  def step(params, x, y, refresh):
    refresh = refresh if traced else True
    return captured.value_and_grad(params, x, y, refresh=refresh)

  with jax.set_mesh(mesh_of(kind)):
    args = put(mesh_of(kind), params, x, y)
    ((name, where, moved),) = collectives(jax.jit(step).lower(*args, True).compile())
  assert (name, where) == ("all-reduce", "entry")
  stats = jax.eval_shape(step, params, x, y, True)[2]
  assert moved <= 2 * size(params) + size(stats.factors) + 16  # and the losses


def test_no_all_reduce_of_statistics_in_a_scan():
  """With a traced refresh: within the loop only gradients are added up, as without statistics."""
  params, x, y = inputs()
  captured = fop_optax.capture(scanned, params, x, y, groups=1)
  with jax.set_mesh(mesh_of(AxisType.Auto)):
    args = put(mesh_of(AxisType.Auto), params, x, y)
    lower = lambda refresh: jax.jit(
      lambda *args: captured.value_and_grad(*args[:-1], refresh=refresh and args[-1] > 0)
    ).lower(*args, 1)
    inside = [
      [found for found in collectives(lower(refresh).compile()) if found[1] != "entry"]
      for refresh in (True, False)
    ]
  assert sum(found[2] for found in inside[0]) == sum(found[2] for found in inside[1])


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


@pytest.mark.parametrize("captured_with", ["shapes", "arrays"])
def test_a_loss_that_looks_at_the_mesh(captured_with):
  """Under Auto axes: its program is another than without a mesh. Flax NNX's dropout is such."""

  def loss(p, key, x, y):
    mask = jax.random.bernoulli(key, 0.9, x.shape, out_sharding=jax.typeof(x).sharding)
    h = jnp.tanh(x @ p["w"][0] + p["b"][0]) * mask
    return fop_optax.softmax_cross_entropy(h.mean(1) @ p["head"], y)

  params, x, y = inputs()
  key, sharded = jax.random.key(0), put(mesh_of(AxisType.Auto), params, x, y)
  shapes = jax.eval_shape(lambda: (params, key, x, y))
  of = shapes if captured_with == "shapes" else (sharded[0], key, *sharded[1:])
  captured = fop_optax.capture(loss, *of, batch_argnums=(1, 2), groups=2)
  assert len(captured.layers) == 2
  got = jax.jit(captured.value_and_grad)(sharded[0], key, *sharded[1:])
  want = jax.jit(captured.value_and_grad)(params, key, x, y)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_shard_map_with_its_check():
  """One `pmean` of what the devices have gives the numbers of one; without it they are refused."""
  params, x, y = inputs(16)
  params = {"w": params["w"][:1], "b": params["b"][:1], "head": params["head"]}

  def loss(p, x, y):
    return fop_optax.softmax_cross_entropy(jnp.tanh(x[:, 0] @ p["w"][0] + p["b"][0]) @ p["head"], y)

  captured = fop_optax.capture(loss, params, x, y, groups=2)
  tx = fop_optax.fop(0.1, captured.layers)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  spec = PartitionSpec("data")

  def step(state, params, x, y, average=True):
    out = captured.value_and_grad(params, x, y, refresh=fop_optax.refresh_due(state))
    loss, grads, stats = jax.lax.pmean(out, "data") if average else out
    updates, _ = tx.update(grads, state, params, stats=stats)
    return loss, grads, stats.factors, stats.contrasts, updates

  def mapped(check, **kwargs):
    function = lambda *args: step(*args, **kwargs)
    specs = (PartitionSpec(), PartitionSpec(), spec, spec)
    return jax.shard_map(
      function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check
    )

  state = tx.init(params)
  loss_and_grads = jax.jit(captured.value_and_grad)(params, x, y)
  updates, _ = tx.update(loss_and_grads[1], state, params, stats=loss_and_grads[2])
  expected = *loss_and_grads[:2], loss_and_grads[2].factors, loss_and_grads[2].contrasts, updates
  for check in (True, False):
    ours = jax.jit(mapped(check))(state, params, x, y)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours, expected
    )
  with pytest.raises(
    ValueError, match=r"differ between devices along .*'data'.*`loss, grads, stats"
  ):
    jax.jit(mapped(True, average=False))(state, params, x, y)


def test_convolutions_under_explicit_axes_with_a_traced_refresh():
  """Statistics are sums by shard then, and patches have axes to merge behind that of the shards."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    "kernel": jax.random.normal(keys[0], (3, 3, 2, 4)),
    "bias": jnp.zeros(4),
    "head": jax.random.normal(keys[1], (4, 3)),
  }
  x, y = jax.random.normal(keys[2], (32, 6, 6, 2)), jax.random.randint(keys[3], (32,), 0, 3)

  def loss(p, x, y):
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims)
    return fop_optax.softmax_cross_entropy(jnp.tanh(h + p["bias"]).mean((1, 2)) @ p["head"], y)

  def factors(params, x, y):
    captured = fop_optax.capture(loss, params, x, y)
    step = jax.jit(lambda refresh: captured.value_and_grad(params, x, y, refresh=refresh)[2])
    return step(jnp.asarray(True)).factors

  want = factors(params, x, y)
  with jax.set_mesh(mesh):
    place = lambda tree, *axes: jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*axes)))
    got = factors(place(params), place(x, "data"), place(y, "data"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
