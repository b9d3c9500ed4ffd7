"""The result of a run, in `result.json`."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from skipinit_jax.data.dataset import Dataset
from skipinit_jax.files import DamagedFile, read_json, set_aside, write_json
from skipinit_jax.training.lines import is_count, is_evaluation, is_number
from skipinit_jax.training.metrics import Reporter, read_metrics, say
from skipinit_jax.training.processes import wait_for_all
from skipinit_jax.training.step import TrainState
from skipinit_jax.version import __version__

RESULT = 'result.json'

STATUSES = ('completed', 'diverged')
COUNTS = ('steps', 'parameters', 'eval_size')


def read_result(workdir: epath.PathLike) -> dict[str, Any] | None:
  """The result of a run that has ended; None if there is none.

  Raises:
    RunError: `result.json` is damaged, or can't be read.
  """
  path = epath.Path(workdir) / RESULT
  result = read_json(path)
  if result is None:
    return None
  fine = {
    'status': result.get('status') in STATUSES,
    'eval': is_evaluation(result.get('eval')),
    'best_eval': is_evaluation(result.get('best_eval')),
    'last_train': isinstance(result.get('last_train'), dict),
    **{name: is_count(result.get(name)) for name in COUNTS},
    **{name: is_number(result.get(name)) for name in ('chance', 'seconds')},
  }
  if bad := [name for name, good in fine.items() if not good]:
    raise DamagedFile(path, f'{bad[0]} is {str(result.get(bad[0]))[:40]!r}')
  return result


def take_result(workdir: epath.Path) -> dict[str, Any] | None:
  """Reads the result; a damaged one is set aside and counts as none."""
  if jax.process_index() == 0:
    try:
      read_result(workdir)
    except DamagedFile as error:
      say(f'{error}; moved to {set_aside(error.path)}')
  wait_for_all('result.json is looked at')
  return read_result(workdir)


def write_result(
  workdir: epath.Path,
  state: TrainState,
  reporter: Reporter,
  data: Dataset,
  seconds: float,
) -> dict[str, Any]:
  """Writes `result.json`, all at once, and returns its fields.

  Args:
    workdir: of the run, with its metrics.
    state: at the end.
    reporter: knows whether the run diverged, and its last finite metrics.
    data: the data set trained on.
    seconds: since this part of the run began.
  """
  if jax.process_index() == 0:
    lines = read_metrics(workdir)
    evals = [{**x['eval'], 'step': x['step']} for x in lines if 'eval' in x]
    trained = [line for line in lines if 'loss' in line]
    last = trained[-1] if trained else {'step': -1}
    if last['step'] < state.step:  # That line was damaged.
      last = last_train(state)
    result = {
      'status': 'diverged' if reporter.diverged else 'completed',
      'eval': evals[-1],
      'best_eval': max(evals, key=lambda e: e['top1']),
      'eval_size': data.eval_size,
      'chance': data.chance,
      'last_train': {k: last[k] for k in ('step', 'loss', 'top1')},
      'steps': int(state.step),
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
      'seconds': round(seconds, 2),
      'versions': versions(),
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'revision': revision(),
    }
    if reporter.diverged:
      result['divergence'] = {
        'last_finite': reporter.last,
        'largest_norms': largest_norms(state.params),
      }
    write_json(workdir / RESULT, result)
  wait_for_all('result.json is written')
  result = read_result(workdir)
  assert result is not None  # It was just written.
  return result


def last_train(state: TrainState) -> dict[str, float]:
  """The last training metrics, from the state."""
  sums = {k: np.float32(v) for k, v in jax.device_get(state.sums).items()}
  steps = max(sums['steps'], np.float32(1))
  means = {k: (sums[k] / steps).item() for k in ('loss', 'top1')}
  return {'step': int(state.step), **means}


def largest_norms(params: Any, number: int = 5) -> dict[str, float]:
  """The parameters with the largest norms, largest first."""
  norms = {
    name: float(jnp.linalg.norm(leaf))
    for name, leaf in flatten_dict(params, sep='/').items()
  }
  largest = sorted(norms, key=lambda name: norms[name], reverse=True)[:number]
  return {name: norms[name] for name in largest}


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that the numbers depend on."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {
    'skipinit-jax': __version__,
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def revision() -> str | None:
  """The commit of the running checkout; None outside a checkout."""
  folder = Path(__file__).resolve().parents[2]
  if not (folder / '.git').exists():
    return None
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
  try:
    done = subprocess.run(
      command, cwd=folder, capture_output=True, text=True, check=False
    )
  except OSError:
    return None
  return done.stdout.strip() or None
