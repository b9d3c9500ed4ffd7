"""What the command lines share: statuses, one-line errors, flags, Ctrl-C.

Importing this, as the package does before anything slow, makes a Ctrl-C end a
command of this package in one line with status 130 while it still imports, and
a package that is missing end it in one line with status 2. Nothing changes
where another program imports this one.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from skipinit_jax.errors import (
  InputError,
  RunError,
  check_folder,
  nearest,
  not_installed,
)

# Exit statuses. A run that diverged has that of its recipe's diverged_status.
FAILED, BAD_INPUT = 1, 2
STUCK = 75  # No step was made for a long time.
LOST = 76  # Another process of the job was lost; 134 where JAX's heartbeat saw.
SIGNALED = 128  # And the number of the signal.

LONGEST = 300  # Characters of an error.
FIELD = '--config.'


def one_line(message: str) -> str:
  """A message on one line; only the beginning and the end of a long one.

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


def refuse(message: str, status: int = BAD_INPUT) -> NoReturn:
  """Ends the process with one line and a status."""
  print(one_line(f'error: {message}'), file=sys.stderr)
  sys.exit(status)


def leave(line: str, status: int) -> NoReturn:
  """Ends the process now, without exit handlers, which may wait for others."""
  sys.stdout.flush()
  above = '\n' if sys.stderr.isatty() else ''  # Keeps the progress line.
  print(above + line, file=sys.stderr, flush=True)
  os._exit(status)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
  """Ends the process in one line if input is bad, or on Ctrl-C."""
  try:
    yield
  except InputError as error:
    refuse(str(error))
  except RunError as error:
    refuse(str(error), FAILED)
  except KeyboardInterrupt:
    print('stopped by SIGINT', file=sys.stderr)
    sys.exit(SIGNALED + signal.SIGINT)


class Parser(argparse.ArgumentParser):
  """Takes flags by their full names, and refuses in one line.

  Args:
    fields: whether fields of a recipe can be set, as in --config.epochs=2.
    **kwargs: of `argparse.ArgumentParser`.
  """

  def __init__(self, *, fields: bool = False, **kwargs):
    if fields:
      kwargs['epilog'] = f'Fields of the recipe are set as in {FIELD}epochs=2.'
    super().__init__(allow_abbrev=False, **kwargs)
    self._fields = fields

  def error(self, message: str) -> NoReturn:
    """Ends the process."""
    refuse(message)

  def parse_known_args(self, args=None, namespace=None):
    """Leaves over only what sets fields, and that only if it is allowed."""
    known, rest = super().parse_known_args(args, namespace)
    for argument in rest:
      name, equals, _ = argument.partition('=')
      if self._fields and argument.startswith(FIELD) and equals:
        continue
      hint = ''
      if name.startswith('--') and not name.startswith(FIELD):
        flags = [f for f in self._option_string_actions if f != '--help']
        hint = nearest(name, flags)
      if self._fields:
        hint += f'; fields are set as in {FIELD}epochs=2'
      self.error(f'unexpected argument {argument!r}{hint}')
    return known, rest

  def parse_with_fields(
    self, args: Sequence[str] | None = None
  ) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags, and the recipe's fields that are set: name and text."""
    known, rest = self.parse_known_args(args)
    parts = [argument.removeprefix(FIELD).partition('=') for argument in rest]
    return known, [(name, text) for name, _, text in parts]


def number(
  kind: type[int] | type[float], low: float, high: float = math.inf
) -> Callable[[str], float]:
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


def folder_or_bucket(text: str) -> str:
  """The type of a flag: a folder, or an address such as gs://bucket/run."""
  return _checked(text, buckets=True)


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


def _checked(text: str, buckets: bool) -> str:
  try:
    return check_folder(text, buckets)
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def interrupt_as_usual() -> None:
  """Makes SIGINT a KeyboardInterrupt again, once all is imported."""
  if signal.getsignal(signal.SIGINT) is _leave_while_starting:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command(argv: list[str], orig_argv: list[str]) -> bool:
  """Whether Python is starting a command of ours: a file, or `-m`."""
  if argv[:1] == ['-m']:  # While Python looks for the module.
    module = orig_argv[orig_argv.index('-m') + 1] if '-m' in orig_argv else ''
    return module.split('.')[0] == 'skipinit_jax'
  # A spawned child has its parent's argv.
  if not argv or argv[0] not in orig_argv:
    return False
  if Path(argv[0]).name == 'skipinit-jax':  # In the folder of scripts.
    return True
  train = Path(__file__).parents[1] / 'train.py'
  return os.path.realpath(argv[0]) == os.path.realpath(train)


def _leave_while_starting(number: int, frame: FrameType | None) -> None:
  del frame
  os.write(2, b'stopped by SIGINT while starting\n')
  os._exit(SIGNALED + number)


def _name_what_is_missing(
  kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
  """Ends a command in one line if an extra was not installed."""
  if isinstance(error, ModuleNotFoundError) and error.name:
    missing = error.name.partition('.')[0]
    if importlib.util.find_spec(missing) is None:
      leave(f'error: {not_installed(missing)}', BAD_INPUT)
  sys.__excepthook__(kind, error, trace)


if _is_command(sys.argv, sys.orig_argv):
  sys.excepthook = _name_what_is_missing
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave_while_starting)
