"""Workloads that no rate was chosen by: losses, weights and inputs of unusual size, many steps."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.workloads.base import Workload, split
from experiments.workloads.held_out import digits, init_mlp, mlp
import fop_optax


def small_units():
  """Regression by 8-64-64-1 of targets of about 0.03, squared error; the last layer as small."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3000, 8)).astype(np.float32)
  y = 0.03 * (np.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3])
  initial = init_mlp(8, 64, 64, 1)

  def init(seed):
    *layers, last = initial(seed)
    return [*layers, last | {"w": 0.03 * last["w"]}]

  loss = lambda params, x, y: jnp.mean((mlp(params, x) - y) ** 2)
  return Workload("small-units", init, loss, *split((x, y), 600), 256, 120, marked=False)


def small_loss():
  """64-64-64-10 with a hundredth of the cross entropy."""
  loss = lambda params, x, y: 0.01 * fop_optax.softmax_cross_entropy(mlp(params, x), y)
  return Workload("small-loss", init_mlp(64, 64, 64, 10), loss, *digits(), 128, 100)


def small_weights():
  """64-128-128-128-128-10 that starts at `0.01 * normal`, biases too."""
  shapes = jax.eval_shape(init_mlp(64, 128, 128, 128, 128, 10), 0)

  def init(seed):
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
      0.01 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)

  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(mlp(params, x), y)
  return Workload("small-weights", init, loss, *digits(), 256, 100)


def large_inputs():
  """64-128-128-10 on pixels up to 255: a saturated start."""
  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(mlp(params, 255 * x), y)
  return Workload("large-inputs", init_mlp(64, 128, 128, 10), loss, *digits(), 256, 100)


def small_batches():
  """20-64-64-8 after a network that drew the labels, a tenth of them wrong: 600 steps of 64."""
  x, logits = _teacher(20, 40, 8, 8000)
  rng = np.random.default_rng(1)
  y = np.where(rng.random(len(x)) < 0.1, rng.integers(0, 8, len(x)), logits.argmax(axis=1))
  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(mlp(params, x), y)
  return Workload("small-batches", init_mlp(20, 64, 64, 8), loss, *split((x, y), 2000), 64, 600)


def many_steps():
  """8-32-32-4 after a network, squared error without noise: 1,000 steps of 32."""
  x, y = _teacher(8, 16, 4, 3000)
  loss = lambda params, x, y: jnp.mean((mlp(params, x) - y) ** 2)
  train, validation = split((x, y), 1000)
  init = init_mlp(8, 32, 32, 4)
  return Workload("many-steps", init, loss, train, validation, 32, 1000, marked=False)


def _teacher(inputs: int, hidden: int, outputs: int, examples: int):
  """Normal inputs, and what a network of one hidden layer makes of them."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x = draw(examples, inputs)
  hidden_units = np.tanh(2 * x @ draw(inputs, hidden) / inputs**0.5)
  return x, hidden_units @ draw(hidden, outputs) / hidden**0.5
