"""Curvature owned over a mesh of eight devices: the numbers of one, an eighth of the work."""

import functools
import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest
from test_sharding import collectives

import fop_optax
from fop_optax.curvature.stacks import Stack, plan_stacks
from fop_optax.curvature.state import CurvatureState
from fop_optax.sharding import plan_owners

pytestmark = pytest.mark.usefixtures("x64")

N, T, D, C, TALL = 64, 2, 6, 3, 20


def loss(p, x, y):
  """A tall layer, nine scanned, one wide, three of one shape and a head: 15 blocks."""
  block = lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), None)
  x, _ = jax.lax.scan(block, jnp.tanh(x @ p["tall"]), (p["stack"], p["shift"]))
  x = jnp.tanh(x @ p["wide"])
  for w in p["w"]:
    x = x * p["scale"] + jnp.tanh(x @ w)
  return fop_optax.softmax_cross_entropy(x.mean(1) @ p["head"], y)


@functools.cache
def inputs():
  """Parameters and four batches."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-2])
  params = {
    "tall": draw(TALL, D),  # whose inputs have a diagonal factor
    "stack": draw(9, D, D),
    "shift": draw(9, D),
    "wide": draw(D, 2 * D),
    "w": [draw(2 * D, 2 * D) for _ in range(3)],
    "scale": np.ones(2 * D),  # in no layer
    "head": draw(2 * D, C),
  }
  return params, draw(4, N, T, TALL), rng.integers(0, C, (4, N)).astype("int32")


@functools.cache
def captured_of(name):
  params, x, y = inputs()
  groups = 2 if name == "fop" else 1
  return fop_optax.capture(loss, params, x[0], y[0], groups=groups, max_dim=16)


def make(name, sharding=None, **options):
  options = {"damping": 0.1, "curvature_update_period": 2} | options
  return getattr(fop_optax, name)(0.1, captured_of(name).layers, sharding=sharding, **options)


def step_of(name, tx, refresh=None):
  """A step, statistics when they are due (None) or always or never."""

  def step(params, state, x, y):
    due = fop_optax.refresh_due(state) if refresh is None else refresh
    value, grads, stats = captured_of(name).value_and_grad(params, x, y, refresh=due)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, value

  return step


def mesh_of(kind=AxisType.Auto, n=8):
  return jax.make_mesh((n,), ("data",), axis_types=(kind,), devices=jax.devices()[:n])


def put(mesh, tree, *axes):
  def place(x):
    rest = [None] * (x.ndim - len(axes)) if AxisType.Explicit in mesh.axis_types else []
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes, *rest)))

  return jax.tree.map(place, tree)


def batch(mesh, i):
  _, x, y = inputs()
  return (x[i], y[i]) if mesh is None else put(mesh, (x[i], y[i]), "data")


def train(name, tx, mesh=None, refresh=(None,) * 4, start=None):
  """Parameters and state after steps on one batch after another, and the compiled step."""
  params = inputs()[0]
  params = jax.tree.map(jnp.asarray, params) if mesh is None else put(mesh, params)
  params, state = start or (params, tx.init(params))
  steps = {own: jax.jit(step_of(name, tx, own)) for own in set(refresh)}
  for i, own in enumerate(refresh):
    params, state, _ = steps[own](params, state, *batch(mesh, i % 4))
  return params, state, steps


def same(ours, expected, tolerance=1e-9):
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
  jax.tree.map(close, ours, expected)


def on_eight(name, kind, refresh, **options):
  """Four steps on a mesh are those on one device, parameters and all of the state."""
  expected = train(name, make(name, **options), refresh=refresh)
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    tx = make(name, fop_optax.Sharding(mesh), **options)
    params, state, steps = train(name, tx, mesh, refresh)
    same(params, expected[0])
    same(fop_optax.to_blocks(state), expected[1], 1e-7)
    assert all(step._cache_size() == 1 for step in steps.values())
  return tx, mesh, params, state


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def test_eight_devices_are_one():
  on_eight("fop", AxisType.Auto, (None,) * 4)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("refresh", [(None,) * 4, (True, False, True, False)], ids=["traced", "static"])
@pytest.mark.parametrize("scaling", ["factored", "exact"])
@pytest.mark.parametrize("name", ["kfac", "fop"])
def test_eight_devices_are_one_in_all_ways(name, scaling, refresh, kind):
  on_eight(name, kind, refresh, scaling=scaling)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(
  "options",
  [
    {"stagger": True, "inverse_update_period": 3},
    {"inverse_update_period": 3, "scaling": "exact"},
    {"projection_metric": "damped", "beta": optax.linear_schedule(0.1, 0.2, 4)},
  ],
)
def test_with_options(options, kind):
  on_eight("fop", kind, (None,) * 4, **options)
