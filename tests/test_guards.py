"""What a step does that is not finite, below rounding, or meets a parameter without a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fop_optax
from fop_optax.capture.backward import tied
from fop_optax.curvature.inverse import SCALINGS
from fop_optax.layers import Factors

SIZES = ((5, 5), (5, 5))  # one stack: quick to compile
PARAMS = problems.make_params(sizes=SIZES)
LAYERS = problems.layers_of(PARAMS)
BATCH = problems.make_batch(sizes=SIZES)
COUNTERS = ("count", "nonfinite_losses", "nonfinite_gradients", "nonfinite_directions")


def counters(state):
  numbers = fop_optax.diagnostics(state)
  return tuple(int(numbers[name]) for name in COUNTERS)


def assert_nothing_moved(updates, before, after):
  """But for the counters."""
  assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
  flat = jax.tree_util.tree_flatten_with_path(before)[0]
  for (path, old), new in zip(flat, jax.tree.leaves(after), strict=True):
    if not any(name in jax.tree_util.keystr(path) for name in COUNTERS[1:]):
      np.testing.assert_array_equal(new, old, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module", params=[fop_optax.kfac, fop_optax.fop], ids=["kfac", "fop"])
def stepped(request):
  """A compiled update, with momentum and decay, and what a good first step left."""
  tx = request.param(30.0, LAYERS, weight_decay=0.1, curvature_update_period=1)
  update = jax.jit(tx.update)
  _, grads, stats = problems.value_and_grad(PARAMS, BATCH)
  _, state = update(grads, tx.init(PARAMS), PARAMS, stats=stats._replace(loss=jnp.float32(1)))
  state = optax.tree.set(state, unit=jnp.float32(1e-3))  # less than a hundredth of the loss to come
  return update, state, grads, stats._replace(loss=jnp.float32(1))


def spoilt(tree, name, value):
  return {**tree, name: jax.tree.map(lambda g: g.at[0].set(value), tree[name])}


@pytest.mark.parametrize(
  ("loss", "leaf", "value", "want"),
  [
    (jnp.inf, None, 0, (1, 1, 0, 0)),
    (jnp.nan, "fc1", jnp.nan, (1, 1, 1, 0)),
    (1, "fc1", jnp.inf, (1, 0, 1, 0)),
    (1, "gain", jnp.nan, (1, 0, 1, 0)),  # in no layer: the layers do not move either
    (1, "fc1", 3e38, (1, 0, 0, 1)),  # the direction overflows
  ],
)
def test_a_step_is_whole_or_none(stepped, loss, leaf, value, want):
  update, state, grads, stats = stepped
  stats = stats._replace(loss=jnp.float32(loss), refresh=jnp.asarray(want[3] == 0))
  bad = grads if leaf is None else spoilt(grads, leaf, value)
  updates, after = update(bad, state, PARAMS, stats=stats)
  assert counters(after) == want
  assert_nothing_moved(updates, state, after)


def test_statistics_of_a_direction_that_overflows_stay(stepped):
  """They are finite; the count stands still, so that the next step takes new ones."""
  update, state, grads, stats = stepped
  updates, after = update(spoilt(grads, "fc1", 3e38), state, PARAMS, stats=stats)
  assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
  assert counters(after) == (1, 0, 0, 1)
  layer = fop_optax.diagnostics(after, LAYERS)["layers"]["['fc0']['w']"]
  assert layer["folds"] == 2
  assert fop_optax.refresh_due(after)


@pytest.mark.parametrize("kwargs", [{"fallback": optax.sgd(1e39)}, {"norm_constraint": 1e-3}])
def test_what_overflows_after_the_direction(kwargs):
  """In the fallback, or the norm; there a zero step is no step either."""
  tx = fop_optax.kfac(0.1, LAYERS, **kwargs)
  _, grads, stats = problems.value_and_grad(PARAMS, BATCH)
  grads = jax.tree.map(lambda g: 1e20 * g, grads)
  updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
  assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
  assert counters(state) == (0, 0, 0, 1)


def test_a_direction_that_is_finite_until_it_is_cast():
  """float16 ends at 65,504; float32, in which directions are made, does not."""
  params = jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS)
  tx = fop_optax.scale_by_kfac(LAYERS, damping=1e-2, fallback=optax.identity())
  _, grads, stats = problems.value_and_grad(PARAMS, BATCH)
  update = jax.jit(tx.update)
  largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
  for scale, want in ((1e-3, (1, 0, 0, 0)), (5e4 / largest, (0, 0, 0, 1))):
    scaled = jax.tree.map(lambda g, s=scale: (s * g).astype(jnp.float16), grads)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(scaled))
    updates, state = update(scaled, tx.init(params), params, stats=stats)
    assert counters(state) == want
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))
    assert jnp.any(updates["fc0"]["w"] != 0) == (want[0] == 1)


@pytest.mark.parametrize("make", [fop_optax.kfac_per_example, fop_optax.fop_per_example])
@pytest.mark.parametrize("curvature", ["kronecker", "exact"])
def test_per_example_directions(make, curvature):
  tx = make(3e38, curvature=curvature)
  params = {"w": jnp.ones((3, 2))}
  grads = {"w": 0.01 * jax.random.normal(jax.random.key(0), (8, 3, 2))}
  state = tx.init(params)
  updates, after = tx.update(grads, state, params)
  assert counters(after) == (0, 0, 0, 1)
  assert jnp.all(updates["w"] == 0)


def test_the_loss_travels_with_the_statistics():
  """An infinite loss with a finite gradient: the square overflows, its derivative does not."""
  loss = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
  params, x = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 0], [0, 1], [1, 1], [1, -1]])
  captured = fop_optax.capture(loss, params, x, x[:, :1], groups=1)
  tx = fop_optax.kfac(0.1, captured.layers)
  for refresh in (True, False):
    value, grads, stats = captured.value_and_grad(
      params, x, jnp.full((4, 1), 1e25), refresh=refresh
    )
    assert jnp.isinf(value)
    assert jnp.all(jnp.isfinite(grads["w"]))
    state = tx.init(params)
    updates, after = tx.update(grads, state, params, stats=stats)
    assert_nothing_moved(updates, state, after)
    assert counters(after) == (0, 1, 0, 0)


@pytest.mark.parametrize("fallback", [None, optax.adamw(1.0)], ids=["default", "adamw"])
@pytest.mark.parametrize("make", [fop_optax.kfac, fop_optax.scale_by_fop])
def test_a_parameter_without_a_gradient_is_left_alone(make, fallback):
  stop = jax.lax.stop_gradient

  def loss(params, x, y):
    x = x @ stop(params["frozen"]) * stop(params["scale"]) + params["shift"] ** 2
    return fop_optax.squared_error(x @ params["w"], y)

  params = {"frozen": jnp.ones((3, 4)), "scale": jnp.ones(4), "w": jnp.ones((4, 2))}
  params["shift"] = jnp.ones(4)
  x, y = jax.random.normal(jax.random.key(0), (8, 3)), jnp.ones((8, 2))
  captured = fop_optax.capture(loss, params, x, y, groups=2)
  paths = [captured.layers.paths[leaf] for leaf in sorted(captured.layers.frozen)]
  assert paths == ["['frozen']", "['scale']"]
  rate = (1.0,) if make is fop_optax.kfac else ()
  tx = make(*rate, layers=captured.layers, fallback=fallback)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
  moved = {name: bool(jnp.any(update != 0)) for name, update in updates.items()}
  assert moved == {"frozen": False, "scale": False, "shift": True, "w": True}


@pytest.mark.parametrize("scaling", ["factored", "exact"])
@pytest.mark.parametrize(("size", "scale"), [(8, 1.0), (8, 255.0), (60, 255.0)])
def test_damping_is_at_least_rounding(scaling, size, scale):
  """On a singular Fisher block a step of single precision is about that of double."""
  rng = np.random.default_rng(size)
  half = rng.normal(size=(4 * size, size // 2))
  inputs = scale * np.concatenate([half, half @ rng.normal(size=(size // 2, size // 2))], axis=1)
  outputs = rng.normal(size=(4 * size, 3)) @ rng.normal(size=(3, 5))  # G is singular as well
  V = inputs.T @ outputs / len(inputs)
  A, G = (np.asarray(v.T @ v / len(v)) for v in (inputs, outputs))

  def step(dtype, damping):
    factors = Factors(jnp.asarray(A, dtype), jnp.asarray(G, dtype))
    inverse, sound = problems.invert_block(factors, damping, scaling)
    assert sound
    return np.asarray(SCALINGS[scaling].solve(*inverse, jnp.asarray(V, dtype)), float), inverse

  with jax.enable_x64(True):
    for damping in (1e-12 * scale**2, 0.3 * scale**2):
      (single, raised), (double, _) = step(jnp.float32, damping), step(jnp.float64, damping)
      ratio = np.linalg.norm(single) / np.linalg.norm(double)
      assert 0.3 < ratio < 3
      (_, used) = raised
      added = used.added if scaling == "exact" else used.added_A
      assert (added > 0) == (damping < 1e-6 * scale**2)


def test_a_tied_use_without_a_gradient_adds_nothing():
  """The limit as the gradients of one use go to zero, and zero where both are."""
  spd = lambda seed, d: (lambda r: r @ r.T)(np.random.default_rng(seed).normal(size=(1, d, d))[0])
  first = Factors(jnp.asarray(spd(0, 3))[None], jnp.asarray(spd(1, 2))[None])
  second = Factors(jnp.asarray(spd(2, 3))[None], jnp.asarray(spd(3, 2))[None])
  traces = lambda f: jnp.trace(f.A[0]) * jnp.trace(f.G[0])
  for small in (Factors(0 * second.A, second.G), Factors(second.A, 0 * second.G)):
    both = tied(first, small)
    np.testing.assert_allclose(traces(both), traces(first), rtol=1e-6)
    np.testing.assert_allclose(both.A / both.A[0, 0, 0], first.A / first.A[0, 0, 0], rtol=1e-6)
    tiny = jax.tree.map(lambda z, s: z + 1e-12 * s, small, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), tied(first, tiny), both)
  nothing = jax.tree.map(jnp.zeros_like, first)
  jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), tied(nothing, small))
  bad = tied(first, Factors(second.A, second.G * jnp.nan))
  assert not np.isfinite(bad.G).any()  # refused later, and counted


def test_max_dim_counts_inputs_without_the_bias():
  loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2)
  params, x = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, jnp.ones((2, 4))
  for limit, diagonal in ((4, (False, False)), (3, (True, False))):
    (layer,) = fop_optax.capture(loss, params, x, max_dim=limit).layers
    assert (layer.rows, layer.diagonal) == (5, diagonal)
