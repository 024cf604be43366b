"""SOAP: the official code's numbers, a dense reference for what that has not, and laws."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.experimental import aggregating
import problems
import pytest
from selection import slow_but

import fop_optax
from fop_optax.curvature.modes import unrotate

ORACLE = np.load(pathlib.Path(__file__).parent / "oracles" / "soap_official.npz")
NAMES = ("W1", "b", "W2", "S", "T")
OFFICIAL = {
  "a_default": {},
  "b_1d_wd0": {"precondition_1d": True, "weight_decay": 0.0},
  "c_1d_norm": {"precondition_1d": True, "normalize_grads": True},
  "d_onesided": {"max_precond_dim": 4},
  "e_merge9": {"merge_dims": True, "max_precond_dim": 9},
  "f_betas": {
    "b1": 0.9,
    "b2": 0.99,
    "shampoo_beta": 0.9,
    "inverse_update_period": 1,
    "correct_bias": False,
    "eps": 1e-6,
  },
}
# Statistics of one gradient have full rank, so that the first basis is not up to LAPACK.
WELL_POSED = {"a_default": "SbT", "b_1d_wd0": "ST", "c_1d_norm": "ST", "e_merge9": "Sb",
              "f_betas": "SbT"}  # fmt: skip


def official(config, precision):
  """The optimizer, start values and gradients of a stored run."""
  dtype = {"f32": jnp.float32, "f64": jnp.float64}[precision]
  tx = fop_optax.soap(3e-3, **{"inverse_update_period": 3} | OFFICIAL[config])
  params = {name: jnp.asarray(ORACLE[f"p0_{name}"], dtype) for name in NAMES}
  grads = {name: jnp.asarray(ORACLE[f"g_{name}"], dtype) for name in NAMES}
  return tx, params, grads


def soap_state(state):
  return next(filter(is_soap, jax.tree.leaves(state, is_leaf=is_soap)))


def is_soap(x):
  return isinstance(x, fop_optax.ScaleBySoapState)


def with_bases(state, bases):
  """A state with the bases `bases(name, mode)`; every parameter is a stack of its own."""

  def replace(soap):
    stacks = []
    for name, s in zip(sorted(NAMES), soap.stacks, strict=True):
      own = tuple(
        old if old is None else jnp.asarray(bases(name, mode), old.dtype)[None]
        for mode, old in enumerate(s.bases.bases)
      )
      stacks.append(s._replace(bases=s.bases._replace(bases=own)))
    return soap._replace(stacks=tuple(stacks))

  return jax.tree.map(lambda x: replace(x) if is_soap(x) else x, state, is_leaf=is_soap)


def run_official(config, precision, inject):
  """Parameters after each of the 20 steps, and the last state."""
  tx, params, grads = official(config, precision)

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  first, rest = (jax.tree.map(lambda g, s=s: g[s], grads) for s in (0, slice(1, None)))
  carry, start = jax.jit(step)((params, tx.init(params)), first)
  if inject:
    stored = lambda name, mode: ORACLE[f"{config}/{precision}/Q0_{name}_{mode}"]
    carry = carry[0], with_bases(carry[1], stored)
  (_, state), after = jax.jit(lambda *args: jax.lax.scan(step, *args))(carry, rest)
  whole = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, after)
  return whole, soap_state(state)


@pytest.mark.parametrize("precision", ["f64", pytest.param("f32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", OFFICIAL)
def test_official_trajectories(config, precision):
  """The first basis is given where one gradient leaves it open: Adam is not free of it."""
  tolerance = 1e-10 if precision == "f64" else 5e-6 if config == "c_1d_norm" else 2e-6
  with jax.enable_x64(precision == "f64"):
    params, state = run_official(config, precision, inject=True)
  for name in NAMES:
    stored = ORACLE[f"{config}/{precision}/p_{name}"]
    np.testing.assert_allclose(params[name], stored, rtol=0, atol=tolerance, err_msg=name)
  if precision == "f64":
    for name, s in zip(sorted(NAMES), state.stacks, strict=True):
      v = s.nu[0][0].reshape(ORACLE[f"{config}/f64/final_v_{name}"].shape)
      np.testing.assert_allclose(v, ORACLE[f"{config}/f64/final_v_{name}"], rtol=1e-10, atol=1e-12)
      for mode, S in enumerate(s.bases.statistics):
        if S is not None:
          stored = ORACLE[f"{config}/f64/final_GG_{name}_{mode}"]
          np.testing.assert_allclose(S[0], stored, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", slow_but(OFFICIAL, "a_default"))
def test_official_trajectories_that_are_well_posed(config):
  """From the first basis on our own, where one gradient determines it."""
  with jax.enable_x64(True):
    params, _ = run_official(config, "f64", inject=False)
  for name in WELL_POSED.get(config, NAMES):
    stored = ORACLE[f"{config}/f64/p_{name}"]
    np.testing.assert_allclose(params[name], stored, rtol=0, atol=1e-10, err_msg=name)


class Dense:
  """SOAP on one tensor, by another route: one basis of all entries, momentum unrotated, NumPy.

  Basis vectors keep the numbers they are born with; a `rank` says where each stands.
  """

  def __init__(self, shape, modes, *, b1=0.9, b2=0.8, eps=1e-3, period=2, start="eigh",
               skip_first=True, after=False, factorized=False, kl=False):  # fmt: skip
    self.shape, self.modes = shape, modes
    self.b1, self.b2, self.eps, self.period, self.start = b1, b2, eps, period, start
    self.skip_first, self.after, self.factorized, self.kl = skip_first, after, factorized, kl
    self.S = {m: np.zeros((shape[m], shape[m])) for m in modes}
    self.Q = [np.eye(d) for d in shape]
    self.values = [np.full(d, 0.1) for d in shape]
    self.m, self.v = np.zeros(shape), np.zeros(shape)
    self.parts = [np.zeros(d) for d in shape]
    self.calls = 0

  def basis(self):
    return functools.reduce(np.kron, self.Q)

  def fold(self, g, sides):
    for mode in self.modes if sides is None else sides:
      if sides is not None:
        self.S[mode] = self.b2 * self.S[mode] + (1 - self.b2) * sides[mode]
        continue
      white = g
      for other, (Q, values) in enumerate(zip(self.Q, self.values, strict=True)):
        if self.kl and other != mode and self.calls > 0:
          root = Q @ np.diag(np.minimum(values**-0.5, max(10, len(values)))) @ Q.T
          white = np.moveaxis(np.tensordot(root, white, (1, other)), 0, other)
      U = np.moveaxis(white, mode, 0).reshape(self.shape[mode], -1)
      self.S[mode] = self.b2 * self.S[mode] + (1 - self.b2) * U @ U.T / (
        U.shape[1] if self.kl else 1
      )
    if self.kl and self.calls > 0:
      square = (self.basis().T @ g.ravel()).reshape(self.shape) ** 2
      whitened = [
        square / np.prod([_along(v, i, self.shape) for i, v in enumerate(self.values) if i != j], 0)
        for j in range(len(self.shape))
      ]
      self.values = [
        self.b2 * v + (1 - self.b2) * np.mean(w, tuple(i for i in range(w.ndim) if i != j))
        for j, (v, w) in enumerate(zip(self.values, whitened, strict=True))
      ]

  def turn(self):
    """One power step and QR, with columns in the order of their eigenvalues."""
    for mode in self.modes:
      S, Q = self.S[mode], self.Q[mode]
      order = np.arange(len(S))
      if not self.kl:
        order = np.argsort(-np.diag(Q.T @ S @ Q), kind="stable")
      self.v = np.take(self.v, order, mode)
      self.parts[mode] = self.parts[mode][order]
      self.Q[mode] = np.linalg.qr(S @ Q[:, order])[0]

  def step(self, g, sides=None):
    """With `sides`, second moments that are given: empty for none."""
    first = self.calls == 0
    t = self.calls + (0 if self.skip_first else 1)
    if first and self.start == "eigh":
      for mode in self.modes:
        U = np.moveaxis(g, mode, 0).reshape(self.shape[mode], -1)
        moment = U @ U.T if sides is None else sides[mode]
        self.Q[mode] = np.linalg.eigh(moment)[1][:, ::-1]
    direction = np.zeros(self.shape)
    if t > 0:
      basis = self.basis()
      rotated = (basis.T @ g.ravel()).reshape(self.shape)
      self.m = self.b1 * self.m + (1 - self.b1) * g
      self.v = self.b2 * self.v + (1 - self.b2) * rotated**2
      v = self.v
      if self.factorized:
        sums = (rotated**2).sum(1), (rotated**2).sum(0)
        self.parts = [
          self.b2 * p + (1 - self.b2) * s for p, s in zip(self.parts, sums, strict=True)
        ]
        v = np.outer(*self.parts) / self.parts[0].sum()
      root2 = np.sqrt(1 - self.b2**t)
      root = np.sqrt(v) / root2 + (self.eps if self.after else self.eps / root2)
      whole = basis @ np.diag(1 / root.ravel()) @ basis.T
      direction = (whole @ self.m.ravel()).reshape(self.shape) / (1 - self.b1**t)
    self.fold(g, sides)
    if t > 0 and t % self.period == 0 or first and self.start == "identity":
      self.turn()
    self.calls += 1
    return direction


def _along(values, mode, shape):
  return np.broadcast_to(values.reshape(-1, *[1] * (len(shape) - 1 - mode)), shape)


VARIANTS = {
  "not skipped": ({"skip_first": False}, {"skip_first": False}, {}),
  "eps after": ({"eps_after_correction": True}, {"after": True}, {}),
  "one-sided": ({"one_sided": True}, {}, {"modes": (1,)}),
  "factorized": ({"factorized": True}, {"factorized": True}, {}),
  "factorized, one-sided": (
    {"factorized": True, "one_sided": True},
    {"factorized": True},
    {"modes": (1,)},
  ),
  "from the identity": ({"start": "identity"}, {"start": "identity"}, {}),
  "from the identity, not skipped": (
    {"start": "identity", "skip_first": False, "inverse_update_period": 1},
    {"start": "identity", "skip_first": False, "period": 1},
    {},
  ),
  "kl": ({"kl": True}, {"kl": True}, {}),
  "kl, three modes": ({"kl": True, "skip_first": False}, {"kl": True, "skip_first": False},
                      {"shape": (4, 2, 3), "modes": (0, 1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize(
  "variant", slow_but(VARIANTS, "not skipped", "factorized, one-sided", "kl, three modes")
)
def test_variants_against_a_dense_reference(variant):
  ours, theirs, where = VARIANTS[variant]
  shape, modes = where.get("shape", (4, 3)), where.get("modes", (0, 1))
  grads = np.random.default_rng(0).normal(size=(7, *shape))
  reference = Dense(shape, modes, **theirs)
  want = np.stack([reference.step(g) for g in grads])
  with jax.enable_x64(True):
    tx = fop_optax.scale_by_soap(0.9, 0.8, 1e-3, **({"inverse_update_period": 2} | ours))
    params = jnp.zeros(shape)
    _, got = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(params), jnp.asarray(grads))
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_in_the_basis_of_the_fisher_factors():
  """Of a captured loss with a bias, statistics at two steps of three, against the reference."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    params = {"b": jnp.asarray(rng.normal(size=3)), "w": jnp.asarray(rng.normal(size=(4, 3)))}
    params["scale"] = jnp.ones(3)
    x, y = jnp.asarray(rng.normal(size=(6, 16, 4))), jnp.asarray(rng.normal(size=(6, 16, 3)))

    def loss(params, x, y):
      return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) * params["scale"] - y) ** 2)

    captured = fop_optax.capture(loss, params, x[0], y[0])
    adam = optax.scale_by_adam(0.9, 0.8, eps=0, eps_root=0)  # of "scale", in no layer
    tx = fop_optax.scale_by_soap(
      0.9, 0.8, 1e-3, inverse_update_period=2, layers=captured.layers, fisher=True
    )
    state, reference, moments = tx.init(params), Dense((5, 3), (0, 1)), adam.init(params["scale"])

    @jax.jit
    def step(params, state, x, y, refresh):
      _, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
      return grads, stats, *tx.update(grads, state, params, stats=stats)

    for t in range(6):
      grads, stats, got, state = step(params, state, x[t], y[t], t % 3 != 2)
      g = np.concatenate([grads["w"], grads["b"][None]])
      sides = {m: np.asarray(f[0]) for m, f in enumerate(stats.factors[0])} if t % 3 != 2 else {}
      want = reference.step(g, sides)
      np.testing.assert_allclose(got["w"], want[:-1], rtol=1e-9, atol=1e-12)
      np.testing.assert_allclose(got["b"], want[-1], rtol=1e-9, atol=1e-12)
      if t > 0:  # the first step is skipped
        want, moments = adam.update(grads["scale"], moments)
        own = np.abs(np.asarray(want / got["scale"] - 1))
        assert own.max() < 0.2  # but for eps
      params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, got))
    assert step._cache_size() == 1


