"""Engines: where a study's runs are computed, and how many at a time.

Each is a context that gives a function: it starts a run and returns a future
of the exit status, or of the words on how it was lost.
"""

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from skipinit_jax.errors import InputError
from skipinit_jax.experiments.grid import Run
from skipinit_jax.experiments.runner import OUTPUT

# Of a GPU's memory, to all runs on it together.
MEMORY = 0.9
# Of a run whose machine or process Ray has lost.
RESTARTS = 10
# Where this package is found, in a checkout that is not installed too.
PACKAGE = str(Path(__file__).resolve().parents[2])
Submit = Callable[[Run], concurrent.futures.Future]


def run_process(
  arguments: list[str], folder: str, memory: float, stop: threading.Event
) -> int:
  """Trains in a process of its own; returns its exit status.

  Args:
    arguments: of `python -m skipinit_jax.training`.
    folder: of the run.
    memory: share of a GPU's memory that it may take.
    stop: asks it to save and stop.
  """
  Path(folder).mkdir(parents=True, exist_ok=True)
  command = [
    sys.executable,
    '-m',
    'skipinit_jax.experiments.worker',
    folder,
    *arguments,
  ]
  paths = [PACKAGE, *filter(None, [os.environ.get('PYTHONPATH')])]
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join(paths),
    'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{memory:.3f}',
  }
  with open(Path(folder) / OUTPUT, 'w') as output:
    process = subprocess.Popen(
      command,
      env=environment,
      stdin=subprocess.PIPE,  # The end of it asks the run to stop.
      stdout=output,
      stderr=output,
    )
    with process.stdin:
      while not stop.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
          return process.wait(0.2)
    return process.wait()


@contextlib.contextmanager
def local(workdir: Path, jobs: int) -> Iterator[Submit]:
  """Runs on this machine, `jobs` at a time."""
  stop = threading.Event()
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:

    def submit(run: Run) -> concurrent.futures.Future:
      folder = str(run.folder(workdir))
      arguments = run.arguments(workdir)
      return pool.submit(run_process, arguments, folder, MEMORY / jobs, stop)

    try:
      yield submit
    except BaseException:
      stop.set()
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def require_ray() -> ModuleType:
  """Ray; InputError where it is not installed."""
  try:
    import ray
  except ImportError:
    raise InputError(
      "--engine=ray needs Ray: pip install 'skipinit-jax[ray]'"
    ) from None
  return ray


@contextlib.contextmanager
def on_ray(
  workdir: Path, address: str | None, gpus: float, cpus: float
) -> Iterator[Submit]:
  """Runs as tasks of a Ray cluster, which starts a lost one RESTARTS times.

  Args:
    workdir: that all of the cluster's machines see.
    address: of the cluster, 'auto' for that of this machine; None: a cluster
      of this machine alone, for as long as the study runs.
    gpus, cpus: share of a GPU, and CPUs, of each run.
  """
  ray = require_ray()
  try:
    ray.init(address=address, log_to_driver=False, logging_level='error')
  except (ConnectionError, ValueError, RuntimeError) as error:
    first = str(error).strip().splitlines()[0]
    raise InputError(f'no Ray cluster at {address!r}: {first}') from None
  workdir = workdir.resolve()
  memory = MEMORY * (gpus if 0 < gpus < 1 else 1)

  @ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=RESTARTS)
  def train(arguments: list[str], folder: str) -> int:
    return run_process(arguments, folder, memory, threading.Event())

  def submit(run: Run) -> concurrent.futures.Future:
    folder = str(run.folder(workdir))
    ended = concurrent.futures.Future()

    def end(task: concurrent.futures.Future) -> None:
      if (error := task.exception()) is None:
        ended.set_result(task.result())
      else:
        ended.set_result(f'lost {RESTARTS + 1} times, {type(error).__name__}')

    train.remote(run.arguments(workdir), folder).future().add_done_callback(end)
    return ended

  try:
    yield submit
  finally:
    ray.shutdown()
