"""Text: the next token of each of a window's tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs import Config
from experiments.data import text as texts
from experiments.tasks.base import Task, check_unused, dtype_of, loss_of

EVAL_BATCH = 64


def language(config: Config, text: texts.Text) -> Task:
  """A language model; an epoch is `config.steps_per_epoch` steps, on windows drawn anew."""
  images = ("augmentation", "views", "mixup", "label_smoothing", "imbalance", "examples", "side")
  check_unused(config, images, "text")
  length, steps = config.length, config.steps_per_epoch
  if not (length and steps):
    raise SystemExit(f"Text needs --length and --steps-per-epoch, not {length} and {steps}.")
  model = config.model.build((length,), text.vocabulary, dtype_of(config))

  def feed(seed, first, count):
    for step in range(first, first + count):
      yield texts.starts(len(text.train), config.batch_size, length, seed, step).astype(np.int32)

  def pick(arrays, indices, key):
    del key
    return tuple(x.astype(jnp.int32) for x in texts.take(arrays, indices, length))

  @jax.jit
  def score(params, state, x, y):
    logits, _ = model.apply(params, state, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.stack([losses.sum(), (logits.argmax(-1) == y).sum()])

  x, y = map(jnp.asarray, texts.blocks(np.asarray(text.validation[: config.held_out]), length))

  def evaluate(params, state):
    parts = [
      score(params, state, x[start : start + EVAL_BATCH], y[start : start + EVAL_BATCH])
      for start in range(0, len(x), EVAL_BATCH)
    ]
    loss, right = np.sum(np.asarray(parts, np.float64), axis=0) / x.size
    return {"test_loss": loss, "test_accuracy": right}

  shape = jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32)
  arrays = jnp.asarray(np.asarray(text.train))
  return Task(model, arrays, steps, feed, pick, (shape, shape), loss_of(model), evaluate, x.size)
