"""Marked losses: statistics of every spelling against explicit Jacobians; scaled losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fop_optax
from fop_optax.capture import fisher as labels
from fop_optax.layers import Factors

pytestmark = pytest.mark.usefixtures("x64")
N, T, D, C = 4, 3, 2, 3
RNG = np.random.default_rng(0)
X, Y, W = RNG.normal(size=(N, T, D)), np.arange(N * T).reshape(N, T) % C, RNG.normal(size=(D, C))
WEIGHTS = RNG.uniform(size=(N, T)) * (np.arange(N * T).reshape(N, T) != 1)
cross_entropy, squared = fop_optax.softmax_cross_entropy, fop_optax.squared_error
binary = fop_optax.sigmoid_binary_cross_entropy
stop = jax.lax.stop_gradient
softmax_term = lambda z: jax.nn.logsumexp(z) - z[0]
normal_term = lambda z: 0.5 * jnp.sum(z**2)
sigmoid_term = lambda z: jnp.sum(jax.nn.softplus(z))


def close(actual, desired, tolerance=1e-12):
  np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance)


def explicit(terms, x=X, w=W):
  """`G = sum_t w_t J_t' H_t J_t` over the rows of `h = x w`.

  Args:
    terms: `h` -> for each mark `z[..., C]`, weights `[...]`, and the loss of one `z[C]`.
  """
  h = x @ w
  out = 0
  for number, (_, weights, term) in enumerate(terms(h)):
    z = lambda h, number=number: terms(h)[number][0].reshape(-1, terms(h)[number][0].shape[-1])
    hessian = jax.vmap(jax.hessian(term))(z(h))
    jacobian = jax.jacrev(z)(h).reshape(*z(h).shape, -1, w.shape[1])
    out += jnp.einsum("t,tcro,tcd,tdrp->op", weights.reshape(-1), jacobian, hessian, jacobian)
  return out


def G_of(loss, fisher, key=None, w=W, x=X, y=Y, **options):
  """`G` of `loss(h, y)` of the rows `h = x w`."""
  params, x, y = {"w": jnp.asarray(w)}, jnp.asarray(x), jnp.asarray(y)
  of_params = lambda p, x, y: loss(x @ p["w"], y)
  captured = fop_optax.capture(of_params, params, x, y, fisher=fisher, groups=1)
  run = lambda key: captured.value_and_grad(params, x, y, key=key, **options)[2].factors[0].G[0]
  return jax.jit(run)(key) if key is None else jax.jit(jax.vmap(run))(key)


def mean_of(z, term=softmax_term):
  return (z, jnp.full(z.shape[:-1], 1 / (z.size // z.shape[-1])), term)


def attended(h):  # every row is read by every term of its example
  return jax.nn.softmax(h @ jnp.swapaxes(h, 1, 2)) @ jnp.tanh(h)


def normalised(h):  # examples interact
  return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.1)


def pairs(h):  # of all examples: the classes are examples too
  return h[:, 0] @ h[:, 1].T


over = jax.vmap(cross_entropy)
# loss(h, y), and its terms; those indented once more take longer than they tell
LOSSES = {
  "weights a token": (
    lambda h, y: jnp.sum(WEIGHTS * jax.vmap(over)(h, y)),
    lambda h: [(h, WEIGHTS, softmax_term)],
  ),
  "weights an example": (
    lambda h, y: jnp.sum(WEIGHTS[:, 0] * over(h, y)),
    lambda h: [(h, WEIGHTS[:, :1].repeat(T, 1) / T, softmax_term)],
  ),
  "members on the last axis": (  # each with the classes in the middle
    lambda h, y: jnp.dot(
      WEIGHTS[0], jax.vmap(cross_entropy, (2, None))(jnp.stack([h, 2 * h, h**2], 2), y)
    ),
    lambda h: [
      (z, jnp.full((N, T), weight / (N * T)), softmax_term)
      for z, weight in zip((h, 2 * h, h**2), WEIGHTS[0], strict=True)
    ],
  ),
  "labels alone are batched": (
    lambda h, y: jnp.mean(
      jax.vmap(cross_entropy, (None, 2))(h, jnp.stack([y, y, 0 * y, 1 + 0 * y], 2))
    ),
    lambda h: [mean_of(h)],
  ),
  "nested in a scan": (
    lambda h, y: jnp.mean(
      jax.lax.map(
        jax.checkpoint(lambda hy: jax.vmap(cross_entropy, (1, 0))(hy[0], hy[1])),
        (jnp.swapaxes(h, 1, 2), y),
      )
    ),
    lambda h: [mean_of(h)],
  ),
  "attention": (lambda h, y: cross_entropy(attended(h), y), lambda h: [mean_of(attended(h))]),
  "attention, tokens last": (
    lambda h, y: jax.vmap(cross_entropy, (2, 1))(attended(h).transpose(0, 2, 1), y).mean(),
    lambda h: [mean_of(attended(h))],
  ),
  "attention, flattened": (
    lambda h, y: cross_entropy(attended(h).reshape(-1, C), y.reshape(-1)),
    lambda h: [mean_of(attended(h))],
  ),
  "attention, time first": (
    lambda h, y: squared(
      jnp.swapaxes(attended(h), 0, 1).reshape(-1, C), jax.nn.one_hot(y.T.reshape(-1), C)
    ),
    lambda h: [mean_of(attended(h), normal_term)],
  ),
  "Bernoulli": (
    lambda h, y: binary(3 * jnp.tanh(h), jax.nn.one_hot(y, C)),
    lambda h: [mean_of(3 * jnp.tanh(h), sigmoid_term)],
  ),
  "normalised over the batch": (
    lambda h, y: cross_entropy(normalised(h), y),
    lambda h: [mean_of(normalised(h))],
  ),
  "contrasts of all pairs": (
    lambda h, y: (
      0.5 * cross_entropy(pairs(h), jnp.arange(N)) + 0.5 * cross_entropy(pairs(h).T, jnp.arange(N))
    ),
    lambda h: [(z, jnp.full(N, 0.5 / N), softmax_term) for z in (pairs(h), pairs(h).T)],
  ),
  "two tasks": (
    lambda h, y: cross_entropy(h, y) + 3 * squared(jnp.tanh(h.mean(1)), h[:, 0]),
    lambda h: [
      mean_of(h),
      (jnp.tanh(h.mean(1)) - jax.lax.stop_gradient(h[:, 0]) * 0, jnp.full(N, 3 / N), normal_term),
    ],
  ),
  "halves": (
    lambda h, y: 0.5 * cross_entropy(h, y) + 0.5 * cross_entropy(h, y),
    lambda h: [mean_of(h)],
  ),
  "negative weights": (
    lambda h, y: -cross_entropy(h, y),
    lambda h: [mean_of(h)],
  ),
}


ALWAYS = ("weights a token", "members on the last axis", "attention, time first", "two tasks")
ALWAYS += ("Bernoulli",)


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in LOSSES]
)
def test_exact_is_gauss_newton(name):
  loss, terms = LOSSES[name]
  close(G_of(loss, "exact"), jax.jit(lambda: explicit(terms))())


@pytest.mark.parametrize(
  "name",
  [
    "members on the last axis",
    "Bernoulli",
    pytest.param("contrasts of all pairs", marks=pytest.mark.slow),
  ],
)
def test_sampled_is_gauss_newton_within_its_error(name):
  loss, terms = LOSSES[name]
  G = G_of(loss, "sampled", jax.random.split(jax.random.key(0), 2000))
  error = G.std(0) / np.sqrt(len(G))
  assert np.max(np.abs(G.mean(0) - jax.jit(lambda: explicit(terms))()) / error) < 4


def test_binary_cross_entropies_are_summed_along_the_last_axis():
  z, labels = RNG.normal(size=(N, T, C)), RNG.integers(2, size=(N, T, C))
  p = 1 / (1 + np.exp(-z))
  terms = -np.where(labels, np.log(p), np.log(1 - p)).sum(-1)
  close(binary(jnp.asarray(z), jnp.asarray(labels)), terms.mean())
  assert jax.eval_shape(binary, jnp.ones((2, 1), "float16"), jnp.ones((2, 1))).dtype == "float32"
  for shapes in (((N, C), (N,)), ((), ())):
    with pytest.raises(ValueError, match=r"two arrays \[..., outputs\].*`logits\[..., None\]`"):
      binary(*map(jnp.ones, shapes))


def test_which_terms_are_perturbed_together():
  """All along axes that do not mix; a pass for each entry of those that do."""

  def separate(of_rows, shape, classes):
    h = jnp.asarray(X @ W)
    pull = lambda v: jax.vjp(lambda h: of_rows(h).reshape(shape), h)[1](v)[0].reshape(-1, C)
    column = lambda v: [Factors(jnp.ones(()), (pull(v).T @ pull(v))[None])]
    return labels._separate(column, jnp.ones(shape), labels._axes(shape, classes, N))

  def found():
    return [
      separate(jnp.tanh, (N * T, C), 1),
      separate(lambda h: attended(h).transpose(2, 0, 1), (C, N, T), 0),
      separate(attended, (N * T, C), 1),  # N of T
      separate(lambda h: jnp.swapaxes(attended(h), 0, 1), (T * N, C), 1),
      separate(normalised, (N, T, C), 2),
    ]

  expected = [[True, True], [True, False], [True, False], [False, False], [False, True]]
  assert jax.tree.map(bool, jax.jit(found)()) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
  """Losses in float32, whatever is enabled; starts of the second pass in the logits' type."""
  loss, terms = LOSSES["weights a token"]
  half = lambda h, y: loss(h.astype(dtype), y)
  assert jax.eval_shape(cross_entropy, jnp.ones(3, dtype), jnp.ones((), int)).dtype == "float32"
  expected = jax.jit(lambda: explicit(terms))()
  close(G_of(half, "exact", w=W.astype(dtype), x=X.astype(dtype)), expected, 0.02)


