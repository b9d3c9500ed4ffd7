"""Engines: where a study's runs are computed, and how many at a time.

Each is a context that yields a function; the function starts a run and returns
a future of its exit status, or of a phrase that says why there is none.
"""

import concurrent.futures
import contextlib
import json
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

MEMORY = 0.9  # Share of a GPU's memory, for all runs on it together.
FOLLOWS_WITHIN = 1.0  # Seconds; compiling another program takes many more.
RESTARTS = 10  # Of a run, when Ray loses its machine or process.
# The folder of this package, for a checkout that is not installed.
PACKAGE = str(Path(__file__).resolve().parents[2])
WORKER = [sys.executable, '-m', 'skipinit_jax.experiments.worker']
Submit = Callable[[Run], concurrent.futures.Future]


class Worker:
  """A process that makes runs, one after another; see `worker`.

  Args:
    memory: share of a GPU's memory that it may take.
  """

  def __init__(self, memory: float):
    self._memory = memory
    self._process: Any = None
    self._stopped = False
    self._lock = threading.Lock()

  def run(self, arguments: list[str], folder: str) -> int | str:
    """Trains; returns the exit status.

    Args:
      arguments: for `python -m skipinit_jax.training`.
      folder: the run's folder.
    """
    with self._lock:
      if self._stopped:
        return 'stopped before it began'
      if self._process is not None and self._process.poll() is not None:
        self._end()
      process: Any = self._process or self._start()
      self._process = process
      with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f'{json.dumps([folder, arguments])}\n')
        process.stdin.flush()
    if answer := process.stdout.readline():
      return int(answer)
    with self._lock:
      return self._end()

  def stop(self) -> None:
    """Has the run in progress save and end, and then the process."""
    with self._lock:
      self._stopped = True
      if self._process is not None:
        with contextlib.suppress(BrokenPipeError):
          self._process.stdin.close()

  def wait(self) -> None:
    """Ends the process, which has no run, and returns when it has ended."""
    with self._lock:
      if self._process is not None:
        self._end()

  def _end(self) -> int:
    process, self._process = self._process, None
    with contextlib.suppress(BrokenPipeError):
      process.stdin.close()
    process.stdout.close()
    return process.wait()

  def _start(self) -> subprocess.Popen:
    paths = [PACKAGE, *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = os.environ | {
      'PYTHONPATH': os.pathsep.join(paths),
      'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{self._memory:.3f}',
    }
    return subprocess.Popen(
      WORKER,
      env=environment,
      stdin=subprocess.PIPE,  # Its end tells the run to stop.
      stdout=subprocess.PIPE,
      text=True,
    )


def run_process(arguments: list[str], folder: str, memory: float) -> int | str:
  """Trains in a new process; returns its exit status. See `Worker`."""
  worker = Worker(memory)
  status = worker.run(arguments, folder)
  worker.stop()
  worker.wait()
  return status


@contextlib.contextmanager
def local(
  workdir: Path, jobs: int, place: Callable[[Run], int] = lambda run: 0
) -> Iterator[Submit]:
  """Runs on this machine, `jobs` at a time.

  A worker keeps to runs that share its program, while there are any. Then comes
  what has the first place in the table, so that its first rows are done first.

  Args:
    workdir: of the study.
    jobs: runs at a time.
    place: of a run's cell in the table.
  """
  workers = [Worker(MEMORY / jobs) for _ in range(jobs)]
  programs: dict[Worker, str] = {}  # Of the last run of each.
  waiting: list[tuple[Run, concurrent.futures.Future]] = []
  changed = threading.Condition()
  ended = threading.Event()

  def submit(run: Run) -> concurrent.futures.Future:
    future = concurrent.futures.Future()
    with changed:
      waiting.append((run, future))
      changed.notify_all()
    return future

  def take(worker: Worker) -> tuple[Run, concurrent.futures.Future]:
    own = programs.pop(worker, None)
    others = set(programs.values())

    def turn(each: tuple[Run, concurrent.futures.Future]) -> tuple[int, int]:
      program = each[0].program
      shared = 0 if program == own else 1 + (program in others)
      return shared, place(each[0])

    chosen = min(waiting, key=turn)
    waiting.remove(chosen)
    programs[worker] = chosen[0].program
    return chosen

  def has_more(worker: Worker) -> bool:
    if ended.is_set() or worker not in programs:
      return True
    return any(run.program == programs[worker] for run, _ in waiting)

  def serve(worker: Worker) -> None:
    while True:
      with changed:
        # What comes of a result, such as another rate, shares the program.
        changed.wait_for(lambda: has_more(worker), FOLLOWS_WITHIN)
        changed.wait_for(lambda: waiting or ended.is_set())
        if ended.is_set():
          break
        run, future = take(worker)
      try:
        folder = str(run.folder(workdir))
        future.set_result(worker.run(run.arguments(workdir), folder))
      except Exception as error:  # Handed on to whom it concerns.
        future.set_exception(error)
    worker.wait()

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    for worker in workers:
      pool.submit(serve, worker)
    try:
      yield submit
    finally:
      with changed:
        ended.set()
        changed.notify_all()
      for worker in workers:
        worker.stop()


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
  def train(arguments: list[str], folder: str) -> int | str:
    return run_process(arguments, folder, memory)

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
