"""Data on the command line: prepare, convert, check."""

import argparse
import sys
from pathlib import Path

from skipinit_jax import cli
from skipinit_jax.data import imagenet
from skipinit_jax.data.check import check
from skipinit_jax.data.convert import convert
from skipinit_jax.data.prepare import DOWNLOADED, prepare
from skipinit_jax.data.sources import local_path
from skipinit_jax.errors import InputError


def _folder(value: str) -> Path:
  try:
    if not value.strip():
      raise InputError(f'{value!r}: expected the name of a folder')
    return local_path(value)
  except InputError as error:  # argparse prints these with the flag.
    raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(prog='python -m skipinit_jax.data', description=__doc__)
  workers = cli.number(int, 0, 2**10)
  commands = parser.add_subparsers(required=True, metavar='command')

  command = commands.add_parser(
    'prepare', help='write a data set as ArrayRecord, by tensorflow-datasets'
  )
  command.add_argument('name', choices=[imagenet.NAME, *DOWNLOADED])
  command.add_argument(
    '--data-dir', type=cli.folder, required=True, help='where data sets live'
  )
  command.add_argument(
    '--manual-dir', type=_folder, help="folder of imagenet2012's two archives"
  )
  command.set_defaults(
    run=lambda args: print(prepare(args.name, args.data_dir, args.manual_dir))
  )

  command = commands.add_parser(
    'convert', help='rewrite TFRecords that tfds wrote as ArrayRecord'
  )
  command.add_argument(
    'source', type=_folder, help='prepared folder, NAME/VERSION'
  )
  command.add_argument(
    'target', type=cli.folder, help='new folder, NAME/VERSION'
  )
  command.add_argument('--workers', type=workers, help='default: all cores')
  command.set_defaults(
    run=lambda args: print(convert(args.source, args.target, args.workers))
  )

  command = commands.add_parser(
    'check', help='read and decode every record, and list what is broken'
  )
  command.add_argument('name', help="a tfds data set, or 'folder'")
  command.add_argument('--data-dir', type=_folder, required=True)
  command.add_argument(
    '--workers', type=workers, default=0, help='default: all cores'
  )
  command.set_defaults(run=_check)
  return parser


def _check(args: argparse.Namespace) -> int:
  broken = 0
  for line in check(args.name, args.data_dir, args.workers):
    print(f'broken: {line}')
    broken += 1
  print(f'{broken} broken' if broken else 'all well')
  return cli.FAILED if broken else 0


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  cli.interrupt_as_usual()
  args = _parser().parse_args(argv)
  with cli.errors_in_one_line():
    try:
      return args.run(args) or 0
    except OSError as error:
      raise InputError(f'{error.filename or ""}: {error.strerror}') from None


if __name__ == '__main__':
  sys.exit(main())
