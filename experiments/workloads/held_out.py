"""Workloads that no rate was chosen by: networks and losses of kinds that the others lack.

On the embedded digits or made-up data: they need no folder of data sets.
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments.workloads.base import Examples, Workload, split
import fop_optax

Layer = dict[str, jax.Array]


def pixels() -> Examples:
  """All 1797 digits: pixels `[n, 64]` from 0 to 1, and classes."""
  images = data.load("digits")
  x = np.concatenate([images.train_images, images.test_images]).reshape(-1, 64) / 16
  return x.astype(np.float32), np.concatenate([images.train_labels, images.test_labels])


def digits(*more: Callable[[np.random.Generator, int], np.ndarray]) -> tuple[Examples, Examples]:
  """`pixels()` and what `more` draws for each; 397 for validation."""
  x, y = pixels()
  rng = np.random.default_rng(0)
  return split((x, y, *(draw(rng, len(y)).astype(np.float32) for draw in more)), 397)


def _without_classes(examples: Examples) -> Examples:
  return examples[:1] + examples[2:]


def _keys(seed: int):
  return iter(jax.random.split(jax.random.key(seed), 16))


def _normal(key: jax.Array, *shape: int) -> jax.Array:
  """Of variance one over the inputs: all axes but the last."""
  return jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5


def _dense(key: jax.Array, *shape: int) -> Layer:
  return {"w": _normal(key, *shape), "b": jnp.zeros(shape[-1])}


def _apply(layer: Layer, x: jax.Array) -> jax.Array:
  return x @ layer["w"] + layer["b"]


def init_mlp(*sizes: int) -> Callable[[int], list[Layer]]:
  """`init(seed)` of dense layers of these sizes."""
  pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
  return lambda seed: [_dense(key, *pair) for key, pair in zip(_keys(seed), pairs, strict=False)]


def mlp(layers: Sequence[Layer], x: jax.Array, activation=jax.nn.relu) -> jax.Array:
  for layer in layers[:-1]:
    x = activation(_apply(layer, x))
  return _apply(layers[-1], x)


def physics_informed():
  """2-48-48-48-1 with tanh that solves Poisson's equation: second derivatives in the loss.

  With u = sin(pi x) sin(pi y) on the square from -1 to 1, zero at its edges.
  """
  rng = np.random.default_rng(0)
  inside = rng.uniform(-1, 1, (2000, 2)).astype(np.float32)
  edge, side = inside.copy(), rng.integers(4, size=2000)
  edge[np.arange(2000), side // 2] = np.where(side % 2, 1, -1)

  def laplacian(params, point):
    return jnp.trace(jax.hessian(lambda at: mlp(params, at, jnp.tanh)[0])(point))

  def loss(params, inside, edge):
    source = -2 * np.pi**2 * jnp.prod(jnp.sin(np.pi * inside), -1)
    residual = jax.vmap(laplacian, (None, 0))(params, inside) - source
    return jnp.mean(residual**2 + 10 * mlp(params, edge, jnp.tanh)[:, 0] ** 2)

  examples = split((inside, edge), 400)
  init = init_mlp(2, 48, 48, 48, 1)
  return Workload("physics-informed", init, loss, *examples, 500, 120, marked=False)


def _conv(layer: Layer, x: jax.Array, stride: int = 1) -> jax.Array:
  dimensions = ("NHWC", "HWIO", "NHWC")
  strides = (stride, stride)
  y = lax.conv_general_dilated(x, layer["w"], strides, "SAME", dimension_numbers=dimensions)
  return y + layer["b"]


def denoiser():
  """The noise in digits, from those and its share: convolutions down and up again, with a skip."""
  frequencies = 3 * np.arange(1, 9)

  def init(seed):
    keys = _keys(seed)
    return {
      "first": _dense(next(keys), 3, 3, 1, 24),
      "down": _dense(next(keys), 3, 3, 24, 48),
      "middle": _dense(next(keys), 3, 3, 48, 48),
      "up": _dense(next(keys), 3, 3, 48, 4 * 24),
      "last": _dense(next(keys), 3, 3, 48, 1),
      "time": _dense(next(keys), 16, 48),
    }

  def predict(params, x, share):
    waves = jnp.concatenate([jnp.sin(share * frequencies), jnp.cos(share * frequencies)], -1)
    time = jax.nn.silu(_apply(params["time"], waves))[:, None, None]
    skip = jax.nn.silu(_conv(params["first"], x))
    h = jax.nn.silu(_conv(params["down"], skip, stride=2) + time)
    h = jax.nn.silu(_conv(params["middle"], h))
    up = _conv(params["up"], h).reshape(-1, 4, 4, 2, 2, 24)  # four pixels of each
    up = jax.nn.silu(up.swapaxes(2, 3).reshape(-1, 8, 8, 24))
    return _conv(params["last"], jnp.concatenate([up, skip], -1))

  def loss(params, x, share, noise):
    mixed = jnp.sqrt(1 - share) * (2 * x - 1) + jnp.sqrt(share) * noise
    predicted = predict(params, mixed.reshape(-1, 8, 8, 1), share)
    return jnp.mean((predicted.reshape(-1, 64) - noise) ** 2)

  share = lambda rng, n: rng.uniform(0.05, 0.95, (n, 1))
  noise = lambda rng, n: rng.normal(size=(n, 64))
  examples = (_without_classes(part) for part in digits(share, noise))
  return Workload("denoiser", init, loss, *examples, 256, 100, marked=False)


def gru():
  """A gated recurrent unit of width 96 over the rows of digits."""
  width = 96

  def init(seed):
    keys = _keys(seed)
    inputs, states = (_dense(next(keys), size, 3 * width) for size in (8, width))
    return {"inputs": inputs, "states": states, "head": _dense(next(keys), width, 10)}

  def loss(params, x, y):
    def cell(h, row):
      from_row = jnp.split(_apply(params["inputs"], row), 3, -1)
      from_state = jnp.split(_apply(params["states"], h), 3, -1)
      reset, keep = (jax.nn.sigmoid(from_row[i] + from_state[i]) for i in range(2))
      return (1 - keep) * jnp.tanh(from_row[2] + reset * from_state[2]) + keep * h, None

    h, _ = lax.scan(cell, jnp.zeros((len(x), width)), x.reshape(-1, 8, 8).swapaxes(0, 1))
    return fop_optax.softmax_cross_entropy(_apply(params["head"], h), y)

  return Workload("gru", init, loss, *digits(), 256, 100)


def autoencoder_variational():
  """64-128-8-128-64 with tanh, sampled between: likelihood of pixels and distance to the prior."""
  encoder, decoder = init_mlp(64, 128, 16), init_mlp(8, 128, 64)

  def init(seed):
    return {"encoder": encoder(seed), "decoder": decoder(seed + 1000)}

  def loss(params, x, noise):
    mean, log_variance = jnp.split(mlp(params["encoder"], x, jnp.tanh), 2, -1)
    log_variance = jnp.clip(log_variance, -5, 5)
    logits = mlp(params["decoder"], mean + noise * jnp.exp(0.5 * log_variance), jnp.tanh)
    likelihood = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
    divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1)
    return jnp.mean(likelihood + divergence)

  examples = (_without_classes(part) for part in digits(lambda rng, n: rng.normal(size=(n, 8))))
  return Workload("vae", init, loss, *examples, 256, 100, marked=False)


def _experts(rows, up, down, activation):
  """Each expert's answer to its rows, which are zero for the others: `[experts, n, out]`."""
  hidden = activation(jnp.einsum("end,edf->enf", rows, up))
  return jnp.einsum("enf,efd->end", hidden, down)


