"""`scaling="eigenvalue"` (EKFAC) over steps, against a dense reference in NumPy."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")

SLOW = pytest.mark.slow
NAMES = ("fc0", "fc1", "fc2")
EIGENVALUE = {"scaling": "eigenvalue", "momentum": None, "norm_constraint": None}


class Reference:
  """EKFAC of one layer on row-major vectors, its basis an explicit Kronecker product `C`."""

  def __init__(self, damping, relative, decay, statistics_period, basis_period, turn):
    self.damping, self.relative, self.decay = damping, relative, decay
    self.statistics_period, self.basis_period = statistics_period, basis_period
    self.turn = turn  # the step of each period at which the basis is made, after the first
    self.count = self.folds = 0
    self.A = self.G = self.S = self.C = 0

  def step(self, A, G, V):
    """The direction, of a step's statistics and the gradients `V[n, rows, outputs]`."""
    v = V.reshape(len(V), -1)
    if self.count % self.statistics_period == 0:
      weight = min(1 - 1 / (self.folds + 1), self.decay)
      average = lambda old, new: weight * old + (1 - weight) * new
      self.A, self.G = average(self.A, A), average(self.G, G)
      self.S = average(self.S, np.mean((v @ self.C) ** 2, axis=0) if self.folds else 0)
      self.folds += 1
    if self.count % self.basis_period == self.turn or self.count == 0:
      (a, U_A), (g, U_G) = np.linalg.eigh(self.A), np.linalg.eigh(self.G)
      C = np.kron(U_A, U_G)
      # the diagonal in the new basis of the Fisher block that is diagonal in the old one
      F = self.C @ np.diag(self.S) @ self.C.T if self.count else C @ np.diag(np.kron(a, g)) @ C.T
      self.S, self.C = np.diag(C.T @ F @ C), C
      self.added = self.damping + self.relative * self.S.mean()
    self.count += 1
    return self.C @ ((self.C.T @ v.mean(0)) / (self.S + self.added))


def matrix(tree, name):
  return np.concatenate([tree[name]["w"], tree[name]["b"][..., None, :]], axis=-2)


@functools.cache
def captured_problem(groups=1):
  params, batch = problems.make_params(dtype=jnp.float64), problems.make_batch(dtype=jnp.float64)
  return params, fop_optax.capture(problems.loss, params, batch, groups=groups)


def make_step(captured, tx):
  """A step at fixed parameters, with an example's batch."""

  @jax.jit
  def step(params, state, batch):
    due, basis = fop_optax.refresh_due(state), fop_optax.bases(state)
    _, grads, stats = captured.value_and_grad(params, batch, refresh=due, basis=basis)
    updates, state = tx.update(grads, state, params, stats=stats)
    return updates, state, stats

  return step


@pytest.mark.parametrize(
  ("statistics", "inverses", "stagger"),
  [
    (1, 2, False),
    pytest.param(2, 3, False, marks=SLOW),
    pytest.param(1, 1, False, marks=SLOW),
    pytest.param(1, 2, True, marks=SLOW),
  ],
)
def test_steps(statistics, inverses, stagger):
  """Statistics between the steps that make a new basis, and when one is made."""
  params, captured = captured_problem()
  tx = fop_optax.kfac(
    1.0,
    captured.layers,
    damping=0.01,
    relative_damping=0.1,
    decay=0.6,
    curvature_update_period=statistics,
    inverse_update_period=inverses,
    stagger=stagger,
    **EIGENVALUE,
  )
  step, state = make_step(captured, tx), tx.init(params)
  references = {
    name: Reference(0.01, 0.1, 0.6, statistics, inverses, stagger * index % inverses)
    for index, name in enumerate(NAMES)
  }
  for seed in range(5):
    batch = problems.make_batch(seed=seed, dtype=jnp.float64)
    updates, state, _ = step(params, state, batch)
    # the factors at hand, of which other tests say what they are
    stats = jax.jit(captured.value_and_grad)(params, batch)[2]
    grads = problems.per_example_grads(params, batch)
    for name, factors, reference in zip(NAMES, stats.factors, references.values(), strict=True):
      A, G = (np.asarray(x[0]) for x in factors)
      want = reference.step(A, G, matrix(grads, name))
      np.testing.assert_allclose(-matrix(updates, name).ravel(), want, rtol=1e-7, atol=1e-9)
  assert step._cache_size() == 1


def curvature_of(state):
  return state.inner_states["layers"].inner_state[0].curvature


