"""Image files in folders: split/class/image."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from skipinit_jax.data.reading import read_image
from skipinit_jax.data.records import Record, Source
from skipinit_jax.errors import InputError, unknown

SUFFIXES = ('.jpeg', '.jpg', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff')


class FolderRecords:
  """`folder/class/image`; classes are numbered in the order of their names."""

  def __init__(self, folder: Path, classes: Sequence[str]):
    self.folder, self.classes = folder, list(classes)
    files = [_names(folder / name, _is_image) for name in classes]
    for name, found in zip(classes, files, strict=True):
      if not found:
        raise InputError(f'no images in {folder / name}')
    # Arrays, since a list of a million paths is 100 MB in every worker.
    self.files = np.array([os.fsencode(f) for found in files for f in found])
    counts = [len(found) for found in files]
    self.labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Record:
    label = int(self.labels[index])
    name = f'{self.classes[label]}/{os.fsdecode(self.files[index])}'
    return Record(name, read_image(str(self.folder / name), name), label)


def open_folder(folder: Path) -> Source:
  """Opens `folder/split/class/image`; reads no image.

  Raises:
    InputError: there are no such folders; one line.
  """
  if not folder.is_dir():
    raise InputError(f'no folder {folder}')
  splits = _names(folder, os.DirEntry.is_dir)
  if not splits:
    raise InputError(
      f'{folder} has no folders; wanted: train/CLASS/*.JPEG, val/CLASS/*.JPEG'
    )
  first = folder / ('train' if 'train' in splits else splits[0])
  classes = _names(first, os.DirEntry.is_dir)
  if not classes:
    raise InputError(f'no class folders in {first}')

  def open_split(split: str) -> FolderRecords:
    if split not in splits:
      raise InputError(unknown('split', split, splits))
    found = _names(folder / split, os.DirEntry.is_dir)
    if odd := sorted(set(found) ^ set(classes)):
      raise InputError(
        f'{folder / split} has {len(found)} classes, not the {len(classes)} '
        f'of the other split; the first that differs: {odd[0]}'
      )
    return FolderRecords(folder / split, classes)

  return Source('folder', folder, splits, classes, open_split)


def _names(folder: Path, wanted: Callable[[os.DirEntry], bool]) -> list[str]:
  """Sorted names of the wanted entries of a folder, none that is hidden."""
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if wanted(entry) and not entry.name.startswith('.')
    )


def _is_image(entry: os.DirEntry) -> bool:
  return entry.name.lower().endswith(SUFFIXES)