def test_the_fisher_basis_says_what_it_needs():
  loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
  params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
  captured = fop_optax.capture(loss, params, x)
  with pytest.raises(ValueError, match=r"`fisher=True` .*`layers=captured\.layers` of"):
    fop_optax.soap(0.1, fisher=True)
  with pytest.raises(ValueError, match="`kl=True` whitens gradients"):
    fop_optax.soap(0.1, fisher=True, kl=True, layers=captured.layers)
  tx = fop_optax.soap(0.1, fisher=True, layers=captured.layers)
  with pytest.raises(ValueError, match=r"`fisher=True` needs statistics: .*stats=stats\)`"):
    tx.update(params, tx.init(params), params)
  wider, rows = {"w": jnp.ones((5, 2))}, jnp.ones((4, 5))
  _, _, stats = fop_optax.capture(loss, wider, rows).value_and_grad(wider, rows)
  with pytest.raises(ValueError, match="`stats` are of another loss"):
    tx.update(params, tx.init(params), params, stats=stats)
  with pytest.raises(ValueError, match=r"`scaling='adam'` .*fop_optax\.soap\(.*fisher=True\)"):
    fop_optax.kfac(0.1, captured.layers, scaling="adam")


def test_without_bases_it_is_adam_a_step_later():
  with jax.enable_x64(True):
    grads = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3, 4)))
    ours = fop_optax.scale_by_soap(0.9, 0.99, max_precond_dim=1, eps_after_correction=True)
    adam = optax.scale_by_adam(0.9, 0.99)
    run = lambda tx, grads: jax.lax.scan(
      lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads
    )[1]
    got, want = run(ours, grads), run(adam, grads[1:])
    assert jnp.all(got[0] == 0)
    np.testing.assert_allclose(got[1:], want, rtol=1e-12)