def experts():
  """Eight experts of 48-32-48 behind a dense layer: the best alone answers (Switch), balanced."""
  number = 8

  def init(seed):
    keys = _keys(seed)
    return {
      "first": _dense(next(keys), 64, 48),
      "router": _normal(next(keys), 48, number),
      "up": jax.random.normal(next(keys), (number, 48, 32)) / 48**0.5,
      "down": jax.random.normal(next(keys), (number, 32, 48)) / 32**0.5,
      "head": _dense(next(keys), 48, 10),
    }

  def loss(params, x, y):
    h = jax.nn.relu(_apply(params["first"], x))
    gate = jax.nn.softmax(h @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(gate, -1), number)
    rows = jnp.einsum("ne,nd->end", chosen, h)
    answers = _experts(rows, params["up"], params["down"], jax.nn.relu)
    h = h + jnp.einsum("ne,end->nd", gate * chosen, answers)
    balance = number * jnp.sum(chosen.mean(0) * gate.mean(0))
    return fop_optax.softmax_cross_entropy(_apply(params["head"], h), y) + 0.02 * balance

  return Workload("experts", init, loss, *digits(), 256, 100, marked=False)


def heads():
  """Regression of sixteen tasks, a head each behind 8-64-48; task k is drawn by 1 / k^2."""
  tasks, rng = 16, np.random.default_rng(0)
  shares = np.arange(1, tasks + 1) ** -2.0
  task = rng.choice(tasks, size=4000, p=shares / shares.sum())
  x = rng.normal(size=(4000, 8))
  features, readouts = np.sin(x @ rng.normal(size=(8, 12)) / 2), rng.normal(size=(tasks, 12))
  y = np.sum(features * readouts[task], -1, keepdims=True)
  examples = tuple(part.astype(np.float32) for part in (x, np.eye(tasks)[task], y))
  trunk = init_mlp(8, 64, 48)

  def init(seed):
    keys = _keys(seed + 1000)
    up, down = (jax.random.normal(next(keys), (tasks, *shape)) for shape in ((48, 16), (16, 1)))
    return {"trunk": trunk(seed), "up": up / 48**0.5, "down": down / 16**0.5}

  def loss(params, x, task, y):
    h = jax.nn.relu(mlp(params["trunk"], x))
    rows = jnp.einsum("ne,nd->end", task, h)
    answers = _experts(rows, params["up"], params["down"], jnp.tanh)
    return fop_optax.squared_error(jnp.einsum("ne,end->nd", task, answers), y)

  return Workload("heads", init, loss, *split(examples, 800), 128, 120, marked=False)


