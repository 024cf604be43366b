"""EKFAC's second moments out of the backward pass, against the gradient of every example by itself.

The reference takes `V_n` from `jax.vmap(jax.grad(loss))` over batches of one, turns it and squares
it in NumPy. Bases are any orthogonal matrices: nothing depends on their being eigenvectors.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import slow_but

import fop_optax
from fop_optax import moments
from fop_optax.layers import Basis

pytestmark = pytest.mark.usefixtures("x64")
N, T, C = 8, 5, 3  # examples, tokens, classes


class Case(NamedTuple):
  """A loss, and its layers' gradients `[examples, stack, rows, outputs]` out of those of params."""

  loss: Callable[..., Any]
  params: dict[str, Any]
  x: jax.Array
  y: jax.Array
  matrices: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
  terms: int = 1
  # the loss with a parameter of its own for each use of a weight, what is summed use by use
  apart: Callable[..., Any] | None = None
  copies: Callable[[dict[str, Any]], dict[str, Any]] | None = None
  logits: Callable[..., Any] | None = None


def draw(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1))


def labels(*shape):
  return jnp.asarray(np.random.default_rng(1).integers(C, size=shape))


def with_bias(w, b):
  return np.concatenate([w, b[..., None, :]], axis=-2)


def one(w):
  """A layer of one matrix."""
  return w[:, None]


def loss_of(logits):
  return lambda p, x, y: fop_optax.softmax_cross_entropy(logits(p, x), y)


def dense():
  params = {"w": draw(4, 6), "b": draw(6), "head": draw(6, C)}

  logits = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["head"]
  matrices = lambda g: {"['w']": one(with_bias(g["w"], g["b"])), "['head']": one(g["head"])}
  return Case(loss_of(logits), params, draw(N, 4), labels(N), matrices, logits=logits)


def attention():
  """Tokens that mix, q, k and v out of one weight; a term of the loss for each token."""
  params = {"qkv": draw(4, 12), "b": draw(12), "head": draw(4, C)}

  def logits(p, x):
    q, k, v = jnp.split(x @ p["qkv"] + p["b"], 3, axis=-1)
    return jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ p["head"]

  matrices = lambda g: {
    "['qkv']": one(with_bias(g["qkv"], g["b"])),
    "['head']": one(g["head"]),
  }
  x, y = draw(N, T, 4), labels(N, T)
  return Case(loss_of(logits), params, x, y, matrices, terms=T, logits=logits)


def tokens_first():
  """Examples along the second axis, and an axis that is tokens times examples."""
  params = {"w": draw(4, 6), "head": draw(6, C)}

  def loss(p, x, y):
    h = jnp.tanh(jnp.einsum("ntd,de->tne", x, p["w"]))
    z = h.reshape(-1, 6) @ p["head"]
    return fop_optax.softmax_cross_entropy(z.reshape(T, -1, C).mean(0), y)

  matrices = lambda g: {f"['{name}']": one(g[name]) for name in ("w", "head")}
  return Case(loss, params, draw(N, T, 4), labels(N), matrices)


def convolution():
  """Strides, padding, two feature groups; many places and few channels."""
  params = {"w": draw(3, 2, 2, 6), "b": draw(6), "head": draw(6, C)}
  numbers = ("NHWC", "HWIO", "NHWC")

  def loss(p, x, y):
    h = jax.lax.conv_general_dilated(
      x, p["w"], (1, 2), "SAME", None, None, numbers, feature_group_count=2
    )
    return fop_optax.softmax_cross_entropy(jnp.tanh(h + p["b"]).mean((1, 2)) @ p["head"], y)

  def matrices(g):
    kernels = g["w"].reshape(-1, 12, 2, 3).swapaxes(1, 2)  # [N, groups, inputs, outputs]
    return {"['w']": with_bias(kernels, g["b"].reshape(-1, 2, 3)), "['head']": one(g["head"])}

  return Case(loss, params, draw(N, 7, 6, 4), labels(N), matrices)


def embedding():
  """Tokens that come twice in an example; indices out of range, which are dropped."""
  params = {"table": draw(7, 4), "shift": draw(4), "head": draw(4, C)}
  x = jnp.asarray(np.random.default_rng(2).integers(9, size=(N, T)))

  def logits(p, x):
    h = p["table"].at[x].get(mode="fill", fill_value=0) + p["shift"]
    return jnp.tanh(h).mean(1) @ p["head"]

  matrices = lambda g: {
    "['table']": one(with_bias(g["table"], g["shift"])),
    "['head']": one(g["head"]),
  }
  return Case(loss_of(logits), params, x, labels(N), matrices, logits=logits)


