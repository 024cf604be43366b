"""Large sets, read and decoded while they are trained on: Grain over TFDS folders.

    records = streaming.open_records("imagenet2012", "train")
    batches = streaming.train_batches(records, batch=1024, seed=0)
    batch = next(batches)  # {"image": uint8 [1024, 224, 224, 3], "label": int32 [1024]}

A batch is a function of the seed and of its number: not of how many workers make it. So a run goes
on at the batch where it ended, by `start=step` or by Grain's own state (`batches.get_state()`, a
small dictionary for JSON, or `grain.checkpoint` beside Orbax; the same number of workers then).
Where workers are started, the main module needs its `if __name__ == "__main__"`: they import it.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import os
import time
from typing import Any

import numpy as np

from experiments.data import cache, folders, photographs

# Mean and deviation of ImageNet's pixels, of 255, as commonly used.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

PADDING = -1  # the label where a last batch has no example left


@dataclasses.dataclass(frozen=True)
class Records:
  """A sequence of `{"image": bytes, "label": int}`, images still encoded; it can be pickled.

  Attributes:
    source: `tfds.data_source`, or whatever gives such dictionaries by index.
    classes: how many there are.
    chosen: int64, which records of `source`; `None` for all.
    renamed: int64, the label here for each label there, or `None` for the same.
  """

  source: Any
  classes: int
  chosen: np.ndarray | None = None
  renamed: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.source) if self.chosen is None else len(self.chosen)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if index >= len(self):
      raise IndexError(index)
    record = self.source[index if self.chosen is None else int(self.chosen[index])]
    label = record["label"] if self.renamed is None else int(self.renamed[record["label"]])
    return {"image": record["image"], "label": label}


def open_records(
  name: str, split: str, data_dir: str | None = None, classes: Sequence[str] | None = None
) -> Records:
  """The records of a TFDS folder, or those of some of its classes.

  Args:
    name: `"imagenet2012"`, or any TFDS set of images and classes in ArrayRecord files.
    split: `"train"`, or what there is to evaluate on: `"validation"` in ImageNet.
    data_dir: see `folders.root`.
    classes: names as in the set (in ImageNet `"n01440764"`), in the order of the new labels: how
      ImageNet-100 is made of ImageNet. The first time, this reads every record once for its label.

  Raises:
    SystemExit: with what to do, where the set or the packages that read it are not there.
    ValueError: for a class that the set does not have, with the nearest one that it has.
  """
  source = folders.open_source(name, split, data_dir)
  feature = source.dataset_info.features["label"]
  if classes is None:
    return Records(source, feature.num_classes)
  for unknown in set(classes) - set(feature.names):
    near = difflib.get_close_matches(unknown, feature.names, 1, 0)
    raise ValueError(f"{name!r} has no class {unknown!r}: nearest is {near[0]!r}.")
  if len(set(classes)) < len(classes):
    raise ValueError("A class is listed twice.")
  make = lambda: {"labels": _labels(source)}
  labels = cache.arrays(folders.key(source, split) + "-labels", make)["labels"]
  renamed = np.full(feature.num_classes, PADDING)
  renamed[[feature.str2int(one) for one in classes]] = np.arange(len(classes))
  return Records(source, len(classes), np.flatnonzero(renamed[labels] != PADDING), renamed)


def train_batches(
  records: Records,
  batch: int,
  side: int = 224,
  seed: int = 0,
  *,
  area: tuple[float, float] = (0.08, 1.0),
  flip: bool = True,
  normalised: bool = False,
  epochs: int | None = None,
  start: int = 0,
  workers: int | None = None,
  process: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of an epoch after the other, each shuffled; what fills no whole batch is left out.

  Args:
    records: see `open_records`, or `mock.records`.
    batch: examples of one step, over all processes.
    side: of the images, in pixels.
    seed: of shuffles and crops. 0 to 2^32 - 1.
    area: the share of a photograph that a random crop has (`photographs.random_resized_crop`).
    flip: whether half of the images are mirrored.
    normalised: float32 of mean 0 and deviation 1 (`MEAN`, `STD`), four times the bytes to move;
      else uint8, to be normalised in the step.
    epochs: how many; `None` for no end.
    start: the step to begin at.
    workers: processes that read and decode; 0 does it in threads of this one. See `worker_count`.
    process: which of how many processes this is; by default as JAX has it. Each gets its part of
      every batch, `batch / processes` examples.

  Returns:
    Grain's iterator of `{"image": [n, side, side, 3], "label": int32 [n]}`. `close()` ends workers.
  """
  import grain

  index, count = _process(process)
  if batch % count or not 0 < batch <= len(records):
    raise ValueError(f"{batch=} of {len(records)} records, over {count} processes.")
  whole = len(records) - len(records) % batch
  examples = (
    grain.MapDataset.source(records)
    .shuffle(seed)[:whole][index::count]
    .repeat(epochs)
    .random_map(_Train(side, area, flip, normalised), seed=seed)
  )
  return _iterate(examples.batch(batch // count)[start:], workers, len(records) // count)


def test_batches(
  records: Records,
  batch: int,
  side: int = 224,
  *,
  part: float = 0.875,
  normalised: bool = False,
  workers: int | None = None,
  process: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """All records once and in order, the middle of each, in batches of one shape.

  Where records end before a batch does, labels are `PADDING` (-1) and images black: so every
  process has as many batches, and a jitted evaluation is compiled once. `part` is how much of the
  shorter side is kept; the other arguments, and what is returned, are as in `train_batches`.
  """
  import grain

  index, count = _process(process)
  if batch % count:
    raise ValueError(f"{batch=} over {count} processes.")
  padded = grain.MapDataset.range(-(-len(records) // batch) * batch)[index::count]
  examples = padded.map(_Test(records, side, part, normalised))
  return _iterate(examples.batch(batch // count), workers, len(records) // count)


def worker_count(examples: int) -> int:
  """Workers by default: none below 50,000 examples, else one a CPU, at most 16.

  A worker takes some seconds to start, and threads of one process decode at the same time: for a
  few thousand small photographs two workers are slower than none.
  """
  return 0 if examples < 50_000 else min(16, len(os.sched_getaffinity(0)))


def images_per_second(batches: Iterator[dict[str, np.ndarray]], count: int = 20) -> float:
  """Throughput over `count` batches, after one that starts the workers."""
  next(batches)
  begin = time.perf_counter()
  images = sum(len(next(batches)["label"]) for _ in range(count))
  return images / (time.perf_counter() - begin)


@dataclasses.dataclass(frozen=True)
class _Train:
  """A record and a generator to an example."""

  side: int
  area: tuple[float, float]
  flip: bool
  normalised: bool

  def __call__(self, record, rng):
    image = photographs.random_resized_crop(record["image"], self.side, rng, self.area)
    if self.flip and rng.random() < 0.5:
      image = image[:, ::-1]
    return _example(image, record["label"], self.normalised)


@dataclasses.dataclass(frozen=True)
class _Test:
  """A record's number to an example; one beyond the last to padding."""

  records: Records
  side: int
  part: float
  normalised: bool

  def __call__(self, index):
    if index >= len(self.records):
      return _example(np.zeros((self.side, self.side, 3), np.uint8), PADDING, self.normalised)
    record = self.records[index]
    image = photographs.centre_crop(record["image"], self.side, self.part)
    return _example(image, record["label"], self.normalised)


def _example(image: np.ndarray, label: int, normalised: bool) -> dict[str, np.ndarray]:
  if normalised:  # by rows: over three channels alone, NumPy's inner loop is too short
    height, width, _ = image.shape
    mean, scale = np.tile(np.float32(MEAN), width), np.tile(1 / np.float32(STD), width)
    image = ((image.reshape(height, -1) - mean) * scale).reshape(image.shape)
  return {"image": image, "label": np.int32(label)}


def _labels(source: Any, at_once: int = 1000) -> np.ndarray:
  """Of all records; many are read in one call, which is several times faster than one by one."""
  parts = [range(i, min(i + at_once, len(source))) for i in range(0, len(source), at_once)]
  found = [record["label"] for part in parts for record in source.__getitems__(part)]
  return np.array(found, np.int32)


def _process(process: tuple[int, int] | None) -> tuple[int, int]:
  if process is not None:
    return process
  import jax

  return jax.process_index(), jax.process_count()


def _iterate(batches: Any, workers: int | None, examples: int) -> Iterator[dict[str, np.ndarray]]:
  from absl import flags
  import grain

  # Grain's options are absl's flags, and reading one before they are parsed is an error:
  # UnparsedFlagAccessError. A program without `absl.app.run` never parses them.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  workers = worker_count(examples) if workers is None else workers
  # What waits is whole batches. Workers decode one at a time each, threads here as many as CPUs.
  threads = 1 if workers else len(os.sched_getaffinity(0))
  reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
  batches = batches.to_iter_dataset(reading)
  if workers:
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(batches)
