"""Photographs that are read and decoded while they are trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs import Config
from experiments.data import mock, streaming
from experiments.tasks.base import Task, check_batch, check_unused, dtype_of, loss_of, softened

EVAL_BATCH = 256
MOCK = 512  # examples of the stand-in


def streamed(config: Config) -> Task:
  """A classifier of `config.side` pixels; `--dataset mock` for photographs that are made up.

  Crops and flips are made where images are decoded; mixup, in the step.
  """
  small = ("augmentation", "views", "imbalance", "examples")
  check_unused(config, small, "photographs that are streamed")
  train, test = _records(config)
  check_batch(config.batch_size, len(train))
  shape, classes = (config.side, config.side, 3), train.classes
  model = config.model.build(shape, classes, dtype_of(config))
  mean, std = (np.asarray(x, np.float32) for x in (streaming.MEAN, streaming.STD))
  normalize = lambda images: (images.astype(jnp.float32) - mean) / std

  def feed(seed, first, count):
    batches = streaming.train_batches(
      train, config.batch_size, config.side, seed, start=first, workers=config.workers
    )
    try:
      for _ in range(count):
        yield next(batches)
    finally:
      getattr(batches, "close", lambda: None)()

  def pick(arrays, fed, key):
    del arrays
    return softened(config, key, normalize(fed["image"]), fed["label"], classes)

  @jax.jit
  def score(params, state, images, labels):
    logits, _ = model.apply(params, state, normalize(images), train=False)
    own, known = jnp.maximum(labels, 0), labels != streaming.PADDING
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, own)
    above = logits > jnp.take_along_axis(logits, own[:, None], axis=1)
    rank = jnp.sum(above, axis=1)
    return jnp.stack([jnp.sum(known * x) for x in (losses, rank == 0, rank < 5)])

  def evaluate(params, state):
    batches = streaming.test_batches(test, EVAL_BATCH, config.side, workers=config.workers)
    parts = [score(params, state, own["image"], own["label"]) for own in batches]
    value, right, near = np.sum(np.asarray(parts, np.float64), axis=0) / len(test)
    return {"test_loss": value, "test_accuracy": right, "test_top5": near}

  shapes = (
    jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32),
    jax.ShapeDtypeStruct((config.batch_size, classes), jnp.float32),
  )
  steps = len(train) // config.batch_size
  return Task(model, (), steps, feed, pick, shapes, loss_of(model), evaluate, len(test))


def _records(config: Config) -> tuple[streaming.Records, streaming.Records]:
  if config.dataset == "mock":
    return mock.records(MOCK), mock.records(MOCK // 4, seed=1)
  classes = config.classes or None
  split = {"imagenet2012": "validation"}.get(config.dataset, "test")
  return tuple(
    streaming.open_records(config.dataset, own, config.data_dir, classes)
    for own in ("train", split)
  )
