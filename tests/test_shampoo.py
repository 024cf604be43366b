"""Shampoo: the numbers of Meta's Distributed Shampoo, matrix roots, and laws."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax
from fop_optax.curvature.roots import eigh_root, newton_root
from fop_optax.optimizers import grafting
from fop_optax.tensors import merged_from_left, merged_from_right

ORACLE = np.load(pathlib.Path(__file__).parent / "oracles" / "shampoo_meta.npz")
NAMES = ("W1", "W2", "b")
ADAM = {"grafting": "adam", "graft_eps": 1e-8}
META = {
  "a_plain": {},
  "b_override": {"exponents": {2: 0.5}},
  "c_onesided": {"exponents": {2: {0: 0.5, 1: 0.0}}},
  "d_adamgraft": {**ADAM, "start_step": 5, "weight_decay": 0.01},
  "e_adagrad": {"b2": 1.0, "inverse_update_period": 1, "grafting": "adagrad"},
  "f_defaultmerge": {**ADAM, "merge_to": 1},
  "g_block3": {**ADAM, "block_size": 3},
  "h_nobias_l2_beta3": {
    "inverse_update_period": 2,
    "b3": 0.95,
    "correct_bias": False,
    "weight_decay": 0.05,
    "decoupled_decay": False,
  },
  "i_newton": {**ADAM, "root": "newton"},
  "j_eigcorr": {"eigenvalue_correction": True},
  "k_kl": {"inverse_update_period": 1, "kl": True, "exponents": {2: 0.5}},
}
pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("config", META)
def test_distributed_shampoo(config):
  kwargs = {"inverse_update_period": 3, "grafting": None, "eps": 1e-6} | META[config]
  tx = fop_optax.shampoo(2**-7, 0.9, **({"b2": 0.999} | kwargs))
  params = {name: jnp.asarray(ORACLE[f"p0_{name}"], float) for name in NAMES}
  grads = {name: jnp.asarray(ORACLE[f"g_{name}"], float) for name in NAMES}

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), grads))
  (_, state), after = run(params)
  for name in NAMES:
    np.testing.assert_allclose(
      after[name], ORACLE[f"{config}/p_{name}"], rtol=0, atol=1e-8, err_msg=name
    )
  is_shampoo = lambda x: isinstance(x, fop_optax.ScaleByShampooState)
  (shampoo,) = filter(is_shampoo, jax.tree.leaves(state, is_leaf=is_shampoo))
  checked = 0
  for name, stack in zip(NAMES, shampoo.stacks, strict=False):  # one each but in blocks
    for what, sides in (("factor", stack.factors), ("invroot", stack.roots)):
      for mode, side in enumerate(sides):
        key = f"{config}/final_{what}_{name}_{mode}"
        if key in ORACLE and not (what == "invroot" and config == "j_eigcorr"):
          stored = ORACLE[key]
          np.testing.assert_allclose(side[0], stored, rtol=0, atol=1e-8 * np.abs(stored).max())
          checked += 1
  assert checked == {"a_plain": 10, "k_kl": 10, "j_eigcorr": 5}.get(config, 0)


@pytest.mark.parametrize("root", [2, 4, 6])
def test_roots_of_an_ill_conditioned_matrix(root):
  A = jnp.asarray(ORACLE["root/A"])
  for method, got in (
    ("eigen", eigh_root(A, jnp.asarray(1e-8), 1 / root)),
    ("newton", newton_root(A, jnp.asarray(1e-8), root)),
  ):
    stored = ORACLE[f"root/{method}_r{root}"]
    np.testing.assert_allclose(got, stored, rtol=0, atol=1e-8 * np.abs(stored).max())


@pytest.mark.parametrize("root", [1, 2, 3, 4, 8])
def test_newton_is_eigh(root):
  """At a condition number of a million; scaled, as the iteration scales itself."""
  rng = np.random.default_rng(root)
  Q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
  A = jnp.asarray(1e3 * Q @ np.diag(np.logspace(-6, 0, 8)) @ Q.T)
  want = eigh_root(A, jnp.zeros(()), 1 / root)
  got = newton_root(A, jnp.zeros(()), root)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * float(jnp.max(jnp.abs(want))))
  assert jnp.all(jnp.isnan(newton_root(A * jnp.nan, jnp.zeros(()), root)))


def test_the_first_step_is_the_polar_factor():
  """`(G G')^-1/4 G (G' G)^-1/4` is `U V'`."""
  G = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))
  tx = fop_optax.scale_by_shampoo(0.0, 1.0, 1e-12, grafting=None, inverse_update_period=1)
  got, _ = tx.update(G, tx.init(G))
  U, _, Vh = np.linalg.svd(G)
  np.testing.assert_allclose(got, U @ Vh, atol=1e-8)


@pytest.mark.parametrize("kind", grafting.KINDS)
def test_grafting_takes_the_length(kind):
  """Of each parameter by itself, from the optimizer of that name in optax."""
  grads = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(6, 4, 3))),
           "b": jnp.asarray(np.random.default_rng(2).normal(size=(6, 3)))}  # fmt: skip
  tx = fop_optax.scale_by_shampoo(0.0, grafting=kind, inverse_update_period=2)
  plain = {
    "sgd": optax.identity(),
    "adagrad": optax.scale_by_rss(0.0, 0.0),
    "rmsprop": optax.scale_by_rms(0.99, 1e-10, eps_in_sqrt=False),
    "adam": optax.scale_by_adam(0.0, 0.999, 1e-10),
  }[kind]
  state, other = (
    tx.init(jax.tree.map(lambda g: g[0], grads)),
    plain.init(jax.tree.map(lambda g: g[0], grads)),
  )
  update = jax.jit(tx.update)
  for number in range(6):
    g = jax.tree.map(lambda g, n=number: g[n], grads)
    got, state = update(g, state)
    want, other = plain.update(g, other)
    for name in grads:
      np.testing.assert_allclose(jnp.linalg.norm(got[name]), jnp.linalg.norm(want[name]), rtol=1e-8)
      if number == 0:  # before roots are made it is that step
        np.testing.assert_allclose(got[name], want[name], rtol=1e-8)


@pytest.mark.parametrize(
  "options",
  [{}, {"exponents": {2: {0: 0.5, 1: 0.0}}}, {"root": "newton"}, {"eigenvalue_correction": True}],
)
def test_contrasts_enter_the_momentum_in_the_metric_of_the_step(options):
  """FOP's equations with the dense matrix that the momentum is divided by."""
  rng = np.random.default_rng(0)
  g, c = (jnp.asarray(rng.normal(size=(5, 4, 3))) for _ in range(2))
  tx = fop_optax.scale_by_shampoo(
    0.8, 0.9, 1e-2, grafting=None, inverse_update_period=2, contrast=True, **options
  )
  stats = lambda c: fop_optax.Stats(jnp.asarray(False), (), (c,))
  step = jax.jit(lambda g, c, state: tx.update(g, state, stats=stats(c)))
  state, m = tx.init(g[0]), np.zeros(12)
  for t in range(1, 6):
    direction, state = step(g[t - 1], c[t - 1], state)
    (own,) = state.stacks
    roots = [
      np.eye(d) if r is None else np.asarray(r[0]) for r, d in zip(own.roots, (4, 3), strict=True)
    ]
    inverse = np.kron(*roots)
    if own.eigenvalues is not None:
      v = np.asarray(own.eigenvalues[0]).ravel() / (1 - 0.9**t)
      inverse = inverse @ np.diag(1 / (np.sqrt(v) + 1e-2)) @ inverse.T
    mean, contrast = (np.asarray(x[t - 1]).ravel() for x in (g, c))
    M = np.linalg.inv(inverse)
    perp = contrast - (contrast @ M @ mean) / (mean @ M @ mean) * mean
    inner = lambda a, b, inverse=inverse: a @ inverse @ b
    combined = mean + inner(mean, perp) / inner(perp, perp) * perp
    combined *= inner(mean, combined) / inner(combined, combined)
    m_old, m = m, 0.8 * m + 0.2 * combined
    h = (0.8 * m_old + 0.2 * combined) / (1 - 0.8**t)
    np.testing.assert_allclose(direction.ravel(), inverse @ h, rtol=1e-8, atol=1e-10)
  report = fop_optax.diagnostics(state)["stacks"]["4 x 3"]
  assert 0 < report["rho2"][0] < 1
  assert report["residual"][0] < 1e-10


