"""The data sets that fit on a device: where their images come from."""

import contextlib
import errno
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from skipinit_jax.data.augment import Augmentation
from skipinit_jax.data.decode import DecodeError, decode
from skipinit_jax.data.fields import hold_out
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import (
  Source,
  check_label,
  find_prepared,
  local_path,
  source_of,
)
from skipinit_jax.data.resident import Resident
from skipinit_jax.errors import InputError
from skipinit_jax.files import commit, retry


def digits(config: ConfigDict) -> Resident:
  """scikit-learn's 1,797 images of handwritten digits, 8x8, values 0 to 16.

  The test split is 360 images, stratified by class and always the same.
  """
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  bunch = load_digits()
  images = bunch.images.astype(np.uint8)[..., None]
  split = train_test_split(
    images, bunch.target, test_size=360, stratify=bunch.target, random_state=0
  )
  images, eval_images, labels, eval_labels = split
  return _resident(config, images, labels, eval_images, eval_labels, 10)


def cifar(config: ConfigDict) -> Resident:
  """cifar10 or cifar100, prepared by tfds in the folder `data.dir`.

  The PNGs are decoded once, to a file beside them that later runs read and
  compare with its digest.
  """
  source = source_of(config)
  train, evaluation = (
    _decoded(config, source, split) for split in ('train', 'test')
  )
  return _resident(config, *train, *evaluation, len(source.classes))


def _decoded(
  config: ConfigDict, source: Source, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """All images of a split, uint8 (n, height, width, 3), and their labels."""
  records = source.open(split)
  folder = find_prepared(config.name, local_path(config.dir))
  cache = folder / f'decoded-{split}-{len(records)}.npz'
  if cache.exists() and (arrays := retry(lambda: _kept(cache))):
    return arrays
  images, labels = [], []
  for i in tqdm(range(len(records)), f'{config.name} {split}', disable=None):
    try:
      record = retry(lambda i=i: records[i])
      images.append(decode(record.data).pixels.copy())
    except Unreadable as error:
      raise InputError(
        f'{error.name} can not be read: {error.reason}'
      ) from None
    except DecodeError as error:
      raise InputError(f'{record.name} can not be decoded: {error}') from None
    check_label(record, len(source.classes))
    labels.append(record.label)
  if len({image.shape for image in images}) > 1:
    raise InputError(f'the images of {config.name} are not all of one size')
  arrays = np.stack(images), np.array(labels)
  temporary = cache.with_name(f'incomplete-{os.getpid()}-{cache.name}')
  try:
    np.savez(
      temporary, images=arrays[0], labels=arrays[1], digest=_digest(*arrays)
    )
    commit(temporary, cache)
  except OSError:  # A folder that we may only read: decoded every time.
    temporary.unlink(missing_ok=True)
  return arrays


def _kept(cache: Path) -> tuple[np.ndarray, np.ndarray] | None:
  """Decoded images and labels; None, and the file set aside, if damaged."""
  try:
    with cache.open('rb') as file, np.load(file) as arrays:
      images, labels = arrays['images'], arrays['labels']
      if arrays['digest'].item() == _digest(images, labels):
        return images, labels
    reason = 'not what its digest says'
  except Exception as error:
    # numpy and zipfile raise whatever they meet in a damaged file: EINVAL where
    # its directory points to a place before the file.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
      # The disk, not the file. Errors of read(2) come without a name.
      raise OSError(error.errno, error.strerror, str(cache)) from None
    reason = f'{type(error).__name__}: {error}'
  print(f'{cache} is damaged ({reason}); decoding again', file=sys.stderr)
  # Another process may have done so, or we may only read the folder.
  with contextlib.suppress(OSError):
    os.replace(cache, cache.with_name(f'damaged-{cache.name}'))
  return None


def _digest(images: np.ndarray, labels: np.ndarray) -> str:
  """SHA-256 of the arrays with their shapes and dtypes."""
  digest = hashlib.sha256()
  for array in (images, labels):
    digest.update(f'{array.dtype}{array.shape}'.encode())
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


def synthetic(config: ConfigDict) -> Resident:
  """Random images and labels of any shape, for smoke tests and benchmarks."""
  rng = np.random.default_rng(0)
  shape = config.height, config.width, config.channels

  def draw(n):
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, rng.integers(0, config.num_classes, n)

  train, evaluation = draw(config.train_size), draw(config.eval_size)
  return _resident(config, *train, *evaluation, config.num_classes)


def _resident(
  config: ConfigDict,
  images: np.ndarray,
  labels: np.ndarray,
  eval_images: np.ndarray,
  eval_labels: np.ndarray,
  num_classes: int,
) -> Resident:
  """Applies what is common: the validation split and the augmentation."""
  if config.validation:
    rest, held = hold_out(config, len(images))
    eval_images, eval_labels = images[held], labels[held]
    images, labels = images[rest], labels[rest]
  return Resident(
    name=config.name,
    images=images,
    labels=labels,
    eval_images=eval_images,
    eval_labels=eval_labels,
    augmentation=augmentation(
      config, num_classes, images.shape[1:], *_moments(images)
    ),
  )


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation over all images and pixels, by channel."""
  axes = (0, 1, 2)
  mean, std = images.mean(axes, np.float64), images.std(axes, np.float64)
  return mean, np.maximum(std, 1e-3)


def augmentation(
  config: ConfigDict,
  num_classes: int,
  image_shape: tuple[int, ...],
  mean: np.ndarray,
  std: np.ndarray,
) -> Augmentation:
  """What `config` (a recipe's `data`) says happens on the device."""
  side = min(image_shape[:2])
  for field in ('shift', 'cutout'):
    if not 0 <= config[field] <= side:
      raise InputError(
        f'data.{field}={config[field]}: expected a number of pixels from 0 to '
        f'{side}, the side of an image'
      )
  return Augmentation(
    num_classes,
    mean,
    std,
    **{
      field: config[field]
      for field in ('shift', 'flip', 'cutout', 'mixup', 'cutmix')
    },
  )