@pytest.mark.parametrize("stagger", [False, True])
def test_new_bases_leave_the_first_moment(stagger):
  """Rotated back it is the plain average of gradients, whatever the bases did."""
  with jax.enable_x64(True):
    grads = jnp.asarray(np.random.default_rng(2).normal(size=(9, 2, 4, 3)))
    numbers = fop_optax.DimensionNumbers(1, 2)
    tx = fop_optax.scale_by_soap(
      0.9, inverse_update_period=2, stagger=stagger, dimension_numbers=numbers
    )
    step = jax.jit(tx.update)
    state, mean = tx.init(grads[0]), jnp.zeros(grads[0].shape)
    for number, g in enumerate(grads):
      _, state = step(g, state)
      mean = 0.9 * mean + 0.1 * g if number else mean
      (stack,) = state.stacks
      back = jax.vmap(unrotate)(stack.bases.bases, stack.mu)
      np.testing.assert_allclose(back, mean, atol=1e-14)
      for Q in stack.bases.bases:
        np.testing.assert_allclose(
          jnp.matrix_transpose(Q) @ Q, jnp.broadcast_to(jnp.eye(Q.shape[1]), Q.shape), atol=1e-14
        )
  # the first, and of steps 1 to 8 four each; staggered the blocks take turns
  assert stack.bases.made.tolist() == [5, 5]
  assert stack.bases.failed.tolist() == [0, 0]


