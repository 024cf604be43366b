"""What is learnt: batches that the compiled step picks by itself, a loss, and an evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models
from experiments.configs import Config
from experiments.data import Data
import fop_optax

EVAL_BATCH = 1000
Batch = Any


class Task(NamedTuple):
  """A model and its data.

  What the step needs of the data lives on the device: a batch is picked out of it in the step.
  """

  model: models.Model
  arrays: Any  # the training data, a tree of arrays
  examples: int  # of an epoch
  pick: Callable[[Any, jax.Array, jax.Array], Batch]  # arrays, indices [batch], key -> batch
  batch: Batch  # the shapes of one
  # parameters, state, batch, key -> mean loss, new state
  loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Any]]
  evaluate: Callable[[Any, Any], dict[str, float]]  # parameters, state -> numbers


def classification(config: Config, data: Data) -> Task:
  """Images and their classes; the numbers are `test_loss`, `test_accuracy` and `test_top5`."""
  image = data.train_images.shape[1:]
  model = config.model.build(image, data.classes)
  smoothing = config.label_smoothing

  def normalize(images):
    return (images.astype(jnp.float32) - data.mean) / data.std

  def pick(arrays, indices, key):
    images, labels = arrays
    del key
    return normalize(images[indices]), labels[indices]

  def loss(params, state, batch, key):
    x, y = batch
    logits, state = model.apply(params, state, x, train=True, key=key)
    if smoothing:
      y = (1 - smoothing) * jax.nn.one_hot(y, data.classes) + smoothing / data.classes
    return fop_optax.softmax_cross_entropy(logits.astype(jnp.float32), y), state

  @jax.jit
  def score(params, state, images, labels):
    logits, _ = model.apply(params, state, normalize(images), train=False, key=None)
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    rank = jnp.sum(logits > own, axis=1)
    return jnp.stack([losses.sum(), (logits.argmax(-1) == labels).sum(), (rank < 5).sum()])

  test = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)

  def evaluate(params, state):
    parts = [
      score(params, state, *(array[start : start + EVAL_BATCH] for array in test))
      for start in range(0, len(test[1]), EVAL_BATCH)
    ]
    loss, right, near = np.sum(np.asarray(parts, np.float64), axis=0) / len(test[1])
    numbers = {"test_loss": loss, "test_accuracy": right}
    return numbers | ({"test_top5": near} if data.classes > 10 else {})

  shapes = (
    jax.ShapeDtypeStruct((config.batch_size, *image), jnp.float32),
    jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  )
  train = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
  return Task(model, train, len(data.train_labels), pick, shapes, loss, evaluate)
