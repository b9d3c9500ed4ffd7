"""The command line, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, finish, start

TINY = (
  '--config=synthetic',
  '--config.model.depth=10',
  '--config.epochs=1',
  '--config.compilation_cache=',
)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('small') / 'run'
  return workdir, finish(start(workdir, *TINY))


def test_a_run_prints_one_summary_line(small):
  workdir, (status, out, err) = small
  assert status == 0, err
  (line,) = out.splitlines()
  result = json.loads((workdir / 'result.json').read_text())
  assert line.startswith(f'completed after {result["steps"]} steps')
  assert f'top-1 {result["eval"]["top1"]:.4f}' in line
  assert line.endswith(f'{workdir}/result.json')
  # Not a terminal: no progress line. The devices come first.
  assert '\r' not in err
  assert 'steps,' not in err.replace('training: 4 steps', '')
  assert 'devices: 1 x cpu' in err


def test_evaluation_only_prints_the_last_evaluation_as_json(small):
  workdir, _ = small
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  status, out, err = finish(start(workdir, *TINY, '--eval-only'))
  assert status == 0, err
  (line,) = out.splitlines()
  printed = json.loads(line)
  result = json.loads((workdir / 'result.json').read_text())
  assert {**printed['eval'], 'step': printed['step']} == result['eval']
  files = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
  assert files == {p: t for p, t in before.items() if p.is_file()}


def test_a_diverged_run_has_a_status_of_its_own(tmp_path):
  flags = (*TINY, '--config.optimizer.learning_rate=1e6')
  status, out, err = finish(start(tmp_path / 'run', *flags))
  assert status == 3, err
  assert out.startswith('diverged after')
  assert 'Traceback' not in err
  # The run has ended: this one only reads its result.
  again = finish(start(tmp_path / 'run', *flags, '--config.diverged_status=0'))
  assert again[0] == 0
  assert again[1].startswith('diverged after')


def test_train_py_refuses_in_one_line_too(tmp_path):
  status, out, err = finish(
    start(tmp_path / 'run', '--config=synthetic', '--config.model.depth=11')
  )
  assert (status, out) == (2, '')
  assert (
    err == 'error: depth=11 of a Wide-ResNet must be 6n+4; nearest: 10 or 16\n'
  )
  assert not Path(tmp_path / 'run').exists()


def test_a_process_that_nobody_started_with_others_is_told(tmp_path):
  status, out, err = finish(
    start(tmp_path / 'run', '--config=synthetic', '--distributed')
  )
  assert (status, out) == (2, '')
  assert err.startswith('error: the processes could not find each other')
  assert len(err.splitlines()) == 1


EXHAUSTED = """
import jax
import skipinit_jax.training.__main__ as command

def train(config, workdir, make):
  raise jax.errors.JaxRuntimeError('MESSAGE\\nmore')

command.train = train
command.run()
"""


@pytest.mark.parametrize(
  ('message', 'line'),
  [
    (
      'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9GiB.',
      'the step does not fit in memory (RESOURCE_EXHAUSTED: Out of memory '
      'while trying to allocate 9GiB.); first try --config.micro_batches=4, '
      'then --config.model.remat=True, then a smaller --config.batch_size',
    ),
    (
      'FAILED_PRECONDITION: DNN library initialization failed.',
      'the GPU has no memory left for JAX, which other processes may hold '
      '(FAILED_PRECONDITION: DNN library initialization failed.): see '
      'nvidia-smi; XLA_PYTHON_CLIENT_MEM_FRACTION=.4 asks for less',
    ),
  ],
)
def test_no_memory_is_one_line_with_a_remedy(tmp_path, message, line):
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      EXHAUSTED.replace('MESSAGE', message),
      f'--workdir={tmp_path}/run',
      '--config=synthetic',
      '--config.micro_batches=2',
    ],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert done.stderr == f'error: {line}\n'


def without(module, folder, *command):
  """A command where this module can't be imported."""
  (folder / 'sitecustomize.py').write_text(
    f'import sys; sys.modules[{module!r}] = None'
  )
  return subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(folder)},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  'command', [['train.py'], ['-m', 'skipinit_jax.experiments', 'list']]
)
def test_a_package_that_is_missing_is_one_line(command, tmp_path):
  done = without('ml_collections', tmp_path, *command)
  assert (done.returncode, done.stderr) == (
    2,
    'error: ml_collections is not installed: pip install '
    "'skipinit-jax[train]'\n",
  )


def test_a_module_that_an_installed_package_lacks_is_a_traceback(tmp_path):
  done = without('tqdm.std', tmp_path, '-m', 'skipinit_jax.experiments', 'list')
  assert done.returncode == 1
  assert 'Traceback' in done.stderr
  assert 'is not installed' not in done.stderr