def inverses_of(state):
  return [s.inverse for s in curvature_of(state).stacks]


def test_a_linear_model_has_the_diagonal_of_its_fisher_matrix():
  """One row an example: `A (x) G` is not the Fisher matrix, but S is its diagonal exactly."""
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=(4, 3))), "b": jnp.zeros(3)}
  x, y = jnp.asarray(rng.normal(size=(20, 4))), jnp.asarray(rng.integers(3, size=20))
  loss = lambda p, x, y: fop_optax.softmax_cross_entropy(x @ p["w"] + p["b"], y)
  captured = fop_optax.capture(loss, params, x, y)
  tx = fop_optax.kfac(1.0, captured.layers, damping=0.1, **EIGENVALUE)
  _, grads, stats = captured.value_and_grad(params, x, y, basis=fop_optax.bases(tx.init(params)))
  _, state = tx.update(grads, tx.init(params), params, stats=stats)
  (basis,) = fop_optax.bases(state)
  (S,) = captured.value_and_grad(params, x, y, basis=(basis,))[2].second_moments
  of_one = jax.vmap(jax.grad(lambda p, x, y: loss(p, x[None], y[None])), (None, 0, 0))(params, x, y)
  v = np.concatenate([of_one["w"], of_one["b"][:, None]], axis=1).reshape(20, -1)
  C, fisher = np.kron(basis.A[0], basis.G[0]), v.T @ v / 20
  np.testing.assert_allclose(np.ravel(S), np.diag(C.T @ fisher @ C), rtol=1e-10, atol=1e-14)
  np.testing.assert_allclose(jnp.sum(S), np.trace(fisher), rtol=1e-12)
  # of all that is diagonal in that basis nothing is nearer to the Fisher matrix
  (A,), (G,) = stats.factors[0]
  ours = np.linalg.norm(fisher - C @ np.diag(np.ravel(S)) @ C.T)
  assert ours < 0.95 * np.linalg.norm(fisher - np.kron(A, G))
  (first,) = inverses_of(state)  # K-FAC's, which is another
  assert not np.allclose(first.S, S, rtol=0.1)


@pytest.mark.parametrize("metric", ["fisher", pytest.param("damped", marks=SLOW)])
def test_fop_in_its_metric(metric):
  """`F` and `M` of the second step, dense, in the projection and in the direction."""
  params, captured = captured_problem(groups=2)
  options = EIGENVALUE | {"damping": 0.01, "projection_metric": metric}
  tx = fop_optax.fop(1.0, captured.layers, curvature_update_period=1, **options)
  step, state = make_step(captured, tx), tx.init(params)
  for seed in range(2):
    batch = problems.make_batch(seed=seed, dtype=jnp.float64)
    updates, state, stats = step(params, state, batch)
  _, grads, _ = captured.value_and_grad(params, batch, refresh=False)
  for name, inverse in zip(NAMES, inverses_of(state), strict=True):
    value = jax.tree.map(lambda x: np.asarray(x[0]), inverse)
    C, S = np.kron(value.basis_A, value.basis_G), value.S.ravel()
    F, M = C @ np.diag(S) @ C.T, C @ np.diag(S + 0.01) @ C.T
    P = F if metric == "fisher" else M
    g, c = matrix(grads, name).ravel(), matrix(stats.contrasts[0], name).ravel()
    perp = c - (c @ P @ g) / (g @ P @ g) * g
    solve = lambda v, M=M: np.linalg.solve(M, v)
    comb = g + (g @ solve(perp)) / (perp @ solve(perp)) * perp
    eta = (g @ solve(comb)) / (comb @ solve(comb))
    want = -eta * solve(comb)
    np.testing.assert_allclose(matrix(updates, name).ravel(), want, rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_second_moments_that_are_not_finite():
  """Nothing of such statistics is folded in; a basis that fails leaves the last good one."""
  params, captured = captured_problem()
  tx = fop_optax.kfac(0.1, captured.layers, damping=0.0, curvature_update_period=1, **EIGENVALUE)
  step, batch = make_step(captured, tx), problems.make_batch(dtype=jnp.float64)
  _, state, _ = step(params, tx.init(params), batch)
  _, grads, stats = captured.value_and_grad(params, batch, basis=fop_optax.bases(state))
  update = jax.jit(tx.update)
  spoilt = (stats.second_moments[0].at[0, 0, 0].set(jnp.inf), *stats.second_moments[1:])
  bad = stats._replace(second_moments=spoilt)
  updates, after = update(grads, state, params, stats=bad)
  assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))
  first, second, _ = fop_optax.diagnostics(after, captured.layers)["layers"].values()
  assert (first["folds"], first["nonfinite_statistics"]) == (1, 1)
  assert (second["folds"], second["nonfinite_statistics"]) == (2, 0)
  np.testing.assert_allclose(inverses_of(after)[0].S, inverses_of(state)[0].S)
  # without damping S of zeros cannot be divided by, at decay 0
  tx = fop_optax.kfac(0.1, captured.layers, damping=0.0, decay=0.0, **EIGENVALUE)
  zeros = stats._replace(second_moments=jax.tree.map(jnp.zeros_like, stats.second_moments))
  _, after = tx.update(grads, state, params, stats=zeros)
  made, failed, _ = curvature_of(after).blocks.inversions
  assert (made.tolist(), failed.tolist()) == ([1] * 3, [1] * 3)
  for old, new in zip(inverses_of(state), inverses_of(after), strict=True):
    np.testing.assert_array_equal(old.basis_A, new.basis_A)


