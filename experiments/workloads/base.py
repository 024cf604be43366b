"""What a workload is: a network, its loss, and examples in memory."""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import jax
import numpy as np

Params = Any
Examples = tuple[np.ndarray, ...]  # the loss's arguments, examples along each leading axis


@dataclasses.dataclass(frozen=True)
class Workload:
  """A small training problem.

  Attributes:
    name: as the command line and the tables have it.
    init: seed -> parameters.
    loss: `loss(params, *batch)`, a mean over the batch.
    train, validation: examples.
    batch: examples in a step.
    steps: of a run.
    interacting: whether an example's loss depends on the others of its batch.
    augment: what is done to each batch as it is drawn, with a generator; to validation once.
    marked: whether the loss says its distribution, as `fisher="sampled"` needs.
  """

  name: str
  init: Callable[[int], Params]
  loss: Callable[..., jax.Array]
  train: Examples
  validation: Examples
  batch: int
  steps: int
  interacting: bool = False
  marked: bool = True
  augment: Callable[[np.random.Generator, Examples], Examples] = lambda rng, batch: batch

  def batches(self, seed: int) -> Iterator[Examples]:
    """The batches of a run, the same for every optimizer: epochs of whole batches, shuffled."""
    rng, size = np.random.default_rng(seed), len(self.train[0])
    order = np.empty(0, np.int64)
    for _ in range(self.steps):
      if len(order) < self.batch:
        order = rng.permutation(size)
      chosen, order = order[: self.batch], order[self.batch :]
      yield self.augment(rng, tuple(part[chosen] for part in self.train))

  def held_out(self) -> Examples:
    """What validation is over: as much as a batch where examples interact."""
    size = self.batch if self.interacting else len(self.validation[0])
    return self.augment(np.random.default_rng(0), tuple(part[:size] for part in self.validation))


def split(examples: Examples, validation: int, seed: int = 0) -> tuple[Examples, Examples]:
  """`examples` shuffled, without and with only `validation` of them."""
  order = np.random.default_rng(seed).permutation(len(examples[0]))
  held, kept = order[:validation], order[validation:]
  return tuple(part[kept] for part in examples), tuple(part[held] for part in examples)


def from_module(module: Callable[[Any], Any]) -> tuple[Callable[[int], Params], Callable]:
  """`init(seed)` and `apply(params, *inputs)` of a Flax NNX module made from `rngs`.

  Normalisation uses the statistics of the batch; its running ones are left as they are.
  """
  from flax import nnx

  graphdef, _, others = nnx.split(module(nnx.Rngs(0)), nnx.Param, ...)

  def init(seed):
    return nnx.split(module(nnx.Rngs(seed)), nnx.Param, ...)[1]

  def apply(params, *inputs):
    return nnx.merge(graphdef, params, others, copy=True)(*inputs)

  return init, apply
