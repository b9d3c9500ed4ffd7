"""The command line of the studies.

python -m skipinit_jax.experiments list
python -m skipinit_jax.experiments run depth --dataset=digits --dry-run
python -m skipinit_jax.experiments run depth --dataset=digits
python -m skipinit_jax.experiments report depth --dataset=digits
python -m skipinit_jax.experiments report depth runs/another
python -m skipinit_jax.experiments status depth --dataset=digits

Fields of the recipe come last, as in --config.epochs=2; the same command
resumes a study that was stopped.
"""

import argparse
import dataclasses
import os
import signal
import sys
import types
from pathlib import Path

from skipinit_jax import cli
from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError
from skipinit_jax.experiments import engines
from skipinit_jax.experiments.estimate import (
  SUSTAINED_RATE,
  cost,
  time_here,
  time_of_runs,
  time_on,
)
from skipinit_jax.experiments.grid import (
  TEST,
  VALIDATION,
  Axis,
  Grid,
  cells,
  check_overrides,
)
from skipinit_jax.experiments.runner import (
  STUDY,
  Results,
  check_folder,
  open_study,
  read_study,
  run_study,
)
from skipinit_jax.experiments.selection import (
  known_runs,
  runs_at,
  summarize,
  total_runs,
  wanted,
)
from skipinit_jax.experiments.studies import STUDIES, Study, find_study
from skipinit_jax.experiments.words import (
  cell_name,
  duration,
  rate_text,
  seeds_text,
  widening,
)
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.lines import METRICS
from skipinit_jax.training.network import build_model
from skipinit_jax.training.recipes import load_recipe, parse_fields
from skipinit_jax.training.signals import handled_signals
from skipinit_jax.variants import VARIANTS

DATASET = 'digits'
ENGINES = ('local', 'ray', 'print')

Texts = list[tuple[str, str]]  # Fields that are set, and their values.


def main() -> None:
  """Runs the command; bad input ends it with one line."""
  for number in handled_signals():
    signal.signal(number, _stop)
  args, texts = parser().parse_with_fields()
  with cli.errors_in_one_line():
    try:
      args.call(args, texts)
    except KeyboardInterrupt as stop:
      number = stop.args[0] if stop.args else signal.SIGINT
      print(
        f'stopped by {number.name}; the same command resumes', file=sys.stderr
      )
      sys.exit(cli.SIGNALED + number)


def _stop(number: int, frame: types.FrameType | None) -> None:
  del frame
  raise KeyboardInterrupt(signal.Signals(number))


def parser() -> cli.Parser:
  """The flags."""
  top = cli.Parser(
    prog='python -m skipinit_jax.experiments',
    description="The papers' experiments on your data.",
    fields=True,
  )
  actions = top.add_subparsers(dest='action', required=True)
  listing = actions.add_parser('list', help='the studies and what they cost')
  listing.set_defaults(call=list_studies)
  for name, call, help_ in (
    ('run', run, 'run what is not finished, then write the report'),
    ('report', report, 'write the report of what is finished'),
    ('status', status, 'how far a study is, from any terminal'),
  ):
    action = actions.add_parser(name, help=help_, fields=True)
    action.set_defaults(call=call)
    studies = ', '.join(STUDIES)
    action.add_argument('study', help=f"{studies}, or a started study's folder")
    action.add_argument('--dataset', help='by default digits')
    action.add_argument(
      '--workdir', type=cli.folder, help='by default runs/STUDY-DATASET'
    )
    if name == 'report':
      action.add_argument('other', nargs='?', help='another, to set beside it')
    if name != 'run':
      continue
    action.add_argument(
      '--dry-run',
      action='store_true',
      help='print what would run and what it costs here; change nothing',
    )
    action.add_argument(
      '--topology', help='dry run: a GPU that is not here, such as h100x1'
    )
    action.add_argument('--engine', default='local', choices=ENGINES)
    action.add_argument(
      '--jobs',
      type=cli.number(int, 1, 2**10),
      default=1,
      help='local: at a time',
    )
    action.add_argument(
      '--address', help="ray: of the cluster, 'auto' for a running one"
    )
    share = cli.number(float, 0, 2**10)
    action.add_argument('--gpus-per-run', type=share, default=0.0, help='ray')
    action.add_argument('--cpus-per-run', type=share, default=1.0, help='ray')
  return top


