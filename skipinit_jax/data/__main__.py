"""Data on the command line: prepare, convert, check, rate."""

import argparse
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from skipinit_jax import cli
from skipinit_jax.data import imagenet, rate
from skipinit_jax.data.check import check
from skipinit_jax.data.convert import convert
from skipinit_jax.data.prepare import DOWNLOADED, prepare
from skipinit_jax.data.sources import local_path
from skipinit_jax.data.stream import Stream
from skipinit_jax.errors import InputError, RunError


def _folder(value: str) -> Path:
  try:
    if not value.strip():
      raise InputError(f'{value!r}: expected the name of a folder')
    return local_path(value)
  except InputError as error:  # argparse prints these with the flag.
    raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog='python -m skipinit_jax.data', description=__doc__, fields=True
  )
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
  command.add_argument(
    '--shorter-side',
    type=cli.number(int, 1, 2**13),
    help='also write imagenet2012 with images of so many pixels',
  )
  command.set_defaults(
    run=lambda args: print(
      prepare(args.name, args.data_dir, args.manual_dir, args.shorter_side)
    )
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

  command = commands.add_parser(
    'rate',
    help='images a second that this host makes, and that chips could take',
    fields=True,
  )
  command.add_argument('--data-dir', type=_folder, required=True)
  command.add_argument(
    '--config', default='imagenet', help='recipe (default: %(default)s)'
  )
  command.add_argument(
    '--workers',
    type=workers,
    nargs='+',
    default=rate.usual_workers(),
    help='numbers of processes to try (default: %(default)s)',
  )
  command.add_argument(
    '--topology', help='chips to compare with, such as v5e:2x2 or h100x8'
  )
  command.set_defaults(run=_rate)
  return parser


def _check(args: argparse.Namespace) -> int:
  broken = 0
  for line in check(args.name, args.data_dir, args.workers):
    print(f'broken: {line}')
    broken += 1
  print(f'{broken} broken' if broken else 'all well')
  return cli.FAILED if broken else 0


def _rate(args: argparse.Namespace) -> None:
  # Here, since no other command needs recipes, let alone compilers.
  from skipinit_jax.training import recipes

  config = recipes.load_recipe(args.config)
  fields = recipes.parse_fields(config, args.texts)
  config = recipes.set_fields(config, fields)
  data = rate.open_files(config, str(args.data_dir))
  print(
    f'data: {data.name} in {args.data_dir}, {data.train_size:,} images to '
    f'train on, crops of {data.image_shape[0]} pixels',
    flush=True,
  )
  chips = _chips(config, data, args.topology) if args.topology else None
  print('workers  images/s', flush=True)
  best = 0.0
  for workers in args.workers:
    measured = rate.measure(data, workers)
    print(f'{workers:>7}  {measured:>8,.0f}', flush=True)
    best = max(best, measured)
  if chips:
    print(rate.verdict(best, *chips))


def _chips(
  config: ConfigDict, data: Stream, topology: str
) -> tuple[float, str, int]:
  """What chips can take: images a second, at most; their name and hosts."""
  from skipinit_jax.ahead_of_time import chips, measure

  # Nothing is computed: an accelerator that is here is left alone.
  jax.config.update('jax_platforms', 'cpu')
  where = chips.topology(topology)
  print(f'compiling for {topology} ...', file=sys.stderr)
  found = measure.measure(config, where, evaluation=False, data=data)
  if not found['fits']:
    raise RunError(measure.remedy(found, config))
  bound = where.chips * found['images_per_second_bound']
  print(
    f'chips: {topology} ({where.chips} chips) can take {bound:,.0f} images/s '
    'at most: a bound from their compiler, not a measurement',
    flush=True,
  )
  return bound, topology, where.hosts


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  cli.interrupt_as_usual()
  args, texts = _parser().parse_with_fields(argv)
  args.texts = texts  # The fields of a recipe that `rate` reads.
  with cli.errors_in_one_line():
    try:
      return args.run(args) or 0
    except OSError as error:
      raise InputError(f'{error.filename or ""}: {error.strerror}') from None


if __name__ == '__main__':
  sys.exit(main())
