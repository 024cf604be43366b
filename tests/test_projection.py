"""FOP's equations: stored numbers, and the laws that follow from them."""

import functools
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
from problems import contrast_rows
import pytest
from selection import slow_but

from fop_optax import group_gradients
from fop_optax.block_gradients import Gradients
from fop_optax.curvature import precondition
from fop_optax.curvature.inverse import SCALINGS
from fop_optax.layers import Factors
from fop_optax.projection import fop_direction, fop_directions

pytestmark = pytest.mark.usefixtures("x64")

ORACLE = np.load(Path(__file__).parent / "oracles" / "fop_layer.npz")
CASES = ("small", "wide", "tall", "stiff")
METRICS = ("fisher", "damped", "inverse")


def project(A, G, damping, groups, scaling="factored", metric="fisher", rows=None, **kwargs):
  """`fop_direction` for gradients `groups` of one layer, and K-FAC's direction beside it."""
  factors = Factors(A, G)
  inverse, _ = problems.invert_block(factors, damping, scaling)
  solve = lambda V: SCALINGS[scaling].solve(*inverse, V)
  multiply = {
    "fisher": lambda V: precondition.multiply(factors, V),
    "damped": lambda V: SCALINGS[scaling].damped(*inverse, factors, V),
    "inverse": None,
  }[metric]
  wide = jnp.promote_types(groups.dtype, jnp.float32)
  rows = contrast_rows(len(groups)) if rows is None else rows
  contrasts = jnp.tensordot(jnp.asarray(rows, wide), groups.astype(wide), 1)
  average = jnp.mean(groups.astype(wide), 0)
  if metric == "fisher":
    kwargs["fisher_norm"] = precondition.norm(factors)
  kwargs.setdefault("resolution", jnp.finfo(groups.dtype).eps)
  return fop_direction(average, contrasts, solve, multiply, **kwargs), solve(average)


dtype_name = lambda dtype: np.dtype(dtype).name
jitted = jax.jit(project, static_argnames=("scaling", "metric"))


@functools.partial(jax.jit, static_argnums=(4, 5))
def variants(A, G, damping, groups, scaling, metric):
  """FOP by default, with the total gradient, with eta = 1; K-FAC."""
  run = lambda **kwargs: project(A, G, damping, groups, scaling, metric, **kwargs)
  out, kfac = run()
  return out, run(total_gradient="sum")[0], run(adaptive_step=False)[0], kfac


def relative(a, b):
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize("dtype", slow_but([np.float64, np.float32], "float64", name=dtype_name))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scaling", ["factored", "exact"])
@pytest.mark.parametrize("case", CASES)
def test_stored_layer(case, scaling, metric, dtype):
  A, G, g1, g2 = (jnp.asarray(ORACLE[f"{case}/{k}"], dtype) for k in ("A", "G", "g1", "g2"))
  damping = ORACLE[f"{case}/damping"]
  want = lambda name: ORACLE[f"{case}/{scaling}/{metric}/{name}"]
  single = dtype == np.float32
  # The stiff layer's factors have condition 1e8 each; LAPACK's single precision eigenvectors, all
  # four drivers of them, leave 7e-3 there, where NumPy's, found in double and rounded, leave 2e-3.
  tol = {("stiff", "exact"): 1e-2}.get((case, scaling), 1e-4) if single else 1e-10
  tol = 1e-8 if case == "stiff" and not single else tol
  out, total, plain, kfac = variants(A, G, damping, jnp.stack([g1, g2]), scaling, metric)
  assert out.direction.dtype == dtype
  assert relative(kfac, ORACLE[f"{case}/kfac_{scaling}"]) < tol
  np.testing.assert_allclose(out.s[0], want("s"), rtol=2 * tol)
  assert out.residual < (1e-5 if single else 1e-12)
  if metric == "inverse":
    assert out.rho2 < (1e-8 if single else 1e-20)
    assert single or abs(out.beta[0]) < 1e-8
  else:
    np.testing.assert_allclose(out.beta[0], want("beta"), rtol=tol)
    np.testing.assert_allclose(out.rho2, want("rho2"), rtol=4 * tol)
  np.testing.assert_allclose(out.eta, want("eta_mean"), rtol=tol)
  np.testing.assert_allclose(total.eta, want("eta_sum"), rtol=tol)
  assert plain.eta == 1
  assert relative(out.direction, want("direction_mean")) < tol
  assert relative(total.direction, want("eta_sum") * want("preconditioned")) < tol
  assert relative(plain.direction, want("preconditioned")) < tol


