"""Writes a tfds data set as ArrayRecord, from archives or by download."""

import os
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from skipinit_jax.data import imagenet
from skipinit_jax.data.extras import require
from skipinit_jax.data.records import Records, sample
from skipinit_jax.data.sources import open_source
from skipinit_jax.data.tfds import INFO
from skipinit_jax.errors import InputError

DOWNLOADED = ('cifar10', 'cifar100')
SAMPLED = 1000  # Records whose labels are checked after writing.


def prepare(name: str, data_dir: Path, manual_dir: Path | None = None) -> str:
  """Prepares a data set in `data_dir` by its own tfds builder.

  tfds writes to a folder with `incomplete` in its name and renames it at the
  end, so that half a data set is never taken for a whole one.

  Args:
    name: imagenet2012, cifar10 or cifar100.
    data_dir: where tfds' data sets live.
    manual_dir: the folder of imagenet2012's two archives.

  Returns:
    One line about what was made.

  Raises:
    InputError: it can't be done, or did not come out right; one line.
  """
  for module in ('tensorflow', 'importlib_resources'):
    require(module, 'prepare')
  for module in ('tensorflow_datasets', 'array_record'):
    require(module)
  began = time.perf_counter()
  if name == imagenet.NAME:
    if manual_dir is None:
      raise InputError(
        f'--manual-dir is missing: the folder of {imagenet.ARCHIVES[0]} and '
        f'{imagenet.ARCHIVES[1]}'
      )
    imagenet.check_archives(manual_dir)
    _check_space(data_dir, manual_dir)
  folder, made = _run_builder(name, data_dir, manual_dir)
  source = open_source(name, folder)
  splits = {split: source.open(split) for split in source.splits}
  sizes = {split: len(records) for split, records in splits.items()}
  if name == imagenet.NAME:
    for split, records in splits.items():
      _check_labels(split, records, folder)
    if wrong := imagenet.wrong_sizes(sizes):
      raise InputError(
        f'{wrong[0]}; the archive of imagenet2012 is not the published one'
      )
  size = sum(file.stat().st_size for file in folder.iterdir())
  counts = ', '.join(f'{split} {count:,}' for split, count in sizes.items())
  seconds = time.perf_counter() - began
  verb = 'made' if made else 'already there:'
  return (
    f'{verb} {folder}: {counts} images, {size / 1e9:.3f} GB, {seconds:.0f} s'
  )


def _check_space(data_dir: Path, manual_dir: Path) -> None:
  """Checks that there is room for the records and tfds' shuffling."""
  archives = [manual_dir / name for name in imagenet.ARCHIVES]
  needed = 1.1 * sum(path.stat().st_size for path in archives)
  there = data_dir
  while not there.exists():
    there = there.parent
  free = shutil.disk_usage(there).free
  if free < needed:
    raise InputError(
      f'{data_dir} has {free / 1e9:.0f} GB free, but {needed / 1e9:.0f} GB are '
      'needed'
    )


def _run_builder(
  name: str, data_dir: Path, manual_dir: Path | None
) -> tuple[Path, bool]:
  """Runs tfds; the folder it wrote, and whether it did not exist before."""
  tfds = require('tensorflow_datasets')
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  folder = Path(builder.data_dir)
  if folder.exists():
    if not (folder / INFO).is_file():
      raise InputError(
        f'{folder} exists but holds no prepared data set; remove it first'
      )
    return folder, False
  manual = os.fspath(manual_dir) if manual_dir else None
  try:
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=manual)
    )
  except Exception as error:
    # tfds raises errors of many types: no network, a full disk, a damaged inner
    # archive.
    line = ' '.join(str(error).split()) or type(error).__name__
    raise InputError(f'{name} could not be prepared: {line}') from error
  return folder, True


def _check_labels(split: str, records: Records, folder: Path) -> None:
  """Compares the labels of a sample with what the images' names imply."""
  for index in tqdm(sample(len(records), SAMPLED), f'labels of {split}'):
    record = records[index]
    expected = imagenet.label_of(record.name)
    if expected is not None and expected != record.label:
      raise InputError(
        f'{record.name} has label {record.label}, not {expected}; remove '
        f'{folder} and prepare it again from the published archives'
      )
