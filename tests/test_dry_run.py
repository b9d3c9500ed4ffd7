"""`experiments run --dry-run`: says what would run and what it costs here."""

import dataclasses
import re
import sys
from types import SimpleNamespace

import jax
import pytest

from skipinit_jax.ahead_of_time.chips import GPUS, Slice
from skipinit_jax.experiments import __main__ as cli
from skipinit_jax.experiments import estimate
from skipinit_jax.experiments.studies import STUDIES, find_study
from skipinit_jax.experiments.words import duration


def dry(capsys, *args):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['experiments', 'run', *args, '--dry-run'])
    cli.main()
  return capsys.readouterr().out


def contents(folder):
  return {p: p.is_file() and p.read_bytes() for p in folder.rglob('*')}


def test_a_dry_run_says_all_and_writes_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('os.cpu_count', lambda: 3)
  out = dry(capsys, 'ablations', '--config.epochs=2')
  assert not contents(tmp_path)
  assert 'depth: 16, 100' in out
  assert 'rates: 2^' in out
  runs = re.search(r'(\d+) runs to start with, (\d+) runs', out)
  assert 0 < int(runs[1]) < int(runs[2])  # Tests come later.
  assert 'here: 3 CPU cores: roughly ' in out
  assert ' with --jobs=3\n' in out
  assert 'the first: python -m skipinit_jax.training --config=digits' in out
  assert '--config.epochs=2.0' in out
  assert 'before it can run' not in out


def test_a_dry_run_of_a_study_that_was_begun(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sys, 'argv', ['experiments', 'run', 'ablations', '--engine=print']
    )
    cli.main()
  before = contents(tmp_path)
  assert before
  assert 'nothing was run or written' in dry(capsys, 'ablations')
  with pytest.raises(SystemExit):
    dry(capsys, 'ablations', '--config.epochs=2')
  assert 'with no fields of its own, not with --config.epochs=2.0' in (
    capsys.readouterr().err
  )
  assert contents(tmp_path) == before


def test_a_dry_run_refuses_the_folders_that_a_run_would(tmp_path, capsys):
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(SystemExit) as end:
    dry(capsys, 'ablations', f'--workdir={tmp_path}')
  assert end.value.code == 2
  assert 'is not empty and holds no study' in capsys.readouterr().err


def test_a_dry_run_names_what_is_missing(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  out = dry(capsys, 'depth', '--dataset=cifar10', '--config.data.dir=nowhere')
  assert 'before it can run: ' in out
  assert 'nowhere' in out
  assert '756 runs to start with' in out


@pytest.fixture
def no_compiler(monkeypatch):
  """Steps of 2 s by memory and 1 s by rate, with 10 kernels."""
  asked = []

  def measure(config, where, *, evaluation):
    assert not evaluation
    asked.append((config.model.depth, config.model.method, where.name))
    return {'compute_seconds': 1.0, 'memory_seconds': 2.0, 'launches': 10}

  def topology(name):
    kind, _, chips = name.rpartition('x')
    return Slice(name, GPUS[kind], int(chips), 1, (None,))

  monkeypatch.setattr(estimate, 'measure', measure)
  monkeypatch.setattr(estimate, 'topology', topology)
  return asked


GRID = find_study('depth', 'cifar10')[1]


def test_the_bound_is_that_of_all_steps(no_compiler, tmp_path, capsys):
  arguments = ('depth', '--dataset=cifar10', f'--workdir={tmp_path}/study')
  out = dry(capsys, *arguments, '--topology=h100x1')
  steps = estimate.cost(GRID)['images'] / 128
  days = duration(2 * steps)
  assert f'NVIDIA H100 80GB HBM3: at least about {days} by a bound' in out
  assert f'; {10 * steps:.2g} kernels to start come on top' in out
  assert no_compiler == [(d, 'none', 'h100x1') for d in (16, 100, 1000)]


@pytest.mark.usefixtures('no_compiler')
def test_the_bound_is_for_one_gpu(capsys):
  with pytest.raises(SystemExit):
    dry(capsys, 'depth', '--dataset=cifar10', '--topology=h100x8')
  assert 'h100x8: expected one GPU' in capsys.readouterr().err


@pytest.mark.usefixtures('no_compiler')
def test_the_time_is_for_the_device_that_is_found(monkeypatch):
  device = SimpleNamespace(platform='gpu', device_kind=GPUS['l4'].name)
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  assert estimate.time_here(GRID).startswith('NVIDIA L4: at least about ')
  device.device_kind = 'a GPU of next year'
  days = duration(estimate.cost(GRID)['device_seconds'])
  assert estimate.time_here(GRID) == (
    f'a GPU of next year: {days} at a sustained 100 TFLOP/s'
  )


@pytest.mark.parametrize('study', ['depth', 'large_batch'])
def test_before_runs_a_process_of_its_own_looks_for_the_device(
  study, monkeypatch
):
  # The panels of large_batch hold functions, which no process can be sent.
  _, grid = find_study(study, 'digits')
  fields = {'log_every_steps': 7, 'epochs': 2.0} if study == 'depth' else {}
  grid = dataclasses.replace(grid, overrides=fields)
  expected = estimate.time_here(grid)
  assert 'CPU cores: roughly ' in expected
  monkeypatch.setattr(estimate, 'only_cpus', lambda: False)
  monkeypatch.setattr(jax, 'devices', lambda: pytest.fail('looked'))
  assert estimate.time_of_runs(grid, study, 'digits') == expected
  # What it meets stops no study.
  monkeypatch.setenv('JAX_PLATFORMS', 'abacus')
  said = estimate.time_of_runs(grid, study, 'digits')
  assert 'a time that is not known: ' in said


def test_panels_are_counted_each_with_its_own_steps(no_compiler):
  grid = STUDIES['batch_size'].grids['digits']
  where = estimate.topology('l4x1')
  whole = estimate.bound(grid, where)
  assert len(no_compiler) == len(grid.panels.values) * len(grid.rows.values)
  rates = dataclasses.replace(grid, rates=grid.rates[:1])
  assert estimate.bound(rates, where) < whole