def test_merged_axes():
  assert merged_from_left((6, 4), 9) == (6, 4)
  assert merged_from_left((2, 3, 3, 3), 9) == (6, 9)
  assert merged_from_left((20, 3, 2), 9) == (20, 6)
  assert merged_from_left((1, 1), 9) == (1,)
  assert merged_from_right((6, 4), 1024, 1) == (24,)
  assert merged_from_right((6, 4), 1024, 2) == (6, 4)
  assert merged_from_right((64, 32, 3, 3), 1024, 1) == (64, 288)
  assert merged_from_right((64, 1, 3, 3), 1024, 1) == (576,)
  assert merged_from_right((64, 1, 3, 3), 1024, 3) == (64, 3, 3)
  assert merged_from_right((1, 1), 1024, 1) == (1,)


def test_a_layer_without_matrices_has_the_grafted_step():
  """Both of its sides are beyond `max_dim`."""
  params, x = {"w": jnp.ones((5, 4))}, jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)))
  loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"]) ** 2)
  layers = fop_optax.capture(loss, params, x, max_dim=3).layers
  txs = fop_optax.scale_by_shampoo(layers=layers), optax.scale_by_adam(0.9, 0.999, eps=1e-10)
  states = [tx.init(params) for tx in txs]
  for step in range(12):  # roots are due after ten
    grads = jax.grad(loss)(params, x + step)
    ours, adam = (tx.update(grads, own) for tx, own in zip(txs, states, strict=True))
    states = [ours[1], adam[1]]
  norms = [jnp.linalg.norm(updates["w"]) for updates in (ours[0], adam[0])]
  np.testing.assert_allclose(*norms, rtol=1e-5)


