"""The networks that are timed: plain JAX, random data of the right shapes.

    mlp, cnn-pooled, cnn-flat   small ones, in float32
    resnet18                    He et al. (2016) as it is trained on 32 x 32 images, in bfloat16
    gpt2                        the 124 M decoder with tied embedding, 1,024 tokens, in bfloat16

What is in bfloat16 is computed in it; parameters, and with them gradients, are in float32.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

import fop_optax

Params = Any
MLP_SIZES = (784, 512, 512, 10)
CNN_CHANNELS, CNN_STRIDES = (3, 32, 64, 64), (1, 2, 2)


class Case(NamedTuple):
  """A loss and what it is called with.

  Attributes:
    apply: `apply(params, x)`, the logits.
    loss: `loss(params, x, y)`.
    params, x, y: its arguments.
    rows: for each layer, how many rows of its input an example has (1, pixels of the output, or
      tokens); a number if all have as many.
  """

  apply: Callable[[Params, jax.Array], jax.Array]
  loss: Callable[[Params, jax.Array, jax.Array], jax.Array]
  params: Params
  x: jax.Array
  y: jax.Array
  rows: tuple[int, ...] | int


def _dense(key: jax.Array, *shape: int) -> dict[str, jax.Array]:
  *inputs, outputs = shape
  fan_in = jnp.prod(jnp.array(inputs))
  return {"w": jax.random.normal(key, shape) * jnp.sqrt(2 / fan_in), "b": jnp.zeros(outputs)}


def _case(apply, layers, rows, shape) -> Case:
  """Cross entropy of `apply` over ten classes."""
  keys = jax.random.split(jax.random.key(0), len(layers) + 2)
  params = [_dense(key, *layer) for key, layer in zip(keys, layers, strict=False)]
  x = jax.random.normal(keys[-2], shape)
  y = jax.random.randint(keys[-1], shape[:1], 0, 10)
  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(apply(params, x), y)
  return Case(apply, loss, params, x, y, tuple(rows))


def mlp(batch: int) -> Case:
  """784-512-512-10 with ReLU."""

  def apply(params, x):
    for layer in params[:-1]:
      x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]

  layers = list(zip(MLP_SIZES[:-1], MLP_SIZES[1:], strict=True))
  return _case(apply, layers, [1] * len(layers), (batch, MLP_SIZES[0]))


def cnn(batch: int, pooled: bool) -> Case:
  """3x3 convolutions of 32, 64, 64 channels at strides 1, 2, 2; a head of 10."""

  def apply(params, x):
    for layer, stride in zip(params[:-1], CNN_STRIDES, strict=True):
      numbers = ("NHWC", "HWIO", "NHWC")
      y = lax.conv_general_dilated(x, layer["w"], (stride, stride), "SAME", None, None, numbers)
      x = jax.nn.relu(y + layer["b"])
    x = x.mean((1, 2)) if pooled else x.reshape(x.shape[0], -1)
    return x @ params[-1]["w"] + params[-1]["b"]

  layers = [(3, 3, a, b) for a, b in zip(CNN_CHANNELS[:-1], CNN_CHANNELS[1:], strict=True)]
  layers.append((64 if pooled else 8 * 8 * 64, 10))
  return _case(apply, layers, (32 * 32, 16 * 16, 8 * 8, 1), (batch, 32, 32, 3))


def resnet18(batch: int) -> Case:
  """ResNet-18 on 32 x 32 images: a 3x3 stem, four stages of two blocks, normalised by batch."""
  widths, strides = (64, 64, 64, 128, 128, 256, 256, 512, 512), (1, 1, 2, 1, 2, 1, 2, 1)
  blocks = list(zip(widths[:-1], widths[1:], strides, strict=True))
  shapes, rows, side = [(3, 3, 3, 64)], [32 * 32], 32
  for a, b, stride in blocks:
    side //= stride
    own = [(3, 3, a, b), (3, 3, b, b)] + [(1, 1, a, b)] * (a != b)
    shapes, rows = shapes + own, rows + [side * side] * len(own)
  keys = jax.random.split(jax.random.key(0), len(shapes) + 3)
  params = [
    {
      "w": jax.random.normal(key, shape) * (2 / (shape[0] * shape[1] * shape[2])) ** 0.5,
      "scale": jnp.ones(shape[-1]),
      "offset": jnp.zeros(shape[-1]),
    }
    for key, shape in zip(keys, shapes, strict=False)
  ]
  head = {"w": jax.random.normal(keys[-3], (512, 10)) / 512**0.5, "b": jnp.zeros(10)}

  def conv(p, x, stride=1):
    kernel, numbers = p["w"].astype(x.dtype), ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", None, None, numbers)
    x = x.astype(jnp.float32)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    x = (x - mean) * lax.rsqrt(var + 1e-5) * p["scale"] + p["offset"]
    return x.astype(jnp.bfloat16)

  def apply(params, x):
    stem, *rest = params["convolutions"]
    x = jax.nn.relu(conv(stem, x.astype(jnp.bfloat16)))
    for a, b, stride in blocks:
      first, second, *rest = rest
      y = conv(second, jax.nn.relu(conv(first, x, stride)))
      if a != b:
        projection, *rest = rest
        x = conv(projection, x, stride)
      x = jax.nn.relu(x + y)
    x = x.mean((1, 2)).astype(jnp.float32)
    return x @ params["head"]["w"] + params["head"]["b"]

  x = jax.random.normal(keys[-2], (batch, 32, 32, 3))
  y = jax.random.randint(keys[-1], (batch,), 0, 10)
  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(apply(params, x), y)
  return Case(apply, loss, {"convolutions": params, "head": head}, x, y, (*rows, 1))


def gpt2(batch: int, blocks: int = 12, width: int = 768, vocabulary: int = 50_257) -> Case:
  """A decoder of GPT-2's shapes: 12 blocks of width 768 on 1,024 tokens, the head tied."""
  tokens, heads = 1024, width // 64
  sizes = {"qkv": (width, 3 * width), "out": (width, width)}
  sizes |= {"up": (width, 4 * width), "down": (4 * width, width)}
  keys = iter(jax.random.split(jax.random.key(0), blocks * len(sizes) + 4))
  dense = lambda shape: {"w": 0.02 * jax.random.normal(next(keys), shape), "b": jnp.zeros(shape[1])}
  norm = lambda: {"scale": jnp.ones(width), "offset": jnp.zeros(width)}
  block = lambda: (
    {name: dense(shape) for name, shape in sizes.items()}
    | {
      "before": norm(),
      "between": norm(),
    }
  )
  params = {
    "tokens": 0.02 * jax.random.normal(next(keys), (vocabulary, width)),
    "positions": 0.01 * jax.random.normal(next(keys), (tokens, width)),
    "blocks": [block() for _ in range(blocks)],
    "last": norm(),
  }

  def normal(p, x):
    x = x.astype(jnp.float32)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return ((x - mean) * lax.rsqrt(var + 1e-5) * p["scale"] + p["offset"]).astype(jnp.bfloat16)

  def linear(p, x):
    return x @ p["w"].astype(x.dtype) + p["b"].astype(x.dtype)

  def transform(x, p):
    q, k, v = jnp.split(linear(p["qkv"], normal(p["before"], x)), 3, axis=-1)
    split = lambda a: a.reshape(*a.shape[:-1], heads, -1)
    mixed = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True)
    x = x + linear(p["out"], mixed.reshape(x.shape))
    return x + linear(p["down"], jax.nn.gelu(linear(p["up"], normal(p["between"], x))))

  def apply(params, x):
    h = (params["tokens"][x] + params["positions"]).astype(jnp.bfloat16)
    h = normal(params["last"], functools.reduce(transform, params["blocks"], h))
    return (h @ params["tokens"].T.astype(h.dtype)).astype(jnp.float32)

  x, y = (jax.random.randint(next(keys), (batch, tokens), 0, vocabulary) for _ in range(2))
  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(apply(params, x), y)
  return Case(apply, loss, params, x, y, tokens)


BUILDERS: dict[str, Callable[[int], Case]] = {
  "mlp": mlp,
  "cnn-pooled": functools.partial(cnn, pooled=True),
  "cnn-flat": functools.partial(cnn, pooled=False),
  "resnet18": resnet18,
  "gpt2": gpt2,
}


def build(name: str) -> Case:
  """The case called `<network>-<batch size>`."""
  network, _, batch = name.rpartition("-")
  if network not in BUILDERS or not batch.isdigit():
    known = ", ".join(f"{builder}-BATCH" for builder in BUILDERS)
    raise SystemExit(f"unknown case {name!r}: one of {known}, as in mlp-512")
  return BUILDERS[network](int(batch))