def scanned():
  """Blocks that a scan goes over, rematerialised, each of which squeezes through a bottleneck."""
  params = {"up": draw(2, 4, 5), "b": draw(2, 5), "down": draw(2, 5, 4), "head": draw(4, C)}

  def block(x, w):
    up, b, down = w
    return x + jnp.tanh(x @ up + b) @ down, None

  def loss(p, x, y):
    x, _ = jax.lax.scan(jax.checkpoint(block), x, (p["up"], p["b"], p["down"]))
    return fop_optax.softmax_cross_entropy(x.mean(1) @ p["head"], y)

  matrices = lambda g: {
    "['up']": with_bias(g["up"], g["b"]),
    "['down']": g["down"],
    "['head']": one(g["head"]),
  }
  return Case(loss, params, draw(N, T, 4), labels(N), matrices)


def repeated_entries():
  """A weight whose rows and columns the product meets several times, scaled and shifted."""
  params = {"w": draw(4, 3), "head": draw(6, C)}

  def loss(p, x, y):
    w = 2 * jnp.tile(p["w"], (2, 2))[:5]
    return fop_optax.softmax_cross_entropy(jnp.tanh(x @ w).mean(1) @ p["head"], y)

  matrices = lambda g: {"['w']": one(g["w"]), "['head']": one(g["head"])}
  return Case(loss, params, draw(N, T, 5), labels(N), matrices)


def used_twice():
  """Each use is squared by itself, as if the weights were two."""
  params = {"w": draw(4, 4), "b": draw(4), "head": draw(4, C)}

  def apart(p, x, y):
    h = jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["again"])
    return fop_optax.softmax_cross_entropy(h.mean(1) @ p["head"], y)

  def matrices(g):
    first = one(with_bias(g["w"], g["b"]))
    if "again" not in g:
      return {"['w']": first, "['head']": one(g["head"])}
    second = one(with_bias(g["again"], 0 * g["b"]))
    return {"['w']": np.stack([first, second]), "['head']": one(g["head"])}

  loss = lambda p, x, y: apart(p | {"again": p["w"]}, x, y)
  copies = lambda p: p | {"again": p["w"]}
  return Case(loss, params, draw(N, T, 4), labels(N), matrices, 1, apart, copies)


def recurrent():
  """A weight that is constant over a scan: each step is squared by itself."""
  params = {"w": draw(3, 4), "u": draw(4, 4), "b": draw(4), "head": draw(4, C)}

  def loss(p, x, y):
    step = lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), None)
    h, _ = jax.lax.scan(step, jnp.tile(0 * x[:, 0, :1] + 0.1, 4), x.swapaxes(0, 1))
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  def apart(p, x, y):
    h = jnp.full((len(x), 4), 0.1) + jnp.tile(0 * x[:, 0, :1], 4)
    for t in range(T):
      h = jnp.tanh(x[:, t] @ p["w"][t] + h @ p["u"][t] + p["b"][t])
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  def copies(p):
    return {"head": p["head"]} | {name: jnp.stack([p[name]] * T) for name in ("w", "u", "b")}

  def matrices(g):
    by_step = lambda name: g[name].swapaxes(0, 1)
    return {
      "['w']": by_step("w")[:, :, None],
      "['u']": with_bias(by_step("u"), by_step("b"))[:, :, None],
      "['head']": one(g["head"]),
    }

  return Case(loss, params, draw(N, T, 3), labels(N), matrices, 1, apart, copies)


EXACT = (dense, attention, tokens_first, convolution, embedding, scanned, repeated_entries)
BY_USE = (used_twice, recurrent)
NAMES = lambda make: make.__name__


def bases_of(layers):
  """An orthogonal matrix for each side, None for those that are diagonal."""
  rng = np.random.default_rng(3)

  def turn(stack, d, diagonal):
    return None if diagonal else jnp.asarray(np.linalg.qr(rng.normal(size=(stack, d, d)))[0])

  return tuple(
    Basis(
      turn(layer.stack, layer.rows, layer.diagonal[0]),
      turn(layer.stack, layer.outputs, layer.diagonal[1]),
      jnp.full(layer.stack, index),
    )
    for index, layer in enumerate(layers)
  )


def turned(V, basis):
  """`U_A' V U_G` of each example and block."""
  for U, axes in ((basis.A, "...sij,sik->...skj"), (basis.G, "...sij,sjk->...sik")):
    V = V if U is None else np.einsum(axes, V, U)
  return V