def test_a_subtree_masked_as_one():
  """Layers count parameters, a mask may hide several of them as one."""
  params = problems.make_params()
  layers = problems.layers_of(params)
  tx = fop_optax.scale_by_soap(layers=layers, skip_first=False, max_precond_dim=1)
  mask = {name: name != "fc0" for name in params}
  masked = optax.masked(tx, mask)
  want, _ = tx.update(params, tx.init(params))
  got, _ = masked.update(params, masked.init(params))
  for name, own in got.items():
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, own, want[name] if mask[name] else params[name])


def halves(seed, steps, *shape):
  """Mean gradients and the contrasts of two halves, `[steps, ...]`."""
  g = np.random.default_rng(seed).normal(size=(2, steps, *shape))
  return jnp.asarray(g.mean(0)), jnp.asarray(g[0] - g[1])


def stats_of(contrast):
  return fop_optax.Stats(jnp.asarray(False), (), (contrast,))


def test_contrasts_enter_the_first_moment_in_the_metric_of_the_step():
  """FOP's equations with the dense matrix `M` of the step."""
  with jax.enable_x64(True):
    means, contrasts = halves(0, 5, 4, 3)
    tx = fop_optax.scale_by_soap(0.9, 0.8, 1e-3, inverse_update_period=100, contrast=True)
    step = jax.jit(lambda g, c, state: tx.update(g, state, stats=stats_of(c)))
    _, state = step(means[0], contrasts[0], tx.init(means[0]))
    basis = np.kron(*(np.asarray(Q[0]) for Q in state.stacks[0].bases.bases))
    m, v = np.zeros(12), np.zeros(12)
    for t in range(1, 5):
      direction, state = step(means[t], contrasts[t], state)
      g, c = (np.asarray(x[t]).ravel() for x in (means, contrasts))
      v = 0.8 * v + 0.2 * (basis.T @ g) ** 2
      M = basis @ np.diag(np.sqrt(v) + 1e-3) @ basis.T
      inner = lambda a, b, M=M: a @ np.linalg.solve(M, b)
      perp = c - (c @ M @ g) / (g @ M @ g) * g
      combined = g + inner(g, perp) / inner(perp, perp) * perp
      eta = inner(g, combined) / inner(combined, combined)
      m = 0.9 * m + 0.1 * eta * combined
      want = np.linalg.solve(M, m) * np.sqrt(1 - 0.8**t) / (1 - 0.9**t)
      np.testing.assert_allclose(direction.ravel(), want, rtol=1e-9)
  report = fop_optax.diagnostics(state)["stacks"]["4 x 3"]
  np.testing.assert_allclose(report["eta"], eta, rtol=1e-9)
  assert 0 < report["rho2"][0] < 1
  assert report["residual"][0] < 1e-12


