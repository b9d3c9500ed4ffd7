"""What the command lines share: exit statuses, one-line errors, flag types."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from skipinit_jax.errors import InputError, RunError, check_folder

# Exit statuses, beside a diverged run's, a signal's, `watchdog.STUCK` and
# `processes.LOST`.
FAILED, BAD_INPUT = 1, 2
LONGEST = 300  # Characters of a line on what is wrong.


class Parser(argparse.ArgumentParser):
  """Takes flags by their full names only, and refuses in one line."""

  def __init__(self, **kwargs):
    super().__init__(allow_abbrev=False, **kwargs)

  def error(self, message: str) -> NoReturn:
    """Ends the process."""
    refuse(message)


def refuse(message: str, status: int = BAD_INPUT) -> NoReturn:
  """Ends the process with one line and a status."""
  print(one_line(f'error: {message}'), file=sys.stderr)
  sys.exit(status)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
  """Ends the process where this package says what is wrong."""
  try:
    yield
  except InputError as error:
    refuse(str(error))
  except RunError as error:
    refuse(str(error), FAILED)


def one_line(message: str) -> str:
  """A message on one line; of a very long one, its beginning and its end.

  >>> one_line('a line' + chr(10) + 'and  another')
  'a line and another'
  >>> len(one_line('long ' * 1000)) == LONGEST
  True
  """
  text = ''.join(c if c.isprintable() else ' ' for c in message)
  text = ' '.join(text.split())
  if len(text) <= LONGEST:
    return text
  end = LONGEST // 3
  return f'{text[: LONGEST - end - 5]} ... {text[-end:]}'


def number(kind: type, low: float, high: float = math.inf) -> Callable:
  """The type of a flag: a number from `low` to `high`."""
  name = 'a whole number' if kind is int else 'a number'
  span = f'of at least {low}' if high == math.inf else f'from {low} to {high}'

  def parse(text: str) -> float:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not (low <= value <= high and math.isfinite(value)):
      raise argparse.ArgumentTypeError(f'{text!r}: expected {name} {span}')
    return value

  return parse


def folder(text: str) -> Path:
  """The type of a flag: a local folder to write to, made when needed."""
  return Path(_checked(text, buckets=False))


def file(text: str) -> Path:
  """The type of a flag: a file to write, in a folder that exists."""
  parent, name = os.path.split(text)
  path = folder(parent or '.') / name
  try:
    found = not name or path.is_dir()
  except OSError as error:
    raise argparse.ArgumentTypeError(f'{text!r}: {error.strerror}') from None
  if found or not path.parent.is_dir():
    wrong = 'is a folder' if found else f'is in no folder: {path.parent}'
    raise argparse.ArgumentTypeError(f'{text!r} {wrong}; expected a file')
  return path


def folder_or_bucket(text: str) -> str:
  """The type of a flag: a folder, or an address such as gs://bucket/run."""
  return _checked(text, buckets=True)


def _checked(text: str, buckets: bool) -> str:
  try:
    return check_folder(text, buckets)
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from None
