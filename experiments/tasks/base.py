"""What every task is to the training loop."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import models
from experiments.configs import Config
from experiments.data import augmentation
import fop_optax

Batch = tuple[Any, Any]  # inputs and targets
Fed = Any  # indices, int32 [batch], or a tree of arrays


class Task(NamedTuple):
  """A model and its data.

  Small data live on the device: a batch is picked out of them in the step, by indices that follow
  from seed and step. Of large ones the step is fed with the batch itself, still in bytes. Numbers
  of an evaluation are `test_loss`, `test_accuracy` and, of more than ten classes, `test_top5`.
  """

  model: models.Model
  arrays: Any  # what is on the device, a tree of arrays; may be empty
  steps: int  # of an epoch
  # seed, first step (over all epochs), how many -> what each is fed with, one after the other
  feed: Callable[[int, int, int], Iterator[Fed]]
  pick: Callable[[Any, Fed, jax.Array], Batch]  # arrays, what the step is fed with, key -> batch
  batch: Batch  # the shapes of one
  # parameters, state, batch, key -> mean loss, new state
  loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Any]]
  evaluate: Callable[[Any, Any], dict[str, float]]  # parameters, state -> numbers
  held_out: int  # examples it is evaluated on


def dtype_of(config: Config) -> Any:
  """What the model computes in; None: float32."""
  return jnp.bfloat16 if config.precision == "bfloat16" else None


def loss_of(model: models.Model) -> Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Any]]:
  """The marked cross entropy of a model in training."""

  def loss(params, state, batch, key):
    logits, state = model.apply(params, state, batch[0], train=True, key=key)
    return fop_optax.softmax_cross_entropy(logits, batch[1]), state

  return loss


def softened(
  config: Config, key: jax.Array, images: jax.Array, labels: jax.Array, classes: int
) -> Batch:
  """Images and probabilities of classes, with the mixup and the smoothing that are asked for."""
  labels, smoothing = jax.nn.one_hot(labels, classes), config.label_smoothing
  if config.mixup:
    images, labels = augmentation.mixup(key, images, labels, config.mixup)
  return images, (1 - smoothing) * labels + smoothing / classes


OF_CORPORA = ("files", "vocabulary", "tokenizer")
OF_TEXT = (*OF_CORPORA, "length", "steps_per_epoch", "held_out")
OF_PHOTOGRAPHS = ("classes", "workers")


def check_unused(config: Config, names: Sequence[str], data: str) -> None:
  """Raises SystemExit if fields are set that do nothing for such data."""
  default = {field.name: field.default for field in dataclasses.fields(config)}
  if used := [name for name in names if getattr(config, name) != default[name]]:
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in used)
    raise SystemExit(f"{flags}: not for {data}.")


def check_batch(batch_size: int, examples: int) -> None:
  """Raises SystemExit if there is not one batch."""
  if batch_size > examples:
    raise SystemExit(f"--batch-size {batch_size} is larger than the {examples} training examples.")
