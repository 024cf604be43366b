"""Text as one array of ids, and the windows of it that a step sees.

A step's windows are a function of seed and step: a run that was killed goes on with the same ones.
Corpora in byte pairs are in byte_pairs.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.data import folders


class Text(NamedTuple):
  """A text in ids, split once: the end is for validation."""

  train: np.ndarray  # uint8, uint16 or uint32 [n]; it may be a file's memory map
  validation: np.ndarray
  vocabulary: int  # ids are below it
  decode: Callable[[np.ndarray], str]


def shakespeare(data_dir: str | None = None, validation: float = 0.1) -> Text:
  """Tiny Shakespeare (1,115,394 characters, 65 distinct) by characters, in alphabetical order.

  Args:
    data_dir: where `tiny_shakespeare/1.0.0/input.txt` is: see `folders.root`.
    validation: the part at the end that is not trained on; as in nanoGPT.

  Raises:
    SystemExit: with what to do, where there is no such file.
  """
  path = folders.root(data_dir) / "tiny_shakespeare" / "1.0.0" / "input.txt"
  if not path.exists():
    raise SystemExit(f"No {path}. Put the text of tiny Shakespeare there:\n{SHAKESPEARE}")
  return characters(path.read_text(encoding="utf-8"), validation)


SHAKESPEARE = (
  "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


def characters(text: str, validation: float = 0.1) -> Text:
  """Any text by its characters, of which there are at most 65,536 distinct."""
  points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
  alphabet, ids = np.unique(points, return_inverse=True)
  decode = lambda ids: alphabet[ids].tobytes().decode("utf-32-le")
  return split(ids.astype(id_type(len(alphabet))), validation, len(alphabet), decode)


def split(
  ids: np.ndarray, validation: float, vocabulary: int, decode: Callable[[np.ndarray], str]
) -> Text:
  """`Text` of all ids, the part `validation` of them at the end held out."""
  kept = round((1 - validation) * len(ids))
  return Text(ids[:kept], ids[kept:], vocabulary, decode)


def held_out(text: Text, validation: float = 0.1) -> Text:
  """The training part alone, its end in the place of the validation part: for tuning."""
  kept = round((1 - validation) * len(text.train))
  return text._replace(train=text.train[:kept], validation=text.train[kept:])


def id_type(vocabulary: int) -> np.dtype:
  """The smallest unsigned integers that hold ids below `vocabulary`."""
  return np.min_scalar_type(vocabulary - 1)


def starts(size: int, batch: int, length: int, seed: int, step: int) -> np.ndarray:
  """Where the windows of one step begin, int64 `[batch]`: uniform over `size` ids, with repetition.

  Every window has `length` ids and the one that follows them.

  Raises:
    ValueError: where not one window fits.
  """
  if size <= length:
    raise ValueError(f"{size} ids hold no window of {length} and the id after it.")
  return np.random.default_rng((seed, step)).integers(0, size - length, batch)


def take(ids, begins, length: int):
  """`(inputs, targets)`, both `[batch, length]`: the windows that begin there, and the ids after.

  In NumPy or, where `ids` is an array on the device, in JAX; the type of `ids` is kept.
  """
  inputs = ids[begins[:, None] + np.arange(length)]
  return inputs, ids[begins[:, None] + np.arange(1, length + 1)]


def windows(
  ids: np.ndarray, batch: int, length: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
  """The windows of one step: `(inputs, targets)`, int32 `[batch, length]`."""
  begins = starts(len(ids), batch, length, seed, step)
  inputs, targets = take(ids, begins, length)
  return inputs.astype(np.int32), targets.astype(np.int32)


def blocks(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """All of `ids`, window after window, to evaluate on: `(inputs, targets)`, int32 `[n, length]`.

  Every id but the first is a target once; what fills no window at the end is left out.
  """
  begins = np.arange(0, len(ids) - length, length)
  if not len(begins):
    raise ValueError(f"{len(ids)} ids hold no window of {length} and the id after it.")
  inputs, targets = take(ids, begins, length)
  return inputs.astype(np.int32), targets.astype(np.int32)
