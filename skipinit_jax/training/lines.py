"""The metric lines of a run: a file, or objects in a bucket."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

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
    """All whole lines of at most `until` steps, in order."""
    if self._objects:
      texts = [path.read_text() + '\n' for path in self._objects_in_order()]
    elif self._path.exists():
      texts = self._path.read_text().splitlines(keepends=True)
    else:
      texts = []
    lines = [line for text in texts if (line := _parse(text)) is not None]
    return [line for line in lines if line['step'] <= until]

  def take_up(self, step: int) -> None:
    """Drops what was written after `step` steps, to write it again."""
    if self._objects:
      for path in self._objects_in_order():
        if int(path.name.split('-')[0]) > step:
          path.unlink()
      self._number = len(self._objects_in_order())
      return
    lines = self.read(step)
    temporary = self._path.with_suffix('.tmp')
    temporary.write_text(''.join(dumps(line) + '\n' for line in lines))
    os.replace(temporary, self._path)
    self._file = self._path.open('a')

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

  def _objects_in_order(self) -> list[epath.Path]:
    if not self._folder.exists():
      return []
    return sorted(self._folder.glob('*.json'), key=lambda path: path.name)


def dumps(value: Any, **kwargs) -> str:
  """Strict JSON, with null for numbers that are not finite."""
  return json.dumps(_finite(value), allow_nan=False, **kwargs)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON file in one piece."""
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(dumps(value, indent=2) + '\n')
  temporary.replace(path)


def _parse(text: str) -> dict[str, Any] | None:
  """The line, or None where it was cut off when the run was killed."""
  try:
    return json.loads(text) if text.endswith('\n') else None
  except ValueError:
    return None


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
