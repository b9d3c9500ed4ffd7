"""The command line of training: `python -m skipinit_jax.training`."""

import contextlib
import faulthandler
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from skipinit_jax import cli
from skipinit_jax.cli import BAD_INPUT, FAILED, LOST, SIGNALED, leave
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.files import dumps
from skipinit_jax.training import processes
from skipinit_jax.training.describe import less_memory
from skipinit_jax.training.devices import set_cpu_flag, set_deterministic
from skipinit_jax.training.loop import evaluate_latest, train
from skipinit_jax.training.program import make_program
from skipinit_jax.training.recipes import (
  load_recipe,
  parse_fields,
  recipe_path,
  set_fields,
)
from skipinit_jax.training.signals import Stopped, Tolerant

# How CUDA's libraries say that nothing is left for them, in JAX's messages.
GPU_IN_USE = (
  'CUDA_ERROR_OUT_OF_MEMORY',
  'CUBLAS_STATUS_NOT_INITIALIZED',
  'DNN library initialization failed',
)


def parser() -> cli.Parser:
  """The flags."""
  flags = cli.Parser(
    prog='python -m skipinit_jax.training',
    description='Trains a recipe.',
    fields=True,
  )
  flags.add_argument(
    '--config',
    default='digits',
    help='recipe: the name of a bundled one, or a file (default: digits)',
  )
  flags.add_argument(
    '--workdir',
    type=cli.folder_or_bucket,
    help='folder of the run; by default a new one under runs/',
  )
  flags.add_argument(
    '--eval-only',
    action='store_true',
    help='evaluate the newest checkpoint in --workdir; print JSON',
  )
  flags.add_argument(
    '--distributed',
    action='store_true',
    help='one of several processes, started by Cloud TPU, Slurm or Open MPI',
  )
  flags.add_argument(
    '--coordinator', help='host:port of process 0, if started by hand'
  )
  flags.add_argument(
    '--num-processes',
    type=cli.number(int, 1, 2**20),
    help='their number, with --coordinator',
  )
  flags.add_argument(
    '--process-id',
    type=cli.number(int, 0, 2**20),
    help='number of this one, from 0, with --coordinator',
  )
  flags.add_argument(
    '--heartbeat-seconds',
    type=cli.number(int, 1, 10**6),
    default=100,
    help='silence of a process after which the others end (default: 100)',
  )
  return flags


def parse(flags: cli.Parser) -> tuple[Namespace, ConfigDict]:
  """The flags of this process, and its recipe with the fields they set."""
  args, texts = flags.parse_with_fields()
  with cli.errors_in_one_line():
    config = load_recipe(args.config)
    return args, set_fields(config, parse_fields(config, texts))


def main(
  args: Namespace, config: ConfigDict, make: Callable = make_program
) -> None:
  """Trains, says how it ended, and exits with the run's status.

  Args:
    args, config: of `parse`.
    make: see `loop.train`.
  """
  set_cpu_flag()
  set_deterministic(config)
  with _one_line_each(config):
    processes.initialize(
      args.distributed,
      args.coordinator,
      args.num_processes,
      args.process_id,
      args.heartbeat_seconds,
    )
    if args.eval_only:
      if args.workdir is None:
        raise InputError('--eval-only needs the --workdir of a run')
      print(dumps(evaluate_latest(config, args.workdir)))
      return
    workdir = args.workdir or str(_new_workdir(args.config))
    result = train(config, workdir, make)
  if jax.process_index() == 0:
    print(summary(result, workdir))
  processes.shut_down()
  if result['status'] == 'diverged':
    sys.exit(config.diverged_status)


@contextlib.contextmanager
def _one_line_each(config: ConfigDict) -> Iterator[None]:
  """Ends the process in one line and a status, except for our own bugs."""
  try:
    yield
  except InputError as error:
    _exit(str(error))
  except RunError as error:
    _exit(str(error), FAILED)
  except Stopped as error:
    name = signal.Signals(error.number).name
    _exit(
      f'stopped by {name} after step {error.step:,}, which is saved; the same '
      'command resumes',
      error.status,
    )
  except jax.errors.JaxRuntimeError as error:
    first = str(error).splitlines()[0]
    if first.startswith('RESOURCE_EXHAUSTED'):
      _exit(
        f'the step does not fit in memory ({first}); {less_memory(config)}',
        FAILED,
      )
    if any(symptom in first for symptom in GPU_IN_USE):
      _exit(
        f'the GPU has no memory left for JAX, which other processes may hold '
        f'({first}): see nvidia-smi; XLA_PYTHON_CLIENT_MEM_FRACTION=.4 asks '
        'for less',
        FAILED,
      )
    if jax.process_count() == 1:
      raise
    # Usually because another process was lost.
    _exit(f'a process was lost: {first}', LOST)


def summary(result: dict, workdir: str) -> str:
  """One line on how a run ended."""
  last, best = result['eval'], result['best_eval']
  loss = 'not finite' if last['loss'] is None else f'{last["loss"]:.4f}'
  return (
    f'{result["status"]} after {result["steps"]:,} steps, '
    f'{result["seconds"]:.0f} s: top-1 {last["top1"]:.4f}, '
    f'top-5 {last["top5"]:.4f}, loss {loss}; best top-1 {best["top1"]:.4f} at '
    f'step {best["step"]:,}; {workdir}/result.json'
  )


def _new_workdir(recipe: str) -> Path:
  """A new folder under runs/, the same for all processes."""
  name = Path(recipe_path(recipe).partition(':')[0]).stem
  now = processes.from_first(int(time.time()))
  stamp = time.strftime('%Y%m%d-%H%M%S', time.localtime(now))
  return Path('runs') / f'{name}-{stamp}-{processes.from_first(os.getpid())}'


def _exit(message: str, status: int = BAD_INPUT) -> None:
  line = cli.one_line(f'error: {message}' if status < SIGNALED else message)
  # JAX's exit handlers wait for the other processes, and threads of Orbax
  # wait ten minutes for the rest of a save that failed.
  if processes.several() or status == FAILED:
    leave(line, status)
  print(line, file=sys.stderr)
  sys.exit(status)


def _unraisable(error: 'sys.UnraisableHookArgs') -> None:
  """Ignores arrays that Orbax still writes after it gave up a save."""
  if str(error.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(error)


def set_up() -> None:
  """What a process does before it trains."""
  # Orbax logs a traceback in each of its threads before it raises the error.
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = _unraisable
  faulthandler.enable()  # A crash of the runtime leaves a trace.
  sys.stdout, sys.stderr = Tolerant(sys.stdout), Tolerant(sys.stderr)


def run() -> None:
  """Entry point of `train.py` and of `python -m skipinit_jax.training`."""
  set_up()
  main(*parse(parser()))


if __name__ == '__main__':
  run()