def low_rank_adapters():
  """LoRA: adapters of rank 4 on a frozen random network of 64-128-128-128, and a head."""
  frozen = init_mlp(64, 128, 128, 128)(99)

  def init(seed):
    keys = _keys(seed)
    down = [_normal(next(keys), size, 4) for size in (64, 128, 128)]
    return {"down": down, "up": [jnp.zeros((4, 128))] * 3, "head": _dense(next(keys), 128, 10)}

  def loss(params, x, y):
    for layer, down, up in zip(frozen, params["down"], params["up"], strict=True):
      x = jax.nn.relu(_apply(layer, x) + x @ down @ up)
    return fop_optax.softmax_cross_entropy(_apply(params["head"], x), y)

  return Workload("lora", init, loss, *digits(), 256, 100)


def td_learning():
  """Values of three actions by 64-64-64-3, its own stopped values of the next state as target.

  States are digits, an action adds -1, 0 or 1 to the class; a nine is rewarded, discount 0.8.
  """
  (x, y), rng = pixels(), np.random.default_rng(0)
  action = rng.integers(3, size=len(y)).astype(np.int32)
  after = np.clip(y + action - 1, 0, 9)
  following = x[[rng.choice(np.flatnonzero(y == digit)) for digit in after]]
  reward = (after == 9).astype(np.float32)

  def loss(params, x, action, reward, following):
    value = jnp.take_along_axis(mlp(params, x), action[:, None], 1)[:, 0]
    target = reward + 0.8 * lax.stop_gradient(mlp(params, following)).max(-1)
    return jnp.mean(optax.huber_loss(value, target))

  examples = split((x, action, reward, following), 397)
  return Workload("td", init_mlp(64, 64, 64, 3), loss, *examples, 128, 120, marked=False)