def test_terms_are_counted_after_vmap():
  """R of empirical statistics; two marks over several terms need none of the others."""
  whole = G_of(cross_entropy, "empirical")
  close(
    G_of(
      lambda h, y: jax.vmap(cross_entropy, (2, 0))(jnp.moveaxis(h, 0, 2), y).mean(), "empirical"
    ),
    whole,
  )
  twice = lambda h, y: cross_entropy(h, y) + cross_entropy(2 * h, y)
  with pytest.raises(ValueError, match="2 marked losses.*Pass `terms_per_example`"):
    G_of(twice, "empirical")


def test_marks_in_a_gradient_within_the_loss():
  """Seen beside it, not seen inside of it, and never a crash."""
  of_examples = jax.vmap(jax.grad(cross_entropy))
  penalised = lambda h, y: cross_entropy(h, y) + 1e-3 * jnp.mean(of_examples(h, y) ** 2)
  close(G_of(penalised, "exact"), jax.jit(lambda: explicit(lambda h: [mean_of(h)]))())
  for inside in (
    lambda h, y: jax.value_and_grad(cross_entropy)(h, y)[0],
    lambda h, y: jax.jvp(lambda h: cross_entropy(h, y), (h,), (h,))[1],
    lambda h, y: jax.linearize(lambda h: cross_entropy(h, y), h)[1](h),
    lambda h, y: jax.lax.cond(h.sum() > 0, cross_entropy, lambda h, y: 0 * h.sum(), h, y),
  ):
    with pytest.raises(ValueError, match="outside of `cond`, `while_loop` and of gradients"):
      G_of(inside, "exact")


