"""The networks that are timed: plain JAX, random data of the right shapes."""

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
    rows: for each layer, how many rows of its input an example has (1, or pixels of the output).
  """

  apply: Callable[[Params, jax.Array], jax.Array]
  loss: Callable[[Params, jax.Array, jax.Array], jax.Array]
  params: Params
  x: jax.Array
  y: jax.Array
  rows: tuple[int, ...]


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


BUILDERS: dict[str, Callable[[int], Case]] = {
  "mlp": mlp,
  "cnn-pooled": functools.partial(cnn, pooled=True),
  "cnn-flat": functools.partial(cnn, pooled=False),
}


def build(name: str) -> Case:
  """The case called `<network>-<batch size>`."""
  network, _, batch = name.rpartition("-")
  if network not in BUILDERS or not batch.isdigit():
    known = ", ".join(f"{builder}-BATCH" for builder in BUILDERS)
    raise SystemExit(f"unknown case {name!r}: one of {known}, as in mlp-512")
  return BUILDERS[network](int(batch))
