"""The Neumann optimizer against stored trajectories, Nesterov's momentum, and NumPy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax

ORACLE = np.load(pathlib.Path(__file__).parent / "oracles" / "neumann_reference.npz")
ETA = {
  "const": 0.05,
  "decay": lambda count: jnp.where(count < 10, 0.05, 0.015),
}
CASES = {
  "noreg": (ETA["const"], {"alpha": 0.0, "beta": 0.0}),
  "paper": (ETA["const"], {}),
  "strong": (ETA["const"], {"alpha": 0.1, "beta": 0.1}),
  "decay": (ETA["decay"], {"gamma": 0.9}),
  "paper_resetstep": (ETA["const"], {"reset_moves": True}),
}
pytestmark = pytest.mark.usefixtures("x64")


def run(tx, params, gradient, steps):
  """What each step leaves, for `gradient(params, step)`."""

  def step(carry, s):
    params, state = carry
    updates, state = tx.update(gradient(params, s), state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, state)

  return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(steps))[1])(params)


def split(w):
  """A vector as a tree: `r` is one norm over all of it."""
  return {"a": w[..., :2], "b": w[..., 2:].reshape(*w.shape[:-1], 2, 2)}


def joined(tree):
  return jnp.concatenate([tree["a"], tree["b"].reshape(*tree["a"].shape[:-1], 4)], axis=-1)


def quadratic(params, s):
  noise = jnp.asarray(ORACLE["noise"])[s]
  return split(ORACLE["H"] @ (joined(params) - ORACLE["c"]) + noise)


@pytest.mark.parametrize("case", CASES)
def test_stored_trajectories(case):
  rate, kwargs = CASES[case]
  tx = fop_optax.neumann(rate, 1, num_sgd_steps=3, reset_period=4, **kwargs)
  params, state = run(tx, split(jnp.asarray(ORACLE["w0"])), quadratic, 20)
  neumann = state[1]
  close = lambda got, key: np.testing.assert_allclose(
    got, ORACLE[f"{case}/{key}"], rtol=0, atol=1e-12, err_msg=key
  )
  close(joined(params), "w")
  close(joined(neumann.m), "m")
  close(joined(neumann.v), "v")
  close(neumann.mu, "mu")
  returned = jax.vmap(fop_optax.neumann_eval_params)(state, params)
  close(joined(returned), "ret")


def test_without_regularisers_and_resets_it_is_nesterov():
  plain = {"alpha": 0.0, "beta": 0.0, "resets": "never", "num_sgd_steps": 0}
  tx = fop_optax.neumann(0.05, 1, min_momentum=0.8, max_momentum=0.8, **plain)
  start = split(jnp.asarray(ORACLE["w0"]))
  got, _ = run(tx, start, quadratic, 20)
  want, _ = run(optax.sgd(0.05, 0.8, nesterov=True), start, quadratic, 20)
  np.testing.assert_allclose(joined(got), joined(want), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
  ("resets", "at"),
  [
    ("doubling", [1, 4, 10, 22, 46]),
    ("doubled modulus", [1, 7, 13, 25, 49]),
    ("linear", [1, 4, 10, 19, 31, 46]),
    ("constant", list(range(1, 51, 3))),
    ("never", []),
  ],
)
def test_resets(resets, at):
  """Parameters stand still at a reset, here after a warm-up of two steps, and nowhere else."""
  tx = fop_optax.neumann(0.01, 1, num_sgd_steps=2, reset_period=3, resets=resets)
  params, state = run(tx, {"w": jnp.ones(2)}, lambda p, s: jax.tree.map(jnp.ones_like, p), 52)
  before = jnp.concatenate([jnp.ones((1, 2)), params["w"][:-1]])
  still = jnp.all(params["w"] == before, axis=1)
  assert (jnp.flatnonzero(still) - 1).tolist() == at
  for t in at:  # the series starts anew from the gradient
    np.testing.assert_allclose(state[1].m["w"][t + 1], -0.01, rtol=1e-12)


def test_defaults_are_table_1():
  """Warm-up and first interval in epochs, momentum from 0.5 to 0.9, beta by the variables."""
  one = lambda p, s: {"w": jnp.full(1000, jnp.cos(s.astype(float)))}
  start = {"w": jnp.zeros(1000)}
  _, state = run(fop_optax.neumann(0.01, 4), start, one, 70)
  _, given = run(
    fop_optax.neumann(0.01, 7, num_sgd_steps=20, reset_period=40, beta=1e-2), start, one, 70
  )
  jax.tree.map(np.testing.assert_array_equal, state, given)
  np.testing.assert_allclose(
    state[1].mu[19:31], [0, 1 / 2, 2 / 3, 3 / 4, 4 / 5, 5 / 6, 6 / 7, 7 / 8, 8 / 9, *[0.9] * 3]
  )
  _, by_epoch = run(fop_optax.neumann(0.01, 4, momentum_unit=4), start, one, 70)
  np.testing.assert_allclose(by_epoch[1].mu[jnp.array([20, 23, 27, 55])], [0.5, 0.5, 2 / 3, 0.9])


def test_the_regularisers_where_they_are_not_defined():
  """No force at r = 0; next to it a finite one, which keeps its direction."""
  tx = fop_optax.neumann(1.0, 1, num_sgd_steps=0, resets="never", alpha=0.1, beta=0.1)
  params = {"w": jnp.zeros(3)}
  state = tx.init(params)
  zero = {"w": jnp.zeros(3)}
  updates, _ = tx.update(zero, state, params)
  assert jnp.all(updates["w"] == 0)
  near = {"w": jnp.array([1e-9, 0.0, 0.0])}
  updates, _ = tx.update(zero, state, near)
  # r = 1 at equilibrium: closer than 0.01 the repulsion is 0.1 / 0.01^2
  np.testing.assert_allclose(updates["w"], [1.5 * 1e3, 0, 0], rtol=1e-12)


def test_what_it_needs():
  tx = fop_optax.neumann(0.1, 10)
  params = {"w": jnp.ones(2)}
  with pytest.raises(ValueError, match=r"No `params`: the Neumann .* `tx.update\(grads, opt_state"):
    tx.update(params, tx.init(params))
  for kwargs, message in [
    ({"resets": "often"}, "`resets='often'` should be one of 'doubling', .* 'never'"),
    ({"gamma": 1.0}, r"`gamma=1.0` should be in \[0, 1\)"),
    ({"reset_period": 0}, "`reset_period=0` should be a whole number of steps, at least 1"),
    ({"momentum_unit": 0}, "`momentum_unit=0` should be above 0"),
  ]:
    with pytest.raises(ValueError, match=message):
      fop_optax.neumann(0.1, 10, **kwargs)
  with pytest.raises(ValueError, match="found 0 states of the Neumann optimizer where"):
    fop_optax.neumann_eval_params(optax.sgd(0.1).init(params), params)
