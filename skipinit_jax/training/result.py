"""The result of a run: what `result.json` holds."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from skipinit_jax.training.metrics import dumps, read_evals
from skipinit_jax.version import __version__

RESULT = 'result.json'


def read_result(workdir: Path) -> dict[str, Any] | None:
  """The result of a run that has ended, else None."""
  path = workdir / RESULT
  return json.loads(path.read_text()) if path.exists() else None


def write_result(
  workdir: Path, *, status: str, steps: int, params: Any, seconds: float
) -> dict[str, Any]:
  """Writes `result.json`, in one piece, and returns it.

  Args:
    workdir: of the run, with its metrics.
    status: 'completed' or 'diverged'.
    steps: updates made.
    params: the parameters at the end.
    seconds: since the start of this process's part of the run.
  """
  evals = read_evals(workdir)
  result = {
    'status': status,
    'eval': evals[-1],
    'best_eval': max(evals, key=lambda e: e['top1']),
    'steps': steps,
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'seconds': round(seconds, 2),
    'versions': versions(),
    'device': f'{jax.local_device_count()} x {jax.devices()[0].device_kind}',
    'revision': revision(),
  }
  temporary = workdir / f'{RESULT}.tmp'
  temporary.write_text(dumps(result, indent=2) + '\n')
  os.replace(temporary, workdir / RESULT)
  return result


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {
    'skipinit-jax': __version__,
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def revision() -> str | None:
  """The commit of the checkout that runs, None where there is none."""
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
