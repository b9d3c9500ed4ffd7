"""Augmentation on the device against brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.data.augment import Augmentation, cutout, flip, mix, shift

RNG = np.random.default_rng(0)
MIX = jax.jit(
  mix,
  static_argnums=(4, 5),
  compiler_options={'xla_backend_optimization_level': 0},
)


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def image(height=5, width=6, channels=2):
  """Every pixel another value, none 0."""
  values = np.arange(1, height * width * channels + 1)
  return jnp.asarray(values.reshape(height, width, channels), jnp.float32)


def augmentation(**fields):
  return Augmentation(7, np.zeros(1), np.ones(1), **fields)


def run(augment):
  # The draws are long programs that run once.
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(lambda *args: augment(*args), compiler_options=options)


# Shift and flip.


@pytest.mark.parametrize('pixels', [1, 2, 4])
def test_shift_is_a_crop_of_the_padded_image_at_every_place(pixels):
  x = image()
  padded = np.pad(x, ((pixels, pixels), (pixels, pixels), (0, 0)))
  crops = {
    padded[r : r + 5, c : c + 6].tobytes(): (r, c)
    for r in range(2 * pixels + 1)
    for c in range(2 * pixels + 1)
  }
  n = 40 * len(crops)
  shifted = jax.vmap(lambda k: shift(k, x, pixels))(keys(n))
  places = [crops[s.tobytes()] for s in np.asarray(shifted)]
  counts = np.unique(places, axis=0, return_counts=True)[1]
  assert len(counts) == len(crops)  # All of them,
  assert abs(counts - 40).max() < 6 * math.sqrt(40)  # and alike.


def test_shift_keeps_uint8():
  x = image().astype(jnp.uint8)
  assert shift(jax.random.key(0), x, 2).dtype == jnp.uint8


def test_flip_mirrors_half_of_the_images_left_to_right():
  x, n = image(), 2000
  flipped = np.asarray(jax.vmap(lambda k: flip(k, x))(keys(n)))
  mirrored = (flipped == np.asarray(x)[:, ::-1]).all((1, 2, 3))
  same = (flipped == np.asarray(x)).all((1, 2, 3))
  assert (mirrored ^ same).all()
  assert abs(mirrored.sum() - n / 2) < 5 * math.sqrt(n / 4)


# Cutout.


@pytest.mark.parametrize('size', [1, 2, 3, 20])
def test_cutout_blanks_a_square_around_a_pixel_of_the_image(size):
  x, height, width = image(), 5, 6
  results = {}
  for r in range(height):
    for c in range(width):
      expected = np.array(x)
      top, left = r - size // 2, c - size // 2
      for i in range(top, top + size):
        for j in range(left, left + size):
          if 0 <= i < height and 0 <= j < width:
            expected[i, j] = 0
      results[expected.tobytes()] = (r, c)
  cut = jax.vmap(lambda k: cutout(k, x, size))(keys(1500))
  found = {c.tobytes() for c in np.asarray(cut)}
  assert found == results.keys()


def test_cutout_is_at_the_mean_after_normalization():
  augment = Augmentation(7, np.array([100.0]), np.array([30.0]), cutout=2)
  images = jnp.full((3, 4, 4, 1), 250, jnp.uint8)
  out, _ = augment(
    images, jnp.zeros(3, jnp.int32), jax.random.key(0), jnp.arange(3)
  )
  np.testing.assert_allclose(np.unique(out), [0, 5], rtol=1e-6)


def test_cutout_is_independent_of_the_shift():
  n, size = 3000, 9
  images = jnp.full((n, size, size, 1), 1, jnp.uint8)
  images = images.at[:, 4, 4].set(9)  # Where it goes says how it was shifted.
  labels, examples = jnp.zeros(n, jnp.int32), jnp.arange(n)
  key = jax.random.key(0)
  shifted, _ = run(augmentation(shift=4))(images, labels, key, examples)
  blank, _ = run(augmentation(cutout=1))(images, labels, key, examples)
  moved = np.asarray(shifted).reshape(n, -1).argmax(-1)
  cut = np.asarray(blank).reshape(n, -1).argmin(-1)
  for axis in range(2):  # Rows, then columns; 37 images to a pair on average.
    pairs = {
      (np.unravel_index(m, (9, 9))[axis], np.unravel_index(c, (9, 9))[axis])
      for m, c in zip(moved, cut, strict=True)
    }
    assert len(pairs) == 81


def test_cutout_is_independent_of_the_flip():
  n = 4000
  images = jnp.ones((n, 4, 4, 1), jnp.uint8).at[:, :, 0].set(2)
  labels, examples = jnp.zeros(n, jnp.int32), jnp.arange(n)
  key = jax.random.key(0)
  flipped, _ = run(augmentation(flip=True))(images, labels, key, examples)
  blank, _ = run(augmentation(cutout=1))(images, labels, key, examples)
  mirrored = np.asarray(flipped)[:, 0, 0, 0] == 1
  column = np.asarray(blank).reshape(n, -1).argmin(-1) % 4
  for c in range(4):
    share = mirrored[column == c].mean()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / (n / 4))


# Mixing.


def batch(n=64, height=6, width=5, classes=4):
  images = RNG.normal(size=(n, height, width, 3)).astype(np.float32)
  targets = np.eye(classes, dtype=np.float32)[np.arange(n) % classes]
  return jnp.asarray(images), jnp.asarray(targets)


@pytest.fixture
def cheap_shares(monkeypatch):
  # Beta takes longer to compile than all the rest; other tests have it.
  monkeypatch.setattr(
    jax.random, 'beta', lambda key, a, b: jax.random.uniform(key)
  )


MIXES = {'mixup': (0.4, 0.0), 'cutmix': (0.0, 1.0), 'both': (0.4, 1.0)}


@pytest.mark.parametrize('name', MIXES)
def test_targets_stay_shares(name, cheap_shares):
  images, targets = batch()
  _, mixed = MIX(
    jax.random.key(1), images, targets, jnp.arange(64), *MIXES[name]
  )
  np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-6)
  assert (mixed >= 0).all()
  assert ((mixed > 0).sum(-1) == 2).any()


@pytest.mark.parametrize('name', MIXES)
def test_pairs_are_mixed_with_each_other_alike(name, cheap_shares):
  images, targets = batch()
  mixed, shares = MIX(
    jax.random.key(2), images, targets, jnp.arange(64), *MIXES[name]
  )
  pairs, mixed_pairs = (
    np.asarray(x).reshape(32, 2, *x.shape[1:]) for x in (images, mixed)
  )
  # What leaves one image goes to the other.
  np.testing.assert_allclose(mixed_pairs.sum(1), pairs.sum(1), atol=1e-5)
  own = np.asarray(shares)[np.arange(64), np.arange(64) % 4].reshape(32, 2)
  np.testing.assert_allclose(own[:, 0], own[:, 1], atol=1e-6)


def test_mixup_blends_images_as_targets(cheap_shares):
  images, targets = batch()
  mixed, shares = MIX(
    jax.random.key(3), images, targets, jnp.arange(64), 0.4, 0.0
  )
  own = np.asarray(shares)[np.arange(64), np.arange(64) % 4]
  other = np.asarray(images)[np.arange(64) ^ 1]
  w = own[:, None, None, None]
  expected = w * np.asarray(images) + (1 - w) * other
  np.testing.assert_allclose(mixed, expected, atol=1e-5)
  assert len(np.unique(own.round(6))) > 25  # Each pair has a share of its own.


def test_cutmix_pastes_a_box_whose_pixels_are_the_share(cheap_shares):
  images, targets = batch()
  mixed, shares = MIX(
    jax.random.key(4), images, targets, jnp.arange(64), 0.0, 1.0
  )
  images, mixed = np.asarray(images), np.asarray(mixed)
  other = images[np.arange(64) ^ 1]
  pasted = np.isclose(mixed, other, atol=1e-6).all(-1)
  kept = np.isclose(mixed, images, atol=1e-6).all(-1)
  assert (pasted ^ kept).all()
  for i in range(64):
    rows, columns = np.nonzero(pasted[i])
    if len(rows):  # A full rectangle.
      box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
      assert pasted[i].sum() == box
    own = shares[i, i % 4]
    assert own == pytest.approx(1 - pasted[i].mean(), abs=1e-6)


def test_where_both_are_on_each_pair_is_given_to_one(cheap_shares):
  n = 2000
  images = jnp.zeros((n, 4, 4, 1)).at[1::2].set(1.0)
  targets = jnp.eye(2)[jnp.arange(n) % 2]
  mixed, shares = MIX(
    jax.random.key(5), images, targets, jnp.arange(n), 5.0, 1.0
  )
  blends = np.asarray(mixed)[::2].reshape(n // 2, -1)
  by_cutmix = np.isin(blends, (0, 1)).all(-1)
  assert (by_cutmix | (np.ptp(blends, axis=-1) < 1e-6)).all()
  assert abs(by_cutmix.mean() - 0.5) < 5 * math.sqrt(0.25 / (n / 2))
  np.testing.assert_allclose(shares[::2, 1], blends.mean(-1), atol=1e-6)


@pytest.mark.parametrize('alpha', [0.2, 1.0, 4.0])
def test_mixup_shares_are_beta_distributed(alpha):
  n = 8000
  images, targets = jnp.zeros((n, 1, 1, 1)), jnp.eye(2)[jnp.arange(n) % 2]
  _, shares = mix(jax.random.key(6), images, targets, jnp.arange(n), alpha, 0.0)
  own = np.asarray(shares)[::2, 0]
  variance = 1 / (4 * (2 * alpha + 1))
  assert own.mean() == pytest.approx(
    0.5, abs=5 * math.sqrt(variance / len(own))
  )
  assert own.var() == pytest.approx(variance, rel=0.1)


def test_cutmix_boxes_are_one_minus_beta_where_the_edge_does_not_cut():
  # Beta(1, 1): the side is sqrt of a uniform share. Without the edges a box
  # would cover 1/2 on average; centred anywhere, each side keeps
  # E[s - s^2/4] of its length for s <= 1, so that E = E[(s - s^2/4)^2].
  n, side = 8000, 64
  images = jnp.zeros((n, side, side, 1))
  targets = jnp.eye(2)[jnp.arange(n) % 2]
  _, shares = MIX(jax.random.key(7), images, targets, jnp.arange(n), 0.0, 1.0)
  covered = 1 - np.asarray(shares)[::2, 0]
  s = np.sqrt((np.arange(100_000) + 0.5) / 100_000)
  expected = ((s - s**2 / 4) ** 2).mean()
  assert covered.mean() == pytest.approx(expected, abs=0.02)


ALL = {'shift': 2, 'flip': True, 'cutout': 2}


@pytest.mark.sampled(1)
@pytest.mark.parametrize('mixing', [{}, {'mixup': 0.5, 'cutmix': 1.0}])
def test_cutting_the_batch_into_even_parts_changes_nothing(
  mixing, cheap_shares
):
  augment = run(augmentation(**ALL, **mixing))
  images = RNG.integers(0, 256, (12, 6, 6, 1), np.uint8)
  labels = np.arange(12) % 7
  key = jax.random.key(8)
  whole = augment(images, labels, key, np.arange(12))
  for parts in (2, 3, 6):
    cut = [
      augment(images[i], labels[i], key, i)
      for i in np.split(np.arange(12), parts)
    ]
    for k in range(2):
      np.testing.assert_array_equal(
        np.concatenate([part[k] for part in cut]), whole[k]
      )


def test_places_in_the_batch_and_steps_have_draws_of_their_own():
  augment = run(augmentation(**ALL))
  images = jnp.broadcast_to(image(8, 8, 1).astype(jnp.uint8), (16, 8, 8, 1))
  labels, examples = jnp.zeros(16, jnp.int32), jnp.arange(16)
  one, _ = augment(images, labels, jax.random.key(0), examples)
  two, _ = augment(images, labels, jax.random.key(1), examples)
  assert len({x.tobytes() for x in np.asarray(one)}) > 12
  assert not (np.asarray(one) == np.asarray(two)).all()


def test_nothing_on_is_normalization_and_one_hot():
  augment = Augmentation(7, np.array([10.0, 20.0]), np.array([2.0, 4.0]))
  images = RNG.integers(0, 256, (5, 3, 4, 2), np.uint8)
  labels = np.array([0, 6, 3, 3, 1])
  out, targets = augment(
    jnp.asarray(images), labels, jax.random.key(0), jnp.arange(5)
  )
  np.testing.assert_allclose(
    out, (images - [10.0, 20.0]) / [2.0, 4.0], rtol=1e-6
  )
  np.testing.assert_array_equal(targets, np.eye(7)[labels])
  assert (out.dtype, targets.dtype) == (jnp.float32, jnp.float32)
