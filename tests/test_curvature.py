"""Running factors, damped inverses, their failures and their schedule."""

from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from reference import damped_inverse

import fop_optax
from fop_optax.curvature.damping import Damping, size, split_damping
from fop_optax.curvature.factors import fold, old_weight
from fop_optax.curvature.inverse import SCALINGS
from fop_optax.curvature.positive import positive_inverse
from fop_optax.curvature.stacks import padded
from fop_optax.layers import Factors, Layer, Layers, Stats

pytestmark = pytest.mark.usefixtures("x64")

ORACLES = Path(__file__).parent / "oracles"


def invert_and_solve(A, G, V, damping, scaling):
  inverse, sound = problems.invert_block(Factors(A, G), damping, scaling)
  assert sound
  return SCALINGS[scaling].solve(*inverse, V)


@pytest.mark.parametrize(("dtype", "tol"), [(np.float64, 1e-10), (np.float32, 1e-4)])
@pytest.mark.parametrize("damping", ["0.01", "0.1"])
@pytest.mark.parametrize("name", ["l1", "l2", "l3"])
def test_asdl(name, damping, dtype, tol):
  """ASDL lays weights out as (out, in) and preconditions the bias by its `B` inverse alone."""
  data = np.load(ORACLES / "asdl_kfac_mlp.npz")
  A, G, weight, bias = (
    jnp.asarray(data[f"{name}/{key}"], dtype) for key in ("A", "B", "grad_weight", "grad_bias")
  )
  want = {key: data[f"damp{damping}/{name}/{key}"] for key in ("prec_weight", "prec_bias")}
  inverse, _ = problems.invert_block(Factors(A, G), float(damping), "factored")
  got = SCALINGS["factored"].solve(*inverse, weight.T).T
  np.testing.assert_allclose(got, want["prec_weight"], atol=tol * np.abs(want["prec_weight"]).max())
  got = bias @ inverse[0].G
  np.testing.assert_allclose(got, want["prec_bias"], atol=tol * np.abs(want["prec_bias"]).max())
  for side in ("A", "B"):
    stored = data[f"damp{damping}/{name}/{side}_inv"]
    got = inverse[0].A if side == "A" else inverse[0].G
    np.testing.assert_allclose(got, stored, atol=tol * np.abs(stored).max())


@pytest.mark.parametrize(("dtype", "tol"), [(np.float64, 1e-10), (np.float32, 1e-4)])
@pytest.mark.parametrize("damping", ["0.01", "0.1"])
@pytest.mark.parametrize(
  ("kind", "scaling"), [("pi", "factored"), ("exact", "exact"), ("exact", "eigenvalue")]
)
@pytest.mark.parametrize("mode", ["fisher_empirical", "fisher_exact", "fisher_gradients"])
def test_kfac_jax(mode, kind, scaling, damping, dtype, tol):
  """kfac-jax's empirical factor `B` is 1/N of ours: its direction is N times ours at N lambda.

  EKFAC's first inverse, before anything is measured, is the exact one.
  """
  data = np.load(ORACLES / "kfac_jax.npz")
  scale = len(data["x"]) if mode == "fisher_empirical" else 1
  for layer in "12":
    A, B = (data[f"{mode}/factor_layer{layer}_{side}"] for side in "AB")
    V = np.concatenate([data[f"g_w{layer}"], data[f"g_b{layer}"][None]])
    got = scale * invert_and_solve(
      *(jnp.asarray(x, dtype) for x in (A, scale * B, V)), scale * float(damping), scaling
    )
    stored = f"{mode}/damp{damping}/{kind}/prec_"
    want = np.concatenate([data[f"{stored}w{layer}"], data[f"{stored}b{layer}"][None]])
    np.testing.assert_allclose(got, want, atol=tol * np.abs(want).max())


