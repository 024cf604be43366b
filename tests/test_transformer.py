"""Fifty steps of a character transformer of 0.2 M parameters with every method."""

import pathlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fop_optax

WIDTH, BLOCKS, HEADS, TOKENS, BATCH, STEPS = 64, 4, 4, 32, 32, 50
TEXT = pathlib.Path(__file__).parent.parent / "README.md"

METHODS = {
  "kfac": lambda layers: fop_optax.kfac(0.1, layers),
  "ekfac": lambda layers: fop_optax.kfac(0.1, layers, scaling="eigenvalue"),
  "fop": lambda layers: fop_optax.fop(0.1, layers),
  "soap": lambda layers: fop_optax.soap(0.01),
  "soap of layers": lambda layers: fop_optax.soap(0.01, layers=layers, contrast=True),
  "kl-soap": lambda layers: fop_optax.soap(0.01, kl=True, start="identity"),
  "soap in the Fisher basis": lambda layers: fop_optax.soap(0.01, layers=layers, fisher=True),
  "shampoo": lambda layers: fop_optax.shampoo(0.01),
  "shampoo of contrasts": lambda layers: fop_optax.shampoo(0.01, layers=layers, contrast=True),
  "neumann": lambda layers: fop_optax.neumann(0.1, steps_per_epoch=10),
  "kfac then polar": lambda layers: optax.chain(
    fop_optax.scale_by_kfac(layers),
    fop_optax.orthogonalize(layers=layers),
    optax.scale_by_learning_rate(0.03),
  ),
}


def windows():
  """Characters of the README, `[steps, batch, tokens + 1]`, and how many there are."""
  text = np.frombuffer(TEXT.read_bytes(), np.uint8)
  characters, ids = np.unique(text, return_inverse=True)
  starts = np.random.default_rng(0).integers(0, len(ids) - TOKENS - 1, (STEPS, BATCH, 1))
  return ids[starts + np.arange(TOKENS + 1)].astype(np.int32), len(characters)


def initial(vocabulary):
  keys = iter(jax.random.split(jax.random.key(0), 6))
  stack = lambda a, b: jax.random.normal(next(keys), (BLOCKS, a, b)) * a**-0.5
  return {
    "table": 0.1 * jax.random.normal(next(keys), (vocabulary, WIDTH)),
    "positions": 0.02 * jax.random.normal(next(keys), (TOKENS, WIDTH)),
    "blocks": {
      "qkv": stack(WIDTH, 3 * WIDTH),
      "out": stack(WIDTH, WIDTH) / 3,
      "up": stack(WIDTH, 4 * WIDTH),
      "bias": jnp.zeros((BLOCKS, 4 * WIDTH)),
      "down": stack(4 * WIDTH, WIDTH) / 3,
    },
  }


def normal(h):
  return (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def block(h, p):
  q, k, v = jnp.split(normal(h) @ p["qkv"], 3, axis=-1)
  heads = lambda a: a.reshape(*a.shape[:-1], HEADS, -1)
  mixed = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
  h = h + mixed.reshape(h.shape) @ p["out"]
  return h + jax.nn.gelu(normal(h) @ p["up"] + p["bias"]) @ p["down"], None


def loss_fn(params, x, y):
  h, _ = lax.scan(block, params["table"][x] + params["positions"], params["blocks"])
  return fop_optax.softmax_cross_entropy(normal(h) @ params["table"].T, y)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method):
  text, vocabulary = windows()
  params = initial(vocabulary)
  assert 190_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 220_000
  first = text[0]
  captured = fop_optax.capture(loss_fn, params, first[:, :-1], first[:, 1:], groups=2)
  tx = optax.with_extra_args_support(METHODS[method](captured.layers))
  state = tx.init(params)
  has_curvature = "kfac" in method or method == "fop"

  def step(carry, window):
    params, state = carry
    refresh = fop_optax.refresh_due(state) if has_curvature else True
    basis = fop_optax.bases(state) if method == "ekfac" else None
    loss, grads, stats = captured.value_and_grad(
      params, window[:, :-1], window[:, 1:], refresh=refresh, basis=basis
    )
    updates, state = tx.update(grads, state, params, stats=stats)
    return (optax.apply_updates(params, updates), state), loss

  run = jax.jit(lambda carry: lax.scan(step, carry, jnp.asarray(text)))
  carry, losses = run((params, state))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(carry))
  assert losses[-5:].mean() < losses[0] - 1
