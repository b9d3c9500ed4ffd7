"""The launch scripts, with stand-ins for the commands of the clusters."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

LAUNCH = ROOT / 'launch'

# Logs its arguments, then does the next line of its plan.
STAND_IN = """#!/bin/bash
name=${0##*/}
printf '%s\\0' "$name" $# "$@" >>"$STAND_INS/log"
read -r next <"$STAND_INS/$name" || next=:
sed -i 1d "$STAND_INS/$name"
eval "$next"
"""
# As Slurm does: again, with the count, as long as the job asks for it.
SBATCH = """#!/bin/bash
export SLURM_JOB_ID=7 SLURM_RESTART_COUNT=0
while true; do
  bash "$@"
  status=$?
  [ -f "$STAND_INS/again" ] || exit $status
  rm "$STAND_INS/again"
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""
# Runs what is sent to the workers in a home of theirs.
ON_WORKERS = 'cd "$STAND_INS/home" && bash -c "${8#--command=}" || exit 1'
WORKER_LOST = 'kill -KILL $$'


class StandIns:
  """Commands in front of PATH.

  Args:
    folder: for the commands, their plans and their log.
    plans: command -> lines of shell, one each time that it is called; nothing
      happens when they are over.
  """

  def __init__(self, folder, **plans):
    self.folder = folder
    (folder / 'bin').mkdir()
    (folder / 'log').touch()
    self.add('sleep')
    for name, lines in plans.items():
      self.add(name, lines)

  def add(self, name, lines=(), text=STAND_IN):
    command = self.folder / 'bin' / name
    command.write_text(text)
    command.chmod(0o755)
    plan = ''.join(line + '\n' for line in lines)
    (self.folder / name).write_text(plan)

  def run(self, *command, **environment):
    return subprocess.run(
      command,
      cwd=ROOT,
      env={
        **os.environ,
        'PATH': f'{self.folder / "bin"}:{os.environ["PATH"]}',
        'STAND_INS': str(self.folder),
        **environment,
      },
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )

  def calls(self, wanted):
    """The arguments of each call of a command."""
    words = iter((self.folder / 'log').read_text().split('\0')[:-1])
    calls = []
    for name in words:
      arguments = list(itertools.islice(words, int(next(words))))
      if name == wanted:
        calls.append(arguments)
    return calls


# Slurm.


def slurm(tmp_path, *srun, **environment):
  """Submits a job whose steps end in turn as said."""
  stand_ins = StandIns(
    tmp_path, srun=srun, scontrol=['touch "$STAND_INS/again"'] * 200
  )
  stand_ins.add('sbatch', text=SBATCH)
  done = stand_ins.run(
    'sbatch', 'launch/slurm.sbatch', '--workdir=my runs/a*', **environment
  )
  return done, stand_ins


def test_slurm_starts_again_what_is_lost_and_waits_longer_each_time(tmp_path):
  ends = [75, 76, 134, 138, 143, 129, 76, 76, 0]
  done, stand_ins = slurm(tmp_path, *(f'exit {end}' for end in ends))
  assert done.returncode == 0, done.stderr
  assert len(stand_ins.calls('srun')) == len(ends)
  for call in stand_ins.calls('srun'):
    assert call[-2:] == ['--distributed', '--workdir=my runs/a*']
  # What was told to stop has nothing to wait for.
  waits = [int(seconds) for (seconds,) in stand_ins.calls('sleep')]
  assert waits == [30, 60, 120, 0, 0, 0, 960, 960]
  assert stand_ins.calls('scontrol')[0] == ['requeue', '7']


@pytest.mark.parametrize('status', [0, 1, 2, 3, 130, 137])
def test_slurm_ends_what_starting_again_does_not_mend(status, tmp_path):
  done, stand_ins = slurm(tmp_path, 'exit 76', f'exit {status}')
  assert done.returncode == status
  assert len(stand_ins.calls('srun')) == 2
  assert len(stand_ins.calls('scontrol')) == 1


def test_slurm_gives_up_after_so_many_restarts(tmp_path):
  done, stand_ins = slurm(tmp_path, *['exit 143'] * 9, MAX_RESTARTS='4')
  assert done.returncode == 143
  assert len(stand_ins.calls('srun')) == 5
  assert 'after 4 restarts; giving up' in done.stderr


def test_slurm_is_asked_for_a_signal_ahead_of_time():
  lines = (LAUNCH / 'slurm.sbatch').read_text().splitlines()
  (asked,) = [x for x in lines if x.startswith('#SBATCH --signal=')]
  name, _, seconds = asked.partition('=')[2].partition('@')
  assert name == 'USR1'  # Not B:USR1, which the run would not get.
  assert int(seconds) >= 60


# Cloud TPU.

ACTIVE = 'echo ACTIVE'
MISSING = 'echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1'
FLAKY = 'echo "ERROR: UNAVAILABLE: try again" >&2; exit 1'


def tpu(tmp_path, gcloud, python=(), arguments=(), **environment):
  """Runs the script; `python` says how training ends on the worker."""
  stand_ins = StandIns(tmp_path, gcloud=gcloud, python=python)
  for name in ('sudo', 'pip', 'git', 'python3.11'):
    stand_ins.add(name)
  worker = tmp_path / 'home' / 'skipinit-jax' / '.venv' / 'bin'
  worker.mkdir(parents=True)
  for name in ('python', 'pip'):
    (worker / name).symlink_to(tmp_path / 'bin' / name)
  settings = {
    'NAME': 'mine',
    'ZONE': 'here',
    'TYPE': 'v5litepod-64',
    'REPOSITORY': 'https://host/r',
    'MAX_RESTARTS': '12',
    **environment,
  }
  done = stand_ins.run('launch/tpu_pod.sh', *arguments, **settings)
  return done, stand_ins


def actions(stand_ins):
  """What gcloud was asked for, in turn."""
  return [call[3] for call in stand_ins.calls('gcloud')]


def waits(stand_ins):
  return [int(seconds) for (seconds,) in stand_ins.calls('sleep')]


TRAINED = (ACTIVE, ON_WORKERS, ON_WORKERS)


def test_tpu_slice_is_made_and_trained_on(tmp_path):
  plan = [MISSING, ':', 'echo WAITING_FOR_RESOURCES', *TRAINED]
  done, stand_ins = tpu(
    tmp_path, plan, ['exit 0'], ['--workdir=/my runs/$HOME', "--x='"]
  )
  assert done.returncode == 0, done.stderr
  assert actions(stand_ins) == [
    'describe',
    'create',
    'describe',
    'describe',
    'ssh',
    'ssh',
  ]
  assert waits(stand_ins) == [60]  # For the slice.
  assert stand_ins.calls('python') == [
    ['train.py', '--distributed', '--workdir=/my runs/$HOME', "--x='"]
  ]


def test_tpu_arguments_may_be_none(tmp_path):
  done, stand_ins = tpu(tmp_path, TRAINED, ['exit 0'])
  assert done.returncode == 0, done.stderr
  assert stand_ins.calls('python') == [['train.py', '--distributed']]


def test_tpu_repository_is_quoted(tmp_path):
  clones = 'rm -r "$STAND_INS/home/skipinit-jax"; ' + ON_WORKERS
  done, stand_ins = tpu(
    tmp_path, [ACTIVE, clones], REPOSITORY='x; touch pwned #', MAX_RESTARTS='0'
  )
  assert done.returncode == 75
  assert stand_ins.calls('git') == [
    ['clone', '-q', '--', 'x; touch pwned #', 'skipinit-jax']
  ]
  assert not [*tmp_path.rglob('pwned')]


@pytest.mark.parametrize('status', [1, 2, 3, 130])
def test_tpu_ends_what_starting_again_does_not_mend(status, tmp_path):
  plan = [*TRAINED, *TRAINED, *TRAINED]
  done, stand_ins = tpu(tmp_path, plan, ['exit 76', f'exit {status}'])
  assert done.returncode == status
  assert len(stand_ins.calls('python')) == 2


def test_tpu_trains_again_after_each_kind_of_loss(tmp_path):
  plan = [
    FLAKY,  # The network, not a slice that is missing.
    ACTIVE,
    FLAKY,  # While installing.
    ACTIVE,
    ON_WORKERS,
    WORKER_LOST,  # The connection, while training.
    'echo SUSPENDED',
    FLAKY,  # Preempted, and not deleted.
    'echo SUSPENDED',
    ':',
    ':',
    'echo FAILED',  # Made again, and failed.
    'echo FAILED',
    ':',
    ':',
    *TRAINED,
    *TRAINED,
    ACTIVE,
    ON_WORKERS,
    'exit 0',  # Nothing was heard of the run.
    *TRAINED,
  ]
  done, stand_ins = tpu(tmp_path, plan, ['exit 143', 'exit 76', 'exit 0'])
  assert done.returncode == 0, done.stderr
  assert waits(stand_ins) == [10, 20, 40, 80, 160, 320, 640, 640]
  assert actions(stand_ins).count('create') == 2
  assert actions(stand_ins).count('delete') == 3
  assert 'UNAVAILABLE' in done.stderr


def test_tpu_gives_up_after_so_many_restarts(tmp_path):
  done, stand_ins = tpu(tmp_path, [FLAKY] * 9, MAX_RESTARTS='3')
  assert done.returncode == 75
  assert actions(stand_ins) == ['describe'] * 4
  assert '3 restarts; giving up' in done.stderr


def test_tpu_that_is_refused_ends_at_once(tmp_path):
  refused = 'echo "ERROR: PERMISSION_DENIED: TPU API is off" >&2; exit 1'
  done, stand_ins = tpu(tmp_path, [refused])
  assert done.returncode == 2
  assert 'TPU API is off' in done.stderr
  assert actions(stand_ins) == ['describe']


# Both.


def test_scripts_pass_shellcheck():
  beside = Path(sys.executable).with_name('shellcheck')
  shellcheck = beside if beside.exists() else shutil.which('shellcheck')
  if shellcheck is None and 'CI' not in os.environ:
    pytest.skip('shellcheck is not installed; see requirements-dev.txt')
  scripts = [*LAUNCH.iterdir(), ROOT / '.ci' / 'run']
  done = subprocess.run(
    [shellcheck, '--enable=quote-safe-variables', *scripts],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout


def test_nothing_is_piped_into_a_shell():
  for path in LAUNCH.iterdir():
    text = path.read_text()
    assert 'curl' not in text
    assert 'wget' not in text
