"""The command line of training: `python -m skipinit_jax.training`."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from skipinit_jax.errors import InputError, RunError
from skipinit_jax.training import processes
from skipinit_jax.training.config import less_memory, recipe_path
from skipinit_jax.training.lines import dumps
from skipinit_jax.training.loop import evaluate_latest, train
from skipinit_jax.training.signals import Stopped, leave
from skipinit_jax.training.startup import set_deterministic

# Exit statuses, beside a diverged run's, a signal's and `watchdog.STUCK`.
FAILED, BAD_INPUT = 1, 2

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Recipe: a file, or the name of a bundled one (digits).'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; by default a new one under runs/.'
)
_EVAL_ONLY = flags.DEFINE_bool(
  'eval_only', False, 'Evaluate the newest checkpoint in --workdir; print JSON.'
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'This is one process of several, started by Cloud TPU, Slurm or Open MPI.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of process 0, of several started by hand.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many, with --coordinator.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which one, from 0, with --coordinator.', lower_bound=0
)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_seconds',
  100,
  'Silence of a process after which the others end.',
  lower_bound=1,
)


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; a mistake in them is one line and exit status 2."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise InputError(f'unexpected argument {rest[1]!r}; flags begin with --')
    _ = _CONFIG.value.seed  # A recipe that can't be loaded shows itself here.
  except (flags.Error, InputError, OSError, ValueError) as error:
    _exit(_reason(str(error)))
  except (AttributeError, KeyError) as error:
    # ml_collections: 'dept'\nDid you mean "depth" instead of "dept"?
    field, *near = re.findall(r'\w+(?=\\?[\'"])', str(error.args[0]))
    hint = f'; did you mean {near[0]!r}?' if near else ''
    _exit(f'the recipe has no field {field!r}{hint}')
  return rest


def _reason(message: str) -> str:
  """The one line that matters where ml_collections quotes a traceback."""
  last = message.strip().splitlines()[-1]
  if 'get_config()' in last:
    return 'this recipe takes no argument after the colon'
  return last.partition(': ')[2] if 'Traceback' in message else message


def main(argv: list[str]) -> None:
  """Trains, says how it ended, and exits with the run's status."""
  del argv
  config = _CONFIG.value
  set_deterministic(config)
  with _one_line_each(config):
    processes.initialize(
      _DISTRIBUTED.value,
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      _HEARTBEAT.value,
    )
    if _EVAL_ONLY.value and _WORKDIR.value is None:
      raise InputError('--eval_only needs the --workdir of a run')
    workdir = _WORKDIR.value or str(_new_workdir())
    if _EVAL_ONLY.value:
      print(dumps(evaluate_latest(config, workdir)))
      return
    result = train(config, workdir)
  if jax.process_index() == 0:
    print(summary(result, workdir))
  processes.shut_down()
  if result['status'] == 'diverged':
    sys.exit(config.diverged_status)


@contextlib.contextmanager
def _one_line_each(config: ConfigDict) -> Iterator[None]:
  """What a run may end in, but for our own bugs, as one line and a status."""
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
      'command goes on from there',
      error.status,
    )
  except jax.errors.JaxRuntimeError as error:
    first = str(error).splitlines()[0]
    if first.startswith('RESOURCE_EXHAUSTED'):
      _exit(
        f'the step does not fit in memory ({first}); {less_memory(config)}',
        FAILED,
      )
    if jax.process_count() == 1:
      raise
    # Most often another process was lost.
    _exit(f'a process was lost: {first}', processes.LOST)


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


def _with_recipe_path(args: list[str]) -> list[str]:
  """Replaces the recipe's name by its file, before absl sees it."""
  args = list(args)
  if not any(a.lstrip('-').split('=')[0] == 'config' for a in args):
    args.insert(0, '--config=digits')
  for i, arg in enumerate(args):
    if arg in ('--config', '-config') and i + 1 < len(args):
      args[i + 1] = recipe_path(args[i + 1])
    elif arg.startswith(('--config=', '-config=')):
      flag, _, name = arg.partition('=')
      args[i] = f'{flag}={recipe_path(name)}'
  return args


def _new_workdir() -> Path:
  """Named by the first process for all."""
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  now = processes.from_first(int(time.time()))
  stamp = time.strftime('%Y%m%d-%H%M%S', time.localtime(now))
  return (
    Path('runs')
    / f'{Path(name).stem}-{stamp}-{processes.from_first(os.getpid())}'
  )


def _exit(message: str, status: int = BAD_INPUT) -> None:
  line = f'error: {message}' if status < 128 else message
  # JAX's exit handlers wait for the other processes, and threads of Orbax
  # wait ten minutes for the rest of a save that failed.
  if processes.several() or status == FAILED:
    leave(line, status)
  print(line, file=sys.stderr)
  sys.exit(status)


def _unraisable(error: 'sys.UnraisableHookArgs') -> None:
  """Passes over arrays still written when Orbax has given up a save."""
  if str(error.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(error)


def run() -> None:
  """Entry point of `train.py` and of `python -m skipinit_jax.training`."""
  # Orbax logs a traceback in each of its threads before it raises the error.
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = _unraisable
  try:  # ml_collections looks for overrides in sys.argv itself.
    sys.argv[1:] = _with_recipe_path(sys.argv[1:])
  except InputError as error:
    _exit(str(error))
  app.run(main, flags_parser=parse)


if __name__ == '__main__':
  run()