def explicit(case, layers, bases, x=None, y=None):
  """`R mean_n (U_A' V_n U_G)^2` of each layer, added up over uses."""
  loss, params = case.loss, case.params
  if case.apart is not None:
    loss, params = case.apart, case.copies(params)
  own = lambda p, x, y: loss(p, x[None], y[None])
  x, y = (case.x, case.y) if x is None else (x, y)
  grads = jax.vmap(jax.grad(own), (None, 0, 0))(params, x, y)
  by_path = case.matrices({name: np.asarray(g, np.float64) for name, g in grads.items()})
  out = []
  for layer, basis in zip(layers, bases, strict=True):
    squares = turned(by_path[layer.path], basis) ** 2
    squares = squares.sum(0) if squares.ndim == 5 else squares
    out.append(case.terms * squares.mean(0))
  return out


def assert_close(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def measured(case, **options):
  """Second moments out of one compiled step, and the layers and bases they are of."""
  captured = fop_optax.capture(case.loss, case.params, case.x, case.y, **options)
  bases = bases_of(captured.layers)
  step = jax.jit(functools.partial(captured.value_and_grad, basis=bases))
  return step(case.params, case.x, case.y)[2].second_moments, captured.layers, bases


@pytest.mark.parametrize(
  "options", slow_but([{}, {"groups": 2}, {"micro_batches": 2}, {"groups": 8}], "{}")
)
@pytest.mark.parametrize("make", EXACT + BY_USE, ids=NAMES)
def test_explicit_gradients(make, options):
  case = make()
  got, *of = measured(case, **options)
  assert_close(got, explicit(case, *of))


@pytest.mark.slow
def test_shares_and_switches():
  """Of every second example; none with a `refresh` that is off; free of the loss's scale."""
  case = attention()
  args = case.params, case.x, case.y
  captured = fop_optax.capture(case.loss, *args, curvature_fraction=0.5)
  bases = bases_of(captured.layers)
  step = jax.jit(functools.partial(captured.value_and_grad, basis=bases))
  want = explicit(case, captured.layers, bases, case.x[::2], case.y[::2])
  assert_close(step(*args, refresh=True, loss_scale=8.0)[2].second_moments, want)
  static = jax.jit(functools.partial(captured.value_and_grad, basis=bases, refresh=False))
  for off in (step(*args, refresh=False), static(*args)):
    assert [S.shape for S in off[2].second_moments] == [S.shape for S in want]
    assert not any(map(np.any, off[2].second_moments))
  assert captured.value_and_grad(*args)[2].second_moments == ()


def test_long_sides_have_no_basis():
  case = convolution()
  got, layers, bases = measured(case, max_dim=5)
  assert [layer.diagonal for layer in layers] == [(True, False), (True, False)]
  assert_close(got, explicit(case, layers, bases))


@pytest.mark.parametrize("make", [convolution, embedding], ids=NAMES)
def test_chunks_of_examples(make, monkeypatch):
  monkeypatch.setitem(moments.CHUNK_BYTES, "cpu", 1)  # one example at a time
  got, *of = measured(make())
  assert_close(got, explicit(make(), *of))


def test_reduced_rows():
  """Inputs and gradients of an example are added up each by themselves, steps with them."""
  case = recurrent()
  got, layers, bases = measured(case, sharing="reduce")

  def outputs(eps, x, y):
    h, total = jnp.full(4, 0.1), 0
    for t in range(T):
      total += jnp.append(h, 1)
      z = x[t] @ case.params["w"] + h @ case.params["u"] + case.params["b"]
      h = jnp.tanh(z + eps)
    return fop_optax.softmax_cross_entropy(h[None] @ case.params["head"], y[None]), total / T

  g, a = jax.vmap(jax.grad(outputs, has_aux=True), (None, 0, 0))(jnp.zeros(4), case.x, case.y)
  (index,) = (i for i, layer in enumerate(layers) if layer.path == "['u']")
  V = np.einsum("ni,no->nio", a, g)[:, None]
  assert_close([got[index]], [np.mean(turned(V, bases[index]) ** 2, axis=0)])


@pytest.mark.parametrize("make", slow_but([dense, attention, embedding], "attention", name=NAMES))
def test_exact_fisher(make):
  """`sum_c p_c V_c^2` over the labels of each term, those of an example apart."""
  case = make()
  got, layers, bases = measured(case, fisher="exact")
  want = [0.0] * len(bases)
  for label in range(C):
    for term in range(case.terms):

      def own(p, x, label=label, term=term):
        z = case.logits(p, x[None]).reshape(-1, C)[term]
        p_label = jax.lax.stop_gradient(jax.nn.softmax(z))[label]
        return -jnp.sqrt(p_label) * jax.nn.log_softmax(z)[label]

      grads = jax.vmap(jax.grad(own), (None, 0))(case.params, case.x)
      V = case.matrices({name: np.asarray(g) for name, g in grads.items()})
      for i, (layer, basis) in enumerate(zip(layers, bases, strict=True)):
        want[i] += np.mean(turned(V[layer.path], basis) ** 2, axis=0) / case.terms
  assert_close(got, want)


@pytest.mark.slow
def test_sampled_is_exact_in_the_mean():
  case = attention()
  exact, sampled = (
    fop_optax.capture(case.loss, case.params, case.x, case.y, fisher=fisher)
    for fisher in ("exact", "sampled")
  )
  bases = bases_of(exact.layers)
  args = case.params, case.x, case.y
  want = exact.value_and_grad(*args, basis=bases)[2].second_moments
  draw = lambda key: sampled.value_and_grad(*args, key=key, basis=bases)[2].second_moments
  drawn = jax.lax.map(draw, jax.random.split(jax.random.key(3), 2000))
  for mean, S in zip(drawn, want, strict=True):
    error = jnp.std(mean, axis=0) / 2000**0.5
    assert jnp.all(jnp.abs(mean.mean(0) - S) < 4.5 * error + 1e-12)


@pytest.mark.slow
def test_layers_that_are_not_measured():
  """Tied weights, tables and a scan over examples: the diagonal of `A (x) G`, and it is said."""
  params = {"table": draw(5, 4), "positions": draw(T, 4), "one": draw(4, 4), "w": draw(4, 4)}
  x, y = labels(N, T), labels(N, T)

  def loss(p, x, y):
    h = jnp.tanh((p["table"][x] + p["positions"]) @ p["w"])
    h = jax.lax.map(lambda h: jnp.tanh(h @ p["one"]), h)
    return fop_optax.softmax_cross_entropy(h @ p["table"].T, y)

  captured = fop_optax.capture(loss, params, x, y)
  assert str(captured).splitlines()[-1] == (
    "EKFAC is K-FAC for ['one'], ['positions'], ['table'], whose rows are not told apart by"
    " example."
  )
  bases = bases_of(captured.layers)
  stats = captured.value_and_grad(params, x, y, basis=bases)[2]
  for layer, (A, G), S, basis in zip(
    captured.layers, stats.factors, stats.second_moments, bases, strict=True
  ):
    sides = []
    for factor, U in ((A, basis.A), (G, basis.G)):
      full = np.diag(factor[0]) if factor.ndim == 2 else np.asarray(factor[0])
      sides.append(np.diag(full if U is None else U[0].T @ full @ U[0]))
    assert np.allclose(S[0], np.outer(*sides), rtol=1e-10) == (layer.path != "['w']")


def test_fixed_rows():
  """Each is of its own: M rows of a term of the loss, their mean in place of one over examples."""
  case, M = dense(), 5
  points = draw(M, 4, seed=1)
  penalty = lambda p: jnp.mean(jnp.sum((points @ p["w"] + p["b"]) ** 2, axis=1))
  loss = lambda p, x, y: case.loss(p, x, y) + penalty(p)
  got, layers, bases = measured(case._replace(loss=loss))
  want = explicit(case, layers, bases)
  rows = np.concatenate([points, np.ones((M, 1))], axis=1)
  dy = 2 * (points @ case.params["w"] + case.params["b"])
  (index,) = (i for i, layer in enumerate(layers) if layer.path == "['w']")
  V = np.einsum("mi,mo->mio", rows, dy)[:, None]
  want[index] += np.mean(turned(V, bases[index]) ** 2, axis=0)
  assert_close(got, want)


SHARDED = [(scanned, "shard_map")]
SHARDED_SLOW = [
  (attention, "explicit"),
  (attention, "auto"),
  (scanned, "auto"),
  (scanned, "explicit"),
  (attention, "shard_map"),
  (embedding, "auto"),
  (embedding, "shard_map"),
  (dense, "explicit"),
]


@pytest.mark.parametrize(
  ("make", "kind"),
  [*SHARDED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SHARDED_SLOW)],
)
def test_sharded_batch(make, kind):
  case = make()
  captured = fop_optax.capture(case.loss, case.params, case.x, case.y)
  bases = bases_of(captured.layers)
  moments_of = lambda params, x, y, refresh: (
    captured.value_and_grad(params, x, y, basis=bases, refresh=refresh)[2].second_moments
  )
  want = moments_of(case.params, case.x, case.y, True)
  axis = jax.sharding.AxisType.Explicit if kind == "explicit" else jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((4,), ("data",), (axis,))
  data = jax.NamedSharding(mesh, jax.P("data"))
  for refresh in (True, jnp.asarray(True)):
    function = functools.partial(moments_of, refresh=refresh)
    if kind == "shard_map":
      local = lambda *args, own=function: jax.lax.pmean(own(*args), "data")
      function = jax.shard_map(
        local, mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P()
      )
    with jax.set_mesh(mesh):
      params = jax.device_put(case.params, jax.NamedSharding(mesh, jax.P()))
      got = jax.jit(function)(params, *jax.device_put((case.x, case.y), data))
    assert_close(got, want)
