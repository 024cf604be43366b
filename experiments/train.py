"""One training loop for every optimizer: an epoch is one compiled scan over its batches."""

from collections.abc import Callable, Iterator
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs import Compare
from experiments.data import Data
from experiments.models import mlp
import fop_optax

EVAL_BATCH = 1000


class Row(NamedTuple):
  """What one epoch of one run came to."""

  optimizer: str
  seed: int
  epoch: int
  seconds: float  # of training so far, without compilation and evaluation
  train_loss: float  # mean over the epoch's batches
  test_loss: float
  test_accuracy: float


class Run(NamedTuple):
  """One optimizer, compiled: `train(seed)` yields a `Row` an epoch."""

  train: Callable[[int], Iterator[Row]]
  compile_seconds: float
  steps_per_epoch: int


def schedule_for(config: Compare, peak: float, steps: int) -> optax.Schedule:
  """Linear warm-up from a first step above zero, then a cosine to zero: the same for all."""
  warmup = round(config.warmup * steps)
  return optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, steps)


def first_order(loss_fn: Callable) -> tuple[None, Callable]:
  """No layers, and the loss, its mean gradient and no extra arguments for the update."""

  def gradient(params, opt_state, x, y):
    del opt_state
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    return loss, grads, {}

  return None, gradient


def with_curvature(loss_fn: Callable, params, x, y, groups: int) -> tuple[Any, Callable]:
  """The layers of the loss; and the loss, its mean gradient and the statistics for the update."""
  captured = fop_optax.capture(loss_fn, params, x, y, groups=groups)

  def gradient(params, opt_state, x, y):
    refresh = fop_optax.refresh_due(opt_state)
    loss, grads, stats = captured.value_and_grad(params, x, y, refresh=refresh)
    return loss, grads, {"stats": stats}

  return captured.layers, gradient


def compile_run(config: Compare, name: str, data: Data) -> Run:
  """Compiles the epoch and the evaluation of optimizer `name` for `config`."""
  hyper = getattr(config, name)
  batch_size = config.batch_size
  steps_per_epoch = len(data.train_labels) // batch_size
  if not steps_per_epoch:
    raise SystemExit(
      f"--batch-size {batch_size} is larger than the {len(data.train_labels)} training examples."
    )
  model = mlp.mlp(data.train_images.shape[1:], data.classes, config.hidden)
  _, state = model.shapes  # empty: a multilayer perceptron has none

  def normalize(images):
    return (images.astype(jnp.float32) - data.mean) / data.std

  def loss_fn(params, x, y):
    logits, _ = model.apply(params, state, x, train=True)
    return fop_optax.softmax_cross_entropy(logits, y)

  layers, gradient = first_order(loss_fn)
  if hyper.groups is not None:
    image = data.train_images.shape[1:]
    x = jax.ShapeDtypeStruct((batch_size, *image), jnp.float32)
    y = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    layers, gradient = with_curvature(loss_fn, model.shapes[0], x, y, hyper.groups)

  schedule = schedule_for(config, hyper.learning_rate, config.epochs * steps_per_epoch)
  tx = optax.with_extra_args_support(hyper.make(schedule, layers))

  def epoch(params, opt_state, images, labels, order):
    def step(carry, batch):
      params, opt_state = carry
      x, y = normalize(images[batch]), labels[batch]
      loss, grads, extra = gradient(params, opt_state, x, y)
      updates, opt_state = tx.update(grads, opt_state, params, **extra)
      return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), order)
    return params, opt_state, losses.mean()

  @jax.jit
  def score(params, images, labels):
    logits, _ = model.apply(params, state, normalize(images), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (logits.argmax(-1) == labels).sum()

  def evaluate(params):
    loss, correct = 0.0, 0
    for start in range(0, len(data.test_labels), EVAL_BATCH):
      part = slice(start, start + EVAL_BATCH)
      part_loss, part_correct = score(params, data.test_images[part], data.test_labels[part])
      loss, correct = loss + float(part_loss), correct + int(part_correct)
    return loss / len(data.test_labels), correct / len(data.test_labels)

  def start_of(seed):
    params, _ = model.init(seed)
    return params, jax.jit(tx.init)(params)

  def order_of(rng):
    order = rng.permutation(len(data.train_labels))[: steps_per_epoch * batch_size]
    return order.astype(np.int32).reshape(steps_per_epoch, batch_size)

  start = time.perf_counter()
  images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
  warm = (*start_of(0), images, labels, order_of(np.random.default_rng(0)))
  compiled = jax.jit(epoch, donate_argnums=(0, 1)).lower(*warm).compile()
  jax.block_until_ready(compiled(*warm))  # first call: buffers and threads, no compilation
  evaluate(model.init(0)[0])
  compile_seconds = time.perf_counter() - start

  def train(seed: int) -> Iterator[Row]:
    # Weights and the order of the batches depend on the seed alone: runs are paired.
    params, opt_state = start_of(seed)
    rng = np.random.default_rng(seed)
    seconds = 0.0
    for number in range(1, config.epochs + 1):
      order = jnp.asarray(order_of(rng))
      jax.block_until_ready((params, opt_state, order))
      clock = time.perf_counter()
      params, opt_state, loss = jax.block_until_ready(
        compiled(params, opt_state, images, labels, order)
      )
      seconds += time.perf_counter() - clock
      yield Row(name, seed, number, seconds, float(loss), *evaluate(params))

  return Run(train, compile_seconds, steps_per_epoch)
