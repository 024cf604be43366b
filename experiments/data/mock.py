"""Made-up photographs in the place of sets that are too large, or not there.

They go the whole path of `streaming.py`: JPEG files of many sizes, in memory or in the ArrayRecord
files of a TFDS folder, with the features of TFDS's ImageNet.
"""

import dataclasses
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from experiments.data.streaming import Records


@dataclasses.dataclass(frozen=True)
class Photographs:
  """A sequence of `{"image": JPEG, "label": int, "file_name": bytes}`, as in TFDS's ImageNet.

  Record `i` has the class `i % classes`, and image `i % len(files)`.
  """

  files: tuple[bytes, ...]
  classes: int
  length: int

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, Any]:
    if index >= self.length:
      raise IndexError(index)
    label = index % self.classes
    name = f"{class_name(label)}_{index}.JPEG".encode()
    return {"image": self.files[index % len(self.files)], "label": label, "file_name": name}


def class_name(label: int) -> str:
  return f"class{label:04d}"


def photographs(
  length: int,
  classes: int = 10,
  sides: tuple[int, int] = (300, 500),
  distinct: int = 64,
  seed: int = 0,
) -> Photographs:
  """`length` records of at most `distinct` images: smooth noise around a colour.

  Heights and widths are uniform in `sides`, in pixels. Where `distinct` is a multiple of `classes`
  (or at least `length`), the colour tells the class.
  """
  count = min(length, distinct)
  colours = np.random.default_rng(seed).uniform(60, 195, (classes, 3))
  files = []
  for index in range(count):
    rng = np.random.default_rng((seed, index))
    small = colours[index % classes] + rng.normal(0, 40, (8, 8, 3))
    height, width = rng.integers(sides[0], sides[1] + 1, 2).tolist()
    image = Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    files.append(buffer.getvalue())
  return Photographs(tuple(files), classes, length)


def records(length: int, classes: int = 10, **options: Any) -> Records:
  """`photographs` as `streaming.train_batches` and `test_batches` take them."""
  return Records(photographs(length, classes, **options), classes)


def write_folder(
  data_dir: str | pathlib.Path, name: str, splits: dict[str, Photographs], shards: int = 2
) -> pathlib.Path:
  """Writes a TFDS folder `name` (version 1.0.0) with ArrayRecord files, without TensorFlow.

  Args:
    data_dir: as in `streaming.open_records` afterwards.
    name: of the data set, in lower case.
    splits: what is in each.
    shards: files that the longest split is in.
  """
  import tensorflow_datasets as tfds

  folder = pathlib.Path(data_dir) / name / "1.0.0"
  folder.mkdir(parents=True)
  classes = next(iter(splits.values())).classes
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(names=[class_name(label) for label in range(classes)]),
      "file_name": tfds.features.Text(),
    }
  )
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  longest = max(map(len, splits.values()))
  writer = tfds.core.SequentialWriter(
    info, max_examples_per_shard=-(-longest // shards), file_format="array_record"
  )
  writer.initialize_splits(list(splits))
  writer.add_examples({split: list(content) for split, content in splits.items()})
  writer.close_all()
  return folder
