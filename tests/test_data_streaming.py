"""Streaming of large sets: what is in a batch, on which process, and where a run goes on."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from experiments.data import folders, mock, photographs, streaming

pytest.importorskip("grain")

ROOT = pathlib.Path(__file__).parents[1]


def numbered(length):
  """Records whose label is their number."""
  files = mock.photographs(length, classes=1, sides=(12, 20), distinct=8).files
  return streaming.Records(mock.Photographs(files, length, length), length)


def stream(records, batch, **options):
  options = {"side": 8, "workers": 0, "process": (0, 1)} | options
  return streaming.train_batches(records, batch, **options)


def labels(batches):
  return np.concatenate([batch["label"] for batch in batches])


def equal(ours, theirs):
  return all(
    np.array_equal(a[name], b[name])
    for a, b in zip(ours, theirs, strict=True)
    for name in ("image", "label")
  )


def test_epochs_are_shuffles_without_what_fills_no_batch():
  batches = list(stream(numbered(23), 5, epochs=3))
  assert len(batches) == 12
  assert batches[0]["image"].shape == (5, 8, 8, 3) and batches[0]["image"].dtype == np.uint8
  epochs = labels(batches).reshape(3, 20)
  assert epochs.dtype == np.int32
  assert all(len(set(epoch)) == 20 for epoch in epochs)
  assert len({frozenset(epoch) for epoch in epochs}) == 3  # not the same ones left out
  assert equal(batches, stream(numbered(23), 5, epochs=3))
  other = labels(stream(numbered(23), 5, epochs=3, seed=1)).reshape(3, 20)
  assert not (other == epochs).all(1).any()
  # The crops of an image differ from epoch to epoch.
  find = lambda epoch, label: np.concatenate([b["image"] for b in batches[4 * epoch :]])[
    list(epochs[epoch:].ravel()).index(label)
  ]
  both = sorted(set(epochs[0]) & set(epochs[1]))
  assert any(not np.array_equal(find(0, label), find(1, label)) for label in both)
  same = mock.records(9, sides=(20, 30), distinct=1)
  one, other = (next(stream(same, 9, seed=seed))["image"] for seed in (0, 1))
  assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_stream_goes_on_where_it_was():
  reader = stream(numbered(23), 5)
  for _ in range(6):
    next(reader)
  state = json.loads(json.dumps(reader.get_state()))
  rest = [next(reader) for _ in range(7)]
  restored = stream(numbered(23), 5)
  restored.set_state(state)
  assert equal(rest, [next(restored) for _ in range(7)])
  started = stream(numbered(23), 5, start=6)
  assert equal(rest, [next(started) for _ in range(7)])
  assert not equal(rest, [next(started) for _ in range(7)])


def test_processes_share_each_batch():
  whole = list(stream(numbered(26), 6, epochs=2))
  parts = [list(stream(numbered(26), 6, epochs=2, process=(i, 3))) for i in range(3)]
  assert all(len(part) == 8 and len(part[0]["label"]) == 2 for part in parts)
  for step, batch in enumerate(whole):
    assert sorted(labels(part[step] for part in parts)) == sorted(batch["label"])
  with pytest.raises(ValueError, match="batch=6 of 26 records, over 4 processes"):
    stream(numbered(26), 6, process=(0, 4))
  with pytest.raises(ValueError, match="batch=27 of 26"):
    stream(numbered(26), 27)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_record_once(processes):
  records, seen = numbered(21), []
  for index in range(processes):
    batches = list(
      streaming.test_batches(records, 8, 8, workers=0, process=(index, processes), part=1.0)
    )
    assert [batch["image"].shape for batch in batches] == [(8 // processes, 8, 8, 3)] * 3
    seen.append(labels(batches))
    for batch in batches:
      for image, label in zip(batch["image"], batch["label"], strict=True):
        if label == streaming.PADDING:
          assert not image.any()
        else:
          middle = photographs.centre_crop(records[int(label)]["image"], 8)
          np.testing.assert_array_equal(image, middle)
  found = np.concatenate(seen)
  assert sorted(found[found != streaming.PADDING]) == list(range(21))
  assert (found == streaming.PADDING).sum() == 3


def test_normalised_images():
  plain, scaled = (next(stream(numbered(9), 9, normalised=flag)) for flag in (False, True))
  assert scaled["image"].dtype == np.float32
  back = scaled["image"].astype(float) * streaming.STD + streaming.MEAN
  np.testing.assert_allclose(back, plain["image"], atol=1e-4)


def test_some_classes_of_a_folder(empty_cache, tmp_path):
  mock.write_folder(tmp_path, "made_up", {"validation": mock.photographs(30, sides=(20, 30))})
  every = streaming.open_records("made_up", "validation", str(tmp_path))
  assert (len(every), every.classes) == (30, 10)
  assert folders.evaluation_split(every.source) == "validation"
  names = ["class0007", "class0002"]
  some = streaming.open_records("made_up", "validation", str(tmp_path), names)
  assert (len(some), some.classes) == (6, 2)
  assert sorted(record["label"] for record in map(some.__getitem__, range(6))) == [0] * 3 + [1] * 3
  sources = [every.source[int(i)] for i in some.chosen]
  assert {one["label"]: some[i]["label"] for i, one in enumerate(sources)} == {7: 0, 2: 1}
  assert all(one["file_name"].decode()[:9] in names for one in sources)
  batches = list(streaming.test_batches(some, 4, 16, workers=0, process=(0, 1)))
  assert sorted(labels(batches)) == [-1, -1, 0, 0, 0, 1, 1, 1]
  with pytest.raises(ValueError, match="no class 'class007': nearest is 'class0007'"):
    streaming.open_records("made_up", "validation", str(tmp_path), ["class007"])
  with pytest.raises(ValueError, match="twice"):
    streaming.open_records("made_up", "validation", str(tmp_path), names + names)


def test_made_up_photographs_and_throughput():
  records = mock.records(1000, classes=4, sides=(20, 30), distinct=8)
  assert len(records) == 1000 and records[999]["label"] == 3
  assert records[3]["image"] == records[11]["image"] != records[4]["image"]
  sizes = {Image.open(io.BytesIO(records[i]["image"])).size for i in range(8)}
  assert len(sizes) > 4 and all(20 <= side <= 30 for size in sizes for side in size)
  reader = stream(records, 10)
  assert streaming.images_per_second(reader, 5) > 10
  assert reader.get_state() == {"next_index": 6}
  assert streaming.worker_count(4_000) == 0 < streaming.worker_count(1_281_167) <= 16


WORKERS = """
import numpy as np
from experiments.data import mock, streaming

def main():
  records = mock.records(60, sides=(20, 30))
  read = lambda workers, **options: streaming.train_batches(
    records, 10, 8, workers=workers, process=(0, 1), **options
  )
  alone, many = read(0), read(2)
  for step in range(9):
    ours, theirs = next(alone), next(many)
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours), step
    state = many.get_state() if step == 3 else state if step > 3 else None
  many.set_state(state)
  started = read(0, start=4)
  for step in range(4, 12):
    ours, theirs = next(started), next(many)
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours), step
  many.close()
  print("the same")

if __name__ == "__main__":
  main()
"""


@pytest.mark.slow
def test_workers_make_the_same_batches(tmp_path):
  """In a program that parses no flags, as most are."""
  script = tmp_path / "program.py"
  script.write_text(WORKERS)
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "the same\n"
