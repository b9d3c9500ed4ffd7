"""Stand-ins for the commands of Cloud TPU and Slurm, and for a run on a host.

Each command is a link to this file. Their state lies in the folder $CLUSTER:

  plan.json  command or event -> what happens, one entry each time; nothing is
             planned once they are over
  log        a line of JSON for each call
  resources/ queued resources that exist; their hosts' homes in hosts/
  gone/      the homes of hosts that are no more

Only Python's own library is imported, since each call starts Python again.
"""

import atexit
import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

CLUSTER = pathlib.Path(os.environ.get('CLUSTER', '.'))
HOSTS = 2
LOST = 255  # Of ssh.


@contextlib.contextmanager
def locked():
  with open(CLUSTER / 'lock', 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def planned(key):
  """The next entry of the plan, None where there is none."""
  path = CLUSTER / 'plan.json'
  with locked():
    plan = json.loads(path.read_text())
    entries = plan.get(key) or [None]
    plan[key] = entries[1:]
    path.write_text(json.dumps(plan))
  return entries[0]


def write_log(name, arguments):
  with locked(), open(CLUSTER / 'log', 'a') as log:
    log.write(json.dumps([name, *arguments]) + '\n')


def press(event):
  """Ctrl-C reaches the whole group, `kill` the script alone."""
  if event == 'ctrl-c':
    os.killpg(0, signal.SIGINT)
  elif event == 'kill':
    os.kill(os.getpgrp(), signal.SIGTERM)


def wait_until(condition):
  while not condition():
    time.sleep(0.02)


# Cloud TPU.


def resource(name):
  return CLUSTER / 'resources' / name


def states(name):
  """The states that a resource goes through; the last one stays."""
  with locked():
    return json.loads(resource(name).read_text())


def put(name, those):
  with locked():
    resource(name).write_text(json.dumps(those))


def end_hosts(name):
  """The hosts of a resource and all that runs on them are gone."""
  for home in (CLUSTER / 'hosts').glob(f'{name}.*'):
    with contextlib.suppress(OSError, ValueError):
      os.killpg(int((home / 'train.pid').read_text()), signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError):  # Gone in the meantime.
      home.rename(CLUSTER / 'gone' / f'{time.monotonic_ns()}.{home.name}')


def fail(text):
  print(f'ERROR: (gcloud.compute.tpus) {text}', file=sys.stderr)
  sys.exit(1)


def gcloud(arguments):
  """compute tpus queued-resources|tpu-vm ACTION NAME --FLAG=..."""
  action, name = arguments[3:5]
  flags = dict(flag.partition('=')[::2] for flag in arguments[5:])
  event = planned(action) or ''
  press(event)
  if action == 'ssh':
    sys.exit(ssh(name, flags['--command'], event))
  _, then, event = event.rpartition(', then ')
  if event not in ('', 'ctrl-c', 'kill'):
    fail(event)
  exists = resource(name).exists()
  if action == 'create':
    if exists:
      fail('ALREADY_EXISTS: it is there')
    put(name, planned('states') or ['ACTIVE'])
    if then:
      press(event)
  elif not exists:
    fail('NOT_FOUND: no such resource')
  elif action == 'describe':
    state, *later = states(name)
    put(name, later or [state])
    print(state, planned('why') or '' if state == 'FAILED' else '', sep='\t')
  elif action == 'delete':
    if '--force' not in flags:
      fail('FAILED_PRECONDITION: it is in use')
    end_hosts(name)
    resource(name).unlink()


def ssh(name, command, event):
  """Runs a command on all hosts, until it ends or they are gone.

  As gcloud does, it starts the command again if a connection breaks, and ends
  with a status that is not 0 if any host's is not.
  """
  if event == 'lost' or not resource(name).exists():
    return LOST
  shells = start_shells(name, command)
  if event.startswith('trains, then '):
    wait_until(lambda: all_train(name))
    press(event.removeprefix('trains, then '))
  broken = event == 'trains, then lost'
  if event == 'trains, then again':
    kill(shells)
    shells = start_shells(name, command)
    (CLUSTER / 'again').touch()
  while any(shell.poll() is None for shell in shells) and not broken:
    time.sleep(0.02)
    broken = not resource(name).exists() or states(name)[0] != 'ACTIVE'
  kill(shells)
  statuses = [shell.wait() for shell in shells]
  return LOST if broken else next(filter(None, statuses), 0)


def all_train(name):
  homes = [CLUSTER / 'hosts' / f'{name}.{host}' for host in range(HOSTS)]
  return all((home / 'trains').exists() for home in homes)


def start_shells(name, command):
  shells = []
  for host in range(HOSTS):
    home = CLUSTER / 'hosts' / f'{name}.{host}'
    home.mkdir(exist_ok=True)
    environment = os.environ | {'HOME': str(home), 'HOST': str(host)}
    shells.append(
      subprocess.Popen(
        ['bash', '-c', command],
        cwd=home,
        env=environment,
        start_new_session=True,
      )
    )
  return shells


def kill(shells):
  for shell in shells:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(shell.pid, signal.SIGKILL)


# Slurm.


def sbatch(arguments):
  """Runs a job, again and again while it is queued again."""
  nodes, script, *rest = arguments
  nodes = int(nodes.removeprefix('--nodes='))
  lines = re.findall(
    r'^#SBATCH --(\S+)', pathlib.Path(script).read_text(), re.M
  )
  asked = dict(line.partition('=')[::2] for line in lines)
  environment = os.environ | {
    'SLURM_JOB_ID': '7',
    'SLURM_NNODES': str(nodes),
    'SLURM_GPUS_ON_NODE': asked['gpus-per-node'],
  }
  again, ended = CLUSTER / 'again', -1
  for restarts in range(1000):
    if restarts:
      environment['SLURM_RESTART_COUNT'] = str(restarts)
    for started in CLUSTER.glob('task.*'):
      started.unlink()
    job = subprocess.Popen(
      ['bash', script, *rest], env=environment, start_new_session=True
    )
    if event := planned('slurm'):
      files = [CLUSTER / f'task.{node}' for node in range(nodes)]
      wait_until(lambda files=files: all(map(pathlib.Path.exists, files)))
      tasks = [int(file.read_text()) for file in files]
      if event == 'preempt':
        number = signal.SIGTERM
      elif event == 'time':
        number = signal.Signals[f'SIG{asked["signal"].partition("@")[0]}']
      elif event == 'cancel':
        number = signal.SIGTERM
        os.kill(job.pid, number)
      else:  # A node failed: Slurm kills the rest, and queues by itself.
        number = signal.SIGKILL
        os.killpg(job.pid, number)
        if 'requeue' in asked:
          again.touch()
      for task in tasks:
        os.kill(task, number)
      wait_until(lambda tasks=tasks: not any(map(alive, tasks)))
    ended = job.wait()
    if not again.exists():
      break
    again.unlink()
  sys.exit(ended if ended >= 0 else 128 - ended)


def alive(process):
  path = pathlib.Path(f'/proc/{process}/stat')
  try:
    return path.read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def srun(arguments):
  """One task on each node; ends with the highest of their statuses."""
  command = arguments[next(i for i, a in enumerate(arguments) if a[0] != '-') :]
  tasks = []
  for node in range(int(os.environ['SLURM_NNODES'])):
    environment = os.environ | {'HOST': str(node), 'SLURM_PROCID': str(node)}
    tasks.append(subprocess.Popen(command, env=environment))
    (CLUSTER / f'pid.{node}').write_text(str(tasks[-1].pid))
  statuses = [task.wait() for task in tasks]
  sys.exit(max(s if s >= 0 else 128 - s for s in statuses))


def scontrol(arguments):
  if event := planned('scontrol'):
    fail(event)
  assert arguments == ['requeue', '7']
  (CLUSTER / 'again').touch()


# On a host.


def train():
  """A run that ends as planned, or stays until it is told to stop."""
  event = planned(f'run {os.environ["HOST"]}')

  def stop(number, _):
    print('saved', flush=True)
    sys.exit(128 + number)

  for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
  print('trains', flush=True)
  home = pathlib.Path.cwd().parent
  if home.parent.name == 'hosts':
    marker = home / 'trains'
    marker.touch()
    # The next run on this host has not begun with it.
    atexit.register(marker.unlink, missing_ok=True)
  else:
    (CLUSTER / f'task.{os.environ["HOST"]}').write_text(str(os.getpid()))
  if event == 'preempted':  # Once all hosts train.
    wait_until(lambda: all_train(home.name.partition('.')[0]))
    end_hosts_later(home.name.partition('.')[0])
  if event in ('stays', 'preempted'):
    while True:
      signal.pause()
  if event == 'stays for a while':  # Until it has been followed twice.
    wait_until(lambda: (CLUSTER / 'again').exists())
    event = 0
  sys.exit(event or 0)


def end_hosts_later(name):
  """Preempted: the hosts go, and this process with them."""
  put(name, ['SUSPENDING', 'SUSPENDED'])
  if os.fork() == 0:
    os.setsid()
    end_hosts(name)
    os._exit(0)


def link(folder):
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  for name in ('python', 'pip'):
    (folder / name).symlink_to(CLUSTER / 'bin' / name)


def main():
  name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  write_log(name, arguments)
  match name, arguments:
    case 'gcloud', _:
      gcloud(arguments)
    case 'git', ['ls-remote', *_]:
      if event := planned('git'):
        print(event, file=sys.stderr)
        sys.exit(128)
      print('abc123\tHEAD')
    case 'git', ['clone', *_, folder]:
      pathlib.Path(folder).mkdir()
    case 'python3.11', ['-m', 'venv', folder]:
      link(pathlib.Path(folder) / 'bin')
    case 'python', ['train.py', *_]:
      train()
    case 'sleep', _:
      press(planned('sleep'))
    case 'sbatch', _:
      sbatch(arguments)
    case 'srun', _:
      srun(arguments)
    case 'scontrol', _:
      scontrol(arguments)


if __name__ == '__main__':
  main()