def test_a_root_that_fails_leaves_the_last_and_is_counted():
  """Newton's iteration stalls on what is not positive; directions stay finite."""
  G = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)))
  tx = fop_optax.scale_by_shampoo(root="newton", inverse_update_period=1)
  update = jax.jit(tx.update)
  _, state = update(G, tx.init(G))
  (stack,) = state.stacks
  bad = stack._replace(factors=tuple(-100 * f for f in stack.factors))
  got, after = update(G, state._replace(stacks=(bad,)))
  assert jnp.all(jnp.isfinite(got))
  assert after.stacks[0].failed.tolist() == [1]
  assert after.stacks[0].made.tolist() == [1]
  jax.tree.map(np.testing.assert_array_equal, after.stacks[0].roots, stack.roots)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"exponents": "1/4"}, r"`exponents='1/4'` should be a Python number .*`\{2: \{0: 0.5, 1: 0.0"),
    ({"exponents": {2: 0.3}, "root": "newton"}, '0.3: with `root="newton"` exponents are 1 / r'),
    ({"grafting": "lion"}, "`grafting='lion'` should be one of 'sgd', 'adagrad', 'rmsprop'"),
    ({"root": "qr"}, "`root='qr'` should be one of 'eigh', 'newton'"),
    ({"block_size": 0}, "`block_size=0` should be a Python integer, at least 1"),
    ({"b2": 0.0}, "`b2=0.0` should be above 0 and at most 1"),
    ({"start_step": 1.5}, "`start_step=1.5` should be a whole number of steps"),
  ],
)  # fmt: skip
def test_bad_hyperparameters(kwargs, message):
  with pytest.raises(ValueError, match=message):
    fop_optax.shampoo(0.1, **kwargs)
