"""Images and their classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs import Config
from experiments.data import Data, augmentation, order
from experiments.tasks.base import Task, check_batch
import fop_optax

EVAL_BATCH = 1000
WHITENED = 5000  # images that a network may look at before training

# Of normalised images: what fills in is the mean colour.
AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "flip": augmentation.flip,
  "crop": augmentation.pad_crop,
  "shift": lambda key, images: augmentation.pad_crop(key, images, padding=2, fill=None),
  "cutout": lambda key, images: augmentation.cutout(key, images, images.shape[1] // 4),
}


def classification(config: Config, data: Data) -> Task:
  """A classifier; mixup, where it is asked for, mixes labels too."""
  shape, examples = data.train_images.shape[1:], len(data.train_labels)
  check_batch(config.batch_size, examples)
  dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
  model = config.model.build(shape, data.classes, dtype)

  def normalize(images):
    return (images.astype(jnp.float32) - data.mean) / data.std

  def init(seed):
    params, state = model.init(seed)
    return params, config.model.prepare(state, normalize(data.train_images[:WHITENED]))

  steps = order.steps_per_epoch(examples, config.batch_size)

  def feed(seed, first, count):  # never beyond an epoch
    epoch, within = divmod(first, steps)
    yield from order.epoch_batches(examples, config.batch_size, seed, epoch)[within:][:count]

  def pick(arrays, indices, key):
    images, labels = normalize(arrays[0][indices]), jax.nn.one_hot(arrays[1][indices], data.classes)
    for name, own in zip(config.augmentation, jax.random.split(key, 8), strict=False):
      images = AUGMENTATIONS[name](own, images)
    if config.mixup:
      images, labels = augmentation.mixup(jax.random.fold_in(key, 8), images, labels, config.mixup)
    smoothing = config.label_smoothing
    return images, (1 - smoothing) * labels + smoothing / data.classes

  def loss(params, state, batch, key):
    logits, state = model.apply(params, state, batch[0], train=True, key=key)
    return fop_optax.softmax_cross_entropy(logits, batch[1]), state

  @jax.jit
  def score(params, state, images, labels):
    logits, _ = model.apply(params, state, normalize(images), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    above = logits > jnp.take_along_axis(logits, labels[:, None], axis=1)
    near = jnp.sum(above, axis=1) < 5
    return jnp.stack([losses.sum(), (logits.argmax(-1) == labels).sum(), near.sum()])

  test = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)

  def evaluate(params, state):
    parts = [
      score(params, state, *(array[start : start + EVAL_BATCH] for array in test))
      for start in range(0, len(test[1]), EVAL_BATCH)
    ]
    loss, right, near = np.sum(np.asarray(parts, np.float64), axis=0) / len(test[1])
    numbers = {"test_loss": loss, "test_accuracy": right}
    return numbers | ({"test_top5": near} if data.classes > 10 else {})

  return Task(
    model=model._replace(init=init),
    arrays=(jnp.asarray(data.train_images), jnp.asarray(data.train_labels)),
    steps=steps,
    feed=feed,
    pick=pick,
    batch=(
      jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32),
      jax.ShapeDtypeStruct((config.batch_size, data.classes), jnp.float32),
    ),
    loss=loss,
    evaluate=evaluate,
    held_out=len(test[1]),
  )
