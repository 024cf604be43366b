"""Small data sets: what is read, cached and kept, and in which order a run sees it."""

import io
import pathlib
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from experiments import data
from experiments.data import cache, folders, images, long_tail, mock, order, photographs, streaming

ROOT = pathlib.Path(__file__).parents[1]


def needs(name):
  """For tests that read a prepared set."""
  reason = f"no {name} in the folder of prepared data sets"
  return pytest.mark.skipif(not (folders.root() / name).is_dir(), reason=reason)


def encoded(pixels, form="PNG", mode=None):
  buffer = io.BytesIO()
  Image.fromarray(pixels, mode).save(buffer, form)
  return buffer.getvalue()


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# The cache.


def test_arrays_are_made_once_and_again_where_the_file_is_broken(empty_cache):
  made = []

  def make():
    made.append(1)
    return {"a": np.arange(5), "b": noise(3, 2)}

  first, second = cache.arrays("key", make), cache.arrays("key", make)
  assert len(made) == 1
  assert all(np.array_equal(first[name], second[name]) for name in ("a", "b"))
  (file,) = empty_cache.iterdir()
  file.write_bytes(file.read_bytes()[:100])
  assert np.array_equal(cache.arrays("key", make)["a"], np.arange(5))
  assert len(made) == 2


def test_a_killed_or_failed_writer_leaves_no_file(empty_cache):
  path = empty_cache / "file"
  with pytest.raises(KeyError), cache.replacing(path) as file:
    file.write(b"half")
    raise KeyError
  assert list(empty_cache.iterdir()) == []
  script = (
    "import os, pathlib, sys; from experiments.data import cache\n"
    "with cache.replacing(pathlib.Path(sys.argv[1])) as file:\n"
    "  file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
  )
  done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT)
  assert done.returncode == -signal.SIGKILL
  assert not path.exists()
  with cache.replacing(path) as file:
    file.write(b"whole")
  assert path.read_bytes() == b"whole"


