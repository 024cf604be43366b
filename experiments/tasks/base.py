"""What every task is to the training loop."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from experiments import models

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


def check_batch(batch_size: int, examples: int) -> None:
  """Raises SystemExit if there is not one batch."""
  if batch_size > examples:
    raise SystemExit(f"--batch-size {batch_size} is larger than the {examples} training examples.")