def test_damping_is_no_smaller_than_rounding():
  """Of a block of rank one in single precision; relative damping is in units of the mean of S."""
  with jax.enable_x64(False):
    params = {"w": jnp.ones((6, 3))}
    x = jnp.ones((4, 6))
    loss = lambda p, x: jnp.mean(jnp.sum((x @ p["w"]) ** 2, axis=1))
    captured = fop_optax.capture(loss, params, x)
    tx = fop_optax.kfac(1.0, captured.layers, damping=1e-12, relative_damping=0.0, **EIGENVALUE)
    state = tx.init(params)
    for _ in range(2):
      basis = fop_optax.bases(state)
      _, grads, stats = captured.value_and_grad(params, x, basis=basis)
      updates, state = tx.update(grads, state, params, stats=stats)
    (layer,) = fop_optax.diagnostics(state, captured.layers, condition=True)["layers"].values()
    S = inverses_of(state)[0].S
    norm = float(jnp.linalg.norm(S))
    np.testing.assert_allclose(layer["damping"], 4 * jnp.finfo("float32").eps * norm, rtol=1e-5)
    np.testing.assert_allclose(layer["condition"], norm / layer["damping"], rtol=1e-3)
    assert jnp.all(jnp.abs(updates["w"]) < 1)
    tx = fop_optax.kfac(1.0, captured.layers, relative_damping=0.5, **EIGENVALUE)
    _, state = tx.update(grads, state, params, stats=stats)
    (layer,) = fop_optax.diagnostics(state, captured.layers)["layers"].values()
    mean = jnp.mean(inverses_of(state)[0].S)
    np.testing.assert_allclose(layer["damping"], 0.5 * mean, rtol=1e-5)


def test_where_bases_are_found():
  """In a chain, with hyperparameters injected, and in nested dictionaries."""
  params, captured = captured_problem()
  make = fop_optax.kfac
  options = {"layers": captured.layers} | EIGENVALUE
  state = make(0.1, **options).init(params)
  plain = fop_optax.bases(state)
  assert [basis.layer.tolist() for basis in plain] == [[0], [1], [2]]
  wrapped = optax.chain(optax.identity(), optax.inject_hyperparams(make)(0.1, **options))
  as_dicts = lambda node: (
    {name: as_dicts(getattr(node, name)) for name in node._fields}
    if hasattr(node, "_fields")
    else {key: as_dicts(value) for key, value in node.items()}
    if isinstance(node, dict)
    else dict(enumerate(map(as_dicts, node)))
    if isinstance(node, tuple)
    else node
  )
  for other in (wrapped.init(params), as_dicts(state)):
    jax.tree.map(np.testing.assert_array_equal, fop_optax.bases(other), plain)


def test_nnx():
  """The optimizer's Variables have the bases, under `nnx.jit` too."""
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  graphdef, weights = nnx.split(model, nnx.Param)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
  loss = lambda weights, x: jnp.mean(nnx.merge(graphdef, weights)(x) ** 2)
  captured = fop_optax.capture(loss, weights, x)
  tx = fop_optax.kfac(0.1, captured.layers, curvature_update_period=1, **EIGENVALUE)
  optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(weights)

  @nnx.jit
  def step(model, optimizer):
    basis = fop_optax.bases(optimizer.opt_state)
    _, grads, stats = captured.value_and_grad(nnx.state(model, nnx.Param), x, basis=basis)
    optimizer.update(model, grads, stats=stats)

  for _ in range(2):
    step(model, optimizer)
    _, grads, stats = captured.value_and_grad(weights, x, basis=fop_optax.bases(state))
    updates, state = tx.update(grads, state, weights, stats=stats)
    weights = optax.apply_updates(weights, updates)
  for kept in (optimizer.opt_state, nnx.state(optimizer)["opt_state"]):
    (found,) = fop_optax.bases(kept)
    (want,) = fop_optax.bases(state)
    np.testing.assert_allclose(jnp.abs(found.A[...]), jnp.abs(want.A), atol=1e-6)


