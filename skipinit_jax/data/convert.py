"""TFRecord files that tfds wrote, rewritten as ArrayRecord."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from skipinit_jax.data.extras import require
from skipinit_jax.data.tfds import INFO, read_info
from skipinit_jax.errors import InputError


def convert(source: Path, target: Path, workers: int | None = None) -> str:
  """Rewrites the prepared set in `source` into the new folder `target`.

  The records' bytes stay as they are. `target` gets its name once it is whole.

  Args:
    source: folder of a prepared data set: TFRecords and dataset_info.json.
    target: must not exist; best NAME/VERSION in another data folder, where
      tfds looks for it.
    workers: files written at a time; None: as many as cores.

  Returns:
    One line about what was made.

  Raises:
    InputError: nothing to convert, or a damaged file; one line.
  """
  tfds = require('tensorflow_datasets')
  require('array_record')
  if not (source / INFO).is_file():
    raise InputError(f'{source} is no prepared data set: it has no {INFO}')
  if target.exists():
    raise InputError(f'{target} exists; name a folder that does not')
  info = read_info(source)
  if info.get('fileFormat', 'tfrecord') != 'tfrecord':
    raise InputError(f'{source} holds {info["fileFormat"]}, not tfrecord')
  splits = tfds.builder_from_directory(source).info.splits.values()
  jobs = [
    (Path(path), path.name.replace('.tfrecord', '.array_record'), count)
    for split in splits
    for path, count in zip(split.filepaths, split.shard_lengths, strict=True)
  ]
  partial = target.with_name(target.name + '.incomplete')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    sources, names, counts = zip(*jobs, strict=True)
    targets = [partial / name for name in names]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
      records = pool.map(_convert_file, sources, targets, counts)
      written = sum(tqdm(records, 'files', len(jobs)))
    for file in source.iterdir():  # Features, label names, licences.
      if file.is_file() and '.tfrecord' not in file.name and file.name != INFO:
        shutil.copy(file, partial)
    info['fileFormat'] = 'array_record'
    (partial / INFO).write_text(json.dumps(info, indent=2))
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return f'made {target}: {written:,} records in {len(jobs)} files'


def _convert_file(source: Path, target: Path, count: int) -> int:
  module = require('array_record.python.array_record_module')
  # Groups of one record: random access reads no neighbours.
  writer = module.ArrayRecordWriter(os.fspath(target), 'group_size:1')
  written = 0
  for record in tfrecords(source):
    writer.write(record)
    written += 1
  writer.close()
  if written != count:
    raise InputError(f'{source} has {written} records, not {count}')
  return written


def tfrecords(path: Path) -> Iterator[bytes]:
  """Yields the records of a TFRecord file: length, checksum, bytes, checksum.

  The lengths' checksums are verified. A record whose bytes are damaged is kept,
  since training can do without it: `check` names it.
  """
  if not path.is_file():
    raise InputError(f'{path} is missing')
  with path.open('rb') as file:
    while head := file.read(12):
      if len(head) < 12:
        raise InputError(f'{path} is cut off')
      length, checksum = struct.unpack('<QI', head)
      if checksum != _masked_crc32c(head[:8]):
        raise InputError(
          f'{path} is damaged at byte {file.tell() - 12}, or no TFRecord file'
        )
      body = file.read(length + 4)
      if len(body) < length + 4:
        raise InputError(f'{path} is cut off')
      yield body[:length]


def _masked_crc32c(data: bytes) -> int:
  """CRC-32C, rotated and shifted as the TFRecord format asks."""
  crc = require('google_crc32c').value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
