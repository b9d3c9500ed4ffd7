"""A made-up study with results that are known, and a tiny one that trains."""

import dataclasses
import json

from skipinit_jax.experiments.grid import (
  TEST,
  VALIDATION,
  Axis,
  Cell,
  Grid,
  cells,
)
from skipinit_jax.experiments.selection import runs_at
from skipinit_jax.experiments.studies import Study
from skipinit_jax.published import FAILS, Accuracy

# Seconds a run, most of it the start of a process.
GRID = Grid(
  recipe='synthetic',
  fields={'epochs': 3.0, 'model.depth': 10},
  rows=Axis('batch', {str(b): {'batch_size': b} for b in (16, 32)}),
  columns=('skipinit',),
  rates=(-6, 39),
  validation=8,
  seeds=1,
  best=1,
)

EVIL = '<script>alert(1)</script>&"|`$x$'
RATES = (-3, -2, -1)
# On the held out images: -1 is within error of -2, and -3 is not.
TUNING = {-3: 0.80, -2: 0.90, -1: 0.885}
SHIFT = 0.01  # Of each seed, to either side: an error of 1 %.
TESTED = {'16': 0.935, '100': 0.9}
UNFINISHED = Cell('', '100', 'skipinit')


def make_grid(**changes):
  grid = Grid(
    recipe='digits',
    fields={'watch_every_steps': 5},
    rows=Axis('depth', {r: {'model.depth': int(r)} for r in TESTED}),
    columns=('batchnorm', 'skipinit', 'none'),
    rates=RATES,
    validation=240,
    seeds=2,
    best=2,
    choices=f'Chosen: {EVIL}',
  )
  return dataclasses.replace(grid, **changes)


def make_study(grid, **changes):
  study = Study(
    name='made_up',
    title='A made up study',
    question='Why?',
    grids={'cifar10': grid, 'digits': grid},
    published={
      'batchnorm': {16: Accuracy(93.1, 0.2, -2, (-3, -2))},
      'none': {16: Accuracy(92.0, 0.1, -2, (-2, -2)), 100: FAILS},
    },
    source='A paper, table 7',
  )
  return dataclasses.replace(study, **changes)


def result(top1, diverged, images):
  evaluation = {'top1': top1, 'top5': 1.0, 'loss': 2 * (1 - top1), 'step': 60}
  return {
    'status': 'diverged' if diverged else 'completed',
    'eval': evaluation,
    'best_eval': evaluation,
    'eval_size': images,
    'last_train': {'step': 60, 'loss': 0.125, 'top1': 1.0},
    'chance': 0.1,
    'steps': 60,
    'parameters': 1,
    'seconds': 10.0,
    'versions': {'jax': '0.12.0'},
    'device': '1 x abacus',
    'revision': 'abc123',
  }


def metrics(diverged, scalars):
  for step in range(10, 70, 10):
    line = {'step': step, 'epoch': step / 10}
    yield {**line, 'loss': 2.0**-step, 'top1': 0.5, 'learning_rate': 0.1}
    if diverged:
      return
    if scalars:
      yield {**line, 'alpha': {f'block{i}': i * step for i in range(6)}}
  evaluation = {'top1': 0.9, 'top5': 1.0, 'loss': 0.1}
  yield {'step': 60, 'epoch': 6.0, 'eval': evaluation}


def write_run(workdir, run, top1, diverged):
  folder = run.folder(workdir)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text('{}')
  images = 360 if run.split == TEST else 240
  values = result(top1, diverged, images)
  values['chance'] = 0.1 if run.split == TEST else 0.2
  (folder / 'result.json').write_text(json.dumps(values))
  scalars = run.cell.column == 'skipinit'
  lines = map(json.dumps, metrics(diverged, scalars))
  (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')


def write_runs(workdir, grid):
  """All runs but those of one rate of UNFINISHED, one of them broken."""
  for cell in cells(grid):
    lost = cell.column == 'none'
    for rate in grid.rates:
      runs = runs_at(grid, cell, rate, VALIDATION)
      if cell == UNFINISHED and rate == -1:
        folder = runs[0].folder(workdir)
        folder.mkdir(parents=True)
        (folder / 'result.json').write_text('{"status"')
        continue
      for run in runs:
        top1 = TUNING[rate] + SHIFT * (2 * run.seed - 1)
        write_run(workdir, run, top1, lost)
    if cell != UNFINISHED:
      for run in runs_at(grid, cell, -2 if not lost else -3, TEST):
        top1 = TESTED[cell.row] + 0.001 * (2 * run.seed - 1)
        write_run(workdir, run, top1, lost)
