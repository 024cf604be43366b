"""Damping in units of a block's own curvature: laws, and what a step becomes in other units."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fop_optax
from fop_optax.curvature.damping import Damping, size
from fop_optax.curvature.inverse import SCALINGS
from fop_optax.layers import Factors

pytestmark = pytest.mark.usefixtures("x64")
UNITS = st.floats(1e-4, 1e4)


@functools.partial(jax.jit, static_argnames="scaling")
def direction(rows, dys, damping=0.0, relative=0.0, scaling="factored"):
  """K-FAC's direction of a layer with inputs `rows` and output gradients `dys`, and the damping."""
  A, G, V = rows.T @ rows / len(rows), dys.T @ dys / len(rows), rows.T @ dys / len(rows)
  factors = Factors(A, G)
  lam = Damping(jnp.asarray(damping), jnp.asarray(relative)).of(*map(size, factors))
  inverse, sound = problems.invert_block(factors, damping, scaling, relative)
  return jnp.where(sound, SCALINGS[scaling].solve(*inverse, V), jnp.nan), lam


def draw(seed, examples=12, inputs=5, outputs=3):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(examples, inputs)), rng.normal(size=(examples, outputs))


@hypothesis.given(seed=st.integers(0, 999), unit=UNITS, scaling=st.sampled_from(list(SCALINGS)))
@hypothesis.settings(max_examples=20, deadline=None)
def test_units_of_loss_and_inputs(seed, unit, scaling):
  """Loss times c, so `dy` times c: with empirical factors the direction is 1/c of it, as its
  undamped one is. Inputs times c: 1/c as well, as Newton's, for weights that are then c times too
  large."""
  rows, dys = draw(seed)
  want, lam = direction(rows, dys, relative=0.3, scaling=scaling)
  for a, b in ((rows, unit * dys), (unit * rows, dys)):
    got, scaled = direction(a, b, relative=0.3, scaling=scaling)
    np.testing.assert_allclose(got, want / unit, rtol=1e-8)
    np.testing.assert_allclose(scaled, lam * unit**2, rtol=1e-10)
    away, _ = direction(a, b, damping=lam, scaling=scaling)
    if not 0.5 < unit < 2:  # absolute damping has the units of the loss
      assert not np.allclose(away, want / unit, rtol=1e-3)


@hypothesis.given(seed=st.integers(0, 999), copies=st.integers(2, 5))
@hypothesis.settings(max_examples=20, deadline=None)
def test_duplicated_units(seed, copies):
  """Each input k times, weights shared out: `A` has k times the eigenvalues and the mean it had.

  The direction, summed over copies, is the one at 1/k of the input factor's damping.
  """
  rows, dys = draw(seed)
  A, G, V = (jnp.asarray(x.T @ y) / len(rows) for x, y in ((rows, rows), (dys, dys), (rows, dys)))
  relative = 0.3
  got, _ = direction(np.tile(rows, copies), dys, relative=relative)
  mean = lambda factor: jnp.trace(factor) / len(factor)
  root = relative**0.5
  left = jnp.linalg.inv(A + root * mean(A) / copies * jnp.eye(len(A)))
  right = jnp.linalg.inv(G + root * mean(G) * jnp.eye(len(G)))
  summed = got.reshape(copies, *V.shape).sum(0)
  np.testing.assert_allclose(summed, left @ V @ right, rtol=1e-8)


@pytest.mark.parametrize("make", [fop_optax.scale_by_kfac, fop_optax.scale_by_fop])
def test_units_of_a_whole_loss(make):
  """The loss times c: steps times 1/c, for tied lookups, convolutions and biases as well."""
  groups = 1 if make is fop_optax.scale_by_kfac else 2
  keys = jax.random.split(jax.random.key(0), 5)
  params = {
    "kernel": jax.random.normal(keys[0], (3, 3, 2, 4)),
    "table": jax.random.normal(keys[1], (7, 4)),
    "bias": jnp.zeros(4),
  }
  x, y = jax.random.normal(keys[2], (8, 5, 5, 2)), jax.random.randint(keys[3], (8,), 0, 7)

  def loss(params, x, y, unit):
    numbers = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", None, None, numbers)
    h = jnp.tanh(h + params["bias"]).mean((1, 2)) + params["table"][y]
    return -unit * jnp.mean(jax.nn.log_softmax(h @ params["table"].T)[jnp.arange(len(y)), y])

  captured = fop_optax.capture(loss, params, x, y, 1.0, groups=groups)
  tx = make(captured.layers)

  @jax.jit
  def step(unit):
    _, grads, stats = captured.value_and_grad(params, x, y, unit)
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    return jax.tree.map(lambda u: unit * u, updates)

  steps = [step(unit) for unit in (1.0, 1e-3, 50.0)]
  for other in steps[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other, steps[0])


