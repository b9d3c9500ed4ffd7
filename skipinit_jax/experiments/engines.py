"""Engines: where a study's runs are computed, and how many at a time.

Each is a context that yields a function; the function starts a run and returns
a future of its exit status, or of a phrase that says how it was lost.
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
from typing import Any

from skipinit_jax.errors import InputError
from skipinit_jax.experiments.grid import Run
from skipinit_jax.experiments.runner import OUTPUT

MEMORY = 0.9  # Share of a GPU's memory, for all runs on it together.
RESTARTS = 10  # Of a run, when Ray loses its machine or process.
# The folder of this package, for a checkout that is not installed.
PACKAGE = str(Path(__file__).resolve().parents[2])
Submit = Callable[[Run], concurrent.futures.Future]


def run_process(
  arguments: list[str], folder: str, memory: float, stop: threading.Event
) -> int:
  """Trains in a new process; returns its exit status.

  Args:
    arguments: for `python -m skipinit_jax.training`.
    folder: the run's folder.
    memory: share of a GPU's memory that the run may take.
    stop: when set, the run saves and stops.
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
    process: Any = subprocess.Popen(
      command,
      env=environment,
      stdin=subprocess.PIPE,  # Its end tells the run to stop.
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
  """The module ray; InputError if it is not installed."""
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
  """Runs as tasks of a Ray cluster, which restarts a lost one RESTARTS times.

  Args:
    workdir: a folder that all machines of the cluster can see.
    address: of the cluster, 'auto' for the one on this machine; None: a new
      cluster of this machine alone, for as long as the study runs.
    gpus, cpus: share of a GPU, and number of CPUs, for each run.
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
