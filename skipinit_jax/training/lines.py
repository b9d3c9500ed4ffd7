"""The metric lines of a run: a file, or objects in a bucket."""

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from skipinit_jax.files import (
  DamagedFile,
  dumps,
  name_aside,
  parse_object,
  read_bytes,
  set_aside,
  write_whole,
)

METRICS = 'metrics.jsonl'


class Lines:
  """`metrics.jsonl` in a workdir, one JSON object a line.

  Objects in a bucket can't be appended to: each line is an object there,
  `metrics/STEP-NUMBER.json`, and reading joins them in order.

  Args:
    workdir: a folder, or an address such as gs://bucket/run.
  """

  def __init__(self, workdir: epath.PathLike):
    self._workdir = epath.Path(workdir)
    self._in_bucket = '://' in str(self._workdir)
    self._path = self._workdir / METRICS
    self._folder = self._workdir / 'metrics'
    self._file: Any = None  # Opened by `resume`.
    self._number = 0

  def read(self) -> list[dict[str, Any]]:
    """The good lines, in order."""
    return self.read_and_count()[0]

  def read_and_count(self) -> tuple[list[dict[str, Any]], int]:
    """The good lines, in order, and the number of damaged ones."""
    written = self._written()
    good = [line for _, line in written if line is not None]
    return good, len(written) - len(good)

  def resume(self, step: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Drops what was written after `step` steps, to write it again.

    Damaged lines are dropped too, and all but the last of those about the same
    step and topic; lines get back in order. If any of this has to be done, what
    was there is kept as `damaged-...`.

    Returns:
      The lines that are kept, and sentences on what was dropped.
    """
    said = []
    try:
      written = self._written()
    except DamagedFile as error:
      said.append(f'{error}; moved to {set_aside(error.path)}')
      written = []
    good = [line for _, line in written if line is not None]
    # Before the first step there is nothing to keep: all is written again.
    made = [line for line in good if line['step'] <= step and step > 0]
    in_order = sorted(made, key=lambda line: line['step'])
    latest = {_topic(line): line for line in in_order}
    lines = [line for line in in_order if latest[_topic(line)] is line]
    damage = []
    if bad := len(written) - len(good):
      damage.append(f'{bad} of {len(written)} lines can not be read')
    if twice := len(made) - len(lines):
      damage.append(f'{twice} lines are there twice')
    if made != in_order:
      damage.append('lines are out of order')
    if damage:
      path = self._folder if self._in_bucket else self._path
      said.append(
        f'{path} is damaged: {", ".join(damage)}; as it was: '
        f'{self._copy_aside()}'
      )
    if later := len(good) - len(made):
      said.append(
        f'{later} lines of metrics after step {step} will be written again'
      )
    if self._in_bucket:
      kept = {id(line) for line in lines}
      for path, line in written:
        if id(line) not in kept:
          path.unlink()
      names = [path.stem.split('-')[-1] for path in self._objects()]
      numbers = [int(name) for name in names if name.isdecimal()]
      self._number = 1 + max(numbers, default=-1)
    else:
      text = ''.join(dumps(line) + '\n' for line in lines)
      write_whole(self._path, text.encode())
      self._file = self._path.open('a')
    return lines, said

  def append(self, line: Mapping[str, Any]) -> None:
    """Writes a line; after `resume`."""
    if self._in_bucket:
      self._folder.mkdir(parents=True, exist_ok=True)
      name = f'{line["step"]:010d}-{self._number:010d}.json'
      (self._folder / name).write_text(dumps(line))
      self._number += 1
      return
    self._file.write(dumps(line) + '\n')
    self._file.flush()

  def sync(self) -> None:
    """Makes the lines survive a crash of the machine."""
    if self._file:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file:
      self._file.close()

  def _written(self) -> list[tuple[epath.Path, dict[str, Any] | None]]:
    """Each line, None if it is damaged, and the file that it is in."""
    if self._in_bucket:
      return [(path, _parse(path.read_bytes())) for path in self._objects()]
    lines = (read_bytes(self._path) or b'').split(b'\n')
    return [(self._path, _parse(line)) for line in lines if line.strip()]

  def _copy_aside(self) -> epath.Path:
    """Copies the lines as they are to a new file or folder beside them."""
    if not self._in_bucket:
      aside = name_aside(self._path)
      write_whole(aside, read_bytes(self._path) or b'')
      return aside
    aside = name_aside(self._folder)
    aside.mkdir(parents=True)
    for path in self._objects():
      (aside / path.name).write_bytes(path.read_bytes())
    return aside

  def _objects(self) -> list[epath.Path]:
    if not self._folder.exists():
      return []
    return sorted(self._folder.glob('*.json'), key=lambda path: path.name)


def is_evaluation(value: Any) -> bool:
  """Whether this is an evaluation as `evaluate` returns it."""
  return isinstance(value, Mapping) and (
    all(is_number(value.get(name)) for name in ('top1', 'top5'))
    and _is_number_or_null(value.get('loss', ''))
  )


def is_number(value: Any) -> bool:
  """Whether a value of JSON is a number."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
  """Whether a value of JSON is a number of steps."""
  return isinstance(value, int) and is_number(value) and value >= 0


def _is_number_or_null(value: Any) -> bool:
  return value is None or is_number(value)


def _parse(data: bytes) -> dict[str, Any] | None:
  """A line as a run writes it; None if it is damaged or was cut off."""
  try:
    line = parse_object(data)
  except ValueError:
    return None
  fine = [
    is_count(line.get('step')),
    'eval' not in line or is_evaluation(line['eval']),
    'loss' not in line
    or all(_is_number_or_null(line.get(k, '')) for k in ('loss', 'top1')),
    is_number(line.get('replaced', 0)),
  ]
  return line if all(fine) else None


def _topic(line: Mapping[str, Any]) -> tuple:
  """The step and kind of a line; a run writes one line of each."""
  kinds = [kind for kind in ('eval', 'loss', 'replaced') if kind in line]
  return line['step'], *(kinds or sorted(line))