def test_no_cache_is_a_warning(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  monkeypatch.setenv("FOP_OPTAX_CACHE", str(tmp_path / "file"))
  with pytest.warns(UserWarning, match="FOP_OPTAX_CACHE"):
    assert cache.arrays("key", lambda: {"a": np.ones(1)})["a"] == 1


# Small sets.


def test_a_folder_is_decoded_once(empty_cache, tmp_path, monkeypatch):
  splits = {"train": mock.photographs(30, sides=(20, 40)), "test": mock.photographs(10, seed=1)}
  mock.write_folder(tmp_path, "made_up", splits)
  with pytest.raises(SystemExit, match="many sizes"):
    data.load("made_up", str(tmp_path))
  first = data.load("made_up", str(tmp_path), side=16)
  assert first.train_images.shape == (30, 16, 16, 3)
  assert first.test_images.shape == (10, 16, 16, 3)
  assert first.train_images.dtype == np.uint8
  assert sorted(first.train_labels) == sorted(list(range(10)) * 3)
  assert first.classes == 10
  np.testing.assert_allclose(first.mean, first.train_images.mean((0, 1, 2)), rtol=1e-6)
  monkeypatch.setattr(photographs, "centre_crop", None)  # no second decoding
  second = data.load("made_up", str(tmp_path), side=16)
  assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_folder_of_the_same_name_is_not_taken_from_the_cache(empty_cache, tmp_path):
  for number in (0, 1):
    photos = mock.photographs(10, sides=(20, 40), seed=number)
    mock.write_folder(tmp_path / str(number), "made_up", {"train": photos, "test": photos})
  one, other = (data.load("made_up", str(tmp_path / str(number)), side=8) for number in (0, 1))
  assert not np.array_equal(one.train_images, other.train_images)


def test_what_cannot_be_downloaded_says_so(tmp_path):
  with pytest.raises(SystemExit, match="ILSVRC2012_img_train.tar"):
    streaming.open_records("imagenet2012", "train", str(tmp_path))
  with pytest.raises(SystemExit, match=r"tfds.builder\('caltech101', "):
    data.load("caltech101_80px", str(tmp_path))
  with pytest.raises(SystemExit, match=r"tfds.builder\('cifar100', "):
    data.load("cifar100", str(tmp_path))


@pytest.mark.slow
@needs("caltech101_80px")
def test_photographs_of_a_prepared_folder(empty_cache):
  photos = data.load("caltech101_80px")
  assert photos.train_images.shape == (3712, 80, 80, 3)
  assert photos.test_images.shape == (1010, 80, 80, 3)
  assert photos.classes == 101 and (np.bincount(photos.test_labels) == 10).all()
  source = folders.open_source("caltech101_80px", "test")
  with Image.open(io.BytesIO(source[5]["image"])) as image:
    pixels = np.asarray(image.convert("RGB"))
  top, left = (pixels.shape[0] - 80) // 2, (pixels.shape[1] - 80) // 2
  difference = pixels[top : top + 80, left : left + 80] - photos.test_images[5].astype(int)
  assert np.abs(difference).mean() < 10  # half a pixel aside where the longer side is odd


# Photographs.


def test_the_middle_of_an_image_is_its_pixels():
  pixels = noise(20, 30, 3)
  np.testing.assert_array_equal(photographs.decode(encoded(pixels)), pixels)
  np.testing.assert_array_equal(photographs.centre_crop(encoded(pixels), 20), pixels[:, 5:25])
  half = photographs.centre_crop(encoded(pixels), 10, part=0.5)
  np.testing.assert_array_equal(half, pixels[5:15, 10:20])
  grey = noise(8, 8)
  np.testing.assert_array_equal(photographs.decode(encoded(grey)), grey[..., None])
  in_colour = np.repeat(grey[..., None], 3, 2)
  np.testing.assert_array_equal(photographs.centre_crop(encoded(grey), 8), in_colour)
  assert photographs.centre_crop(encoded(noise(64, 64, 4), "JPEG", "CMYK"), 16).shape == (16, 16, 3)


def test_decoding_at_a_lower_scale_gives_the_same_picture():
  smooth = np.asarray(Image.fromarray(noise(6, 9, 3)).resize((450, 300)))
  box = (31.0, 17.0, 331.0, 289.0)
  ours = photographs._cut(Image.open(io.BytesIO(encoded(smooth, "JPEG"))), box, 32)
  exact = Image.fromarray(smooth).resize((32, 32), Image.Resampling.BILINEAR, box=box)
  assert np.abs(ours.astype(int) - np.asarray(exact)).max() <= 6


def test_random_rectangles_are_inside_and_of_the_areas_asked_for():
  rng, shape = np.random.default_rng(0), (90, 60)
  boxes = [photographs.random_box(shape, rng, (0.2, 0.8), (0.5, 2.0)) for _ in range(400)]
  left, top, right, bottom = np.array(boxes).T
  assert left.min() >= 0 and top.min() >= 0 and right.max() <= 90 and bottom.max() <= 60
  areas, ratios = (right - left) * (bottom - top) / 5400, (right - left) / (bottom - top)
  assert 0.19 < areas.min() < 0.25 and 0.7 < areas.max() < 0.81
  assert 0.48 < ratios.min() < 0.6 and 1.7 < ratios.max() < 2.1
  # None fits: the largest in the middle of an allowed ratio.
  wide = photographs.random_box((400, 10), rng, (0.9, 1.0), (0.5, 2.0))
  assert wide == (190, 0, 210, 10)


# Long tails.

BALANCED = [(10, 5000), (100, 500)]
COUNTS = {
  (10, 10): [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
  (10, 50): [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
  (10, 100): [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
}
TOTALS = {
  (10, 10): 20431, (10, 50): 13996, (10, 100): 12406,
  (100, 10): 19573, (100, 50): 12608, (100, 100): 10847,
}  # fmt: skip


def balanced(classes, largest):
  """As CIFAR, one pixel an image, which tells the image's number."""
  labels = np.random.default_rng(5).permutation(np.repeat(np.arange(classes), largest))
  number = np.arange(len(labels))
  pixels = np.stack([number % 256, number // 256, 0 * number], -1).astype(np.uint8)
  labels = labels.astype(np.int32)
  return images.with_moments(pixels[:, None, None], labels, pixels[:7, None, None], labels, classes)


@pytest.mark.parametrize(("classes", "largest"), BALANCED)
def test_long_tail_counts(classes, largest):
  full = balanced(classes, largest)
  for imbalance in (10, 50, 100):
    tail = data.long_tailed(full, imbalance)
    counts = np.bincount(tail.train_labels).tolist()
    assert counts == COUNTS.get((classes, imbalance), counts)
    assert counts == long_tail.class_counts(largest, classes, imbalance)
    assert len(tail.train_images) == sum(counts) == TOTALS[classes, imbalance]
    assert counts[0] == largest and counts[-1] == largest // imbalance
    assert tail.test_images is full.test_images


def numbers(part):
  return part.train_images[:, 0, 0, 0].astype(int) + 256 * part.train_images[:, 0, 0, 1].astype(int)


def test_long_tails_keep_a_seeded_choice_of_each_class():
  full = balanced(10, 500)
  low, high = data.long_tailed(full, 10), data.long_tailed(full, 100)
  for tail in (low, high):
    assert (full.train_labels[numbers(tail)] == tail.train_labels).all()
    assert len(set(numbers(tail))) == len(tail.train_labels)
  assert set(numbers(high)) < set(numbers(low))
  assert (numbers(high) == numbers(data.long_tailed(full, 100))).all()
  assert set(numbers(high)) != set(numbers(data.long_tailed(full, 100, seed=1)))
  assert sorted(numbers(data.long_tailed(full, 1))) == list(range(5000))
  np.testing.assert_allclose(high.mean, high.train_images.mean((0, 1, 2)), rtol=1e-6)
  with pytest.raises(ValueError, match="at least 1"):
    data.long_tailed(full, 0.01)
  without = full._replace(train_labels=np.where(full.train_labels == 9, 0, full.train_labels))
  with pytest.raises(ValueError, match="Class 9 has 0 images, of which 50 are to be kept"):
    data.long_tailed(without, 10)


@pytest.mark.slow
@needs("cifar10")
def test_long_tail_of_cifar():
  tail = data.long_tailed(data.load("cifar10"), 100)
  assert np.bincount(tail.train_labels).tolist() == COUNTS[10, 100]
  assert tail.train_images.shape == (12406, 32, 32, 3)


# Order.


def test_epochs_are_the_shuffles_of_one_generator():
  rng = np.random.default_rng(3)
  shuffles = [rng.permutation(103) for _ in range(6)]
  for epoch in (4, 0, 5, 2, 2, 1):
    np.testing.assert_array_equal(order.permutation(103, 3, epoch), shuffles[epoch])
    batches = order.epoch_batches(103, 20, 3, epoch)
    assert batches.shape == (5, 20) and batches.dtype == np.int32
    np.testing.assert_array_equal(batches.ravel(), shuffles[epoch][:100])
  assert not np.array_equal(order.permutation(103, 4, 0), shuffles[0])
  with pytest.raises(ValueError, match="A batch of 104 out of 103 examples"):
    order.epoch_batches(103, 104, 0, 0)


def test_examples_are_mirrored_in_every_other_epoch():
  first = order.mirrored(1000, 3, 0)
  assert first.dtype == bool and 400 < first.sum() < 600
  for epoch in (5, 2, 1, 4):
    np.testing.assert_array_equal(order.mirrored(1000, 3, epoch), first ^ (epoch % 2 == 1))
  assert 400 < (first ^ order.mirrored(1000, 4, 0)).sum() < 600
