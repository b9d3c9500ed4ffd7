"""Data sets that tensorflow-datasets prepared as ArrayRecord."""

import copy
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from skipinit_jax.data.extras import require
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Record, Source
from skipinit_jax.errors import InputError, RunError, unknown
from skipinit_jax.files import retry

INFO = 'dataset_info.json'
LONGEST = 100  # Characters of what a set says about its configuration.
# An error of array_record that is the system's, not a wrong checksum.
_FAILED = re.compile(
  r'^(\w+\(\) failed: [^;]+)(?:; (?:reading|opening) ([^;]+))?'
)


class TfdsRecords:
  """A split of an image-classification set."""

  def __init__(self, builder: Any, split: str):
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
      # array_record and protobuf raise errors of many types.
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


def open_tfds(name: str, folder: Path) -> Source:
  """Opens a prepared set; reads no image.

  Args:
    name: of the set, as tfds calls it.
    folder: tfds' data_dir, or the prepared set itself.

  Raises:
    InputError: it is not there, not ArrayRecord, or not labelled images; one
      line.
  """
  tfds = require('tensorflow_datasets')
  require('array_record')
  prepared = find_prepared(name, folder)
  info = read_info(prepared)
  file_format = info.get('fileFormat', 'tfrecord')
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

  form = ' '.join(str(info.get('configDescription', '')).split())[:LONGEST]
  splits = list(builder.info.splits)
  return Source(name, prepared, splits, classes, open_split, form)


def read_info(folder: Path) -> dict[str, Any]:
  """Reads what tfds wrote about a set; InputError where that is damaged."""
  path = folder / INFO
  try:
    return dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise InputError(f'{path} is damaged: {error}') from None


def find_prepared(name: str, folder: Path) -> Path:
  """Finds the newest version of a set: the folder with its dataset_info.json.

  Args:
    name, folder: as in `open_tfds`.

  Raises:
    InputError: there is none, or one for each of several configurations; the
      line names the command that makes it, or the folders.
  """
  if (folder / INFO).is_file():
    return folder
  places = folder / name, *folder.glob(f'{name}/*')  # Of configurations.
  found = [path for place in places if (path := newest_version(place))]
  if len(found) > 1:
    raise InputError(
      f'{folder / name} has several configurations; give one as data.dir: '
      f'{", ".join(sorted(map(str, found)))}'
    )
  if found:
    return found[0]
  raise InputError(
    f'no {name} in {folder}; run: python -m skipinit_jax.data prepare {name} '
    f'--data-dir {folder}'
    + (' --manual-dir ARCHIVES' if name == 'imagenet2012' else '')
    + " (needs: pip install 'skipinit-jax[prepare]')"
  )


def newest_version(folder: Path) -> Path | None:
  """The newest prepared version in the folder of a set; None: there is none."""
  versions = [
    path.parent
    for path in folder.glob(f'*/{INFO}')
    if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
  ]
  return max(
    versions, key=lambda p: [int(n) for n in p.name.split('.')], default=None
  )


def _check_files(split: Any) -> None:
  """Checks that a split's files hold as many records as tfds wrote."""
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