def list_studies(args: argparse.Namespace, texts: Texts) -> None:
  """Prints every study and data set with its cost."""
  del args, texts
  for study in STUDIES.values():
    print(f'{study.name}: {study.question}')
    for dataset, grid in study.grids.items():
      print(f'  --dataset={dataset}: {price(grid)}')


def run(args: argparse.Namespace, texts: Texts) -> None:
  """Runs a study to its end and writes its report."""
  if is_started(args):
    study, grid, workdir = opened(args, texts)
  else:
    args.dataset = args.dataset or DATASET
    study, grid = find_study(args.study, args.dataset)
    fields = parse_fields(load_recipe(grid.recipe), texts)
    check_overrides(grid, fields)
    grid = dataclasses.replace(grid, overrides=fields)
    workdir = study_folder(args)
  if args.topology and not args.dry_run:
    raise InputError('--topology goes with --dry-run')
  if args.dry_run:
    check_folder(workdir, study, grid, args.dataset)
    dry_run(grid, workdir, args.topology)
    return
  check(grid)
  if args.engine == 'ray':
    engines.require_ray()
  open_study(workdir, study, grid, args.dataset)
  results = Results(workdir)
  left = wanted(grid, results)
  if args.engine == 'print':
    try:
      for each in left:
        print(each.command(workdir))
      sys.stdout.flush()
    except BrokenPipeError:  # As into `head`; Python flushes again at its end.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return
    note = 'rates are chosen from these; then ask again for the tests'
    print(f'{len(left)} commands; {note}', file=sys.stderr)
    return
  print(grid_lines(grid), file=sys.stderr)
  print(f'{len(left)} runs to start with, {price(grid)}', file=sys.stderr)
  if args.engine == 'ray':
    engine = engines.on_ray(
      workdir, args.address, args.gpus_per_run, args.cpus_per_run
    )
  else:
    if len(left) == len(known_runs(grid, results)):  # At the first start.
      time = time_of_runs(grid, args.study, args.dataset)
      print(f'here: {time}', file=sys.stderr)
    places = {cell: i for i, cell in enumerate(cells(grid))}
    engine = engines.local(workdir, args.jobs, lambda run: places[run.cell])
  with engine as submit:
    failed = run_study(grid, workdir, submit)
  report(args, [])
  if bound := met_bound(grid, Results(workdir)):
    print(bound, file=sys.stderr)
  if failed:
    print(
      f'{len(failed)} runs failed; the same command tries them again. '
      f'The first: {failed[0]}',
      file=sys.stderr,
    )
    sys.exit(cli.FAILED)


def dry_run(grid: Grid, workdir: Path, topology: str | None) -> None:
  """Prints what would run and what it costs, and changes nothing.

  Args:
    grid: of the study.
    workdir: of the study, which need not exist.
    topology: a GPU to compute the time for; None: the device that is here.
  """
  time = time_on(grid, topology) if topology else f'here: {time_here(grid)}'
  left = wanted(grid, Results(workdir))
  print(grid_lines(grid))
  print(f'{len(left)} runs to start with, {price(grid)}')
  print(time)
  try:
    check(grid)
  except InputError as error:  # Such as images that are to be prepared.
    print(f'before it can run: {error}')
  if left:
    print(f'the first: {left[0].command(workdir)}')
  print('nothing was run or written')


def report(args: argparse.Namespace, texts: Texts) -> None:
  """Writes report.html and report.md in the study's folder, or a comparison."""
  # Here, since drawing takes a second to import.
  from skipinit_jax.experiments.report import (
    Findings,
    write_comparison,
    write_report,
  )

  other = args.other if args.action == 'report' else None
  study, grid, workdir = opened(args, texts)
  if other is None:
    print(write_report(study, grid, args.dataset, workdir))
    return
  ours = Findings(study, grid, args.dataset, workdir)
  # A folder says its own data set; another study has that of the first.
  dataset = args.dataset if other in STUDIES else None
  vars(args).update(study=other, workdir=None, dataset=dataset)
  study, grid, workdir = opened(args, [])
  print(write_comparison(ours, Findings(study, grid, args.dataset, workdir)))


