"""The command line, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, finish, start

# Runs each list of arguments in a child of its own, which ends as `train.py`
# would, and prints what came of it.
FORKS = """
import json, os, sys, tempfile, warnings
import skipinit_jax.training.__main__ as command
warnings.simplefilter('ignore')
results = []
for args in json.loads(sys.argv[1]):
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      sys.argv = ['train.py', *args]
      status = 99
      try:
        command.run()
      except SystemExit as end:
        status = end.code or 0
      except BaseException:
        import traceback
        traceback.print_exc()
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out.seek(0), err.seek(0)
    results.append([status, out.read(), err.read()])
print(json.dumps(results))
"""

# Arguments -> parts of the line.
BAD = {
  'unknown recipe': (['--config=digit'], ["'digit'", "'digits'"]),
  'unknown field': (
    ['--config=synthetic', '--config.model.dept=16'],
    ["no field 'dept'", "'depth'"],
  ),
  'wrong type': (
    ['--config=synthetic', '--config.model.depth=deep'],
    ['depth', 'deep'],
  ),
  'stray argument': (
    ['--config=synthetic', 'config.seed=3'],
    ["'config.seed=3'", 'begin with --'],
  ),
  'unknown flag': (['--config=synthetic', '--workdri=x'], ['workdri']),
  'argument refused': (['--config=digits:x'], ['takes no argument']),
  'row refused': (
    ['--config=imagenet:fixupp'],
    ["row of table 3 'fixupp'", "'fixup'"],
  ),
  'flags that belong together': (
    ['--config=synthetic', '--coordinator=localhost:1'],
    ['--num_processes, --process_id must be given too'],
  ),
  'evaluation without a run': (
    ['--config=synthetic', '--eval_only'],
    ['--workdir'],
  ),
  'evaluation of nothing': (
    ['--config=synthetic', '--eval_only', '--workdir=WORKDIR'],
    ['holds no checkpoint'],
  ),
  'unknown method': (
    ['--config=synthetic', '--config.model.method=nonee'],
    ["'nonee'", "'none'"],
  ),
  'no number': (
    ['--config=synthetic', '--config.optimizer.learning_rate=nan'],
    ['optimizer.learning_rate=nan'],
  ),
  'batch': (
    ['--config=synthetic', '--config.batch_size=-16'],
    ['batch_size=-16'],
  ),
}


@pytest.fixture(scope='module')
def refusals(tmp_path_factory):
  folder = tmp_path_factory.mktemp('refusals')
  cases = []
  for i, (args, _) in enumerate(BAD.values()):
    args = [a.replace('WORKDIR', f'{folder}/run{i}') for a in args]
    if '--eval_only' not in args:
      args.append(f'--workdir={folder}/run{i}')
    cases.append(args)
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [sys.executable, '-c', FORKS, json.dumps(cases)],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
    timeout=500,
  )
  results = json.loads(done.stdout)
  return folder, dict(zip(BAD, results, strict=True))


@pytest.mark.parametrize('name', BAD)
def test_a_mistake_is_one_line_and_status_2(name, refusals):
  status, out, err = refusals[1][name]
  assert status == 2, err
  assert out == ''
  assert err.startswith('error: ')
  assert len(err.splitlines()) == 1, err
  for part in BAD[name][1]:
    assert part in err


def test_a_mistake_leaves_nothing_behind(refusals):
  assert [*refusals[0].iterdir()] == []


TINY = (
  *('--config=synthetic', '--config.model.depth=10'),
  *('--config.epochs=1', '--config.compilation_cache='),
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
  status, out, err = finish(start(workdir, *TINY, '--eval_only'))
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

def train(config, workdir):
  raise jax.errors.JaxRuntimeError(
    'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9GiB.\\nmore'
  )

command.train = train
command.run()
"""


def test_a_step_that_does_not_fit_is_one_line_with_a_remedy(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-c', EXHAUSTED, f'--workdir={tmp_path}/run'),
      *('--config=synthetic', '--config.micro_batches=2'),
    ],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert done.stderr == (
    'error: the step does not fit in memory (RESOURCE_EXHAUSTED: Out of memory '
    'while trying to allocate 9GiB.); first try --config.micro_batches=4, then '
    '--config.model.remat=True, then a smaller --config.batch_size\n'
  )


def test_loops_on_a_cpu_are_pointed_out(small, tmp_path):
  assert 'inside a loop' not in small[1][2]
  status, _, err = finish(
    start(tmp_path / 'run', *TINY, '--config.model.scan=True')
  )
  assert status == 0, err
  assert 'note: model.scan: on a CPU a convolution inside a loop' in err
