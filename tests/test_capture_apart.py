"""Uses of a weight beside the one in a layer: penalties, fixed rows, constants that meet the batch,
numbers beside a weight, and biases that are not added everywhere."""

import explicit
import jax
from jax import lax
from jax.experimental import jet
import jax.numpy as jnp
import numpy as np
import pytest
from selection import slow_but

import fop_optax

pytestmark = pytest.mark.usefixtures("x64")
N, D, H, M = 6, 2, 5, 4  # examples, inputs, hidden units, fixed points


def numbers(*shape, seed=0):
  return np.random.default_rng(seed + sum(shape)).normal(size=shape)


def draw(*shape, seed=0):
  return jnp.asarray(numbers(*shape, seed=seed))


def params(inputs=D):
  return {
    "b1": 0.3 * draw(H),
    "b2": 0.3 * draw(H, seed=1),
    "w1": draw(inputs, H),
    "w2": 0.5 * draw(H, H),
    "w3": draw(H, 1),
  }


X, Y = numbers(N, D), numbers(N, 1)


def net(p, x):
  """A number, of one point."""
  h = jnp.tanh(x @ p["w1"] + p["b1"])
  return (jnp.tanh(h @ p["w2"] + p["b2"]) @ p["w3"])[0]


def fit(p, x, y):
  return jnp.mean((jax.vmap(net, (None, 0))(p, x) - y[:, 0]) ** 2)


def captured(loss, p, *args, **options):
  """What was captured, and its statistics, eagerly; the gradient is that of `jax.grad`."""
  found = fop_optax.capture(loss, p, *args, terms_per_example=1, **options)
  value, grads, stats = jax.jit(found.value_and_grad)(p, *args)
  np.testing.assert_allclose(value, loss(p, *args), rtol=1e-12)
  close(grads, jax.grad(loss)(p, *args))
  return found, stats.factors


def close(actual, desired, tolerance=1e-11):
  def check(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (np.max(np.abs(b)) + 1e-30))

  jax.tree.map(check, actual, desired)


def squares(p):
  return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


# Terms of a loss without a batch: each leaves all weights and biases in their layers.
PENALTIES = {
  "l2": lambda p, fit: fit + 1e-2 * 0.5 * squares(p),
  "half of a sum": lambda p, fit: jnp.sum(jnp.stack([fit, 1e-2 * squares(p)])) / 2 + fit / 2,
  "norm": lambda p, fit: jnp.sqrt(squares(p) + 1) * 0.1 + fit,
  "products with other matrices": lambda p, fit: (
    fit + (p["w2"].reshape(-1) @ jnp.ones(H * H)) ** 2 + jnp.sum((p["w2"][:2] @ jnp.ones(H)) ** 2)
  ),
  "subtracted, divided": lambda p, fit: -(squares(p) / 7 - fit),
  "orthogonal": lambda p, fit: fit + jnp.sum((p["w2"].T @ p["w2"] - jnp.eye(H)) ** 2),
  "scan": lambda p, fit: lax.scan(lambda c, r: (c + jnp.sum(r**2), None), fit, p["w2"])[0],
  "cond": lambda p, fit: fit + lax.cond(p["b1"].sum() > 0, squares, lambda p: 2 * squares(p), p),
  "jit, checkpoint": lambda p, fit: jax.jit(lambda p: fit + jax.checkpoint(squares)(p))(p),
  "where": lambda p, fit: fit + jnp.where(fit > 0, squares(p), 0.0),
  "entropy": lambda p, fit: fit + jax.nn.logsumexp(p["b1"]) + jnp.max(p["w1"]),
}


@pytest.mark.parametrize(
  "name", slow_but(PENALTIES, "l2", "subtracted, divided", "orthogonal", "cond", "half of a sum")
)
def test_a_penalty_leaves_statistics_as_they_are(name):
  p = params()
  found, factors = captured(lambda p, x, y: PENALTIES[name](p, fit(p, x, y)), p, X, Y)
  assert not found.fallbacks
  assert "penalty left out of the curvature" in str(found)
  close(factors, captured(fit, p, X, Y)[1])