def status(args: argparse.Namespace, texts: Texts) -> None:
  """Prints how far a study is, each of its rows, and the time they need."""
  _, grid, workdir = opened(args, texts)
  results = Results(workdir)
  known = known_runs(grid, results)
  left = [run for run in known if results(run) is None]
  begun = [r for r in left if (r.folder(workdir) / METRICS).exists()]
  print(
    f'{len(known) - len(left)} of {total_runs(grid, results)} runs done, '
    f'{len(begun)} begun'
  )
  for row, fields in grid.rows.values.items():
    part = dataclasses.replace(grid, rows=Axis(grid.rows.name, {row: fields}))
    outcomes = filter(None, map(results, known_runs(part, results)))
    seconds = [outcome.seconds for outcome in outcomes]
    left = total_runs(part, results) - len(seconds)
    line = f'{grid.rows.name} {row}: {len(seconds)} of {left + len(seconds)}'
    if left and seconds:
      rest = duration(left * sum(seconds) / len(seconds))
      line += f', the others about {rest} one at a time'
    print(line)
  for problem in results.problems.values():
    print(f'unreadable: {problem}')


def is_started(args: argparse.Namespace) -> bool:
  """Whether the study is named by the folder that it was started in."""
  return args.study not in STUDIES and (Path(args.study) / STUDY).exists()


def opened(args: argparse.Namespace, texts: Texts) -> tuple[Study, Grid, Path]:
  """A started study, its grid with the overrides of that start, its folder."""
  if is_started(args):
    if args.workdir or args.dataset:
      raise InputError(
        f'{args.study} is the folder of a study, which says its data set; '
        'expected neither --dataset nor --workdir'
      )
    args.workdir = Path(args.study)
    started = read_study(args.workdir)
    args.study, args.dataset = started['study'], started['dataset']
  args.dataset = args.dataset or DATASET
  study, grid = find_study(args.study, args.dataset)
  workdir = study_folder(args)
  overrides = read_study(workdir)['overrides']
  if texts and parse_fields(load_recipe(grid.recipe), texts) != overrides:
    raise InputError(f'{workdir} was run with other fields: {overrides}')
  grid = dataclasses.replace(grid, overrides=overrides)
  check_folder(workdir, study, grid, args.dataset)
  return study, grid, workdir


def study_folder(args: argparse.Namespace) -> Path:
  """The study's folder."""
  return args.workdir or Path('runs') / f'{args.study}-{args.dataset}'


def check(grid: Grid) -> None:
  """Raises InputError for a config that can't run, or missing data."""
  some = [
    run
    for cell in cells(grid)
    for split in (VALIDATION, TEST)
    for run in runs_at(grid, cell, grid.rates[0], split)
  ]
  data = open_dataset(some[0].config.data)
  for each in some:
    check_config(each.config, 1)
    build_model(each.config, data.num_classes, 'cpu')


def grid_lines(grid: Grid) -> str:
  """The grid in words, before it is run."""
  columns = ', '.join(VARIANTS[c].label for c in grid.columns)
  lines = [
    f'{grid.rows.name}: {", ".join(grid.rows.values)}',
    f'methods: {columns}',
    f'rates: {", ".join(f"2^{r}" for r in grid.rates)}'
    + (f' times {grid.unit:g}' if grid.unit != 1 else '')
    + widening(grid),
    f'seeds: {seeds_text(grid)}',
  ]
  if len(grid.panels.values) > 1:
    lines.insert(0, f'{grid.panels.name}: {", ".join(grid.panels.values)}')
  return '\n'.join(lines)


def met_bound(grid: Grid, results: Results) -> str:
  """The cells whose best rate is the last that was allowed; '' if none is."""
  summaries = [summarize(grid, cell, results) for cell in cells(grid)]
  met = [
    f'{cell_name(grid, s.cell)} at {rate_text(grid, s.rate)}'
    for s in summaries
    if s.rate is not None and s.trains and s.at_the_edge
  ]
  if not met:
    return ''
  return (
    'the best rate is the smallest or largest tried, and a better one may lie '
    f'beyond what the grid allows: {"; ".join(met)}'
  )


def price(grid: Grid) -> str:
  """What a grid costs, in words."""
  figures = cost(grid)
  on_cpu = duration(figures['cpu_seconds'])
  on_device = duration(figures['device_seconds'])
  where = (
    f'roughly {on_cpu} of one CPU core, half of it with --jobs=2 on two'
    if figures['flops'] < 1e15
    else f'{on_device} at a sustained {SUSTAINED_RATE / 1e12:.0f} TFLOP/s'
  )
  most = figures['widened']
  widened = f' (at most {most:.0f})' if most > figures['runs'] else ''
  return (
    f'{figures["runs"]:.0f} runs{widened}, {figures["images"] / 1e6:,.3g} '
    f'million images, {figures["flops"]:.2g} FLOPs; {where}'
  )


if __name__ == '__main__':
  main()
