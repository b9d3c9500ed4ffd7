"""Writes a tfds data set as ArrayRecord, from archives or by download."""

import os
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from skipinit_jax.data import imagenet
from skipinit_jax.data.extras import require
from skipinit_jax.data.records import open_source, spread
from skipinit_jax.errors import InputError

DOWNLOADED = ('cifar10', 'cifar100')
SAMPLED = 1000  # Records whose labels are checked after writing.


def prepare(
  name: str,
  data_dir: Path,
  manual_dir: Path | None = None,
  allow_counts: bool = False,
) -> str:
  """Prepares a data set in `data_dir` by its own tfds builder.

  tfds writes to a folder with `incomplete` in its name and renames it at the
  end, so that what was broken off is never taken for whole.

  Args:
    name: imagenet2012, cifar10 or cifar100.
    data_dir: where tfds' data sets live.
    manual_dir: of imagenet2012's two archives.
    allow_counts: see `imagenet.check_archives`.

  Returns:
    What it made, one line.

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
    classes, count = imagenet.check_archives(manual_dir, allow_counts)
    print(f'archives: {classes} classes, {count} validation images', flush=True)
    _check_space(data_dir, manual_dir)
  folder, made = _run_builder(name, data_dir, manual_dir)
  splits = {split: _count(name, folder, split) for split in _splits(folder)}
  if name == imagenet.NAME and not allow_counts:
    check_sizes(splits)
  size = sum(file.stat().st_size for file in folder.iterdir())
  counts = ', '.join(f'{split} {count:,}' for split, count in splits.items())
  seconds = time.perf_counter() - began
  verb = 'made' if made else 'already there:'
  return (
    f'{verb} {folder}: {counts} images, {size / 1e9:.3f} GB, {seconds:.0f} s'
  )


def check_sizes(sizes: dict[str, int]) -> None:
  """Raises InputError unless these are imagenet2012's sizes."""
  for split, size in imagenet.SIZES.items():
    if sizes.get(split) != size:
      raise InputError(
        f"imagenet2012's {split} split must have {size:,} images, not "
        f'{sizes.get(split, 0):,}; its archive is not the published one'
      )


def _check_space(data_dir: Path, manual_dir: Path) -> None:
  """Room for the records, and for one bucket more of tfds' shuffling."""
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
    if not (folder / 'dataset_info.json').is_file():
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
    # tfds and what lies below it raise whatever they meet: a network that is
    # not there, a full disk, a damaged inner archive.
    line = ' '.join(str(error).split()) or type(error).__name__
    raise InputError(f'{name} could not be prepared: {line}') from error
  return folder, True


def _splits(folder: Path) -> list[str]:
  tfds = require('tensorflow_datasets')
  return list(tfds.builder_from_directory(folder).info.splits)


def _count(name: str, folder: Path, split: str) -> int:
  """Number of records; checks the labels of a sample against their names."""
  source = open_source(name, folder)
  records = source.open(split)
  if name == imagenet.NAME:
    for index in tqdm(spread(len(records), SAMPLED), f'labels of {split}'):
      record = records[index]
      expected = imagenet.label_of(record.name)
      if expected is not None and expected != record.label:
        raise InputError(
          f'{record.name} has label {record.label}, not {expected}; remove '
          f'{folder} and prepare it again from the published archives'
        )
  return len(records)
