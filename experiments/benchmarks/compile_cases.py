"""Small networks of different makes, whose steps are compiled: plain JAX, random data.

vit-3                          three blocks of width 64 on 16 patches of 28 x 28 images
autoencoder                    three convolutions down to 4 x 4 and three transposed ones back
gru                            one scan over 32 tokens, width 64
scanned-12, unrolled-12        a decoder of 12 blocks, as a scan over them and written out
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from experiments.benchmarks.cases import Case
import fop_optax

WIDTH, HEADS, VOCABULARY, TOKENS, BATCH = 128, 4, 256, 64, 16
_SIZES = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}  # times the width


def _dense(key: jax.Array, *shape: int) -> dict[str, jax.Array]:
  fan_in = jnp.prod(jnp.array(shape[:-1]))
  return {"w": jax.random.normal(key, shape) / jnp.sqrt(fan_in), "b": jnp.zeros(shape[-1])}


def _linear(p, h):
  return h @ p["w"] + p["b"]


def _norm(h, p=None):
  h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
  return h if p is None else h * p["scale"] + p["offset"]


def _block(h: jax.Array, p: dict[str, dict[str, jax.Array]], causal: bool = True) -> jax.Array:
  """Attention and a dense part, each behind a normalisation."""
  q, k, v = jnp.split(_linear(p["qkv"], _norm(h, p.get("before"))), 3, axis=-1)
  heads = lambda a: a.reshape(*a.shape[:-1], HEADS, -1)
  mixed = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), is_causal=causal)
  h = h + _linear(p["out"], mixed.reshape(h.shape))
  return h + _linear(p["down"], jax.nn.gelu(_linear(p["up"], _norm(h, p.get("between")))))


def _weights(key: jax.Array, width: int) -> dict[str, dict[str, jax.Array]]:
  keys = jax.random.split(key, len(_SIZES))
  return {
    name: _dense(own, rows * width, columns * width)
    for own, (name, (rows, columns)) in zip(keys, _SIZES.items(), strict=True)
  }


def _cross_entropy(apply) -> Callable[..., jax.Array]:
  return lambda params, x, y: fop_optax.softmax_cross_entropy(apply(params, x), y)


def transformer(blocks: int, scan: bool) -> Case:
  """`blocks` blocks of width 128 on 16 x 64 tokens."""

  def apply(params, x):
    h = params["embedding"][x]
    if scan:
      h, _ = jax.lax.scan(lambda h, p: (_block(h, p), None), h, params["blocks"])
    else:
      h = functools.reduce(_block, params["blocks"], h)
    return h @ params["head"]

  keys = jax.random.split(jax.random.key(0), blocks + 4)
  weights = functools.partial(_weights, width=WIDTH)
  params = {
    "embedding": jax.random.normal(keys[-4], (VOCABULARY, WIDTH)),
    "blocks": jax.vmap(weights)(keys[:blocks]) if scan else list(map(weights, keys[:blocks])),
    "head": jax.random.normal(keys[-3], (WIDTH, VOCABULARY)) / WIDTH**0.5,
  }
  x, y = (jax.random.randint(key, (BATCH, TOKENS), 0, VOCABULARY) for key in keys[-2:])
  return Case(apply, _cross_entropy(apply), params, x, y, ())


def vit(blocks: int = 3, width: int = 64) -> Case:
  """Patches of 7 x 7, positions, blocks with learned normalisation, a mean over tokens, a head."""

  def apply(params, x):
    x = x.reshape(-1, 4, 7, 4, 7).swapaxes(2, 3).reshape(-1, 16, 49)
    h = _linear(params["patch"], x) + params["positions"]
    h = functools.reduce(functools.partial(_block, causal=False), params["blocks"], h)
    return _linear(params["head"], _norm(h, params["last"]).mean(1))

  keys = jax.random.split(jax.random.key(0), blocks + 4)
  norm = lambda: {"scale": jnp.ones(width), "offset": jnp.zeros(width)}
  params = {
    "patch": _dense(keys[-4], 49, width),
    "positions": 0.02 * jax.random.normal(keys[-3], (16, width)),
    "blocks": [
      _weights(key, width) | {"before": norm(), "between": norm()} for key in keys[:blocks]
    ],
    "last": norm(),
    "head": _dense(keys[-3], width, 10),
  }
  x = jax.random.normal(keys[-2], (BATCH, 28, 28))
  return Case(apply, _cross_entropy(apply), params, x, jnp.arange(BATCH) % 10, ())


def autoencoder() -> Case:
  """Strides of two to 32 channels on 4 x 4, a code of 16, and back: squared error of the image."""
  channels, numbers = (1, 8, 16, 32), ("NHWC", "HWIO", "NHWC")

  def apply(params, x):
    h = x
    for p in params["down"]:
      h = jax.lax.conv_general_dilated(h, p["w"], (2, 2), "SAME", dimension_numbers=numbers)
      h = jax.nn.relu(h + p["b"])
    code = _linear(params["code"], h.reshape(len(h), -1))
    h = jax.nn.relu(_linear(params["back"], code)).reshape(h.shape)
    for number, p in enumerate(params["up"]):
      h = jax.lax.conv_transpose(h, p["w"], (2, 2), "SAME", dimension_numbers=numbers) + p["b"]
      h = h if number == 2 else jax.nn.relu(h)
    return h

  keys = iter(jax.random.split(jax.random.key(0), 9))
  pairs = list(zip(channels[:-1], channels[1:], strict=True))
  params = {
    "down": [_dense(next(keys), 3, 3, a, b) for a, b in pairs],
    "code": _dense(next(keys), 4 * 4 * 32, 16),
    "back": _dense(next(keys), 16, 4 * 4 * 32),
    "up": [_dense(next(keys), 3, 3, b, a) for a, b in pairs[::-1]],
  }
  x = jax.random.normal(next(keys), (BATCH, 32, 32, 1))
  loss = lambda params, x, y: fop_optax.squared_error(apply(params, x), y)
  return Case(apply, loss, params, x, x, ())


def gru(width: int = 64) -> Case:
  """A gated recurrent unit over 32 tokens (Cho et al., 2014), a head at each."""

  def apply(params, x):
    def cell(h, e):
      a, b = _linear(params["inputs"], e), _linear(params["hidden"], h)
      (r, z, n), (hr, hz, hn) = jnp.split(a, 3, axis=-1), jnp.split(b, 3, axis=-1)
      r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
      h = (1 - z) * jnp.tanh(n + r * hn) + z * h
      return h, h

    e = params["embedding"][x].swapaxes(0, 1)
    _, h = jax.lax.scan(cell, jnp.zeros((len(x), width)), e)
    return _linear(params["head"], h.swapaxes(0, 1))

  keys = jax.random.split(jax.random.key(0), 6)
  params = {
    "embedding": jax.random.normal(keys[0], (64, width)),
    "inputs": _dense(keys[1], width, 3 * width),
    "hidden": _dense(keys[2], width, 3 * width),
    "head": _dense(keys[3], width, 64),
  }
  x, y = (jax.random.randint(key, (BATCH, 32), 0, 64) for key in keys[4:])
  return Case(apply, _cross_entropy(apply), params, x, y, ())


NETWORKS = ("vit-3", "autoencoder", "gru", "scanned-12", "unrolled-12")
_BLOCKS: dict[str, Callable[[int], Case]] = {
  "vit": vit,
  "scanned": functools.partial(transformer, scan=True),
  "unrolled": functools.partial(transformer, scan=False),
}


def build(name: str) -> Case:
  """The network of this name, of as many blocks as it says."""
  network, _, blocks = name.rpartition("-")
  if network in _BLOCKS and blocks.isdigit():
    return _BLOCKS[network](int(blocks))
  whole: dict[str, Callable[[], Case]] = {"autoencoder": autoencoder, "gru": gru}
  if name not in whole:
    raise SystemExit(f"unknown network {name!r}: one of {', '.join(NETWORKS)}")
  return whole[name]()