@SLOW
def test_masked_layers_and_layers_of_one_shape():
  """Equal layers share a stack; the basis of each goes to it, whichever others are masked."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2)
  params = {"a": draw(3, 3), "b": draw(2, 3, 3), "c": draw(3, 3)}
  x = draw(8, 3)

  def loss(p, x):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ p["a"]), p["b"])
    return jnp.mean((h @ p["c"]) ** 2)

  captured = fop_optax.capture(loss, params, x, terms_per_example=1)
  tx = fop_optax.kfac(0.1, captured.layers, curvature_update_period=1, **EIGENVALUE)
  masked = optax.masked(tx, {"a": False, "b": True, "c": True})

  def run(tx):
    step, state = make_step(captured, tx), tx.init(params)
    for _ in range(3):
      updates, state, _ = step(params, state, x)
    return updates

  want, got = run(tx), run(masked)
  for name in ("b", "c"):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-8)
  # all of a shape masked, as if it were not there
  params |= {"head": draw(3, 2)}
  with_head = lambda p, x: loss(p, x) + jnp.mean((x @ p["head"]) ** 2)
  captured = fop_optax.capture(with_head, params, x, terms_per_example=1)
  tx = fop_optax.kfac(0.1, captured.layers, curvature_update_period=1, **EIGENVALUE)
  got = run(optax.masked(tx, {"a": True, "b": True, "c": True, "head": False}))
  for name in ("a", "b", "c"):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-8)


def test_errors():
  params, captured = captured_problem()
  batch = problems.make_batch(dtype=jnp.float64)
  tx = fop_optax.kfac(0.1, captured.layers, **EIGENVALUE)
  state = tx.init(params)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, batch)
  with pytest.raises(ValueError, match=r"are missing.*`captured.value_and_grad\(.*basis=fop_optax"):
    tx.update(grads, state, params, stats=stats)
  other = stats._replace(second_moments=(jnp.ones((1, 2, 2)),))
  with pytest.raises(ValueError, match=r"of the shapes \[\(1, 2, 2\)\] where these layers have"):
    tx.update(grads, state, params, stats=other)
  exact = fop_optax.kfac(0.1, captured.layers, scaling="exact").init(params)
  with pytest.raises(ValueError, match=r"`bases\(opt_state\)`: .*no second moments.*Leave `basis`"):
    fop_optax.bases(exact)
  with pytest.raises(ValueError, match=r"`bases\(opt_state\)` found no curvature state"):
    fop_optax.bases(optax.adam(0.1).init(params))
  with pytest.raises(
    ValueError, match=r"no block of the shape of .*fc2.*, 5 x 6.*bases\(opt_state"
  ):
    captured.value_and_grad(params, batch, basis=fop_optax.bases(state)[:2])
  with pytest.raises(
    ValueError, match="`scaling='eigenvalue'` should be one of 'factored', 'exact'"
  ):
    fop_optax.kfac_per_example(0.1, scaling="eigenvalue")


@SLOW
def test_vmap_over_seeds():
  _, captured = captured_problem()
  tx = fop_optax.kfac(0.1, captured.layers, curvature_update_period=1, **EIGENVALUE)
  seeds = [problems.make_params(seed, dtype=jnp.float64) for seed in range(3)]
  batches = [problems.make_batch(seed=seed, dtype=jnp.float64) for seed in range(3)]

  def step(params, state, batch):
    _, grads, stats = captured.value_and_grad(params, batch, basis=fop_optax.bases(state))
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
  state, together, alone = (
    jax.vmap(tx.init)(params),
    jax.jit(jax.vmap(step, (0, 0, None))),
    seeds[1],
  )
  own = tx.init(alone)
  for batch in batches:
    params, state = together(params, state, batch)
    alone, own = jax.jit(step)(alone, own, batch)
  close = lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-7, atol=1e-10)
  jax.tree.map(close, params, alone)
