"""EKFAC's second moments out of the backward pass, against the gradient of every example by itself.

The reference takes `V_n` from `jax.vmap(jax.grad(loss))` over batches of one, turns it and squares
it in NumPy. Bases are any orthogonal matrices: nothing depends on their being eigenvectors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import slow_but

import fop_optax
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


def dense():
  params = {"w": draw(4, 6), "b": draw(6), "head": draw(6, C)}

  def loss(p, x, y):
    return fop_optax.softmax_cross_entropy(jnp.tanh(x @ p["w"] + p["b"]) @ p["head"], y)

  matrices = lambda g: {"['w']": one(with_bias(g["w"], g["b"])), "['head']": one(g["head"])}
  return Case(loss, params, draw(N, 4), labels(N), matrices)


def attention():
  """Tokens that mix, q, k and v out of one weight; a term of the loss for each token."""
  params = {"qkv": draw(4, 12), "b": draw(12), "head": draw(4, C)}

  def loss(p, x, y):
    q, k, v = jnp.split(x @ p["qkv"] + p["b"], 3, axis=-1)
    h = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    return fop_optax.softmax_cross_entropy(h @ p["head"], y)

  matrices = lambda g: {
    "['qkv']": one(with_bias(g["qkv"], g["b"])),
    "['head']": one(g["head"]),
  }
  return Case(loss, params, draw(N, T, 4), labels(N, T), matrices, terms=T)


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

  def loss(p, x, y):
    h = p["table"].at[x].get(mode="fill", fill_value=0) + p["shift"]
    return fop_optax.softmax_cross_entropy(jnp.tanh(h).mean(1) @ p["head"], y)

  matrices = lambda g: {
    "['table']": one(with_bias(g["table"], g["shift"])),
    "['head']": one(g["head"]),
  }
  return Case(loss, params, x, labels(N), matrices)


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


@pytest.mark.parametrize(
  "options", slow_but([{}, {"groups": 2}, {"micro_batches": 2}, {"groups": 8}], "{}")
)
@pytest.mark.parametrize("make", EXACT + BY_USE, ids=NAMES)
def test_explicit_gradients(make, options):
  case = make()
  captured = fop_optax.capture(case.loss, case.params, case.x, case.y, **options)
  bases = bases_of(captured.layers)
  step = jax.jit(captured.value_and_grad)
  got = step(case.params, case.x, case.y, basis=bases)[2].second_moments
  assert_close(got, explicit(case, captured.layers, bases))
