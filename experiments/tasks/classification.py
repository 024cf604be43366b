"""Images and their classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs import Config
from experiments.data import Data, augmentation, order
from experiments.tasks.base import Task, check_batch, dtype_of, loss_of, softened

EVAL_BATCH = 1000
WHITENED = 5000  # images that a network may look at before training

# Of normalised images: what fills in is the mean colour.
AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "flip": augmentation.flip,  # "alternating_flip" is fed: it follows from image and epoch
  "crop": augmentation.pad_crop,
  "shift": lambda key, images: augmentation.pad_crop(key, images, padding=2, fill=None),
  "cutout": lambda key, images: augmentation.cutout(key, images, images.shape[1] // 4),
}


def classification(config: Config, data: Data) -> Task:
  """A classifier; mixup, where it is asked for, mixes labels too."""
  shape, examples = data.train_images.shape[1:], len(data.train_labels)
  check_batch(config.batch_size, examples)
  model = config.model.build(shape, data.classes, dtype_of(config))

  def normalize(images):
    return (images.astype(jnp.float32) - data.mean) / data.std

  def init(seed):
    params, state = model.init(seed)
    return params, config.model.prepare(state, normalize(data.train_images[:WHITENED]))

  steps = order.steps_per_epoch(examples, config.batch_size)
  alternating = "alternating_flip" in config.augmentation

  def feed(seed, first, count):  # never beyond an epoch
    epoch, within = divmod(first, steps)
    batches = order.epoch_batches(examples, config.batch_size, seed, epoch)[within:][:count]
    if alternating:
      mirrored = order.mirrored(examples, seed, epoch)
      yield from ((indices, mirrored[indices]) for indices in batches)
    else:
      yield from batches

  def pick(arrays, fed, key):
    indices, mirrored = fed if alternating else (fed, None)
    images, labels = (array[indices] for array in arrays)
    images = normalize(images)
    mixed, *keys = jax.random.split(key, 1 + len(config.augmentation))
    for name, own in zip(config.augmentation, keys, strict=True):
      if name == "alternating_flip":
        images = augmentation.mirror(images, mirrored)
      else:
        images = AUGMENTATIONS[name](own, images)
    return softened(config, mixed, images, labels, data.classes)

  @jax.jit
  def score(params, state, images, labels):
    one = lambda own: model.apply(params, state, own, train=False)[0]
    logits = augmentation.mean_over_views(one, normalize(images), config.views)
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
    loss=loss_of(model),
    evaluate=evaluate,
    held_out=len(test[1]),
  )