# What is made of parameters and meets the batch is no penalty.
MEETINGS = {
  "weight norm": lambda p, x: jnp.mean(x @ (p["w"] / jnp.linalg.norm(p["w"])) ** 2),
  "gate": lambda p, x: jnp.mean(x @ p["ok"]) * jnp.sum(p["w"] ** 2),
  "temperature": lambda p, x: jnp.mean((x @ p["ok"]) / jnp.exp(p["w"][0, 0])),
  "squared sum": lambda p, x: (jnp.mean(x @ p["ok"]) + jnp.sum(p["w"] ** 2)) ** 2,
  "added inside": lambda p, x: jnp.mean(jnp.tanh(x @ p["ok"] + jnp.sum(p["w"] ** 2))),
  "carried": lambda p, x: jnp.mean(
    lax.scan(lambda c, x: (jnp.tanh(c + x @ p["ok"]), None), jnp.sum(p["w"] ** 2) * jnp.ones(H), x)[
      0
    ]
  ),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_what_meets_the_batch_is_refused(name):
  p = {"w": draw(D, H), "ok": draw(D, H, seed=1), "head": draw(D, 1)}
  loss = lambda p, x: MEETINGS[name](p, x) + jnp.mean((x @ p["head"]) ** 2)
  found, _ = captured(loss, p, X)
  assert "['w']" in found.fallbacks
  assert "['head']" not in found.fallbacks


def test_fixed_points_are_rows_of_their_own():
  points = jnp.linspace(-1.0, 1.0, M * D).reshape(M, D)

  def loss(p, x, y):
    at = jax.vmap(net, (None, 0))(p, points)
    return fit(p, x, y) + jnp.mean(at**2)

  def tapped(p, x, y, tap, name=""):
    def rows(x, name):
      h = jnp.tanh(tap("w1" + name, x, p["w1"], p["b1"]))
      return tap("w3" + name, jnp.tanh(tap("w2" + name, h, p["w2"], p["b2"])), p["w3"])[:, 0]

    return jnp.mean((rows(x, "") - y[:, 0]) ** 2) + jnp.mean(rows(points, " fixed") ** 2)

  p = params()
  found, factors = captured(loss, p, X, Y)
  assert not found.fallbacks
  assert f"{M} fixed rows" in str(found)
  matrices = explicit.evaluate(tapped, p, X, Y, groups=1).matrices
  for layer, (A, G) in zip(found.layers, factors, strict=True):
    name = found.layers.paths[layer.weight].strip("[']")
    batch, fixed = matrices[name, 0], matrices[name + " fixed", 0]
    both = (N * batch.factors[0] + M * fixed.factors[0]) / (N + M)
    close((A[0], G[0]), (both, batch.G + fixed.G / N * M))  # G of a mean over N, and over M
  # cut into chunks the fixed rows are in each: neither factor changes
  for options in ({"groups": 2}, {"micro_batches": 3}):
    chunked = fop_optax.capture(loss, p, X, Y, terms_per_example=1, **options)
    close(jax.jit(chunked.value_and_grad)(p, X, Y)[2].factors, factors)
  # nor with a penalty that is the product of a constant with another matrix
  other = lambda p, x, y: loss(p, x, y) + (p["w2"].reshape(-1) @ jnp.ones(H * H)) ** 2
  found, same = captured(other, p, X, Y)
  assert "penalty left out of the curvature" in str(found)
  close(same, factors)


def hessian(u, x):
  return jnp.trace(jax.hessian(u)(x))


def forward_over_forward(u, x):
  along = lambda x, v: jax.jvp(u, (x,), (v,))[1]
  return sum(jax.jvp(lambda x, v=v: along(x, v), (x,), (v,))[1] for v in jnp.eye(D))


def linearized_in_a_loop(u, x):
  _, tangent = jax.linearize(jax.grad(u), x)
  return lax.fori_loop(0, D, lambda i, total: total + tangent(jnp.eye(D)[i])[i], 0.0)


def taylor(u, x):
  zero = jnp.zeros(D)
  return sum(jet.jet(u, (x,), ((v, zero),))[1][1] for v in jnp.eye(D))


def scanned_directions(u, x):
  second = lambda v: jax.jvp(lambda x: jax.jvp(u, (x,), (v,))[1], (x,), (v,))[1]
  return jnp.sum(lax.map(second, jnp.eye(D)))


def reverse_over_reverse(u, x):
  return sum(jax.grad(lambda x, i=i: jax.grad(u)(x)[i])(x)[i] for i in range(D))


def force(u, x):
  return jnp.sum(jax.grad(u)(x) ** 2)


def hamiltonian(u, x):
  dq, dp = jax.grad(lambda q, p: u(jnp.stack([q, p])), (0, 1))(x[0], x[1])
  return (dp - 1) ** 2 + (dq + 1) ** 2


def gradient_penalty(u, x):
  return (jnp.linalg.norm(jax.grad(u)(x)) - 1) ** 2 + u(x)


def of_the_whole_batch(u, x):
  energy, forces = jax.value_and_grad(lambda x: jnp.sum(jax.vmap(u)(x)))(x)
  return jnp.sum(forces**2, -1) + 0 * energy


DERIVATIVES = {
  function.__name__: function
  for function in (
    hessian,
    forward_over_forward,
    linearized_in_a_loop,
    taylor,
    scanned_directions,
    reverse_over_reverse,
    force,
    hamiltonian,
    gradient_penalty,
    of_the_whole_batch,
  )
}


def residuals(derivative, u, x):
  if derivative is of_the_whole_batch:
    return derivative(u, x)
  return jax.vmap(lambda x: derivative(u, x))(x)


@pytest.mark.parametrize("name", slow_but(DERIVATIVES, "forward_over_forward", "force"))
def test_derivatives_of_a_network_are_captured_whole(name):
  """As the same function whose biases are a row of the weights, met by a column of ones."""

  def loss(p, x):
    return 0.5 * jnp.mean(residuals(DERIVATIVES[name], lambda x: net(p, x), x) ** 2)

  def with_ones(p, x):
    one = lambda x: jnp.concatenate([x, jnp.ones(1)])
    u = lambda x: (jnp.tanh(one(jnp.tanh(one(x) @ p["w1"])) @ p["w2"]) @ p["w3"])[0]
    return 0.5 * jnp.mean(residuals(DERIVATIVES[name], u, x) ** 2)

  p = params()
  joined = {k: jnp.concatenate([p[k], p["b" + k[1]][None]]) for k in ("w1", "w2")}
  joined["w3"] = p["w3"]
  found, _ = captured(loss, p, X)
  other, _ = captured(with_ones, joined, X)
  assert not found.fallbacks and not other.fallbacks
  updates = []
  for each, tree in ((found, p), (other, joined)):
    tx = fop_optax.kfac(1.0, each.layers, damping=1e-2, momentum=None, norm_constraint=None)
    _, grads, stats = jax.jit(each.value_and_grad)(tree, X)
    updates.append(tx.update(grads, tx.init(tree), tree, stats=stats)[0])
  ours, theirs = updates
  for weight, bias in (("w1", "b1"), ("w2", "b2")):
    close(jnp.concatenate([ours[weight], ours[bias][None]]), theirs[weight], 1e-10)
  close(ours["w3"], theirs["w3"], 1e-10)


def test_factors_of_a_forward_derivative_are_explicit_ones():
  v = jnp.array([1.0, -2.0])

  def loss(p, x, y):
    slope = jax.vmap(lambda x: jax.jvp(lambda x: net(p, x), (x,), (v,))[1])(x)
    return jnp.mean((slope - y[:, 0]) ** 2)

  def tapped(p, x, y, tap):
    t1 = jnp.tanh(tap("w1", x, p["w1"], p["b1"]))
    d1 = (1 - t1**2) * tap("w1", jnp.tile(v, (N, 1)), p["w1"])  # a row of v an example
    t2 = jnp.tanh(tap("w2", t1, p["w2"], p["b2"]))
    d2 = (1 - t2**2) * tap("w2", d1, p["w2"])
    return jnp.mean((tap("w3", d2, p["w3"]) - y) ** 2)

  check_explicit(loss, tapped, params())


def test_factors_of_a_reverse_derivative_are_explicit_ones():
  def loss(p, x, y):
    return jnp.mean((jax.vmap(jax.grad(lambda x: net(p, x)))(x) - y) ** 2)

  def tapped(p, x, y, tap):
    t1 = jnp.tanh(tap("w1", x, p["w1"], p["b1"]))
    t2 = jnp.tanh(tap("w2", t1, p["w2"], p["b2"]))
    c2 = (1 - t2**2) * tap("w3 turned", jnp.ones((N, 1)), p["w3"].T)
    c1 = (1 - t1**2) * tap("w2 turned", c2, p["w2"].T)
    return jnp.mean((tap("w1 turned", c1, p["w1"].T) - y) ** 2)

  p = params()
  found, factors = captured(loss, p, X, Y)
  matrices = explicit.evaluate(tapped, p, X, Y, groups=1).matrices
  for layer, (A, G) in zip(found.layers, factors, strict=True):
    name = found.layers.paths[layer.weight].strip("[']")
    turned = matrices[name + " turned", 0].factors
    if name == "w3":  # used in this orientation alone
      close((A[0], G[0]), turned)
      continue
    pair = matrices[name, 0].factors
    padded = np.pad(turned[1], (0, 1)), turned[0]  # no gradient of the homogeneous coordinate
    close((A[0], G[0]), added(balanced(pair), balanced(padded)))


def added(*pairs):
  return tuple(map(sum, zip(*pairs, strict=True)))


def balanced(factors):
  root = np.sqrt(np.mean(np.diag(factors[1])) / np.mean(np.diag(factors[0])))
  return factors[0] * root, factors[1] / root


def check_explicit(loss, tapped, p, *args):
  args = args or (X, Y)
  found, factors = captured(loss, p, *args)
  assert not found.fallbacks
  matrices = explicit.evaluate(tapped, p, *args, groups=1).matrices
  for layer, (A, G) in zip(found.layers, factors, strict=True):
    name = found.layers.paths[layer.weight].strip("[']")
    close((A[0], G[0]), matrices[name, 0].factors)


def network_at_zero(p, x):
  trunk = lambda t: jnp.tanh(t @ p["w1"] + p["b1"]) @ p["w2"]
  return jnp.mean(jax.vmap(lambda x: jnp.tanh(x @ p["u"]) @ trunk(jnp.full(D, 0.3)))(x) ** 2)


def network_at_zero_tapped(p, x, y, tap):
  h = jnp.tanh(tap("w1", jnp.full((N, D), 0.3), p["w1"], p["b1"]))
  return jnp.mean(jnp.sum(jnp.tanh(tap("u", x, p["u"])) * tap("w2", h, p["w2"]), -1) ** 2)


def test_a_constant_row_that_meets_the_batch_in_a_product():
  p = {"b1": draw(H), "u": draw(D, H), "w1": draw(D, H, seed=3), "w2": draw(H, H)}
  check_explicit(lambda p, x, y: network_at_zero(p, x), network_at_zero_tapped, p)


# `y = (c x) W + h b`: (loss of x and of parameters w, b, o; c; h)
NUMBERS = {
  "divided": (lambda p, x: (x @ (p["w"] / jnp.sqrt(4.0)) + p["b"]) @ p["o"], 0.5, 1.0),
  "negated": (lambda p, x: (x @ -p["w"] - p["b"]) @ p["o"], -1.0, -1.0),
  "both": (lambda p, x: (x @ (2.0 * p["w"]) + 0.1 * p["b"]) @ p["o"], 2.0, 0.1),
  "of the output": (lambda p, x: (0.5 * (x @ p["w"]) + p["b"]) @ p["o"], 1.0, 2.0),
  "an array of one number": (
    lambda p, x: (x @ (p["w"] * jnp.full((D, H), 3.0)) + p["b"]) @ p["o"],
    3.0,
    1.0,
  ),
  "in a scan": (
    lambda p, x: lax.map(lambda x: (x @ (p["w"] * 4) + p["b"]) @ p["o"], x),
    4.0,
    1.0,
  ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_beside_a_weight_scales_its_inputs(name):
  function, c, h = NUMBERS[name]
  p = {"b": draw(H), "o": draw(H, 1), "w": draw(D, H)}
  found, factors = captured(lambda p, x, y: jnp.mean((function(p, x) - y) ** 2), p, X, Y)
  assert not found.fallbacks
  inputs = np.concatenate([c * np.asarray(X), np.full((N, 1), h)], 1)
  (A,) = factors[-1].A
  close(A, inputs.T @ inputs / N)
  # of `y = [c x; h] [W; b]` the gradient is the inputs' product with the output gradients
  dy = 2 / N * (np.asarray(function(p, X)) - Y) @ p["o"].T
  factor = 0.5 if name == "of the output" else 1.0  # which comes after the product
  close(factors[-1].G[0], N * factor**2 * dy.T @ dy)


def test_a_mask_is_said_to_be_one():
  loss = lambda p, x: jnp.mean(x @ (p["w"] * jnp.tril(jnp.ones((D, H)))) @ p["o"])
  found = fop_optax.capture(loss, {"w": draw(D, H), "o": draw(H, 1)}, X)
  assert found.fallbacks["['w']"].startswith("it is masked or scaled entry by entry (`mul`)")


def q_k_v(p, x, split):
  q, k, v = split(x @ p["w"])
  return jnp.tanh(q + p["bq"]) * jnp.tanh(k + p["bk"]) + jnp.tanh(p["bv"] + v)


QKV = {
  "split": lambda y: jnp.split(y, 3, -1),
  "slices": lambda y: (y[:, :H], y[:, H : 2 * H], y[:, 2 * H :]),
  "heads": lambda y: jnp.moveaxis(y.reshape(-1, 3, H), 1, 0),
  "indices": lambda y: (lambda heads: [heads[:, i] for i in range(3)])(y.reshape(-1, 3, H)),
}


@pytest.mark.parametrize("name", slow_but(QKV, "split", "heads"))
def test_biases_of_slices_are_one_bias(name):
  p = {"bk": draw(H), "bq": draw(H, seed=1), "bv": draw(H, seed=2), "w": draw(D, 3 * H)}
  one = {"b": jnp.concatenate([p["bq"], p["bk"], p["bv"]]), "w": p["w"]}

  def plain(p, x):
    q, k, v = jnp.split(x @ p["w"] + p["b"], 3, -1)
    return jnp.mean(jnp.tanh(q) * jnp.tanh(k) + jnp.tanh(v))

  found, factors = captured(lambda p, x: jnp.mean(q_k_v(p, x, QKV[name])), p, X)
  other, expected = captured(plain, one, X)
  assert not found.fallbacks
  close(factors, expected)
  matrices = [
    each.layers[0].gather(jax.tree.leaves(tree)) for each, tree in ((found, p), (other, one))
  ]
  np.testing.assert_array_equal(*matrices)
  spread = found.layers[0].spread(matrices[0], found.layers.shapes)
  jax.tree.map(np.testing.assert_array_equal, [spread[i] for i in range(4)], jax.tree.leaves(p))


def test_a_slice_without_a_bias_leaves_the_others_out():
  loss = lambda p, x: jnp.mean(jnp.tanh((x @ p["w"])[:, :H] + p["b"]) * (x @ p["w"])[:, H:])
  split = lambda p, x: jnp.mean(jnp.tanh((y := x @ p["w"])[:, :H] + p["b"]) * y[:, H:])
  for each in (loss, split):
    found, _ = captured(each, {"b": draw(H), "w": draw(D, 2 * H)}, X)
    assert "of which others have no bias" in found.fallbacks["['b']"]


JOINED = {
  "biases joined too": lambda p: jnp.concatenate([p["bu"], p["bw"]]),
  "one bias": lambda p: p["b"],
}


@pytest.mark.parametrize("name", JOINED)
def test_biases_of_joined_weights(name):
  joined = JOINED[name]
  names = {"biases joined too": {"bu": H, "bw": H}, "one bias": {"b": 2 * H}}[name]
  p = {"u": draw(D, H), "w": draw(D, H, seed=1)} | {k: draw(n) for k, n in names.items()}

  def loss(p, x, y):
    return jnp.mean(jnp.tanh(x @ jnp.concatenate([p["u"], p["w"]], 1) + joined(p)) ** 2)

  def tapped(p, x, y, tap):
    outputs = [
      tap(name, x, p[name], b) for name, b in zip("uw", jnp.split(joined(p), 2), strict=True)
    ]
    return jnp.mean(jnp.tanh(jnp.concatenate(outputs, 1)) ** 2)

  check_explicit(loss, tapped, p)


def with_and_without(p, x, y, tap):
  h = jnp.tanh(tap("w", x, p["w"], p["b"]))
  return jnp.mean((tap("w", jnp.tanh(tap("w", h, p["w"])), p["w"], p["b"]) - y) ** 2)


def test_a_bias_that_is_not_always_added():
  plain = lambda name, x, w, b=None: x @ w if b is None else x @ w + b
  p = {"b": draw(D), "w": draw(D, D)}
  check_explicit(lambda p, x, y: with_and_without(p, x, y, plain), with_and_without, p)


def test_the_bias_of_a_tied_weight_turns_its_layer():
  p = {"b": draw(D), "w": draw(D, H)}
  loss = lambda p, x, y: jnp.mean((jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"] - y) ** 2)

  def tapped(p, x, y, tap):
    h = jnp.tanh(tap("w", x, p["w"]))
    return jnp.mean((tap("w turned", h, p["w"].T, p["b"]) - y) ** 2)

  found, ((A, G),) = captured(loss, p, X, Y)
  assert not found.fallbacks
  matrices = explicit.evaluate(tapped, p, X, Y, groups=1).matrices
  first, turned = matrices["w", 0].factors, matrices["w turned", 0].factors
  padded = np.pad(first[1], (0, 1)), first[0]
  close((A[0], G[0]), added(balanced(turned), balanced(padded)))


def test_a_bias_in_each_orientation_joins_in_one():
  p = {"b": draw(H), "c": draw(D), "w": draw(D, H)}
  loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T + p["c"] - x) ** 2)
  found, _ = captured(loss, p, X)
  assert list(found.fallbacks) == ["['c']"]
  assert "used transposed with another one" in found.fallbacks["['c']"]
