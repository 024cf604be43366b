"""Augmentation inside the step: the laws of each function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import augmentation

KEY = jax.random.key(7)
BATCH = np.random.default_rng(0).integers(0, 256, (64, 9, 8, 3), np.uint8)
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


@pytest.mark.usefixtures("x64")
def test_means_over_views():
  rng = np.random.default_rng(1)
  x, weights = rng.normal(size=(5, 32, 32, 3)), rng.normal(size=(32 * 32 * 3, 10))
  logits = lambda images: jnp.tanh(images.reshape(len(images), -1) @ weights / 50)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
  shares = [(x, 0.5), (padded[:, 0:32, 0:32], 0.25), (padded[:, 2:34, 2:34], 0.25)]
  both = lambda images: (logits(images) + logits(images[:, :, ::-1])) / 2
  expected = {
    "one": logits(x),
    "mirrored": both(x),
    "shifted": sum(share * both(view) for view, share in shares),
  }
  assert len({bytes(np.asarray(own)) for own in expected.values()}) == 3
  for views, own in expected.items():
    np.testing.assert_allclose(augmentation.mean_over_views(logits, x, views), own, rtol=1e-12)


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