def curvature_only(logits):
  entropy = cross_entropy(logits, stop(jax.nn.softmax(logits)))
  return entropy - stop(entropy)


def test_natural_policy_gradient():
  """REINFORCE beside a mark: `A (x) G` is the Fisher matrix of the policy, in one state."""
  state, actions, advantages = RNG.normal(size=D), np.array([0, 2, 1, 1]), RNG.normal(size=N)
  states = jnp.asarray(np.stack([state] * N))
  log_pi = lambda w, state: jax.nn.log_softmax(state @ w)

  def reinforce(params, states, actions, advantages):
    of_actions = jax.vmap(lambda s, a: log_pi(params["w"], s)[a])(states, actions)
    return -jnp.mean(advantages * of_actions)

  def loss(params, states, actions, advantages):
    mark = curvature_only(states @ params["w"])
    return reinforce(params, states, actions, advantages) + mark

  args = ({"w": jnp.asarray(W)}, states, jnp.asarray(actions), jnp.asarray(advantages))
  captured = fop_optax.capture(loss, *args, groups=1, fisher="exact")
  value, grads, stats = jax.jit(captured.value_and_grad)(*args)
  expected = jax.jit(jax.value_and_grad(reinforce))(*args)
  jax.tree.map(close, (value, grads), expected)
  scores = jax.jit(jax.jacobian(log_pi))(W, state).reshape(C, -1)  # of every action
  fisher = np.einsum("a,ai,aj->ij", np.exp(log_pi(W, state)), scores, scores)
  (A, G) = stats.factors[0]
  close(np.kron(A[0], G[0]), fisher)


