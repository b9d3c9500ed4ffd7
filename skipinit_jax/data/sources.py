"""Opening a data set on disk by its name."""

import os
import re
from pathlib import Path

from ml_collections import ConfigDict

from skipinit_jax.data.folders import open_folder
from skipinit_jax.data.records import Source
from skipinit_jax.data.tfds import open_tfds
from skipinit_jax.errors import InputError


def open_source(name: str, folder: str | os.PathLike) -> Source:
  """Opens the data set `name` in `folder`; reads no image.

  Args:
    name: 'folder', or a tfds data set.
    folder: for 'folder', the one that holds a folder for each split; else tfds'
      data_dir, or the prepared set itself, with its dataset_info.json.

  Raises:
    InputError: it is not there, or can't be read; the line says what to do.
  """
  if not os.fspath(folder):
    raise InputError(f'expected the folder of {name}')
  if not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)*', name):
    raise InputError(f'{name!r} is no name of a data set')
  path = local_path(folder)
  try:
    path.is_dir()
  except OSError as error:
    raise InputError(f'{folder}: {error.strerror}') from None
  return open_folder(path) if name == 'folder' else open_tfds(name, path)


def source_of(config: ConfigDict) -> Source:
  """Opens the source of a recipe's `data`; see `open_source`."""
  try:
    return open_source(config.name, config.dir)
  except InputError as error:
    raise InputError(f'data.dir={config.dir}: {error}') from None


def local_path(folder: str | os.PathLike) -> Path:
  """The path of a folder; raises InputError for a bucket's address."""
  if '://' in os.fspath(folder):
    raise InputError(
      f'{folder} is a bucket, but records are read at random places: mount it '
      '(gcsfuse with a file cache) or attach a disk, and give that folder'
    )
  return Path(os.path.expanduser(folder))
