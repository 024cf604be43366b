"""Capture and an optimizer together: in vmap, scan, donation, and against explicit statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fop_optax


def batch_loss(params, x, y):
  return problems.loss(params, problems.Batch(x, y))


@pytest.mark.usefixtures("x64")
def test_capture_finds_what_was_computed_by_hand():
  params = problems.make_params(dtype=jnp.float64)
  batch = problems.make_batch(dtype=jnp.float64)
  for groups in (1, 2, 4):
    captured = fop_optax.capture(batch_loss, params, *batch, groups=groups)
    assert captured.layers == problems.layers_of(params, groups)
    ours = jax.jit(captured.value_and_grad)(params, *batch)
    theirs = problems.value_and_grad(params, batch, groups=groups)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)


def make_step(name, **options):
  params, batch = problems.make_params(), problems.make_batch(64)
  captured = fop_optax.capture(batch_loss, params, *batch, groups=2)
  tx = getattr(fop_optax, name)(0.1, captured.layers, damping=0.01, **options)

  def step(state, batch):
    params, opt_state = state
    refresh = fop_optax.refresh_due(opt_state)
    loss, grads, stats = captured.value_and_grad(params, *batch, refresh=refresh)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), loss

  return step, lambda params: (params, tx.init(params)), batch


def close(a, b):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), a, b)


@pytest.mark.slow  # by default the contract suite has a scan and a vmap
@pytest.mark.parametrize("scaling", ["factored", "exact"])
@pytest.mark.parametrize("name", ["kfac", "fop"])
def test_steps_in_a_loop_a_scan_and_a_vmap_are_the_same(name, scaling):
  step, init, batch = make_step(name, scaling=scaling, curvature_update_period=2)
  seeds = [problems.make_params(seed) for seed in range(3)]
  train = lambda state: jax.lax.scan(lambda state, _: step(state, batch), state, None, length=5)

  jitted = jax.jit(step)
  looped = init(seeds[0])
  losses = []
  for _ in range(5):
    looped, loss = jitted(looped, batch)
    losses.append(loss)
  assert losses[-1] < losses[0]
  scanned, scanned_losses = jax.jit(train)(init(seeds[0]))
  close(scanned[0], looped[0])
  close(scanned_losses, jnp.stack(losses))

  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
  many, many_losses = jax.jit(jax.vmap(lambda params: train(init(params))))(stacked)
  close(jax.tree.map(lambda a: a[0], many[0]), looped[0])
  close(many_losses[0], jnp.stack(losses))
  assert many_losses.shape == (3, 5)


def test_a_donated_state_and_no_recompilation():
  step, init, batch = make_step("fop")
  traces = []

  @functools.partial(jax.jit, donate_argnums=0)
  def counted(state, batch):
    traces.append(1)
    return step(state, batch)

  state = init(problems.make_params())
  state = jax.tree.map(jnp.copy, state)
  for _ in range(4):
    state, loss = counted(state, batch)
  assert len(traces) == 1
  assert np.isfinite(loss)


@pytest.mark.slow
def test_static_variants_train_like_the_traced_one():
  step, init, batch = make_step("fop", curvature_update_period=3)
  params = problems.make_params()
  captured = fop_optax.capture(batch_loss, params, *batch, groups=2)
  tx = fop_optax.fop(0.1, captured.layers, damping=0.01, curvature_update_period=3)

  @functools.partial(jax.jit, static_argnames="refresh")
  def static(state, batch, refresh):
    params, opt_state = state
    loss, grads, stats = captured.value_and_grad(params, *batch, refresh=refresh)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return (optax.apply_updates(params, updates), opt_state), loss

  ours, theirs = init(params), init(params)
  traced = jax.jit(step)
  for i in range(7):
    ours, _ = static(ours, batch, refresh=i % 3 == 0)
    theirs, _ = traced(theirs, batch)
  close(ours[0], theirs[0])


@pytest.mark.parametrize("name", ["kfac", "fop"])
def test_a_batch_of_nan_is_skipped_and_counted(name):
  step, init, batch = make_step(name)
  step = jax.jit(step)
  state, _ = step(init(problems.make_params()), batch)
  poisoned = batch._replace(x=batch.x.at[3, 2].set(jnp.nan))
  after, loss = step(state, poisoned)
  assert np.isnan(loss)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after[0]))
  numbers = fop_optax.diagnostics(after[1])
  assert int(numbers["nonfinite_gradients"]) == 1
  resumed, loss = step(after, batch)
  assert np.isfinite(loss)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(resumed))
