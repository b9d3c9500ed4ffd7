"""The command line of training: `python -m skipinit_jax.training`."""

import os
import re
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from skipinit_jax.errors import InputError
from skipinit_jax.training.config import recipe_path
from skipinit_jax.training.loop import train

BAD_INPUT = 2  # Exit status.

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Recipe: a file, or the name of a bundled one (digits).'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; by default a new one under runs/.'
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
  if _WORKDIR.value is None:
    workdir = _new_workdir()
    print(f'workdir: {workdir}', file=sys.stderr)
  else:
    workdir = Path(_WORKDIR.value)
  try:
    result = train(config, workdir)
  except InputError as error:
    _exit(str(error))
  except KeyboardInterrupt:
    _exit('interrupted; the same command goes on from the last checkpoint', 130)
  print(summary(result, workdir))
  if result['status'] == 'diverged':
    sys.exit(config.diverged_status)


def summary(result: dict, workdir: Path) -> str:
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
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  stamp = time.strftime('%Y%m%d-%H%M%S')
  return Path('runs') / f'{Path(name).stem}-{stamp}-{os.getpid()}'


def _exit(message: str, status: int = BAD_INPUT) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(status)


def run() -> None:
  """Entry point of `train.py` and of `python -m skipinit_jax.training`."""
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX say a lot at INFO.
  try:  # ml_collections looks for overrides in sys.argv itself.
    sys.argv[1:] = _with_recipe_path(sys.argv[1:])
  except InputError as error:
    _exit(str(error))
  app.run(main, flags_parser=parse)


if __name__ == '__main__':
  run()
