"""Data on the command line: prepare, convert, check."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from skipinit_jax.data import imagenet
from skipinit_jax.data.check import check
from skipinit_jax.data.convert import convert
from skipinit_jax.data.prepare import DOWNLOADED, prepare
from skipinit_jax.data.records import local_path
from skipinit_jax.errors import InputError

BAD_INPUT, BROKEN, INTERRUPTED = 2, 1, 130  # Exit statuses.


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(BAD_INPUT, f'error: {message} (see {self.prog} --help)\n')


def _folder(value: str) -> Path:
  try:
    return local_path(value)
  except InputError as error:  # argparse has a line of its own for these.
    raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog='python -m skipinit_jax.data', description=__doc__)
  commands = parser.add_subparsers(required=True, metavar='command')

  command = commands.add_parser(
    'prepare', help='write a data set as ArrayRecord, by tensorflow-datasets'
  )
  command.add_argument('name', choices=[imagenet.NAME, *DOWNLOADED])
  command.add_argument(
    '--data-dir', type=_folder, required=True, help='where data sets live'
  )
  command.add_argument(
    '--manual-dir', type=_folder, help="folder of imagenet2012's two archives"
  )
  command.add_argument(
    '--allow-counts', action='store_true', help=argparse.SUPPRESS
  )
  command.set_defaults(run=_prepare)

  command = commands.add_parser(
    'convert', help='rewrite TFRecords that tfds wrote as ArrayRecord'
  )
  command.add_argument(
    'source', type=_folder, help='prepared folder, NAME/VERSION'
  )
  command.add_argument('target', type=_folder, help='new folder, NAME/VERSION')
  command.add_argument('--workers', type=int, help='default: all cores')
  command.set_defaults(run=_convert)

  command = commands.add_parser(
    'check', help='read and decode every record, and list what is broken'
  )
  command.add_argument('name', help="a tfds data set, or 'folder'")
  command.add_argument('--data-dir', type=_folder, required=True)
  command.add_argument(
    '--workers', type=int, default=0, help='default: all cores'
  )
  command.add_argument(
    '--allow-counts', action='store_true', help=argparse.SUPPRESS
  )
  command.set_defaults(run=_check)
  return parser


def _prepare(args: argparse.Namespace) -> int:
  print(prepare(args.name, args.data_dir, args.manual_dir, args.allow_counts))
  return 0


def _convert(args: argparse.Namespace) -> int:
  print(convert(args.source, args.target, args.workers))
  return 0


def _check(args: argparse.Namespace) -> int:
  broken = 0
  for line in check(args.name, args.data_dir, args.workers, args.allow_counts):
    print(f'broken: {line}')
    broken += 1
  print(f'{broken} broken' if broken else 'all well')
  return BROKEN if broken else 0


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  try:
    args = _parser().parse_args(argv)
    return args.run(args)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return BAD_INPUT
  except OSError as error:
    print(f'error: {error.filename or ""}: {error.strerror}', file=sys.stderr)
    return BAD_INPUT
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return INTERRUPTED


if __name__ == '__main__':
  sys.exit(main())
