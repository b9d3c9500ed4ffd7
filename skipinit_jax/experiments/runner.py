"""Running a study: every run that can start is started, until none is left.

A run resumes where it was stopped; a finished one is never repeated. An engine
is a function that starts a run and returns a future, see `engines`.
"""

import concurrent.futures
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tqdm

from skipinit_jax.errors import InputError
from skipinit_jax.experiments.grid import Grid, Run
from skipinit_jax.experiments.selection import (
  Outcome,
  known_runs,
  read_outcome,
  seeds_of,
  total_runs,
  wanted,
)
from skipinit_jax.experiments.studies import Study
from skipinit_jax.experiments.worker import OUTPUT
from skipinit_jax.files import write_json

STUDY = 'study.json'


class Results:
  """The outcomes in a workdir, read once each.

  Attributes:
    problems: run id -> a line on a result that can't be read.
  """

  def __init__(self, workdir: Path):
    self._workdir = workdir
    self._known: dict[str, Outcome | None] = {}
    self.problems: dict[str, str] = {}

  def __call__(self, run: Run, *, again: bool = False) -> Outcome | None:
    """The outcome of a run; None if not finished or not readable."""
    if again or run.id not in self._known:
      self.problems.pop(run.id, None)
      self._known[run.id] = None
      try:
        self._known[run.id] = read_outcome(run.folder(self._workdir))
      except ValueError as error:
        self.problems[run.id] = str(error)
    return self._known[run.id]


def open_study(workdir: Path, study: Study, grid: Grid, dataset: str) -> None:
  """Makes a study's folder, or checks that an existing one is this study's.

  Raises:
    InputError: the folder holds another study or grid, or can't be made.
  """
  check_folder(workdir, study, grid, dataset)
  path = workdir / STUDY
  if path.exists():
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, _described(study, grid, dataset))
  except OSError as error:
    raise InputError(f'can not write to {workdir}: {error.strerror}') from None


def check_folder(workdir: Path, study: Study, grid: Grid, dataset: str) -> None:
  """Raises InputError for a folder with another study, or with other files."""
  if (workdir / STUDY).exists():
    theirs = read_study(workdir)
    for name, value in _described(study, grid, dataset).items():
      if theirs.get(name) != value:
        if name == 'overrides':
          raise InputError(
            f'{workdir} was started with {_flags(theirs[name])}, not with '
            f'{_flags(value)}; go on by `run {workdir}`, or choose another '
            '--workdir'
          )
        raise InputError(
          f'{workdir} holds another study: {name} is {theirs.get(name)!r} '
          f'there, {value!r} here; choose another --workdir'
        )
  elif workdir.is_dir() and any(workdir.iterdir()):
    raise InputError(f'{workdir} is not empty and holds no study')


def _flags(overrides: Mapping[str, Any]) -> str:
  """Fields as they are given on a command line."""
  flags = [f'--config.{name}={value}' for name, value in overrides.items()]
  return ' '.join(flags) or 'no fields of its own'


def _described(study: Study, grid: Grid, dataset: str) -> dict[str, Any]:
  """What study.json says of a study."""
  return {
    'study': study.name,
    'dataset': dataset,
    'panels': list(grid.panels.values),
    'rows': list(grid.rows.values),
    'columns': list(grid.columns),
    'rates': list(grid.rates),
    'widest': grid.widest and list(grid.widest),
    'seeds': {row: list(seeds_of(grid, row)) for row in grid.rows.values},
    'overrides': dict(grid.overrides),
  }


def read_study(workdir: Path) -> dict[str, Any]:
  """The contents of study.json; InputError if there is none."""
  try:
    study = json.loads((workdir / STUDY).read_text())
    return study | {'overrides': dict(study['overrides'])}
  except (OSError, ValueError, TypeError, KeyError):
    raise InputError(
      f'{workdir} holds no study; start one by `run STUDY --dataset=DATASET '
      f'--workdir={workdir}`'
    ) from None


def run_study(
  grid: Grid,
  workdir: Path,
  submit: Callable[[Run], concurrent.futures.Future],
) -> list[str]:
  """Runs all that is not finished, and prints a line for each run that ends.

  Args:
    grid: the study's grid.
    workdir: the study's folder, see `open_study`.
    submit: the engine, see `engines`.

  Returns:
    A line for each run that failed, after the others are done.
  """
  results = Results(workdir)
  running: dict[concurrent.futures.Future, Run] = {}
  started: set[str] = set()
  failed: list[str] = []
  with progress_bar(grid, results) as bar:
    while True:
      for run in wanted(grid, results):
        if run.id not in started:
          started.add(run.id)
          running[submit(run)] = run
      if not running:
        return failed
      ended, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in [f for f in running if f in ended]:
        run = running.pop(future)
        outcome = results(run, again=True)
        if outcome is None:
          status = future.exception() or future.result()
          failed.append(f'{run.title}: {reason(run, workdir, status)}')
          line = f'failed: {failed[-1]}'
        else:
          line = f'{run.title}: {outcome.status}, top-1 {outcome.top1:.4f}'
          bar.update()
          bar.total = total_runs(grid, results)
        bar.set_postfix_str(f'{len(running)} running, {len(failed)} failed')
        bar.write(line, file=sys.stderr)


def progress_bar(grid: Grid, results: Results) -> tqdm.tqdm:
  """A bar for the whole study; none without a terminal."""
  return tqdm.tqdm(
    total=total_runs(grid, results),
    initial=sum(results(r) is not None for r in known_runs(grid, results)),
    disable=None,
    dynamic_ncols=True,
    bar_format='{n_fmt}/{total_fmt} runs done, {elapsed} gone, {remaining} left'
    '{postfix}',
  )


def reason(run: Run, workdir: Path, status: Any) -> str:
  """The reason why a run failed: the last line that it printed."""
  path = run.folder(workdir) / OUTPUT
  text = path.read_text(errors='replace') if path.exists() else ''
  lines = [line for line in text.splitlines() if line.strip()]
  last = lines[-1].removeprefix('error: ') if lines else 'no output'
  how = f'exit status {status}' if isinstance(status, int) else status
  return f'{last} ({how}; {path})'
