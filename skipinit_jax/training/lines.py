"""The metric lines of a run: a file, or objects in a bucket."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from skipinit_jax.files import (
  DamagedFile,
  name_aside,
  parse_object,
  read_bytes,
  set_aside,
  write_whole,
)

METRICS = 'metrics.jsonl'


class Lines:
  """`metrics.jsonl` in a workdir, one JSON object a line.

  Objects in a bucket can't be appended to: there each line is an object of its
  own, `metrics/STEP-NUMBER.json`, and reading joins them in order.

  Args:
    workdir: a folder, or an address such as gs://bucket/run.
  """

  def __init__(self, workdir: epath.PathLike):
    self._workdir = epath.Path(workdir)
    self._objects = '://' in str(self._workdir)
    self._path = self._workdir / METRICS
    self._folder = self._workdir / 'metrics'
    self._file = None
    self._number = 0

  def read(self, until: float = math.inf) -> list[dict[str, Any]]:
    """All good lines of at most `until` steps, in order."""
    return [line for line in self.look()[0] if line['step'] <= until]

  def look(self) -> tuple[list[dict[str, Any]], int]:
    """All good lines, in order, and the number of damaged ones."""
    lines = [_parse(data) for _, data in self._written()]
    good = [line for line in lines if line is not None]
    return good, len(lines) - len(good)

  def take_up(self, step: int) -> list[str]:
    """Drops what was written after `step` steps, to write it again.

    Dropped too: damaged lines, and all but the last of those that say the same
    of the same step. Lines get back in order. Where anything of this is to be
    done, what was there is kept as `damaged-...`.

    Returns:
      Sentences on what was dropped.
    """
    said = []
    try:
      written = [(path, _parse(data)) for path, data in self._written()]
    except DamagedFile as error:
      said.append(f'{error}; moved to {set_aside(error.path)}')
      written = []
    good = [line for _, line in written if line is not None]
    # Before the first step there is nothing to keep: all is written again.
    made = [line for line in good if line['step'] <= step and step > 0]
    in_order = sorted(made, key=lambda line: line['step'])
    latest = {_topic(line): line for line in in_order}
    lines = [line for line in in_order if latest[_topic(line)] is line]
    damage = {
      f'{len(written) - len(good)} of {len(written)} lines can not be read': (
        len(written) > len(good)
      ),
      f'{len(made) - len(lines)} lines are there twice': len(made) > len(lines),
      'lines are out of order': made != in_order,
    }
    if found := [text for text, holds in damage.items() if holds]:
      place = self._folder if self._objects else self._path
      said.append(
        f'{place} is damaged: {", ".join(found)}; as it was: '
        f'{self._copy_aside(written)}'
      )
    if later := len(good) - len(made):
      said.append(
        f'{later} lines of metrics after step {step} will be written again'
      )
    if self._objects:
      kept = {id(line) for line in lines}
      for path, line in written:
        if id(line) not in kept:
          path.unlink()
      names = [path.stem for path in self._objects_in_order()]
      numbers = [n for name in names if (n := name.split('-')[-1]).isdecimal()]
      self._number = 1 + max(map(int, numbers), default=-1)
    else:
      text = ''.join(dumps(line) + '\n' for line in lines)
      write_whole(self._path, text.encode())
      self._file = self._path.open('a')
    return said

  def append(self, line: Mapping[str, Any]) -> None:
    """Writes a line."""
    if self._objects:
      self._folder.mkdir(parents=True, exist_ok=True)
      name = f'{line["step"]:010d}-{self._number:010d}.json'
      (self._folder / name).write_text(dumps(line))
      self._number += 1
      return
    self._file.write(dumps(line) + '\n')
    self._file.flush()

  def sync(self) -> None:
    """Makes what was written last through a crash of the machine."""
    if self._file:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file:
      self._file.close()

  def _written(self) -> list[tuple[epath.Path, bytes]]:
    """All lines as they are, but for blank ones, and where they are."""
    if self._objects:
      return [(path, path.read_bytes()) for path in self._objects_in_order()]
    lines = (read_bytes(self._path) or b'').split(b'\n')
    return [(self._path, line) for line in lines if line.strip()]

  def _copy_aside(self, written: list[tuple[epath.Path, Any]]) -> epath.Path:
    """Copies what is there, so that it is in one place or the other always."""
    if not self._objects:
      aside = name_aside(self._path)
      write_whole(aside, read_bytes(self._path))
      return aside
    aside = name_aside(self._folder)
    aside.mkdir(parents=True)
    for path, _ in written:
      (aside / path.name).write_bytes(path.read_bytes())
    return aside

  def _objects_in_order(self) -> list[epath.Path]:
    if not self._folder.exists():
      return []
    return sorted(self._folder.glob('*.json'), key=lambda path: path.name)


def dumps(value: Any, **kwargs) -> str:
  """Strict JSON, with null for numbers that are not finite."""
  return json.dumps(_finite(value), allow_nan=False, **kwargs)


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file in one piece, see `write_whole`."""
  write_whole(path, (dumps(value, indent=2) + '\n').encode())


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
  """A line as a run writes it; None where it is damaged, or was cut off."""
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
  """What a line is about; there is one line of each step and kind."""
  kinds = [kind for kind in ('eval', 'loss', 'replaced') if kind in line]
  return line['step'], *(kinds or sorted(line))


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
