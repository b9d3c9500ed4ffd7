"""Writes a tfds data set as ArrayRecord, from archives or by download."""

import os
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from skipinit_jax.data import imagenet
from skipinit_jax.data.extras import require
from skipinit_jax.data.records import Records, Source, sample
from skipinit_jax.data.shrink import configuration, expected_size, shrink
from skipinit_jax.data.sources import open_source
from skipinit_jax.data.tfds import INFO, newest_version
from skipinit_jax.errors import InputError

DOWNLOADED = ('cifar10', 'cifar100')
SAMPLED = 1000  # Records whose labels are checked after writing.


def prepare(
  name: str,
  data_dir: Path,
  manual_dir: Path | None = None,
  shorter_side: int | None = None,
) -> str:
  """Prepares a data set in `data_dir` by its own tfds builder.

  tfds writes to a folder with `incomplete` in its name and renames it at the
  end, so that half a data set is never taken for a whole one. So is the smaller
  set of `shorter_side`, which is made from the whole one and lies beside it.

  Args:
    name: imagenet2012, cifar10 or cifar100.
    data_dir: where tfds' data sets live.
    manual_dir: the folder of imagenet2012's two archives; not needed where the
      whole set is there and a smaller one is asked for.
    shorter_side: of the images, in pixels, for imagenet2012 only; None: they
      stay as they are.

  Returns:
    One line about what was made.

  Raises:
    InputError: it can't be done, or did not come out right; one line.
  """
  began = time.perf_counter()
  if shorter_side is None:
    folder, made = _prepare_whole(name, data_dir, manual_dir)
    return _report(name, folder, made, began)
  if name != imagenet.NAME:
    raise InputError(
      f'--shorter-side={shorter_side}: the images of {name} are small; '
      f'expected with {imagenet.NAME} only'
    )
  for module in ('tensorflow_datasets', 'array_record', 'simplejpeg', 'cv2'):
    require(module)
  place = data_dir / name / configuration(shorter_side)
  if folder := newest_version(place):
    return _report(name, folder, False, began)
  whole = newest_version(data_dir / name)
  if whole is None:
    whole, _ = _prepare_whole(name, data_dir, manual_dir)
  source = open_source(name, whole)
  _check_sizes(name, source)
  folder = place / whole.name
  _check_absent(folder)
  _check_space(data_dir, expected_size(source, shorter_side))
  counts = shrink(whole, folder, shorter_side)
  return f'{_report(name, folder, True, began)}; {counts}'


def _prepare_whole(
  name: str, data_dir: Path, manual_dir: Path | None
) -> tuple[Path, bool]:
  """Prepares and checks a set; its folder, and whether it was not there."""
  for module in ('tensorflow', 'importlib_resources'):
    require(module, 'prepare')
  for module in ('tensorflow_datasets', 'array_record'):
    require(module)
  if name == imagenet.NAME:
    if manual_dir is None:
      raise InputError(
        f'--manual-dir is missing: the folder of {imagenet.ARCHIVES[0]} and '
        f'{imagenet.ARCHIVES[1]}'
      )
    imagenet.check_archives(manual_dir)
    archives = [manual_dir / file for file in imagenet.ARCHIVES]
    _check_space(data_dir, sum(path.stat().st_size for path in archives))
  folder, made = _run_builder(name, data_dir, manual_dir)
  if name == imagenet.NAME:
    source = open_source(name, folder)
    for split in source.splits:
      _check_labels(split, source.open(split), folder)
  return folder, made


def _report(name: str, folder: Path, made: bool, began: float) -> str:
  """Checks the numbers of images; one line about what was made."""
  source = open_source(name, folder)
  sizes = _check_sizes(name, source)
  size = sum(file.stat().st_size for file in folder.iterdir())
  counts = ', '.join(f'{split} {count:,}' for split, count in sizes.items())
  seconds = time.perf_counter() - began
  verb = 'made' if made else 'already there:'
  form = f' ({source.form})' if source.form else ''
  return (
    f'{verb} {folder}: {counts} images{form}, {size / 1e9:.3f} GB, '
    f'{seconds:.0f} s'
  )


def _check_sizes(name: str, source: Source) -> dict[str, int]:
  """The numbers of images by split; imagenet2012 has the published ones."""
  sizes = {split: len(source.open(split)) for split in source.splits}
  if name == imagenet.NAME and (wrong := imagenet.wrong_sizes(sizes)):
    raise InputError(
      f'{wrong[0]}; the archive of imagenet2012 is not the published one'
    )
  return sizes


def _check_space(data_dir: Path, size: float) -> None:
  """Checks that there is room for so many bytes of images, and a tenth more."""
  needed = 1.1 * size
  there = data_dir
  while not there.exists():
    there = there.parent
  free = shutil.disk_usage(there).free
  if free < needed:
    raise InputError(
      f'{data_dir} has {free / 1e9:.3g} GB free, but {needed / 1e9:.3g} GB '
      'are needed'
    )


def _run_builder(
  name: str, data_dir: Path, manual_dir: Path | None
) -> tuple[Path, bool]:
  """Runs tfds; the folder it wrote, and whether it did not exist before."""
  tfds = require('tensorflow_datasets')
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  folder = Path(builder.data_dir)
  if (folder / INFO).is_file():
    return folder, False
  _check_absent(folder)
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


def _check_absent(folder: Path) -> None:
  if folder.exists():
    raise InputError(
      f'{folder} exists but holds no prepared data set; remove it first'
    )


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