def test_natural_gradient_of_a_variational_energy():
  """`G` is that of the Fisher matrix of `|psi|^2`, centred over the samples."""
  log_psi = lambda h: jnp.tanh(h).sum((1, 2))
  energies = RNG.normal(size=N)

  def loss(h, y):
    f, centred = log_psi(h), stop(y - y.mean())
    log_p = 2 * (f - f.mean())[:, None]
    surrogate = 2 * jnp.mean(centred * f)
    return y.mean() + surrogate - stop(surrogate) + squared(log_p, stop(log_p))

  def terms(h):
    f = 2 * log_psi(h)
    return [mean_of((f - f.mean())[:, None], normal_term)]

  params, x, y = {"w": jnp.asarray(W)}, jnp.asarray(X), jnp.asarray(energies)
  of_params = lambda p, x, y: loss(x @ p["w"], y)
  expected = jax.jit(lambda: explicit(terms))()
  captured = fop_optax.capture(of_params, params, x, y, groups=1, fisher="exact")
  value, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  close(value, energies.mean())
  of_samples = jax.jit(jax.jacobian(lambda w: log_psi(X @ w)))(W)
  close(grads["w"], 2 * np.tensordot(energies - energies.mean(), of_samples, 1) / N)
  close(stats.factors[0].G[0], expected)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_loss_scale_changes_nothing(fisher):
  params, x, y = {"w": jnp.asarray(W), "b": jnp.zeros(C)}, jnp.asarray(X), jnp.asarray(Y)
  loss = lambda p, x, y: (cross_entropy(jnp.tanh(x @ p["w"] + p["b"]), y), x.sum())
  captured = fop_optax.capture(loss, params, x, y, fisher=fisher, groups=2, has_aux=True)

  @jax.jit
  def run(scale):
    options = {"key": jax.random.key(0), "loss_scale": scale}
    plain = captured.value_and_grad(params, x, y, refresh=False, **options)
    return captured.value_and_grad(params, x, y, refresh=jnp.array(True), **options), plain

  ours, plain = run(1024.0)
  jax.tree.map(np.testing.assert_array_equal, (ours, plain), run(1.0))
  expected = jax.jit(lambda: captured.value_and_grad(params, x, y, refresh=False))()
  jax.tree.map(lambda a, b: close(a, b, 1e-15), plain, expected)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_loss_scale_cures_underflow_in_float16(fisher):
  with jax.enable_x64(False):
    params, x, y = {"w": jnp.asarray(W, "float32")}, jnp.asarray(X, "float32"), jnp.asarray(Y)

    def step_in(dtype):
      h = lambda p, x: jnp.tanh(x.astype(dtype) @ p["w"].astype(dtype))
      loss = lambda p, x, y: 1e-6 * cross_entropy(h(p, x), y)
      captured = fop_optax.capture(loss, params, x, y, groups=1, fisher=fisher)
      return jax.jit(
        lambda scale: captured.value_and_grad(params, x, y, key=jax.random.key(0), loss_scale=scale)
      )

    def direction(loss, grads, stats):
      assert 0 < loss < 1e-5
      assert grads["w"].dtype == "float32"
      (A, G), eye = (np.asarray(factor[0]) for factor in stats.factors[0]), np.eye(C)
      return np.linalg.solve(A, grads["w"]) @ np.linalg.inv(G + 1e-3 * np.trace(G) * eye)

    half, right = step_in("float16"), direction(*step_in("float32")(1.0))
    off = lambda u: np.linalg.norm(u - right) / np.linalg.norm(right)
    assert off(direction(*half(2.0**15))) < 0.01 < off(direction(*half(1.0)))
    assert not np.isfinite(half(2.0**40)[1]["w"]).all()  # for the caller to see


@pytest.mark.parametrize("scale", [0.0, -2.0, np.inf, np.ones(2)])
def test_no_loss_scale(scale):
  with pytest.raises(ValueError, match="takes one positive number, as 2.0\\*\\*15, not"):
    G_of(cross_entropy, "empirical", loss_scale=scale)
