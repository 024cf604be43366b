"""Which examples a step sees: a function of seed and step, so that a run goes on where it ended.

An epoch is a shuffle of all examples, cut into whole batches; what is left over is in none. The
shuffles of a seed are those that one NumPy generator of that seed gives one after the other.
"""

import functools

import numpy as np


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  """All examples, int64 `[size]`, in the order of `epoch` (from 0).

  The generator is remembered at the start of each epoch it was asked for: the next epoch is one
  shuffle, an epoch in a fresh process as many as came before (about 1 ms each for 50,000).
  """
  states = _states(size, seed)
  rng = np.random.default_rng()
  for number in range(min(epoch, len(states) - 1), epoch + 1):
    rng.bit_generator.state = states[number]
    order = rng.permutation(size)
    if len(states) == number + 1:
      states.append(rng.bit_generator.state)
  return order


def steps_per_epoch(size: int, batch: int) -> int:
  """Whole batches of `size` examples."""
  if not 0 < batch <= size:
    raise ValueError(f"A batch of {batch} out of {size} examples.")
  return size // batch


def epoch_batches(size: int, batch: int, seed: int, epoch: int) -> np.ndarray:
  """The batches of one epoch, int32 `[steps, batch]`."""
  steps = steps_per_epoch(size, batch)
  return permutation(size, seed, epoch)[: steps * batch].astype(np.int32).reshape(steps, batch)


def mirrored(size: int, seed: int, epoch: int) -> np.ndarray:
  """Which examples `epoch` sees mirrored, bool `[size]`: half of them, and in the next the others.

  Each example is drawn once; the draws of a seed have nothing to do with its shuffles.
  """
  drawn = np.random.default_rng((seed, 1)).integers(2, size=size, dtype=bool)
  return drawn ^ bool(epoch % 2)


@functools.lru_cache(maxsize=64)
def _states(size: int, seed: int) -> list[dict]:
  """States of the generator before epochs 0, 1, ... as far as asked for; it grows."""
  del size  # the generator draws as it goes: its state after a shuffle depends on the size
  return [np.random.default_rng(seed).bit_generator.state]
