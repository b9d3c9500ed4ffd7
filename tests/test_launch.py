"""The launch scripts, with stand-ins for the commands of the clusters."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import clusters
import pytest
from runs import ROOT

LAUNCH = ROOT / 'launch'
TPU_COMMANDS = ('gcloud', 'git', 'sudo', 'sleep', 'python', 'pip', 'python3.11')
COMMANDS = (*TPU_COMMANDS, 'sbatch', 'srun', 'scontrol')


class Cluster:
  """The stand-ins in front of PATH.

  Args:
    folder: for their state.
    plan: what happens, see `clusters`; by name, with _ for a space.
  """

  def __init__(self, folder, **plan):
    self.folder = folder
    for name in ('bin', 'resources', 'hosts', 'gone', 'checkout'):
      (folder / name).mkdir()
    for name in COMMANDS:
      command = folder / 'bin' / name
      text = Path(clusters.__file__).read_text()
      command.write_text(f'#!{sys.executable} -IS\n{text}')
      command.chmod(0o755)
    plan = {key.replace('_', ' '): entries for key, entries in plan.items()}
    (folder / 'plan.json').write_text(json.dumps(plan))
    (folder / 'log').touch()

  def run(self, *command, **environment):
    """Runs it in a group of its own, where Ctrl-C is pressed."""
    process = subprocess.Popen(
      command,
      cwd=self.folder / 'checkout',
      env={
        **os.environ,
        'PATH': f'{self.folder / "bin"}:{os.environ["PATH"]}',
        'CLUSTER': str(self.folder),
        **environment,
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    try:
      output = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      for run in self.folder.glob('hosts/*/train.pid'):
        with contextlib.suppress(ProcessLookupError):
          os.killpg(int(run.read_text()), signal.SIGKILL)
      for task in self.folder.glob('pid.*'):
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(task.read_text()), signal.SIGKILL)
      raise
    return subprocess.CompletedProcess(command, process.returncode, *output)

  def calls(self, wanted):
    """The arguments of each call of a command."""
    lines = (self.folder / 'log').read_text().splitlines()
    calls = [json.loads(line) for line in lines]
    return [arguments for name, *arguments in calls if name == wanted]

  def waits(self):
    """Seconds that were waited for, each time."""
    return [int(seconds) for (seconds,) in self.calls('sleep')]


# Slurm.


def slurm(tmp_path, arguments=(), environment=None, **plan):
  """Submits a job for two hosts of 8 GPUs."""
  cluster = Cluster(tmp_path, **plan)
  checkout = tmp_path / 'checkout'
  (checkout / 'launch').symlink_to(LAUNCH)
  (checkout / '.venv' / 'bin').mkdir(parents=True)
  (checkout / '.venv/bin/python').symlink_to(tmp_path / 'bin' / 'python')
  script = ('--nodes=2', 'launch/slurm.sbatch', *arguments)
  return cluster.run('sbatch', *script, **(environment or {})), cluster


def test_slurm_starts_again_what_is_lost_and_waits_longer_each_time(tmp_path):
  ends = [75, 76, 134, 138, 143, 129, 76, 76, 0]
  # The other host ends as it can; srun tells of the highest status.
  done, cluster = slurm(
    tmp_path, ['--workdir=my runs/a*'], run_0=ends, run_1=[75, 0, 76]
  )
  assert done.returncode == 0, done.stderr
  assert cluster.calls('python') == 2 * len(ends) * [
    ['train.py', '--distributed', '--workdir=my runs/a*']
  ]
  # What was told to stop has nothing to wait for.
  assert cluster.waits() == [30, 60, 120, 0, 0, 0, 960, 960]
  assert cluster.calls('scontrol') == 8 * [['requeue', '7']]


@pytest.mark.parametrize('status', [0, 1, 2, 3, 130, 137])
def test_slurm_ends_what_starting_again_does_not_mend(status, tmp_path):
  done, cluster = slurm(tmp_path, run_0=[76, status], run_1=[0, 0])
  assert done.returncode == status
  assert len(cluster.calls('srun')) == 2
  assert len(cluster.calls('scontrol')) == 1
  assert ('out of memory' in done.stderr) == (status == 137)


def test_slurm_gives_up_after_so_many_restarts(tmp_path):
  done, cluster = slurm(
    tmp_path, environment={'MAX_RESTARTS': '4'}, run_0=[143] * 9
  )
  assert done.returncode == 143
  assert len(cluster.calls('srun')) == 5
  assert 'after 4 restarts; giving up' in done.stderr


@pytest.mark.parametrize('event', ['preempt', 'time', 'node'])
def test_slurm_goes_on_after(event, tmp_path):
  done, cluster = slurm(
    tmp_path, slurm=[event], run_0=['stays', 0], run_1=['stays', 0]
  )
  assert done.returncode == 0, done.stderr
  assert len(cluster.calls('srun')) == 2
  # Where a node failed nothing is left to ask, and Slurm does it by itself.
  failed = event == 'node'
  assert cluster.calls('scontrol') == ([] if failed else [['requeue', '7']])
  assert done.stdout.count('saved') == (0 if failed else 2)
  assert cluster.waits() == ([] if failed else [0])


def test_slurm_job_that_is_cancelled_saves_and_is_not_queued_again(tmp_path):
  done, cluster = slurm(
    tmp_path, slurm=['cancel'], run_0=['stays'], run_1=['stays']
  )
  assert done.returncode == 128 + signal.SIGTERM
  assert done.stdout.count('saved') == 2
  assert not cluster.calls('scontrol')


def test_slurm_says_so_if_it_does_not_queue_the_job(tmp_path):
  done, _ = slurm(tmp_path, run_0=[143], scontrol=['DISABLED: by the admin'])
  assert done.returncode == 143
  assert 'could not be queued again; the same sbatch command' in done.stderr


def test_slurm_is_asked_for_a_signal_ahead_of_time():
  lines = (LAUNCH / 'slurm.sbatch').read_text().splitlines()
  (asked,) = [x for x in lines if x.startswith('#SBATCH --signal=')]
  name, _, seconds = asked.partition('=')[2].partition('@')
  assert name == 'USR1'  # Not B:USR1, which the run would not get.
  assert int(seconds) >= 60


# Joins the other and prints the GPUs that JAX would take.
JOIN = """
import os, jax
os.environ['SLURM_STEP_NODELIST'] = 'localhost'
os.environ |= {'SLURM_NTASKS': '2', 'SLURM_LOCALID': '0'}
jax.config.update('jax_platforms', 'cpu')
jax.distributed.initialize(initialization_timeout=60)
os.write(1, f'{jax.config.read("jax_cuda_visible_devices")}\\n'.encode())
jax.distributed.shutdown()
"""


def test_slurm_gives_each_process_all_gpus_of_its_host(tmp_path):
  cluster = Cluster(tmp_path)
  checkout = tmp_path / 'checkout'
  (checkout / 'train.py').write_text(JOIN)
  (checkout / '.venv' / 'bin').mkdir(parents=True)
  python = checkout / '.venv' / 'bin' / 'python'
  python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  python.chmod(0o755)
  script = ('--nodes=2', LAUNCH / 'slurm.sbatch')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  done = cluster.run('sbatch', *script, JAX_COORDINATOR_PORT=port)
  assert done.returncode == 0, done.stderr
  assert done.stdout == 2 * '0,1,2,3,4,5,6,7\n'


# Cloud TPU.


def tpu(tmp_path, arguments=(), environment=None, **plan):
  """Runs the script to its end on a cloud with two hosts."""
  cluster = Cluster(tmp_path, **plan)
  return launch(cluster, arguments, environment), cluster


def launch(cluster, arguments=(), environment=None, *, left=False):
  """Runs the script, and sees that nothing is left unless told so."""
  settings = {
    'NAME': 'mine',
    'ZONE': 'here',
    'TYPE': 'v5litepod-8',
    'REPOSITORY': 'https://host/r',
    'MAX_RESTARTS': '12',
    'POLL_SECONDS': '7',
    **(environment or {}),
  }
  done = cluster.run(LAUNCH / 'tpu_pod.sh', *arguments, **settings)
  # What is billed, and where runs could go on that nobody sees.
  for folder in ('resources', 'hosts'):
    assert any((cluster.folder / folder).iterdir()) == left, done.stderr
  runs = [*cluster.folder.glob('gone/*/train.pid')]
  assert not any(clusters.alive(int(run.read_text())) for run in runs)
  return done


def actions(cluster):
  """What gcloud was asked for, in turn."""
  return [call[3] for call in cluster.calls('gcloud')]


def last_line(done):
  return done.stderr.splitlines()[-1]


def test_tpu_slice_is_made_trained_on_and_deleted(tmp_path):
  done, cluster = tpu(
    tmp_path,
    ['--workdir=/my runs/$HOME', "--x='"],
    states=[['ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']],
  )
  assert done.returncode == 0, done.stderr
  assert actions(cluster) == [
    'describe',
    'create',
    'describe',
    'describe',
    'describe',
    'describe',
    'ssh',
    'ssh',
    'describe',
    'delete',
  ]
  assert cluster.waits() == [7, 7, 7]  # For the slice.
  assert cluster.calls('python') == 2 * [
    ['train.py', '--distributed', '--workdir=/my runs/$HOME', "--x='"]
  ]
  assert done.stdout.count('trains') == 2
  for state in ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'):
    assert done.stderr.count(f'mine: {state}') == 1
  assert last_line(done) == 'deleting mine'


def test_tpu_slice_is_made_as_asked(tmp_path):
  done, cluster = tpu(
    tmp_path,
    environment={
      'FLAGS': '--reserved --data-disk=source=d,mode=read-only',
      'SETUP': 'echo "host $HOST"\nsudo mount LABEL=data /mnt/data',
    },
  )
  assert done.returncode == 0, done.stderr
  (create,) = [c for c in cluster.calls('gcloud') if c[3] == 'create']
  assert '--spot' not in create
  assert create[-2:] == ['--reserved', '--data-disk=source=d,mode=read-only']
  assert cluster.calls('sudo') == 2 * [['mount', 'LABEL=data', '/mnt/data']]
  assert {'host 0', 'host 1'} <= {*done.stdout.splitlines()}


@pytest.mark.parametrize('flags', [None, ''])
def test_tpu_slice_is_of_the_spot_kind_unless_asked(flags, tmp_path):
  environment = {} if flags is None else {'FLAGS': flags}
  _, cluster = tpu(tmp_path, environment=environment)
  (create,) = [c for c in cluster.calls('gcloud') if c[3] == 'create']
  assert ('--spot' in create) == (flags is None)


def test_tpu_trains_the_commit_that_was_there_at_the_start(tmp_path):
  plan = {'run_0': ['preempted'], 'run_1': ['stays']}
  done, cluster = tpu(
    tmp_path, environment={'REPOSITORY': 'x; touch pwned #'}, **plan
  )
  assert done.returncode == 0, done.stderr
  calls = cluster.calls('git')
  assert calls[0] == ['ls-remote', '--', 'x; touch pwned #', 'HEAD']
  clones = [call for call in calls if call[0] == 'clone']
  assert clones == 4 * [
    ['clone', '-q', '--', 'x; touch pwned #', 'skipinit-jax']
  ]
  commits = [call for call in calls if call[0] == 'checkout']
  assert commits == 4 * [['checkout', '-q', '--detach', 'abc123']]
  assert not [*tmp_path.rglob('pwned')]


@pytest.mark.sampled(2)
@pytest.mark.parametrize('status', [1, 2, 3, 130])
def test_tpu_ends_what_starting_again_does_not_mend(status, tmp_path):
  done, cluster = tpu(tmp_path, run_0=[76, status], run_1=[0, 76])
  assert done.returncode == status
  assert len(cluster.calls('python')) == 4
  assert f'ended with status {status}; starting again would' in done.stderr


def test_tpu_trains_again_after_each_kind_of_loss(tmp_path):
  done, cluster = tpu(
    tmp_path,
    describe=[
      'UNAVAILABLE: try again'
    ],  # The network, not a slice that is missing.
    ssh=[
      'lost',  # Before installing.
      None,
      'lost',  # Before training.
    ],
    delete=['UNAVAILABLE: try again'],  # Of the slice that was preempted.
    states=[['ACTIVE'], ['PROVISIONING', 'FAILED'], ['ACTIVE']],
    why=['broken hardware'],
    run_0=[143, 'preempted', 76, 0],
    run_1=[137, 'stays', 0, 0],
  )
  assert done.returncode == 0, done.stderr
  assert [w for w in cluster.waits() if w != 7] == [
    10,
    20,
    40,
    80,
    160,
    320,
    640,
    640,
  ]
  assert actions(cluster).count('create') == 3
  assert 'UNAVAILABLE' in done.stderr
  assert 'mine: SUSPENDED' in done.stderr
  assert 'broken hardware' in done.stderr


def test_tpu_run_goes_on_while_ssh_is_lost_and_is_followed_again(tmp_path):
  stays = {'run_0': ['stays'], 'run_1': ['stays']}
  done, cluster = tpu(
    tmp_path,
    ssh=[None, 'trains, then lost', None, 'trains, then kill'],
    **stays,
  )
  # It was started once, was seen again, and saved when the script was ended.
  assert done.returncode == 128 + signal.SIGTERM, done.stderr
  assert len(cluster.calls('python')) == 2
  assert done.stdout.count('trains') == 4
  assert len(cluster.calls('git')) == 1 + 2 * 3  # Installed once.
  logs = [*tmp_path.glob('gone/*/train.log')]
  assert [log.read_text() for log in logs] == 2 * [
    'trains\nsaved\ntrain.py ended with status 143\n'
  ]


def test_tpu_run_is_not_started_twice_where_gcloud_connects_again(tmp_path):
  done, cluster = tpu(
    tmp_path,
    ssh=[None, 'trains, then again', None],
    run_0=['stays for a while'],
    run_1=['stays for a while'],
  )
  assert done.returncode == 0, done.stderr
  assert len(cluster.calls('python')) == 2
  assert actions(cluster).count('ssh') == 2
  assert done.stdout.count('train.py ended with status 0') == 2


def test_tpu_does_not_pay_for_hosts_that_can_not_be_set_up(tmp_path):
  done, cluster = tpu(tmp_path, environment={'SETUP': 'exit 3'})
  assert done.returncode == 1, done.stderr
  assert 'installing or SETUP failed on the hosts 5 times' in done.stderr
  assert cluster.waits() == [10, 20, 40, 80]
  assert not cluster.calls('python')


def test_tpu_waits_for_hosts_that_do_not_answer_yet(tmp_path):
  done, _ = tpu(
    tmp_path,
    ssh=[*4 * ['lost'], None, 'lost', *4 * ['lost'], None, None],
  )
  assert done.returncode == 0, done.stderr
  assert 'restart 9' in done.stderr  # The count began anew.


def test_tpu_gives_up_after_so_many_restarts(tmp_path):
  done, cluster = tpu(
    tmp_path,
    describe=['UNAVAILABLE: try again'] * 4,
    environment={'MAX_RESTARTS': '3'},
  )
  assert done.returncode == 75
  assert actions(cluster) == ['describe'] * 4
  assert last_line(done) == '3 restarts; giving up'


QUOTA = (
  "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' "
  'has been exceeded. Limit: 0 in zone here.'
)
REFUSALS = {
  'off': (
    {'describe': ['PERMISSION_DENIED: the TPU API is off']},
    'gcloud services enable tpu.googleapis.com',
  ),
  'login': (
    {'describe': ['No active account. Run:\n  gcloud auth login']},
    'run gcloud auth login',
  ),
  'project': (
    {'describe': ['Error parsing.\nFailed to find attribute [project].']},
    'gcloud config set project',
  ),
  'quota': ({'create': [QUOTA]}, 'queued-resources list --zone=here'),
  'quota later': (
    {'states': [['PROVISIONING', 'FAILED']], 'why': [QUOTA]},
    'queued-resources list --zone=here',
  ),
  'type': (
    {'create': ['INVALID_ARGUMENT: no such accelerator']},
    'TYPE=v5litepod-8, ZONE=here',
  ),
  'flags': (
    {'create': ['unrecognized arguments: --spott']},
    'look at FLAGS=--spot',
  ),
  'disk': (
    {'create': ["NOT_FOUND: 'projects/PROJECT/zones/here/disks/imagenet'"]},
    'look at FLAGS=--spot',
  ),
  'taken': ({'create': ['ALREADY_EXISTS: node mine']}, 'choose another NAME'),
  'repository': ({'git': ['fatal: not found']}, 'REPOSITORY=https://host/r'),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_tpu_that_is_refused_ends_at_once(name, tmp_path):
  plan, what_to_do = REFUSALS[name]
  done, cluster = tpu(tmp_path, **plan)
  assert done.returncode == 2
  (line,) = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  (said,) = plan.get('why') or next(iter(plan.values()))
  assert said.splitlines()[0].rstrip('.') in line
  assert what_to_do in line
  assert not cluster.calls('python')
  assert 'restart' not in done.stderr


@pytest.mark.parametrize('name', ['NAME', 'ZONE', 'TYPE', 'REPOSITORY'])
def test_tpu_says_which_variable_is_missing(name, tmp_path):
  done, cluster = tpu(tmp_path, environment={name: ''})
  assert done.returncode == 2
  assert done.stderr.startswith(f'error: {name} is not set: ')
  assert not cluster.calls('gcloud')


def test_tpu_needs_gcloud(tmp_path):
  done, _ = tpu(tmp_path, environment={'PATH': str(tmp_path)})
  assert done.returncode == 2
  assert done.stderr.startswith('error: gcloud is not here: https://')


def test_tpu_quota_that_was_enough_is_waited_for(tmp_path):
  done, cluster = tpu(
    tmp_path,
    create=[None, QUOTA],  # The slice that was preempted is counted yet.
    run_0=['preempted', 0],
    run_1=['stays', 0],
  )
  assert done.returncode == 0, done.stderr
  assert actions(cluster).count('create') == 3


INTERRUPTED = {
  'describe': {'describe': [None, 'EVENT'], 'states': [['PROVISIONING']]},
  'create': {'create': ['EVENT']},
  'created': {'create': ['made, then EVENT']},
  'wait': {'sleep': ['EVENT'], 'states': [['WAITING_FOR_RESOURCES', 'ACTIVE']]},
  'install': {'ssh': ['EVENT']},
  'train': {
    'ssh': [None, 'trains, then EVENT'],
    'run 0': ['stays'],
    'run 1': ['stays'],
  },
  'restart': {'run 0': [76], 'sleep': ['EVENT']},
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize('event', ['ctrl-c', 'kill'])
@pytest.mark.parametrize('where', INTERRUPTED)
def test_tpu_script_that_is_interrupted_leaves_nothing(where, event, tmp_path):
  plan = json.loads(json.dumps(INTERRUPTED[where]).replace('EVENT', event))
  done, _ = tpu(tmp_path, **plan)
  number = signal.SIGINT if event == 'ctrl-c' else signal.SIGTERM
  assert done.returncode == 128 + number, done.stderr
  assert 'deleting mine' in done.stderr
  if where == 'train':
    saved = [x.read_text() for x in tmp_path.glob('gone/*/train.log')]
    assert [text.count('saved') for text in saved] == [1, 1]


def test_tpu_deletion_is_tried_again_and_else_said(tmp_path):
  done, cluster = tpu(tmp_path, delete=['UNAVAILABLE: try again'] * 4)
  assert done.returncode == 0
  assert actions(cluster).count('delete') == 5
  assert 'NOT deleted' not in done.stderr


def test_tpu_that_can_not_be_deleted_is_not_forgotten(tmp_path):
  denied = ['PERMISSION_DENIED: since today'] * 5
  cluster = Cluster(tmp_path, describe=[None, None, *denied])
  done = launch(cluster, left=True)
  assert done.returncode == 0
  assert last_line(done) == (
    'error: mine is NOT deleted, and billed until you run: '
    'gcloud compute tpus queued-resources delete mine --zone=here --force'
  )


def test_tpu_is_kept_if_asked(tmp_path):
  cluster = Cluster(tmp_path, run_0=[3])
  done = launch(cluster, environment={'KEEP': '1'}, left=True)
  assert done.returncode == 3
  assert 'delete' not in actions(cluster)
  assert last_line(done).startswith('mine is kept, and billed until you run: ')


def test_tpu_that_trains_something_else_is_left_alone(tmp_path):
  cluster = Cluster(
    tmp_path,
    ssh=[None, 'trains, then lost', None, None, None, 'trains, then ctrl-c'],
    run_0=['stays'],
    run_1=['stays'],
  )
  # Its script was lost; the run goes on.
  alone = {'KEEP': '1', 'MAX_RESTARTS': '0'}
  done = launch(cluster, ['--workdir=a'], alone, left=True)
  assert done.returncode == 75, done.stderr

  done = launch(cluster, ['--workdir=b'], left=True)
  assert done.returncode == 2, done.stderr
  assert 'mine trains something else' in done.stderr

  done = launch(cluster, ['--workdir=a'])
  assert done.returncode == 130, done.stderr
  assert len(cluster.calls('python')) == 2
  saved = [x.read_text() for x in tmp_path.glob('gone/*/train.log')]
  assert [text.count('saved') for text in saved] == [1, 1]


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