@pytest.mark.parametrize("diagonal", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_diagonal_factor_is_a_diagonal_matrix(scaling, diagonal):
  rng = np.random.default_rng(0)
  sides = [
    np.diag(rng.uniform(0.1, 2, d)) if diag else _spd(rng, d)
    for d, diag in zip((4, 3), diagonal, strict=True)
  ]
  V = jnp.asarray(rng.normal(size=(4, 3)))
  kept = [jnp.asarray(np.diag(s) if diag else s) for s, diag in zip(sides, diagonal, strict=True)]
  got = invert_and_solve(*kept, V, 0.3, scaling)
  reference = "exact" if scaling == "eigenvalue" else scaling  # before anything is measured
  want = damped_inverse(*sides, 0.3, reference) @ np.ravel(V)
  np.testing.assert_allclose(np.ravel(got), want, rtol=1e-12)
  inverse, _ = problems.invert_block(Factors(*kept), 0.3, scaling)
  again = SCALINGS[scaling].damped(*inverse, Factors(*kept), got)
  np.testing.assert_allclose(again, V, rtol=1e-10, atol=1e-12)


def _spd(rng, d):
  root = rng.normal(size=(d, d))
  return root @ root.T


@pytest.mark.parametrize(("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_damping_of_a_zero_factor(a, g):
  A, G = size(a * jnp.eye(3)), size(g * jnp.eye(2))
  assert split_damping(A, G, jnp.asarray(0.04)) == (0.2, 0.2)


def test_singular_without_damping_fails_aloud():
  factors = Factors(jnp.zeros((2, 2)), jnp.eye(3))
  for scaling in SCALINGS:
    _, sound = problems.invert_block(factors, 0.0, scaling)
    assert not sound


def test_average_is_exact_until_decay_bites():
  rng = np.random.default_rng(0)
  new = [rng.normal(size=(2, 2)) for _ in range(6)]
  running, decay = Factors(jnp.zeros((2, 2)), jnp.zeros((1, 1))), jnp.asarray(0.7)
  want = 0.0
  for t, A in enumerate(new, 1):
    if t == 3:  # not finite: not folded in, counted
      bad = Factors(jnp.asarray(A).at[0, 0].set(jnp.nan), jnp.ones((1, 1)))
      running = fold(running, bad, jnp.asarray(False), old_weight(t, decay, jnp.float64))
    good = Factors(jnp.asarray(A), jnp.ones((1, 1)))
    running = fold(running, good, jnp.asarray(True), old_weight(t, decay, jnp.float64))
    weight = min(1 - 1 / t, 0.7)
    want = weight * want + (1 - weight) * A
    np.testing.assert_allclose(running.A, want, rtol=1e-12)


def run(tx, params, steps, spoil=lambda i, grads, stats: (grads, stats), groups=2):
  """Steps of `tx` on changing batches at fixed parameters; all states."""

  @jax.jit
  def step(state, grads, stats):
    refresh = fop_optax.refresh_due(state)
    return tx.update(grads, state, params, stats=stats._replace(refresh=refresh))

  state, updates, states = tx.init(params), None, []
  for i in range(steps):
    batch = problems.make_batch(seed=i, dtype=jnp.float64)
    _, grads, stats = problems.value_and_grad(params, batch, groups=groups)
    updates, state = step(state, *spoil(i, grads, stats))
    states.append((updates, state))
  return states


def kfac_problem(**kwargs):
  params = problems.make_params(dtype=jnp.float64)
  layers = problems.layers_of(params)
  kwargs = {"damping": 1e-2, "curvature_update_period": 1, "momentum": None} | kwargs
  return fop_optax.kfac(0.1, layers, **kwargs), params, layers


def curvature_of(state):
  return state.inner_states["layers"].inner_state[0].curvature


def stacks_of(state):
  return curvature_of(state).stacks


def made_of(state):
  return np.asarray(curvature_of(state).blocks.inversions.made)


def test_statistics_that_are_not_finite_leave_the_block_alone():
  tx, params, layers = kfac_problem()

  def spoil(i, grads, stats):
    bad = Factors(stats.factors[0].A * jnp.nan, stats.factors[0].G)
    return grads, stats._replace(factors=(bad, *stats.factors[1:])) if i == 1 else stats

  states = run(tx, params, 3, spoil)
  report = fop_optax.diagnostics(states[-1][1], layers)["layers"]
  first, second = list(report.values())[:2]
  assert (first["folds"], first["nonfinite_statistics"]) == (2, 1)
  assert (second["folds"], second["nonfinite_statistics"]) == (3, 0)
  for updates, _ in states:
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


def test_without_any_sound_statistics_a_layer_rests():
  tx, params, layers = kfac_problem()
  spoil = lambda i, grads, stats: (
    grads,
    stats._replace(factors=tuple(Factors(f.A * jnp.inf, f.G) for f in stats.factors)),
  )
  updates, state = run(tx, params, 2, spoil)[-1]
  assert all(jnp.all(updates[name]["w"] == 0) for name in ("fc0", "fc1", "fc2"))
  assert jnp.any(updates["gain"] != 0)
  for layer in fop_optax.diagnostics(state, layers)["layers"].values():
    assert (layer["inverses"], layer["failed_inverses"], layer["nonfinite_statistics"]) == (0, 0, 2)


@pytest.mark.parametrize("scaling", ["factored", "exact"])
def test_a_failed_inverse_leaves_the_last_good_one(scaling):
  # Without damping the first statistics can be inverted (more examples than rows), a zero cannot.
  tx, params, layers = kfac_problem(damping=0.0, scaling=scaling, decay=0.0)

  def spoil(i, grads, stats):
    spoilt = tuple(Factors(0 * f.A, f.G + jnp.eye(f.G.shape[-1])) for f in stats.factors)
    sound = tuple(Factors(f.A, f.G + jnp.eye(f.G.shape[-1])) for f in stats.factors)
    return grads, stats._replace(factors=spoilt if i == 1 else sound)

  first, second, third = (state for _, state in run(tx, params, 3, spoil))
  for one, two, three in zip(*map(stacks_of, (first, second, third)), strict=True):
    jax.tree.map(np.testing.assert_array_equal, one.inverse, two.inverse)
    assert np.any(one.inverse[0] != three.inverse[0])
  for layer in fop_optax.diagnostics(third, layers)["layers"].values():
    assert (layer["inverses"], layer["failed_inverses"]) == (2, 1)


def test_inverses_keep_their_own_period():
  tx, params, layers = kfac_problem(curvature_update_period=2, inverse_update_period=3)
  states = [state for _, state in run(tx, params, 7)]
  made = [made_of(state)[0] for state in states]
  folds = [curvature_of(state).blocks.folds[0] for state in states]
  assert made == [1, 1, 1, 2, 2, 2, 3]
  assert folds == [1, 1, 2, 2, 3, 3, 4]


def test_staggered_blocks_take_turns():
  tx, params, layers = kfac_problem(inverse_update_period=3, stagger=True)
  states = [state for _, state in run(tx, params, 7)]
  made = np.array([made_of(state) for state in states])
  np.testing.assert_array_equal(made[0], 1)  # the first at once
  turns = np.diff(made, axis=0)
  for step in range(1, 7):
    np.testing.assert_array_equal(turns[step - 1], np.arange(3) % 3 == step % 3)
  # What a block holds is what all together would have made at that step.
  together = run(kfac_problem(inverse_update_period=1)[0], params, 7)
  A = lambda state, stack: stacks_of(state)[stack].inverse.A[0]
  np.testing.assert_allclose(A(states[-1], 0), A(together[6][1], 0), rtol=1e-12)
  np.testing.assert_allclose(A(states[-1], 1), A(together[4][1], 1), rtol=1e-12)


def test_equal_layers_are_one_stack():
  params = problems.make_params(sizes=((5, 5), (5, 5), (5, 4)), dtype=jnp.float64)
  layers = problems.layers_of(params)
  tx = fop_optax.scale_by_kfac(layers, damping=1e-2)
  batch = problems.make_batch(sizes=((5, 5), (5, 5), (5, 4)), dtype=jnp.float64)
  _, grads, stats = problems.value_and_grad(params, batch)
  updates, state = tx.update(grads, tx.init(params), params, stats=stats)
  curvature = state.inner_states["layers"].inner_state.curvature
  assert [s.blocks for s in curvature.stacks] == [2, 1]
  assert curvature.blocks.layer.tolist() == [0, 1, 2]
  for factors, name in zip(stats.factors, ("fc0", "fc1", "fc2"), strict=True):
    V = np.concatenate([grads[name]["w"], grads[name]["b"][None]])
    want = damped_inverse(factors.A[0], factors.G[0], 1e-2, "factored") @ V.ravel()
    got = np.concatenate([updates[name]["w"], updates[name]["b"][None]])
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-9)


def test_views_stacks_and_shared_leaves():
  """A weight of two parts used apart, and a stack of three matrices, go where they came from."""
  rng = np.random.default_rng(0)
  params = {
    "qk": jnp.asarray(rng.normal(size=(4, 6))),
    "scan": jnp.asarray(rng.normal(size=(3, 4, 2))),
  }
  part = lambda i: (("slice", (0, 3 * i), (4, 3 * i + 3), (1, 1)), ("reshape", (1, 4, 3)))
  make = lambda path, weight, view, stack, outputs: Layer(
    path, "dense", weight, view, stack, 4, outputs
  )
  layers = Layers(
    (make("q", 0, part(0), 1, 3), make("k", 0, part(1), 1, 3), make("scan", 1, (), 3, 2)),
    ((4, 6), (3, 4, 2)),
    ("qk", "scan"),
    groups=1,
  )
  factors = tuple(
    Factors(*(jnp.asarray([_spd(rng, d) for _ in range(stack)]) for d in (4, outputs)))
    for stack, outputs in ((1, 3), (1, 3), (3, 2))
  )
  tx = fop_optax.scale_by_kfac(layers, damping=0.1)
  stats = Stats(jnp.asarray(True), factors, ())
  updates, _ = tx.update(params, tx.init(params), params, stats=stats)
  solve = lambda f, i, V: damped_inverse(f.A[i], f.G[i], 0.1, "factored") @ np.ravel(V)
  for i in range(2):
    got = updates["qk"][:, 3 * i : 3 * i + 3]
    want = solve(factors[i], 0, params["qk"][:, 3 * i : 3 * i + 3])
    np.testing.assert_allclose(np.ravel(got), want, rtol=1e-8)
  for i in range(3):
    want = solve(factors[2], i, params["scan"][i])
    np.testing.assert_allclose(np.ravel(updates["scan"][i]), want, rtol=1e-8)


@pytest.mark.parametrize("n", [7, 385, pytest.param(801, marks=pytest.mark.slow)])
def test_positive_inverse(n):
  rng = np.random.default_rng(n)
  x = rng.normal(size=(2, 2 * n, n))
  matrices = np.einsum("bni,bnj->bij", x, x) / n
  inverses = jax.vmap(positive_inverse)(matrices)
  np.testing.assert_allclose(inverses @ matrices, np.broadcast_to(np.eye(n), (2, n, n)), atol=1e-9)
  np.testing.assert_array_equal(inverses, np.swapaxes(inverses, 1, 2))
  indefinite = matrices - 9 * np.eye(n)
  assert not np.isfinite(np.asarray(jax.vmap(positive_inverse)(indefinite))).any()


def test_sides_that_are_inverted_together():
  """Sides that differ by one and small ones share a program; damping is of each block by itself."""
  rng = np.random.default_rng(0)
  dims = [(67, 66), (66, 66), (5, 1), (3, 65)]
  blocks = [Factors(*(jnp.asarray(_spd(rng, d))[None] for d in own)) for own in dims]
  sides = [x.shape[1] for x in padded([side for own in blocks for side in own])]
  assert sides == [67, 67, 67, 67, 65, 65, 65, 65]
  damping = Damping(jnp.asarray(0.1), jnp.asarray(0.0))
  made, used, sound = SCALINGS["factored"].invert(blocks, damping, None, (), jnp.zeros(4, int))
  assert sound.all()
  for own, inverse, A, G in zip(blocks, made, used.damping_A, used.damping_G, strict=True):
    for factor, found, added in ((own.A, inverse.A, A), (own.G, inverse.G, G)):
      want = np.linalg.inv(factor[0] + added * np.eye(factor.shape[1]))
      np.testing.assert_allclose(found[0], want, rtol=1e-9, atol=1e-12)


def test_many_stacks_at_a_time_do_not_wait_for_each_other():
  """In a process of its own: where batches of LAPACK calls wait for each other, it never ends."""
  script = """
import jax, jax.numpy as jnp
from fop_optax.curvature.positive import positive_inverse
from fop_optax.curvature.stacks import padded
stacks = [jnp.stack([jnp.eye(d)] * 2) for d in (129, 384, 129, 128, 129, 512, 513, 128)]
jax.block_until_ready(jax.jit(lambda s: [jax.vmap(positive_inverse)(a) for a in s])(stacks))
"""
  subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