GOLDEN = {  # specification by hand: s, beta, eta (sum), rho2
  ("fisher", "factored"): (0.646017699115, -0.545653252494, 1.535901586965, 0.177971992840),
  ("fisher", "exact"): (0.646017699115, -0.586121766833, 1.480787040167, 0.212586482595),
  ("damped", "factored"): (0.428003744441, -0.214981922703, 1.913063361023, 0.023250125574),
  ("damped", "exact"): (0.515957446809, -0.429713660344, 1.692382102768, 0.099968563861),
}
GOLDEN_DIRECTION = {
  "factored": [
    [1.2668061258, -2.9416566627, 3.8868988649],
    [-1.6235419192, 2.5857582209, -1.7948633639],
  ],
  "exact": [
    [2.6799981629, -6.3034642796, 8.7606618817],
    [-3.3084424878, 5.0261179965, -3.1747656885],
  ],
}


@pytest.mark.parametrize("chosen", slow_but(GOLDEN, "fisher-factored", name="-".join))
def test_golden_numbers(chosen):
  metric, scaling = chosen
  A = jnp.array([[2, 0.5, 0], [0.5, 1, 0.25], [0, 0.25, 0.5]])
  G = jnp.array([[0.4, 0.1], [0.1, 0.2]])
  groups = jnp.array([[[1, -2, 0.5], [0.25, 1, -1]], [[0.5, -1, 1.5], [-0.75, 0.5, 0]]])
  out, _ = project(
    A, G, 0.1, groups.swapaxes(1, 2), scaling=scaling, metric=metric, total_gradient="sum"
  )
  got = (out.s[0], out.beta[0], out.eta, out.rho2)
  np.testing.assert_allclose(got, GOLDEN[metric, scaling], rtol=1e-9)
  if metric == "fisher":
    np.testing.assert_allclose(
      out.direction / out.eta, np.transpose(GOLDEN_DIRECTION[scaling]), rtol=1e-9
    )


def random_layer(seed, rows=7, outputs=5, groups=2, dtype=np.float64, spread=2.0):
  """Factors with eigenvalues over `10^±spread/2`, damping, and gradients that have a mean."""
  rng = np.random.default_rng(seed)

  def factor(d):
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return (basis * 10 ** rng.uniform(-spread / 2, spread / 2, d)) @ basis.T

  damping = 10 ** rng.uniform(-3, 0)
  A, G = factor(rows), factor(outputs)
  mean = rng.normal(size=(rows, outputs))
  gradients = mean + 10 ** rng.uniform(-2, 1) * rng.normal(size=(groups, rows, outputs))
  return (*(jnp.asarray(x, dtype) for x in (A, G)), damping, jnp.asarray(gradients, dtype))


layers = st.builds(
  random_layer,
  seed=st.integers(0, 10**6),
  dtype=st.sampled_from([np.float64, np.float32]),
)
scalings = st.sampled_from(["factored", "exact"])
metrics = st.sampled_from(["fisher", "damped"])


def loose(layer):
  return 1e-10 if layer[0].dtype == np.float64 else 2e-3