def test_mean_eigenvalue_of_an_exact_metric():
  """Per-example gradients: the unit is the mean eigenvalue of the Fisher of all leaves."""
  rng = np.random.default_rng(0)
  grads = {"a": rng.normal(size=(6, 2, 2)), "b": rng.normal(size=(6, 3))}
  params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)
  tx = fop_optax.scale_by_kfac_per_example(curvature="exact", relative_damping=0.4)
  got, _ = tx.update(grads, tx.init(params), params)
  X = np.concatenate([g.reshape(6, -1) for g in grads.values()], axis=1)
  F = X.T @ X / 6
  want = np.linalg.solve(F + 0.4 * np.linalg.eigvalsh(F).mean() * np.eye(7), X.mean(0))
  np.testing.assert_allclose(np.concatenate([got["a"].ravel(), got["b"]]), want, rtol=1e-8)


@pytest.mark.parametrize("devices", (1, 8))
@pytest.mark.parametrize("scaling", tuple(SCALINGS))
def test_experts_that_few_rows_come_to(scaling, devices):
  """Two folds of statistics of three experts in one array: damping is at least their mean's."""
  rng = np.random.default_rng(3)
  params = {"w": rng.normal(size=(3, 5, 4)), "head": rng.normal(size=(4, 2))}
  batches = [
    (np.array([1.0, 0.1, 1e-3])[:, None] * rng.normal(size=(16, 3, 5)), rng.integers(0, 2, 16))
    for _ in range(2)
  ]

  def loss(p, x, y):
    h = jnp.tanh(jnp.einsum("nei,eio->neo", x, p["w"])).sum(axis=1)
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  captured = fop_optax.capture(loss, params, *batches[0])
  sharding = None if devices == 1 else fop_optax.Sharding(jax.make_mesh((devices,), ("data",)))
  tx = fop_optax.kfac(
    0.1, captured.layers, relative_damping=0.5, scaling=scaling, decay=0.5, sharding=sharding
  )
  state, traces = tx.init(params), []
  for batch in batches:
    basis = fop_optax.bases(state) if scaling == "eigenvalue" else None
    _, grads, stats = captured.value_and_grad(params, *batch, basis=basis)
    _, state = tx.update(grads, state, params, stats=stats)
    experts = next(own for own in stats.factors if len(own.A) == 3)
    traces.append([jax.vmap(jnp.trace)(own) for own in experts])
  (A, G), (new_A, new_G) = traces
  mean = np.asarray((A + new_A) * (G + new_G)) / 4 / (5 * 4)
  curvature = optax.tree.get(state, "curvature")
  at = np.asarray(curvature.blocks.layer)
  index = next(i for i, own in enumerate(captured.layers) if own.stack == 3)
  used = jax.tree.map(lambda x: np.asarray(x)[at == index], curvature.blocks.inversions.damping)
  lam = used.damping if scaling != "factored" else used.damping_A * used.damping_G
  assert mean[2] < 1e-4 * mean.mean()
  own = mean
  if scaling == "eigenvalue":  # its own mean eigenvalue is that of S
    whole = curvature if devices == 1 else optax.tree.get(fop_optax.to_blocks(state), "curvature")
    own = next(np.mean(x.inverse.S, axis=(1, 2)) for x in whole.stacks if x.blocks == 3)
  np.testing.assert_allclose(lam, 0.5 * np.maximum(own, mean.mean()), rtol=1e-10)


def test_a_layer_that_overflows_leaves_experts_alone():
  """Its mean eigenvalue is infinite in float32, theirs are not."""
  params = {"w": jnp.ones((3, 2, 2), jnp.float32), "far": jnp.ones((3, 1), jnp.float32)}
  x = jax.random.normal(jax.random.key(0), (8, 3, 2), jnp.float32)

  def loss(p, x):
    h = jnp.tanh(jnp.einsum("nei,eio->neo", x, p["w"]))
    return jnp.mean(jnp.sum(h**2, axis=(1, 2)) + 1e12 * (1e12 * x[:, :, 0] @ p["far"])[:, 0])

  captured = fop_optax.capture(loss, params, x)
  tx = fop_optax.kfac(0.1, captured.layers)
  _, grads, stats = captured.value_and_grad(params, x)
  updates, state = tx.update(grads, tx.init(params), params, stats=stats)
  found = fop_optax.diagnostics(state, captured.layers)["layers"]
  assert np.all(found["['w']"]["inverses"] == 1)
  assert np.all(found["['far']"]["failed_inverses"] == 1)
  assert jnp.all(updates["w"] != 0) and jnp.all(updates["far"] == 0)
