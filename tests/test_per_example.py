"""The second way in: per-example gradients, against dense matrices and against capture."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
from optax.experimental import aggregating
import problems
import pytest
from reference import damped_inverse

import fop_optax
from fop_optax.curvature import gram
from fop_optax.optimizers import per_example

pytestmark = pytest.mark.usefixtures("x64")

METHODS = {"kfac": fop_optax.scale_by_kfac_per_example, "fop": fop_optax.scale_by_fop_per_example}


def problem(seed=0, examples=12):
  params = problems.make_params(dtype=jnp.float64)
  return params, problems.make_batch(examples, seed, jnp.float64)


def gradients(seed=0, examples=12):
  params, batch = problem(seed, examples)
  return params, problems.per_example_grads(params, batch)


def assert_close(tree, other, tol=1e-8):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), tree, other)


def relative(tree, other):
  difference = optax.tree.norm(optax.tree.sub(tree, other)) / optax.tree.norm(other)
  return float(difference)


def fop_dense(F, inverse, average, contrasts):
  """FOP with explicit matrices, groups and all."""
  s = contrasts @ F @ average / (average @ F @ average)
  perp = contrasts - s[:, None] * average
  beta = np.linalg.solve(perp @ inverse @ perp.T, perp @ inverse @ average)
  comb = average + beta @ perp
  return (average @ inverse @ comb) / (comb @ inverse @ comb) * (inverse @ comb)


def mean_and_contrasts(X, groups):
  by_group = X.reshape(-1, groups, X.shape[1]).mean(0)
  return by_group.mean(0), np.asarray(problems.contrast_rows(groups)) @ by_group


class Block:
  """One leaf with explicit matrices: running averages of L and R, `F = L (x) R / tr L`."""

  def __init__(self, scaling, decay, damping, limits):
    self.scaling, self.decay, self.damping = scaling, decay, damping
    self.max_dim, self.max_vector = limits
    self.folds, self.L, self.R = 0, 0.0, 0.0

  def fold(self, V):
    L, R = np.einsum("nij,nkj->ik", V, V) / len(V), np.einsum("nij,nik->jk", V, V) / len(V)
    limit = self.max_vector if len(L) == 1 else self.max_dim
    L, R = (np.diag(np.diag(f)) if len(f) > limit else f for f in (L, R))
    self.folds += 1
    weight = min(1 - 1 / self.folds, self.decay)
    self.L, self.R = weight * self.L + (1 - weight) * L, weight * self.R + (1 - weight) * R
    self.F = np.kron(self.L, self.R) / np.trace(self.L)
    root = np.sqrt(np.trace(self.L))
    self.inverse = damped_inverse(self.L / root, self.R / root, self.damping, self.scaling)
    if len(L) == 1:
      self.inverse = np.linalg.inv(self.R + self.damping * np.eye(len(R)))

  def direction(self, V, fop):
    average, contrasts = mean_and_contrasts(V.reshape(len(V), -1), 2)
    return fop_dense(self.F, self.inverse, average, contrasts) if fop else self.inverse @ average


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  ("scaling", "limits"),
  [SLOW("factored", (8192, 1024)), SLOW("exact", (8192, 1024)), ("exact", (5, 4))],
)
def test_kronecker_is_the_dense_matrix(method, scaling, limits):
  tx = METHODS[method](
    damping=0.03,
    scaling=scaling,
    decay=0.6,
    curvature_update_period=2,
    max_dim=limits[0],
    max_vector=limits[1],
  )
  params, _ = problem()
  state = tx.init(params)
  blocks = jax.tree.map(lambda _: Block(scaling, 0.6, 0.03, limits), params)
  step = jax.jit(tx.update)
  for count in range(5):
    _, grads = gradients(count, 12 if count % 2 else 8)  # batches of two sizes
    updates, state = step(grads, state, params)

    def want(grad, block, param, count=count):
      V = np.asarray(grad).reshape(len(grad), *(param.shape if param.ndim > 1 else (1, -1)))
      if count % 2 == 0:
        block.fold(V)
      return block.direction(V, method == "fop").reshape(param.shape)

    assert_close(updates, jax.tree.map(want, grads, blocks, params))


@settings(max_examples=8)  # a program for each number of examples and of groups
@given(
  seed=st.integers(0, 99),
  examples=st.sampled_from([4, 12, 160]),
  groups=st.sampled_from([2, 4]),
  damping=st.floats(1e-3, 10),
  method=st.sampled_from(sorted(METHODS)),
)
def test_exact_is_the_damped_fisher(seed, examples, groups, damping, method):
  with jax.enable_x64(True):
    params, grads = gradients(seed, examples)
    kwargs = {"groups": groups} if method == "fop" else {}
    tx = METHODS[method](curvature="exact", damping=damping, **kwargs)
    updates, _ = tx.update(grads, tx.init(params), params)
    X = np.concatenate([np.reshape(g, (examples, -1)) for g in jax.tree.leaves(grads)], axis=1)
    F = X.T @ X / examples
    average, contrasts = mean_and_contrasts(X, groups)
    inverse = np.linalg.inv(F + damping * np.eye(len(F)))
    want = fop_dense(F, inverse, average, contrasts) if method == "fop" else inverse @ average
    got = np.concatenate([np.ravel(u) for u in jax.tree.leaves(updates)])
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8 * np.abs(want).max())


def test_exact_without_damping_is_the_shortest_solution():
  params, grads = gradients()
  twice = jax.tree.map(lambda g: jnp.concatenate([g, g]), grads)  # K is singular
  tx = fop_optax.scale_by_kfac_per_example(curvature="exact", damping=0.0)
  updates, _ = tx.update(twice, tx.init(params), params)
  X = np.concatenate([np.reshape(g, (24, -1)) for g in jax.tree.leaves(twice)], axis=1)
  want = np.linalg.lstsq(X, np.ones(24), rcond=1e-10)[0]  # F d = g
  got = np.concatenate([np.ravel(u) for u in jax.tree.leaves(updates)])
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
  zeros = jax.tree.map(jnp.zeros_like, grads)
  updates, _ = tx.update(zeros, tx.init(params), params)
  assert_close(updates, jax.tree.map(jnp.zeros_like, params), 0)


@pytest.mark.parametrize("groups", [2, 3])
def test_gradients_and_contrasts_are_the_captured_ones(groups):
  params, batch = problem()
  captured = fop_optax.capture(problems.loss, params, batch, groups=groups)
  _, mean, stats = jax.jit(captured.value_and_grad)(params, batch)
  grads = problems.per_example_grads(params, batch)

  settings = per_example.Settings("kronecker", None, 8192, 1024, groups)
  options = per_example.Options(
    damping=0.1,
    relative_damping=None,
    decay=0.9,
    scaling="factored",
    curvature_update_period=1,
    inverse_update_period=None,
    stagger=False,
    norm_constraint=None,
    learning_rate=1.0,
    per_example=True,
  )
  seen = lambda grads, state, params=None, *, stats, **_: ((grads, stats.contrasts), state)
  inner = lambda layers: optax.GradientTransformationExtraArgs(lambda params: (), seen)
  state = fop_optax.scale_by_kfac_per_example().init(params)
  got, _ = per_example.kronecker(settings, options, inner).update(grads, state, params)
  assert_close(got, (mean, stats.contrasts), 1e-12)

  weights = per_example._weights(12, groups, jnp.float64)  # of the exact way
  combine = lambda w: jax.tree.map(lambda g: gram.combine(g, w), grads)
  assert_close(combine(weights.mean), mean, 1e-12)
  for w, contrast in zip(weights.contrasts, stats.contrasts, strict=True):
    assert_close(combine(w), contrast, 1e-12)


def constant_norms(seed, examples=12):
  """Two layers without bias, with `|a_n|` and `|g_n|` the same for all examples and steps."""
  rng = np.random.default_rng(seed)
  x, t, u = (rng.normal(size=(examples, d)) for d in (5, 4, 3))
  x, u = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, u))
  return tuple(map(jnp.asarray, (x, t, u)))


def of_constant_norms(params, x, t, u):
  return jnp.sum(jnp.abs(x @ params["w"] - t)) + 0.3 * jnp.sum(u * (x @ params["v"]))


@pytest.mark.parametrize(
  ("method", "scaling"),
  [("kfac", "exact"), SLOW("fop", "factored"), SLOW("fop", "exact"), SLOW("kfac", "factored")],
)
def test_kronecker_is_kfac_where_norms_are_constant(method, scaling):
  rng = np.random.default_rng(0)
  params = {"v": jnp.asarray(rng.normal(size=(5, 3))), "w": jnp.asarray(rng.normal(size=(5, 4)))}
  mean_loss = lambda params, *batch: jnp.mean(
    jax.vmap(functools.partial(of_constant_norms, params))(*batch)
  )
  captured = fop_optax.capture(mean_loss, params, *constant_norms(0), groups=2)
  assert not captured.fallbacks
  kwargs = {"damping": 0.02, "decay": 0.5, "scaling": scaling, "curvature_update_period": 1}
  ways = (
    getattr(fop_optax, method)(0.1, captured.layers, **kwargs),
    getattr(fop_optax, f"{method}_per_example")(0.1, **kwargs),
  )
  one, two = (tx.init(params) for tx in ways)
  for seed in range(4):
    batch = constant_norms(seed)
    _, mean, stats = jax.jit(captured.value_and_grad)(params, *batch)
    want, one = ways[0].update(mean, one, params, stats=stats)
    grads = jax.vmap(jax.grad(of_constant_norms), (None, 0, 0, 0))(params, *batch)
    got, two = ways[1].update(grads, two, params)
    assert_close(got, want)
    params = optax.apply_updates(params, got)


@pytest.mark.slow
def test_kronecker_is_not_kfac_elsewhere():
  sizes = ((20, 32), (32, 10))
  params = problems.make_params(dtype=jnp.float64, sizes=sizes)
  batch = problems.make_batch(128, dtype=jnp.float64, sizes=sizes)
  captured = fop_optax.capture(problems.loss, params, batch, groups=1)
  _, mean, stats = jax.jit(captured.value_and_grad)(params, batch)
  kfac = fop_optax.scale_by_kfac(captured.layers, damping=1e-3)
  want, _ = kfac.update(mean, kfac.init(params), params, stats=stats)
  tx = fop_optax.scale_by_kfac_per_example(damping=1e-3)
  got, _ = tx.update(problems.per_example_grads(params, batch), tx.init(params), params)
  for name in ("fc0", "fc1"):
    assert 0.01 < relative(got[name]["w"], want[name]["w"]) < 1


@pytest.mark.slow
def test_halves_folded_are_the_whole():
  """With a decay that does not bite, averages are over all examples that came."""
  params, whole = gradients(examples=16)
  tx = fop_optax.scale_by_kfac_per_example(decay=0.9, curvature_update_period=1)
  _, once = tx.update(whole, tx.init(params), params)
  twice = tx.init(params)
  for half in (slice(None, 8), slice(8, None)):
    _, twice = tx.update(jax.tree.map(lambda g, half=half: g[half], whole), twice, params)
  for one, two in zip(once.curvature.stacks, twice.curvature.stacks, strict=True):
    assert_close(one.factors, two.factors, 1e-12)


@pytest.mark.parametrize(
  ("make", "curvature"),
  [
    SLOW(fop_optax.kfac_per_example, "kronecker"),
    (fop_optax.fop_per_example, "exact"),
    SLOW(fop_optax.kfac_per_example, "exact"),
    SLOW(fop_optax.fop_per_example, "kronecker"),
  ],
)
def test_a_step_that_is_not_finite_is_counted_and_harmless(make, curvature):
  params, grads = gradients()
  tx = make(0.1, curvature=curvature, momentum=None)
  _, state = tx.update(grads, tx.init(params), params)
  for value in (jnp.nan, jnp.inf):
    bad = {**grads, "gain": grads["gain"].at[3, 1].set(value)}
    updates, after = jax.jit(tx.update)(bad, state, params)
    assert_close(updates, jax.tree.map(jnp.zeros_like, params), 0)
    one, two = state[0], after[0]
    assert two.curvature.steps.nonfinite_gradients == 1
    steps = one.curvature.steps._replace(nonfinite_gradients=jnp.asarray(1))
    counted = one._replace(curvature=one.curvature._replace(steps=steps))
    assert_close(two, counted, 0)


@pytest.mark.parametrize("method", METHODS)
def test_norm_constraint_of_exact(method):
  params, grads = gradients()
  make = functools.partial(METHODS[method], curvature="exact", damping=1e-2)
  free, _ = make().update(grads, make().init(params), params)
  X = np.concatenate([np.reshape(g, (12, -1)) for g in jax.tree.leaves(grads)], axis=1)
  d = np.concatenate([np.ravel(u) for u in jax.tree.leaves(free)])
  square = d @ (X.T @ X / 12 + 1e-2 * np.eye(len(d))) @ d
  for kappa in (1e-3 * square, 10 * square):
    tx = make(norm_constraint=kappa, learning_rate=0.5)
    bound, _ = tx.update(grads, tx.init(params), params)
    nu = min(1, np.sqrt(kappa / (0.25 * square)))
    assert_close(bound, optax.tree.scale(nu, free))


@pytest.mark.parametrize("curvature", [SLOW("kronecker"), "exact"])
def test_options_of_fop(curvature):
  params, grads = (dict(tree["fc0"]) for tree in gradients())

  def run(make=fop_optax.scale_by_fop_per_example, **kwargs):
    tx = make(damping=1e-2, curvature=curvature, **kwargs)
    return tx.update(grads, tx.init(params), params)

  kfac, _ = run(fop_optax.scale_by_kfac_per_example)
  base, state = run()
  assert_close(run(total_gradient="sum")[0], optax.tree.scale(2, base))
  assert_close(run(projection_metric="inverse")[0], kfac)
  assert relative(base, kfac) > 1e-3
  report = fop_optax.diagnostics(state)["layers"]
  names = {"b": "layer 0", "w": "layer 1"}
  if curvature == "exact":
    names = dict.fromkeys(names, "all parameters")
  assert set(report) == set(names.values())
  plain, _ = run(adaptive_step=False)
  for name in params:
    layer = report[names[name]]
    assert layer["residual"] < 1e-10
    assert_close(layer["eta"][0] * plain[name], base[name])
  damped = fop_optax.diagnostics(run(projection_metric="damped")[1])["layers"]
  for name, layer in damped.items():
    assert 0 < abs(layer["beta"][0, 0]) < abs(report[name]["beta"][0, 0])


def test_equal_groups_are_kfac():
  params, grads = (dict(tree["fc0"]) for tree in gradients())
  twice = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), grads)
  for curvature in ("kronecker", "exact"):
    ways = [make(curvature=curvature) for make in METHODS.values()]
    kfac, fop = (tx.update(twice, tx.init(params), params)[0] for tx in ways)
    assert_close(fop, kfac, 1e-12)


@pytest.mark.parametrize(
  ("curvature", "kind"),
  [
    ("exact", AxisType.Explicit),
    SLOW("kronecker", AxisType.Auto),
    SLOW("kronecker", AxisType.Explicit),
    SLOW("exact", AxisType.Auto),
  ],
)
def test_eight_devices_are_one(curvature, kind):
  params, grads = (dict(tree["fc0"]) for tree in gradients(examples=32))
  tx = fop_optax.fop_per_example(0.1, curvature=curvature)
  want, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    params = place(params)
    got, _ = jax.jit(tx.update)(place(grads, "data"), tx.init(params), params)
  assert_close(got, want)


@pytest.mark.slow
def test_dimension_numbers():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  numbers = fop_optax.DimensionNumbers
  params = {"conv": {"k": draw(3, 3, 2, 4), "b": draw(4)}, "heads": draw(5, 2, 3)}
  grads = jax.tree.map(lambda p: draw(8, *p.shape), params)

  def update(params, grads, dimension_numbers=None):
    tx = fop_optax.scale_by_kfac_per_example(dimension_numbers=dimension_numbers)
    return tx.update(grads, tx.init(params), params)[0]

  def reshaped(k, heads):
    tree = lambda t, *lead: {
      "conv": {"k": k(t["conv"]["k"], lead), "b": t["conv"]["b"]},
      "heads": heads(t["heads"], lead),
    }
    return update(tree(params), tree(grads, 8))

  plain = reshaped(lambda k, n: k.reshape(*n, 18, 4), lambda h, n: h.reshape(*n, 10, 3))
  got = update(params, grads)
  assert_close(got["conv"]["k"].reshape(18, 4), plain["conv"]["k"])
  assert_close(got["heads"].reshape(10, 3), plain["heads"])

  # heads: rows are the first axis, columns both others; of the kernel each pixel a block
  of_heads, of_kernel = numbers(0, (1, 2)), numbers(-2, -1)
  want = reshaped(
    lambda k, n: k.reshape(*n, 9, 2, 4)[..., 5, :, :], lambda h, n: h.reshape(*n, 5, 6)
  )
  muon = optax.contrib.MuonDimensionNumbers
  for dimension_numbers in (
    {"conv": of_kernel, "heads": of_heads},
    {"conv": {"k": muon(-2, -1), "b": None}, "heads": muon(0, (1, 2))},
    lambda tree: jax.tree.map(lambda p: of_kernel if p.ndim == 4 else of_heads, tree),
  ):
    got = update(params, grads, dimension_numbers)
    assert_close(got["conv"]["k"].reshape(9, 2, 4)[5], want["conv"]["k"])
    assert_close(got["heads"].reshape(5, 6), want["heads"])
    kfac = functools.partial(fop_optax.kfac_per_example, dimension_numbers=dimension_numbers)
    optax.masked(kfac(0.1), {"conv": False, "heads": True}).init(params)
    static = ("max_dim", "max_vector", "dimension_numbers")
    optax.inject_hyperparams(kfac, static)(0.1).init(params)

  for wrong, message in (
    (
      {"conv": numbers(0, 0)},
      r"\(0, 0\) for \['conv'\]\['k'\], a parameter of shape \(3, 3, 2, 4\)",
    ),
    ({"heads": numbers(0, 3)}, "should be axes of it, at least one each and none twice, such as"),
    ({"heads": numbers((), 0)}, r"reduction_axis=\(0, 1\), output_axis=2"),
    ({"body": numbers()}, r"an entry at \['body'\], where params have nothing: their leaves are"),
    (
      {"heads": (0, 1)},
      r"has 0 at \['heads'\]\[0\], where it needs a `fop_optax.DimensionNumbers`",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      fop_optax.kfac_per_example(0.1, dimension_numbers=wrong).init(params)


@pytest.mark.parametrize("curvature", ["kronecker", "exact"])
@pytest.mark.parametrize("make", [fop_optax.kfac_per_example, fop_optax.fop_per_example])
def test_what_comes_in(make, curvature):
  params, grads = gradients()
  tx = make(0.1, curvature=curvature)
  state = tx.init(params)
  scalar = {**params, "gain": params["gain"][0]}
  for wrong, own, message in (
    (grads, None, r"No `params`: .*`tx.update\(per_example_grads, opt_state, params\)`"),
    (
      {"gain": grads["gain"]},
      params,
      r"lacks \['fc0'\]\['b'\], .* and 3 more of params\. Pass .* `jax.vmap\(jax.grad\(loss",
    ),
    (
      {**grads, "gain": grads["gain"][:4]},
      params,
      r"leading axes .* differ \(\['fc0'\]\['b'\]: 12.*\['gain'\]: 4\)",
    ),
    (
      {**grads, "gain": params["gain"]},
      params,
      r"has shape \(6,\) at \['gain'\], where params have \(6,\): this is a plain gradient",
    ),
    ({**grads, "gain": jnp.ones(())}, scalar, "this is a plain gradient.*of one example"),
    (
      {**grads, "gain": grads["gain"][:, :4]},
      params,
      r"has shape \(12, 4\) at \['gain'\].*gradient there is \[B, 6\]: pass",
    ),
    (
      {**grads, "gain": jnp.ones((12, 6), int)},
      params,
      r"is int64 at \['gain'\], where it should be floating point. .*`optax.masked`",
    ),
    (jax.tree.map(lambda g: g[:0], grads), params, "Gradients of 0 examples"),
  ):
    with pytest.raises(ValueError, match=message):
      tx.update(wrong, state, own)
  if make is fop_optax.fop_per_example:
    with pytest.raises(ValueError, match="11 examples cannot be divided into groups=2. Drop"):
      tx.update(jax.tree.map(lambda g: g[:11], grads), state, params)
  if curvature == "kronecker":
    other = {**params, "gain": jnp.ones(5)}
    more = {**grads, "gain": jnp.ones((12, 5))}
    with pytest.raises(ValueError, match=r"state is of another model .*`tx.init\(params\)`"):
      tx.update(more, state, other)


def test_hyperparameters():
  kfac, fop = fop_optax.kfac_per_example, fop_optax.fop_per_example
  for make, kwargs, message in (
    (kfac, {"curvature": "diagonal"}, "'diagonal'` should be one of 'kronecker', 'exact'"),
    (kfac, {"scaling": "exakt"}, "'exakt'` should be one of 'factored', 'exact'"),
    (kfac, {"damping": -1.0}, "`damping=-1.0` should be at least 0"),
    (kfac, {"momentum": 1.0}, r"`momentum=1.0` should be in \[0, 1\)"),
    (kfac, {"max_vector": -1}, "`max_vector=-1` should be a Python integer, at least 0"),
    (kfac, {"max_dim": 0.5}, "`max_dim=0.5` should be a Python integer"),
    (fop, {"groups": 1}, "two groups of examples, not groups=1: .*`fop_optax.kfac_per_example`"),
    (fop, {"groups": 0}, "`groups=0` should be a Python integer, at least 1"),
    (fop, {"groups": 3, "beta": 0.5}, "groups=3 of examples: .*depend on the basis"),
    (fop, {"projection_metric": "euclid"}, "one of 'fisher', 'damped', 'inverse'"),
    (fop, {"total_gradient": "both"}, '`total_gradient` is "mean" or "sum"'),
  ):
    with pytest.raises(ValueError, match=message):
      make(0.1, **kwargs)
  params, _ = problem()
  with pytest.raises(ValueError, match=r"declare the integers among groups, max_dim.*static_args"):
    optax.inject_hyperparams(fop)(0.1).init(params)


def test_everything_masked_is_no_step():
  params, grads = gradients()
  for make in (fop_optax.kfac_per_example, fop_optax.fop_per_example):
    for curvature in ("kronecker", "exact"):
      tx = optax.masked(make(0.1, curvature=curvature), False)
      state = tx.init(params)
      got, after = tx.update(grads, state, params)
      assert_close((got, after), (grads, state), 0)


def test_an_empty_leaf_gets_an_empty_update():
  params = {"w": jnp.ones((0, 3)), "b": jnp.ones(2)}
  for curvature in ("kronecker", "exact"):
    tx = fop_optax.kfac_per_example(0.1, curvature=curvature)
    got, _ = tx.update(
      jax.tree.map(lambda p: jnp.ones((4, *p.shape)), params), tx.init(params), params
    )
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("method", ["kfac", SLOW("fop")])
def test_aggregating(method):
  """As the aggregator of `process`: private gradients in, a step of any optimizer out."""
  params, grads = gradients()
  clip = jax.vmap(optax.projections.projection_l2_ball)
  tx = aggregating.process(
    optax.stateless(lambda grads, params: clip(grads)),
    METHODS[method](damping=1e-2),
    optax.sgd(0.1, momentum=0.9),
  )
  make = getattr(fop_optax, f"{method}_per_example")
  direct = make(0.1, damping=1e-2, momentum=0.9, norm_constraint=None)
  state, other = tx.init(params), direct.init(params)
  step = jax.jit(tx.update)
  for seed in range(2):
    grads = gradients(seed)[1]
    got, state = step(grads, state, params)
    want, other = direct.update(clip(grads), other, params)
    assert_close(got, want, 1e-10)


def test_leaves_kept_from_it_are_averaged_beside_it():
  params, grads = gradients()
  mean = aggregating.average_per_element_updates()
  tx = optax.partition(
    {"here": fop_optax.fop_per_example(0.1), "adam": optax.chain(mean, optax.adam(0.1))},
    lambda tree: {name: "adam" if name == "gain" else "here" for name in tree},
  )
  updates, _ = tx.update(grads, tx.init(params), params)
  adam = optax.adam(0.1)
  want, _ = adam.update(jnp.mean(grads["gain"], 0), adam.init(params["gain"]))
  assert_close(updates["gain"], want, 1e-12)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.slow
def test_microbatching():
  params, batch = problem()
  tx = fop_optax.fop_per_example(0.1)
  grads = problems.per_example_grads(params, batch)
  want, _ = tx.update(grads, tx.init(params), params)
  one = lambda params, x, y: problems.example_loss(params, x, y)[0]
  micro = optax.microbatching
  by_vmap = micro.micro_vmap(jax.grad(one), (None, 0, 0), microbatch_size=4)
  by_grad = micro.micro_grad(
    one,
    batch_argnums=(1, 2),
    keep_batch_dim=False,
    microbatch_size=4,
    accumulator=micro.AccumulationType.CONCAT,
  )
  for grads in (by_vmap(params, *batch), by_grad(params, *batch)[0]):
    got, _ = tx.update(grads, tx.init(params), params)
    assert_close(got, want, 1e-12)