@hypothesis.given(layers, scalings, metrics)
def test_orthogonal_and_a_descent_direction(layer, scaling, metric):  # D1, D2, D3
  single = layer[0].dtype == np.float32
  out, kfac = jitted(*layer, scaling=scaling, metric=metric)
  assert out.residual < (1e-5 if single else 1e-12)
  assert 0.5 <= out.eta <= 1
  rho2, average = float(out.rho2), jnp.mean(layer[3], 0)
  assert 0 <= rho2 <= 1
  np.testing.assert_allclose(out.eta, (1 + rho2) / (1 + 3 * rho2), rtol=loose(layer))
  N = jnp.sum(average * kfac)
  along = jnp.sum(average * out.direction) / out.eta
  assert along > 0
  np.testing.assert_allclose(along, N * (1 + rho2), rtol=loose(layer))
  np.testing.assert_allclose(out.norm2 / out.eta**2, N * (1 + 3 * rho2), rtol=loose(layer))
  want = (1 + rho2) / np.sqrt(1 + 3 * rho2)  # length, next to K-FAC's
  np.testing.assert_allclose(np.sqrt(out.norm2 / N), want, rtol=loose(layer))


@hypothesis.given(layers, scalings, st.integers(0, 10**6))
def test_equal_halves_are_kfac(layer, scaling, seed):
  A, G, damping, groups = layer
  g = groups[0]
  for metric in METRICS:
    out, kfac = jitted(A, G, damping, jnp.stack([g, g]), scaling=scaling, metric=metric)
    assert_same(out.direction, kfac)
  # The same halves, summed in another order: apart by rounding, which is not to be blown up.
  rng = np.random.default_rng(seed)
  noise = jnp.asarray(rng.uniform(-4, 4, g.shape), g.dtype) * jnp.finfo(g.dtype).eps
  other = g + noise * jnp.max(jnp.abs(g))
  out, kfac = jitted(A, G, damping, jnp.stack([g, other]), scaling=scaling)
  assert out.beta[0] == 0
  assert_same(out.direction, kfac)


def assert_same(a, b):
  """To the last bit; but for it where the device may fuse the same sum in two ways."""
  last = 0 if jax.default_backend() == "cpu" else 4 * jnp.finfo(a.dtype).eps
  np.testing.assert_allclose(a, b, rtol=last)


@hypothesis.given(
  layers,
  scalings,
  st.sampled_from([1e-2, -0.3, 7.0, 1e2]),
  st.sampled_from([1e-12, 0.37, 1e9]),
  st.sampled_from([1e-6, 3.0, 1e5]),
)
def test_swap_and_scale(layer, scaling, c, gradient_scale, fisher_scale):  # D4, D5, D10
  A, G, damping, groups = layer
  tol = loose(layer)
  base, _ = jitted(A, G, damping, groups, scaling=scaling)

  swapped, _ = jitted(A, G, damping, groups[::-1], scaling=scaling)
  np.testing.assert_allclose(swapped.beta, -base.beta, rtol=tol)
  assert relative(swapped.direction, base.direction) < tol

  half = c * (groups[0] - groups[1]) / 2
  stretched = jnp.mean(groups, 0) + jnp.stack([half, -half])
  out, _ = jitted(A, G, damping, stretched, scaling=scaling)
  np.testing.assert_allclose(out.beta * c, base.beta, rtol=tol, atol=tol)
  assert relative(out.direction, base.direction) < tol

  out, _ = jitted(A, G, damping, gradient_scale * groups, scaling=scaling)
  np.testing.assert_allclose(out.beta, base.beta, rtol=tol, atol=tol)
  assert relative(out.direction, gradient_scale * base.direction) < tol

  out, _ = jitted(fisher_scale * A, G, fisher_scale * damping, groups, scaling=scaling)
  np.testing.assert_allclose(out.beta, base.beta, rtol=tol, atol=tol)
  assert relative(fisher_scale * out.direction, base.direction) < tol


@hypothesis.given(layers, scalings)
def test_isotropic_curvature_is_kfac(layer, scaling):  # D6
  A, G, damping, groups = layer
  one = lambda x: 0.7 * jnp.eye(len(x), dtype=x.dtype)
  out, kfac = jitted(one(A), one(G), damping, groups, scaling=scaling)
  assert out.rho2 < (1e-8 if A.dtype == np.float32 else 1e-20)
  assert relative(out.direction, kfac) < loose(layer)


