"""A prepared data set with its images made smaller, to read it faster."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from skipinit_jax.data.decode import DecodeError, decode, jpeg_size
from skipinit_jax.data.extras import require
from skipinit_jax.data.reading import Unreadable
from skipinit_jax.data.records import Source, sample
from skipinit_jax.data.tfds import INFO, read_info
from skipinit_jax.errors import InputError

SAMPLED = 64  # Images of a split that tell how large all will be.
QUALITY = 95  # Of libjpeg, with one chroma sample for four pixels.


@dataclasses.dataclass
class Counts:
  """Records by what became of them, and the bytes of all.

  Attributes:
    smaller: re-encoded.
    kept: as they were, since their shorter side is no larger.
    broken: as they were, since they can't be decoded; training names them.
    size: bytes.
  """

  smaller: int = 0
  kept: int = 0
  broken: int = 0
  size: int = 0

  def __add__(self, other: 'Counts') -> 'Counts':
    pairs = zip(
      dataclasses.astuple(self), dataclasses.astuple(other), strict=True
    )
    return Counts(*(one + two for one, two in pairs))

  def __str__(self) -> str:
    return (
      f're-encoded {self.smaller:,}, not larger anyway {self.kept:,}, '
      f'undecodable {self.broken:,}'
    )


def configuration(side: int) -> str:
  """tfds' name for a set whose images have this shorter side."""
  return f'shorter_side_{side}'


def expected_size(source: Source, side: int) -> float:
  """How many bytes the smaller images of a set will have, from a sample."""
  total = 0.0
  for split in source.splits:
    records, sizes = source.open(split), []
    for index in sample(len(records), SAMPLED):
      try:
        data = records[index].data
      except Unreadable:
        continue  # `shrink` tells.
      try:
        sizes.append(len(reencode(data, side) or data))
      except DecodeError:
        sizes.append(len(data))
    total += len(records) * sum(sizes) / max(1, len(sizes))
  return total


def shrink(source: Path, target: Path, side: int) -> Counts:
  """Writes the set in `source` to `target` with the shorter side `side`.

  Order, labels and names stay. No image is enlarged; one that is no larger
  keeps its bytes. `target` gets its name once it is whole.

  Args:
    source: folder of a prepared set, in ArrayRecord.
    target: must not exist; NAME/`configuration(side)`/VERSION.
    side: in pixels.

  Raises:
    InputError: a record that can't be read; one line.
  """
  tfds = require('tensorflow_datasets')
  info = read_info(source)
  splits = tfds.builder_from_directory(source).info.splits.values()
  partial = target.with_name(target.name + '.incomplete')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    total, sizes = Counts(), {}
    for split in splits:
      paths = list(map(Path, split.filepaths))
      with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(
          lambda path: _shrink_file(path, partial / path.name, side), paths
        )
        counts = list(tqdm(counts, f'{split.name} files', len(paths)))
      found = sum(counts, Counts())
      sizes[split.name], total = found.size, total + found
    for file in source.iterdir():  # Features, label names, licences.
      if file.is_file() and '.array_record' not in file.name:
        shutil.copy(file, partial)
    (partial / INFO).write_text(
      json.dumps(_described(info, sizes, side), indent=2)
    )
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return total


def _described(info: dict, sizes: dict[str, int], side: int) -> dict:
  """What tfds wrote about the set, with what has been done to it."""
  return info | {
    'configName': configuration(side),
    'configDescription': (
      f'shorter side at most {side} pixels, re-encoded as JPEG of quality '
      f'{QUALITY}'
    ),
    'splits': [
      split | {'numBytes': str(sizes[split['name']])}
      for split in info['splits']
    ],
  }


def _shrink_file(source: Path, target: Path, side: int) -> Counts:
  module = require('array_record.python.array_record_module')
  reader = module.ArrayRecordReader(os.fspath(source))
  # Groups of one record: random access reads no neighbours.
  writer = module.ArrayRecordWriter(os.fspath(target), 'group_size:1')
  counts = Counts()
  for index in range(reader.num_records()):
    try:
      (record,) = reader.read([index])
    except (RuntimeError, ValueError) as error:
      reason = str(error).splitlines()[0]
      raise InputError(f'record {index} of {source}: {reason}') from None
    record, what = _shrink_record(record, side)
    writer.write(record)
    counts += Counts(**{what: 1}, size=len(record))
  writer.close()
  reader.close()
  return counts


def _shrink_record(record: bytes, side: int) -> tuple[bytes, str]:
  """The record with a smaller image, and which of `Counts` it is."""
  example = require(
    'tensorflow_datasets.proto'
  ).tf_example_pb2.Example.FromString(record)
  images = example.features.feature['image'].bytes_list
  try:
    smaller = reencode(images.value[0], side)
  except DecodeError:
    return record, 'broken'
  if smaller is None:
    return record, 'kept'
  images.value[0] = smaller
  return example.SerializeToString(deterministic=True), 'smaller'


def reencode(data: bytes, side: int) -> bytes | None:
  """An image file as a JPEG whose shorter side is `side`; None if none larger.

  Each pixel is the mean of the area that it covers.

  Raises:
    DecodeError: it can't be decoded.
  """
  if (shape := jpeg_size(data)) and min(shape) <= side:
    return None
  pixels = decode(data).pixels
  height, width = pixels.shape[:2]
  if min(height, width) <= side:
    return None
  factor = side / min(height, width)
  size = round(width * factor), round(height * factor)
  cv2 = require('cv2')
  small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
  return require('simplejpeg').encode_jpeg(
    small, QUALITY, colorsubsampling='420', fastdct=False
  )
