"""The data sets of the benchmarks: what is read, kept, drawn and mixed, and in which order."""

import gzip
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from experiments import data
from experiments.data import (
  augmentation,
  byte_pairs,
  cache,
  folders,
  images,
  long_tail,
  mock,
  order,
  photographs,
  streaming,
  text,
)

ROOT = pathlib.Path(__file__).parents[1]

needs_tfds = pytest.mark.skipif(
  "TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR names no folder of prepared data sets"
)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("FOP_OPTAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


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
@needs_tfds
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
@needs_tfds
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
  for step in (29, 3, 11):
    expected = shuffles[step // 5][20 * (step % 5) : 20 * (step % 5) + 20]
    np.testing.assert_array_equal(order.batch_at(103, 20, 3, step), expected)
  assert not np.array_equal(order.permutation(103, 4, 0), shuffles[0])
  with pytest.raises(ValueError, match="A batch of 104 out of 103 examples"):
    order.epoch_batches(103, 104, 0, 0)


# Augmentation.

KEY = jax.random.key(7)
BATCH = noise(64, 9, 8, 3)
FUNCTIONS = {
  "pad_crop": augmentation.pad_crop,
  "flip": augmentation.flip,
  "cutout": lambda key, x: augmentation.cutout(key, x, 4),
  "random_resized_crop": lambda key, x: augmentation.random_resized_crop(key, x, 6),
}


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_augmentation_is_a_function_of_its_key_and_keeps_the_dtype(name, dtype):
  function, batch = jax.jit(FUNCTIONS[name]), jnp.asarray(BATCH, dtype)
  first, again, other = (function(key, batch) for key in (KEY, KEY, jax.random.key(8)))
  assert first.dtype == dtype
  assert first.shape == ((64, 6, 6, 3) if name == "random_resized_crop" else batch.shape)
  assert jnp.array_equal(first, again) and not jnp.array_equal(first, other)
  same_image = function(KEY, jnp.broadcast_to(batch[:1], batch.shape))
  assert len({np.asarray(image).tobytes() for image in same_image}) > 1  # each image has its draw


def test_flip_is_of_whole_images_and_of_half_of_them():
  out = np.asarray(augmentation.flip(KEY, BATCH))
  pairs = list(zip(out, BATCH, strict=True))
  flipped = [np.array_equal(image, before[:, ::-1]) for image, before in pairs]
  kept = [np.array_equal(image, before) for image, before in pairs]
  assert all(a != b for a, b in zip(flipped, kept, strict=True))
  assert 16 < sum(flipped) < 48


@pytest.mark.parametrize("fill", [0, (9, 8, 7), None])
def test_crops_are_windows_of_the_padded_image(fill):
  padding = 3
  out = np.asarray(augmentation.pad_crop(KEY, BATCH, padding, fill))
  margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  if fill is None:
    padded = np.pad(BATCH, margins, mode="reflect")
  else:
    padded = np.broadcast_to(np.uint8(fill), (64, 15, 14, 3)).copy()
    padded[:, 3:12, 3:11] = BATCH
  corners = []
  for image, whole in zip(out, padded, strict=True):
    found = [
      (top, left)
      for top in range(2 * padding + 1)
      for left in range(2 * padding + 1)
      if np.array_equal(whole[top : top + 9, left : left + 8], image)
    ]
    assert len(found) == 1
    corners += found
  tops, lefts = map(set, zip(*corners, strict=True))
  assert tops == lefts == set(range(2 * padding + 1))


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_fills_a_square_cut_off_at_the_edge(side):
  fill = jax.jit(lambda x: augmentation.cutout(KEY, x, side, fill=(5.0, 6.0)))
  out = np.asarray(fill(jnp.ones((256, 9, 8, 2))))
  extents = set()
  for image in out:
    hole = image[..., 0] == 5
    assert (image[hole] == (5, 6)).all() and (image[~hole] == 1).all()
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    assert hole.sum() == len(rows) * len(columns)  # a rectangle
    assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    for places, length in ((rows, 9), (columns, 8)):
      assert len(places) == side or places[0] == 0 or places[-1] == length - 1
      extents.add(len(places))
  assert extents == set(range(side // 2 if side % 2 == 0 else side // 2 + 1, side + 1))


@pytest.mark.usefixtures("x64")
def test_mixup_is_the_convex_combination():
  x = jnp.asarray(BATCH, jnp.float64)
  y = jax.nn.one_hot(np.arange(64) % 10, 10, dtype=jnp.float64)
  shares, pairings = [], set()
  for key in jax.random.split(KEY, 5):
    mixed, labels = jax.jit(augmentation.mixup)(key, x, y, 0.7)
    assert mixed.dtype == labels.dtype == jnp.float64
    # The share and the partner from the first image; the same share explains all others.
    flat, out = np.asarray(x).reshape(64, -1), np.asarray(mixed).reshape(64, -1)
    fits = []
    for partner in range(1, 64):
      across = flat[0] - flat[partner]
      share = (out[0] - flat[partner]) @ across / (across @ across)
      fits.append((np.abs(share * across + flat[partner] - out[0]).max(), share))
    error, share = min(fits)
    if share < 1 - 1e-9 and error < 1e-9:
      distances = np.abs((out - share * flat)[:, None] / (1 - share) - flat[None]).max(-1)
      partners = distances.argmin(1)
      assert distances.min(1).max() < 1e-6 and sorted(partners) == list(range(64))
      expected = share * np.asarray(y) + (1 - share) * np.asarray(y)[partners]
      np.testing.assert_allclose(labels, expected, atol=1e-9)
      shares.append(share)
      pairings.add(tuple(partners))
    np.testing.assert_allclose(np.asarray(labels).sum(1), 1, atol=1e-12)
  assert len(set(shares)) == len(pairings) >= 3 and all(0 <= share <= 1 for share in shares)
  narrow = x.astype(jnp.bfloat16), y.astype(jnp.float32)
  half = jax.eval_shape(lambda x, y: augmentation.mixup(KEY, x, y, 1.0), *narrow)
  assert [part.dtype for part in half] == [jnp.bfloat16, jnp.float32]
  with pytest.raises(TypeError, match="mixup needs labels in floating point, not int"):
    augmentation.mixup(KEY, x, jnp.arange(64), 1.0)


def test_random_resized_crops_are_of_the_image():
  crop = jax.jit(augmentation.random_resized_crop, static_argnums=(2, 3, 4))
  flat = jnp.broadcast_to(jnp.array([10.0, 20, 30]), (8, 9, 8, 3))
  np.testing.assert_allclose(crop(KEY, flat, 5), flat[:, :5, :5], 1e-5)
  whole = crop(KEY, jnp.asarray(BATCH), 4, (1.0, 1.0), (8 / 9, 8 / 9))
  expected = jax.image.resize(jnp.asarray(BATCH, jnp.float32), (64, 4, 4, 3), "linear")
  assert np.abs(np.asarray(whole) - np.asarray(expected)).max() <= 0.51
  # On a ramp, a crop is a ramp of the crop's width: what of the image's is in it.
  ramp = jnp.broadcast_to(jnp.arange(64.0)[None, None, :, None], (200, 64, 64, 1))
  crops = np.asarray(crop(KEY, ramp, 64, (0.25, 0.5), (1.0, 1.0)))
  steps = np.diff(crops[:, 32, 8:-8, 0], axis=1)
  assert np.ptp(steps, axis=1).max() < 1e-3
  widths = steps.mean(1)
  assert 0.5 - 1e-3 < widths.min() < 0.52 and 0.69 < widths.max() < 0.5**0.5 + 1e-3
  first = crops[:, 32, 8, 0] + 0.5 - 8.5 * widths  # left edge in the image: uniform over the room
  share = first / (64 - 64 * widths)
  assert -1e-3 < share.min() < 0.05 and 0.95 < share.max() < 1 + 1e-3


# Text.


def test_windows_are_of_the_text_and_of_seed_and_step():
  corpus = text.characters("to be, or not to be: that is the question. " * 20, 0.25)
  whole = np.concatenate([corpus.train, corpus.validation])
  assert corpus.decode(whole) == "to be, or not to be: that is the question. " * 20
  assert len(corpus.validation) == len(whole) // 4
  assert corpus.vocabulary == len(set(corpus.decode(whole))) and corpus.train.dtype == np.uint8
  counted = np.arange(100)
  x, y = text.windows(counted, 400, 7, seed=1, step=5)
  assert x.shape == y.shape == (400, 7) and x.dtype == y.dtype == np.int32
  np.testing.assert_array_equal(y, x + 1)
  np.testing.assert_array_equal(x, x[:, :1] + np.arange(7))
  assert x.min() == 0 and y.max() == 99
  np.testing.assert_array_equal(x, text.windows(counted, 400, 7, seed=1, step=5)[0])
  for seed, step in ((1, 6), (2, 5)):
    assert not np.array_equal(x, text.windows(counted, 400, 7, seed, step)[0])
  on_device = text.take(jnp.asarray(counted), text.starts(100, 400, 7, 1, 5), 7)
  assert all(np.array_equal(a, b) for a, b in zip(on_device, (x, y), strict=True))
  with pytest.raises(ValueError, match="7 ids hold no window of 7"):
    text.windows(counted[:7], 1, 7, 0, 0)


def test_blocks_have_every_id_but_the_first_as_a_target_once():
  for size in (99, 100, 101):
    x, y = text.blocks(np.arange(size), 9)
    np.testing.assert_array_equal(y.ravel(), np.arange(1, len(y) * 9 + 1))
    np.testing.assert_array_equal(x + 1, y)
    assert y.size == 9 * ((size - 1) // 9)
  assert text.id_type(256) == np.uint8 and text.id_type(257) == np.uint16
  assert text.id_type(65536) == np.uint16 and text.id_type(65537) == np.uint32


def test_no_shakespeare_says_where_it_goes(tmp_path):
  with pytest.raises(SystemExit, match="No .*tiny_shakespeare/1.0.0/input.txt. Put the text"):
    text.shakespeare(str(tmp_path))


@needs_tfds
def test_shakespeare():
  play = text.shakespeare()
  assert (len(play.train), len(play.validation), play.vocabulary) == (1003855, 111539, 65)
  assert play.decode(play.train[:14]) == "First Citizen:"


def test_byte_pairs(empty_cache, tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  plain, lines = tmp_path / "a.txt", tmp_path / "b.json.gz"
  plain.write_text("the cat sat on the mat, naïvely. " * 30, encoding="utf-8")
  with gzip.open(lines, "wt", encoding="utf-8") as file:
    for number in range(40):
      print(json.dumps({"text": f"the dog {number}", "url": "none"}), file=file)
  corpus = byte_pairs.byte_pairs([plain, lines], vocabulary=300, validation=0.2)
  whole = np.concatenate([corpus.train, corpus.validation])
  documents = [plain.read_text(encoding="utf-8"), *(f"the dog {number}" for number in range(40))]
  assert corpus.decode(whole) == "".join(one + byte_pairs.END for one in documents)
  assert corpus.vocabulary == 300 and whole.dtype == np.uint16 and whole.max() < 300
  assert isinstance(corpus.train, np.memmap)
  assert len(whole) < len("".join(documents)) / 2  # pairs were learned
  files = sorted(empty_cache.iterdir())
  assert [file.suffix for file in files] == [".npy", ".json"]
  before = [file.stat().st_mtime_ns for file in files]
  again = byte_pairs.byte_pairs([plain, lines], vocabulary=300, validation=0.2)
  np.testing.assert_array_equal(again.train, corpus.train)
  assert [file.stat().st_mtime_ns for file in files] == before  # nothing is made again
  given = byte_pairs.byte_pairs([lines], tokenizer=files[1], validation=0)
  expected = tokenizers.Tokenizer.from_file(str(files[1])).encode("the dog 0").ids
  assert given.train[: len(expected)].tolist() == expected
  assert given.decode(given.train).startswith("the dog 0" + byte_pairs.END)
  plain.write_text("another text")
  other = byte_pairs.byte_pairs([plain], tokenizer=files[1], validation=0)
  assert other.decode(other.train) == "another text" + byte_pairs.END
  with pytest.raises(SystemExit, match="No .*c.txt"):
    byte_pairs.byte_pairs([tmp_path / "c.txt"])


def test_byte_pairs_without_the_library(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(SystemExit, match=r"pip install 'fop_optax\[text\]'"):
    byte_pairs.byte_pairs([tmp_path / "a.txt"])


# Streaming.


def numbered(length):
  """Records whose label is their number."""
  files = mock.photographs(length, classes=1, sides=(12, 20), distinct=8).files
  return streaming.Records(mock.Photographs(files, length, length), length)


def stream(records, batch, **options):
  pytest.importorskip("grain")
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
  pytest.importorskip("grain")
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
  pytest.importorskip("grain")
  mock.write_folder(tmp_path, "made_up", {"validation": mock.photographs(30, sides=(20, 30))})
  every = streaming.open_records("made_up", "validation", str(tmp_path))
  assert (len(every), every.classes) == (30, 10)
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
  pytest.importorskip("grain")
  script = tmp_path / "program.py"
  script.write_text(WORKERS)
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "the same\n"
