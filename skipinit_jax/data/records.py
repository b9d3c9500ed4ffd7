"""Where ImageNet-like images come from: a tfds folder, or class folders."""

import copy
import errno
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from skipinit_jax.data.extras import require
from skipinit_jax.data.reading import Unreadable, read_image
from skipinit_jax.errors import InputError, RunError, unknown
from skipinit_jax.files import retry

INFO = 'dataset_info.json'
SUFFIXES = ('.jpeg', '.jpg', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff')
# How array_record tells that a call of the system failed, not a checksum.
_FAILED = re.compile(
  r'^(\w+\(\) failed: [^;]+)(?:; (?:reading|opening) ([^;]+))?'
)
# What the evaluation split is called where the recipe does not say.
EVAL_SPLITS = ('validation', 'val', 'test')


class Record(NamedTuple):
  """An image file: its name for messages, its bytes, its class."""

  name: str
  data: bytes
  label: int


class Records(Protocol):
  """One split; random access (Grain's protocol), picklable.

  Reading one raises Unreadable where the record itself is at fault, and OSError
  where the system is.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class TfdsRecords:
  """A split of a tfds image-classification set in ArrayRecord."""

  def __init__(self, builder, split: str):
    raw = require('tensorflow_datasets').decode.DeserializeMethod.RAW_BYTES
    self.split = split
    self.source = builder.as_data_source(split, deserialize_method=raw)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Record:
    # Parsed here, since tfds' own parser takes ten times as long: a tenth of
    # all that is done for an image.
    proto = require('tensorflow_datasets.proto').tf_example_pb2
    name = f'{self.split}[{index}]'
    try:
      example = proto.Example.FromString(self._read(index))
      feature = example.features.feature
      data = feature['image'].bytes_list.value[0]
      label = feature['label'].int64_list.value[0]
    except OSError:
      raise  # The disk, not the record.
    except Exception as error:
      # array_record and protobuf raise whatever they meet.
      raise Unreadable(name, f'{type(error).__name__}: {error}') from None
    if own := feature['file_name'].bytes_list.value:
      name = f'{own[0].decode()} ({name})'
    return Record(name, data, label)

  def _read(self, index: int) -> bytes:
    try:
      return self.source[index]
    except RuntimeError as error:
      if not (failed := _FAILED.match(str(error))):
        raise
      # A reader that has failed never recovers; a copy opens its files anew.
      self.source.data_source = copy.copy(self.source.data_source)
      raise OSError(errno.EIO, *failed.groups()) from None


class FolderRecords:
  """`folder/class/image`; classes are numbered in the order of their names."""

  def __init__(self, folder: Path, classes: Sequence[str]):
    self.folder, self.classes = folder, list(classes)
    files = [_image_files(folder / name) for name in classes]
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


class Subset:
  """Some of the records, in a given order."""

  def __init__(self, records: Records, indices: np.ndarray):
    self.records, self.indices = records, indices

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Record:
    return self.records[int(self.indices[index])]


class Source(NamedTuple):
  """A data set: its splits and classes by name, and how to open a split."""

  name: str
  splits: Sequence[str]
  classes: Sequence[str]
  open: Callable[[str], Records]

  def eval_split(self, wanted: str) -> str:
    """The split to evaluate on: `wanted`, or the usual one where empty."""
    for split in (wanted,) if wanted else EVAL_SPLITS:
      if wanted or split in self.splits:
        return split
    raise InputError(
      f'{self.name} has no split to evaluate on, only '
      f'{", ".join(self.splits)}; name one in data.eval_split or hold images '
      'out by data.validation'
    )


def local_path(folder: str | os.PathLike) -> Path:
  """The path of a folder; raises InputError for a bucket's address."""
  if '://' in os.fspath(folder):
    raise InputError(
      f'{folder} is a bucket, but records are read at random places: mount it '
      '(gcsfuse with a file cache) or attach a disk, and give that folder'
    )
  return Path(os.path.expanduser(folder))


def open_source(name: str, folder: str | os.PathLike) -> Source:
  """Opens the data set `name` in `folder`; reads no image.

  Args:
    name: 'folder', or a tfds data set.
    folder: for 'folder', that of the splits' folders; else tfds' data_dir, or
      the prepared folder itself, the one that holds dataset_info.json.

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
  return _open_folder(path) if name == 'folder' else _open_tfds(name, path)


def source_of(config: ConfigDict) -> Source:
  """The source of a recipe's `data`; see `open_source`."""
  try:
    return open_source(config.name, config.dir)
  except InputError as error:
    raise InputError(f'data.dir={config.dir}: {error}') from None


def _open_folder(folder: Path) -> Source:
  if not folder.is_dir():
    raise InputError(f'no folder {folder}')
  splits = _folders(folder)
  if not splits:
    raise InputError(
      f'{folder} has no folders; wanted: train/CLASS/*.JPEG, val/CLASS/*.JPEG'
    )
  classes = _folders(folder / ('train' if 'train' in splits else splits[0]))
  if not classes:
    raise InputError(f'no class folders in {folder / splits[0]}')

  def open_split(split: str) -> FolderRecords:
    if split not in splits:
      raise InputError(unknown('split', split, splits))
    found = _folders(folder / split)
    odd = sorted(set(found) ^ set(classes))
    if odd:
      raise InputError(
        f'{folder / split} has {len(found)} classes, not the {len(classes)} '
        f'of the other split; the first that differs: {odd[0]}'
      )
    return FolderRecords(folder / split, classes)

  return Source('folder', splits, classes, open_split)


def _open_tfds(name: str, folder: Path) -> Source:
  tfds = require('tensorflow_datasets')
  require('array_record')
  prepared = find_prepared(name, folder)
  file_format = read_info(prepared).get('fileFormat', 'tfrecord')
  if file_format != 'array_record':
    raise InputError(
      f'{prepared} holds {file_format} files, which can not be read at random '
      'places; run: python -m skipinit_jax.data convert '
      f'{prepared} OTHER_FOLDER/{name}/{prepared.name}'
    )
  builder = tfds.builder_from_directory(prepared)
  features = dict(builder.info.features)
  classes = getattr(features.get('label'), 'names', None)
  if not isinstance(features.get('image'), tfds.features.Image) or not classes:
    raise InputError(
      f'{name} is no set of images with one class each; its features: '
      f'{", ".join(features)}'
    )

  def open_split(split: str) -> TfdsRecords:
    base = re.split(r'[\[+]', split)[0]
    if base not in builder.info.splits:
      raise InputError(unknown('split', split, builder.info.splits))
    _check_files(builder.info.splits[base])
    try:
      return TfdsRecords(builder, split)
    except (ValueError, AssertionError) as error:  # As in train[:
      raise InputError(f'split {split!r} of {name}: {error}') from None

  return Source(name, list(builder.info.splits), classes, open_split)


def read_info(folder: Path) -> dict[str, Any]:
  """What tfds wrote on a prepared set; InputError where that is damaged."""
  path = folder / INFO
  try:
    return dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise InputError(f'{path} is damaged: {error}') from None


def find_prepared(name: str, folder: Path) -> Path:
  """The folder of `name`'s newest version (the one of dataset_info.json)."""
  if (folder / 'dataset_info.json').is_file():
    return folder
  versions = [
    path.parent
    for depth in ('*', '*/*')  # A version, or a configuration's version.
    for path in folder.glob(f'{name}/{depth}/dataset_info.json')
    if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
  ]
  if len({path.parent for path in versions}) > 1:
    raise InputError(
      f'{folder / name} has several configurations; give one as data.dir: '
      f'{", ".join(sorted(map(str, versions)))}'
    )
  if versions:
    return max(versions, key=lambda p: [int(n) for n in p.name.split('.')])
  raise InputError(
    f'no {name} in {folder}; run: python -m skipinit_jax.data prepare {name} '
    f'--data-dir {folder}'
    + (' --manual-dir ARCHIVES' if name == 'imagenet2012' else '')
    + " (needs: pip install 'skipinit-jax[prepare]')"
  )


def _check_files(split) -> None:
  """Checks that the files hold as many records as tfds wrote."""
  reader = require('array_record.python.array_record_module').ArrayRecordReader
  for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
    if not os.path.exists(path):
      raise InputError(f'{path} is missing; prepare the data set again')
    # The reader takes a file that it can't open for one without records.
    retry(lambda path=path: Path(path).open('rb').close())
    try:
      file = reader(os.fspath(path))
      found = file.num_records()
      file.close()
    except (RuntimeError, ValueError) as error:
      if failed := _FAILED.match(str(error)):
        raise RunError(f'{path}: {failed[1]}') from None
      raise InputError(
        f'{path} is damaged, prepare the data set again: {error}'
      ) from None
    if found != count:
      raise InputError(
        f'{path} has {found} records, not {count}; prepare the data set again'
      )


def _folders(folder: Path) -> list[str]:
  if not folder.is_dir():
    return []
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if entry.is_dir() and not entry.name.startswith('.')
    )


def _image_files(folder: Path) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if entry.name.lower().endswith(SUFFIXES)
      and not entry.name.startswith('.')
    )


def check_label(record: Record, num_classes: int) -> None:
  """Raises InputError where a label is none of the classes."""
  if not 0 <= record.label < num_classes:
    raise InputError(
      f'label {record.label} of {record.name} is outside the {num_classes} '
      f'classes (0 to {num_classes - 1})'
    )


def spread(count: int, wanted: int) -> list[int]:
  """At most `wanted` indices, evenly over 0 ... count - 1.

  >>> spread(10, 3)
  [0, 4, 9]
  """
  if count <= wanted:
    return list(range(count))
  return [i * (count - 1) // (wanted - 1) for i in range(wanted)]
