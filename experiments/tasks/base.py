"""What every task is to the training loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import models

Batch = tuple[Any, Any]  # inputs and targets


class Task(NamedTuple):
  """A model and its data.

  What the step needs of the data lives on the device: a batch is picked out of it in the step, by
  indices that follow from seed and epoch. Numbers of an evaluation are `test_loss`,
  `test_accuracy` and, of more than ten classes, `test_top5`.
  """

  model: models.Model
  arrays: Any  # the training data, a tree of arrays
  order: Callable[[int, int], np.ndarray]  # seed, epoch (from 1) -> indices, int32 [steps, batch]
  pick: Callable[[Any, jax.Array, jax.Array], Batch]  # arrays, indices [batch], key -> batch
  batch: Batch  # the shapes of one
  # parameters, state, batch, key -> mean loss, new state
  loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Any]]
  evaluate: Callable[[Any, Any], dict[str, float]]  # parameters, state -> numbers
  held_out: int  # examples it is evaluated on


def check_batch(batch_size: int, examples: int) -> None:
  """Raises SystemExit if there is not one batch."""
  if batch_size > examples:
    raise SystemExit(f"--batch-size {batch_size} is larger than the {examples} training examples.")
