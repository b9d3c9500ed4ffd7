"""imagenet2012 (ILSVRC 2012): its sizes, file names and labels."""

import functools
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from skipinit_jax.data.extras import require
from skipinit_jax.errors import InputError

NAME = 'imagenet2012'
SIZES = {'train': 1_281_167, 'validation': 50_000}
ARCHIVES = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
# Classes of the first validation images, as the challenge published them.
KNOWN = ('n01751748', 'n09193705', 'n02105855', 'n04263257', 'n03125729')


@functools.cache
def synsets() -> list[str]:
  """The 1,000 classes in the order of their numbers."""
  return _lines('labels.txt')


@functools.cache
def _validation_synsets() -> list[str]:
  """The class of each validation image, in the order of their numbers."""
  found = _lines('validation_labels.txt')
  if tuple(found[: len(KNOWN)]) != KNOWN:
    raise InputError(
      "tensorflow-datasets' validation labels are not those of the challenge; "
      'install another version of it'
    )
  return found


def _lines(file: str) -> list[str]:
  tfds = require('tensorflow_datasets')
  path = tfds.core.tfds_path(f'datasets/imagenet2012/{file}')
  return path.read_text().split()


def label_of(name: str) -> int | None:
  """The label that an image's own file name implies, or None.

  Args:
    name: contains the file name: n01440764_10026.JPEG, with the class of a
      training image, or ILSVRC2012_val_00000001.JPEG, with the number of a
      validation image.
  """
  if match := re.search(r'ILSVRC2012_val_(\d{8})\.', name):
    number = int(match[1])
    if not 1 <= number <= SIZES['validation']:
      return None
    return synsets().index(_validation_synsets()[number - 1])
  if match := re.search(r'(n\d{8})_\d+\.', name):
    return synsets().index(match[1]) if match[1] in synsets() else None
  return None


def wrong_sizes(sizes: Mapping[str, int]) -> list[str]:
  """A line for each split whose number of images is not the published one."""
  return [
    f'{split}: {sizes.get(split, 0):,} images, not {size:,}'
    for split, size in SIZES.items()
    if sizes.get(split) != size
  ]


def check_archives(folder: Path) -> None:
  """Checks both archives by the names of their members.

  tfds labels a validation image by the rank of its name among those it finds:
  one missing file silently mislabels all that follow.

  Args:
    folder: of the archives.

  Raises:
    InputError: an archive is missing, cut off, or not what was published.
  """
  for name in ARCHIVES:
    if not (folder / name).is_file():
      raise InputError(
        f'no {name} in {folder}; both archives are wanted: '
        f'{" and ".join(ARCHIVES)}, from https://image-net.org'
      )
  train, validation = (_members(folder / name) for name in ARCHIVES)
  _check_members(
    f'{ARCHIVES[0]} must hold an archive for each of the 1000 classes',
    train,
    {f'{synset}.tar' for synset in synsets()},
  )
  count = SIZES['validation']
  _check_members(
    f'{ARCHIVES[1]} must hold the images ILSVRC2012_val_00000001.JPEG to '
    f'{count:08d}.JPEG',
    validation,
    {f'ILSVRC2012_val_{n + 1:08d}.JPEG' for n in range(count)},
  )


def _members(path: Path) -> list[str]:
  """The names of an archive's members."""
  try:  # A last member that is cut off is an error, too.
    with tarfile.open(path, 'r:') as archive:
      names = archive.getnames()
  except (tarfile.TarError, EOFError) as error:
    raise InputError(f'{path} is cut off or damaged: {error}') from None
  if len(set(names)) < len(names):
    raise InputError(f'{path} holds members of the same name')
  return names


def _check_members(rule: str, found: list[str], wanted: set[str]) -> None:
  parts = [f'{rule}; it holds {len(found)} members']
  for what, names in (
    ('not expected', set(found) - wanted),
    ('missing', wanted - set(found)),
  ):
    if names:
      parts.append(f'{len(names)} {what} (the first: {min(names)})')
  if len(parts) > 1:
    raise InputError(', '.join(parts))