@hypothesis.given(layers, scalings)
def test_projecting_with_the_inverse_is_kfac(layer, scaling):  # D7
  A, G, damping, groups = layer
  out, kfac = jitted(A, G, damping, groups, scaling=scaling, metric="inverse")
  assert out.rho2 < (1e-8 if A.dtype == np.float32 else 1e-20)
  assert relative(out.direction, kfac) < loose(layer)


@hypothesis.given(st.integers(0, 10**6), st.sampled_from([3, 5]), scalings)
def test_more_groups_in_any_basis(seed, count, scaling):
  A, G, damping, groups = random_layer(seed, groups=count)
  rng = np.random.default_rng(seed)
  rows = contrast_rows(count)
  base, kfac = jitted(A, G, damping, groups, scaling=scaling, rows=rows)
  turn, _ = np.linalg.qr(rng.normal(size=(count - 1, count - 1)))
  rows = jnp.asarray(turn @ rows)
  turned, _ = jitted(A, G, damping, groups, scaling=scaling, rows=rows)
  assert relative(turned.direction, base.direction) < 1e-11
  rho2, average = float(base.rho2), jnp.mean(groups, 0)
  N = jnp.sum(average * kfac)
  along = jnp.sum(average * base.direction) / base.eta
  np.testing.assert_allclose(along, N * (1 + rho2), rtol=1e-9)
  np.testing.assert_allclose(base.eta, (1 + rho2) / (1 + 3 * rho2), rtol=1e-9)


@hypothesis.given(layers, scalings)
def test_repeated_groups_add_nothing(layer, scaling):
  A, G, damping, groups = layer
  two, _ = jitted(A, G, damping, groups, scaling=scaling)
  four, _ = jitted(A, G, damping, groups[jnp.array([0, 1, 1, 0])], scaling=scaling)
  assert jnp.all(jnp.isfinite(four.direction))
  assert relative(four.direction, two.direction) < loose(layer)


def test_more_groups_than_entries():
  A, G, damping, groups = random_layer(3, rows=2, outputs=1, groups=6)
  out, _ = jitted(A, G, damping, groups)
  assert jnp.all(jnp.isfinite(out.direction))
  # The contrasts span everything: g_perp is all that is F-orthogonal to g_avg.
  assert out.residual < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_wide_layers_and_coarse_gradients_do_project(dtype):
  n = 1024 if dtype == np.float32 else 64
  A, G, _, groups = random_layer(0, n, n, dtype=np.float32)
  reference, _ = jitted(*(x.astype(jnp.float64) for x in (A, G)), 1e-2, groups.astype(jnp.float64))
  out, _ = jitted(A, G, 1e-2, groups.astype(dtype))
  assert out.s[0] != 0
  assert out.beta[0] != 0
  np.testing.assert_allclose(out.beta[0], reference.beta[0], rtol=0.05)


def test_halves_equal_up_to_bfloat16_are_kfac():
  A, G, damping, groups = random_layer(0, dtype=np.float32)
  g = groups[0].astype(jnp.bfloat16)
  other = (g * (1 + jnp.finfo(jnp.bfloat16).eps)).astype(jnp.bfloat16)
  out, kfac = jitted(A, G, damping, jnp.stack([g, other]))
  assert out.beta[0] == 0
  np.testing.assert_array_equal(out.direction, kfac)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_mean_gradient_in_the_null_space_of_the_fisher(dtype):
  A, G, damping, groups = random_layer(1, dtype=dtype)
  values, basis = np.linalg.eigh(np.asarray(A, np.float64))
  values[:3] = 0
  A = jnp.asarray((basis * values) @ basis.T, dtype)
  null = jnp.asarray(basis[:, :3] @ basis[:, :3].T, dtype)
  mean = null @ jnp.mean(groups, 0)
  half = (groups[0] - groups[1]) / 2
  out, _ = jitted(A, G, damping, jnp.stack([mean + half, mean - half]))
  assert out.s[0] == 0
  assert out.residual == 0
  assert jnp.all(jnp.isfinite(out.direction))