def test_halves_that_agree_are_soap():
  with jax.enable_x64(True):
    means, _ = halves(1, 4, 4, 3)
    run = lambda tx: jax.lax.scan(
      lambda state, g: tx.update(g, state, stats=stats_of(jnp.zeros_like(g)))[::-1],
      tx.init(means[0]),
      means,
    )[1]
    got = run(fop_optax.scale_by_soap(contrast=True, inverse_update_period=2))
    want = run(fop_optax.scale_by_soap(inverse_update_period=2))
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("groups", [2, 4])
def test_gradients_of_examples_by_group(groups):
  """As the aggregator of `process`, and alone: what a captured loss of as many groups gives."""
  with jax.enable_x64(True):
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 3)))
    one = lambda params, x: jnp.sum((jnp.tanh(x @ params["w"] + params["b"]) - 0.3) ** 2)
    loss = lambda params, x: jnp.mean(jax.vmap(one, (None, 0))(params, x))
    captured = fop_optax.capture(loss, params, x[0], groups=groups)
    tx = fop_optax.scale_by_soap(contrast=True, inverse_update_period=2)
    alone = fop_optax.by_group(tx, groups)
    within = aggregating.process(optax.identity(), alone, optax.scale(1.0))
    states = [tx.init(params), alone.init(params), within.init(params)]
    for batch in x:
      _, grads, stats = captured.value_and_grad(params, batch, refresh=False)
      want, states[0] = tx.update(grads, states[0], stats=stats)
      grads = jax.vmap(jax.grad(one), (None, 0))(params, batch)
      for i, other in ((1, alone), (2, within)):
        got, states[i] = other.update(grads, states[i], params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)
  with pytest.raises(ValueError, match="`groups=1` should be .* at least 2"):
    fop_optax.by_group(tx, 1)
  with pytest.raises(ValueError, match="this is a plain gradient, without an axis of examples"):
    alone.update(params, alone.init(params), params)
  with pytest.raises(ValueError, match="Gradients of 8 examples cannot be divided into groups=3"):
    fop_optax.by_group(tx, 3).update(grads, tx.init(params), params)


def test_contrasts_of_a_captured_loss():
  params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
  x = jax.random.normal(jax.random.key(0), (8, 3))
  loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - 0.3) ** 2)
  captured = fop_optax.capture(loss, params, x, groups=2)
  tx = fop_optax.soap(0.01, contrast=True, layers=captured.layers)

  @jax.jit
  def step(params, state):
    value, grads, stats = captured.value_and_grad(params, x, refresh=False)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, value

  state, values = tx.init(params), []
  for _ in range(10):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[-1] < values[1]
  assert step._cache_size() == 1
  with pytest.raises(ValueError, match=r"`contrast=True` needs .* two groups .*stats=stats\)`"):
    tx.update(params, state, params)