def test_zero_gradients():
  A, G, damping, groups = random_layer(2)
  for average in (0, 1):
    half = groups[0] * (1 - average)
    out, _ = jitted(A, G, damping, jnp.stack([half, -half]))  # zero mean; all zero
    for value in out:
      assert jnp.all(jnp.isfinite(value))
    np.testing.assert_array_equal(out.direction, 0)


def test_a_given_beta_is_literal():
  A, G, damping, groups = random_layer(4)
  free, kfac = jitted(A, G, damping, groups)
  literal, _ = project(A, G, damping, groups, beta=0.25, adaptive_step=False)
  none, _ = project(A, G, damping, groups, beta=0.0, adaptive_step=False)
  np.testing.assert_allclose(none.direction, kfac, rtol=1e-12)
  slope = (free.direction / free.eta - kfac) / free.beta[0]
  np.testing.assert_allclose(literal.direction, kfac + 0.25 * slope, rtol=1e-9)
  best, _ = project(A, G, damping, groups, beta=free.beta[0])
  np.testing.assert_allclose(best.direction, free.direction, rtol=1e-10)


def test_bad_arguments():
  A, G, damping, groups = random_layer(5, groups=3)
  with pytest.raises(ValueError, match='`total_gradient` is "mean" or "sum", not \'both\''):
    project(A, G, damping, groups, total_gradient="both")
  with pytest.raises(ValueError, match=r"`beta=0.5` was given with 2 contrasts.*`beta=None`"):
    project(A, G, damping, groups, beta=0.5)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_a_tree_of_contrasts_folds_level_by_level(groups):
  """Against the equations in NumPy, with contrasts formed from the groups' gradients."""
  rng = np.random.default_rng(groups)
  F, M = (x @ x.T / 9 + 0.1 * np.eye(6) for x in rng.normal(size=(2, 6, 9)))
  g = rng.normal(size=(groups, 6))
  combined, width, rho2 = g.mean(0), groups, []
  inner = lambda a, b: a @ np.linalg.solve(M, b)
  while width > 1:
    halves = g.reshape(groups // width, 2, width // 2, 6).sum(2)
    contrasts = np.sqrt(2 / width) * (halves[:, 0] - halves[:, 1])
    s = contrasts @ F @ combined / (combined @ F @ combined)
    perp = contrasts - s[:, None] * combined
    E = np.array([[inner(a, b) for a in perp] for b in perp])
    D = np.array([inner(combined, a) for a in perp])
    rho2.append(D @ np.linalg.solve(E, D) / inner(combined, combined))
    new = combined + np.linalg.solve(E, D) @ perp
    combined = inner(combined, new) / inner(new, new) * new
    width //= 2
  with jax.enable_x64(True):
    of_capture = jnp.stack(group_gradients.contrasts(list(jnp.asarray(g))))
    stack = Gradients(
      jnp.asarray(g.mean(0))[None],
      of_capture[None],
      lambda V: V @ np.linalg.inv(M),
      lambda V: V @ F,
      0.0,
    )
    (direction,), numbers = fop_directions([stack], tree=group_gradients.tree_of(groups))
    np.testing.assert_allclose(direction[0], np.linalg.solve(M, combined), rtol=1e-9)
    np.testing.assert_allclose(numbers.norm2[0], inner(combined, combined), rtol=1e-9)
    np.testing.assert_allclose(numbers.rho2[0], max(rho2), rtol=1e-9)
    if groups == 2:  # a tree of depth one
      (joint,), _ = fop_directions([stack])
      np.testing.assert_array_equal(direction, joint)
  with pytest.raises(ValueError, match=r"takes 2, 4, 8, \.\.\. groups, not 6"):
    group_gradients.tree_of(6)
