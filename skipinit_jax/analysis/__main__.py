"""The command line of the analyses.

python -m skipinit_jax.analysis all --dataset=digits --out=runs/analysis
python -m skipinit_jax.analysis paths --dataset=cifar10 --out=runs/analysis
python -m skipinit_jax.analysis lesions --checkpoint=RUN --out=runs/analysis

Each kind writes its figures (SVG and PNG) and its numbers (JSON) to the folder.
What a recipe's fields are set to comes last, as in --config.model.depth=100.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from skipinit_jax import cli
from skipinit_jax.analysis import (
  along_training,
  curvature,
  lesions,
  networks,
  paths,
  propagation,
  shattered,
)
from skipinit_jax.analysis.capture import capture
from skipinit_jax.data import open_dataset
from skipinit_jax.errors import InputError, unknown, unwritable
from skipinit_jax.files import write_json
from skipinit_jax.training import train
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.network import build_method, build_model
from skipinit_jax.training.recipes import (
  load_recipe,
  parse_fields,
  set_fields,
)
from skipinit_jax.training.saved import Saved, find_checkpoint, load_run
from skipinit_jax.training.timetable import make_timetable

# What the paths and the lesions compare, and the fields that make it.
METHODS = {
  'batchnorm': {'model.method': 'batchnorm'},
  'skipinit': {'model.method': 'skipinit'},
  'fixup': {'model.method': 'fixup', 'optimizer.learning_rate': 2.0**-3},
  'none': {'model.method': 'none', 'optimizer.learning_rate': 2.0**-10},
}
# Small enough for minutes on two CPU cores.
DIGITS = {
  'model.depth': 40,
  'epochs': 8.0,
  'optimizer.learning_rate': 2.0**-4,
  # One that starts at zero lets no gradient through.
  'model.classifier_init': 'he',
  # What is looked at along training.
  'watch_every_steps': 9,
  'checkpoint_every_steps': 90,
  'keep_checkpoints': 100,
}


def main() -> None:
  """Parses, and ends in one line where the input is bad."""
  cli.interrupt_as_usual()
  parser = cli.Parser(
    prog='python -m skipinit_jax.analysis',
    description='Why the scalar works: signals, paths, gradients.',
    fields=True,
  )
  parser.add_argument('kind', help=f'{", ".join(KINDS)}, or all')
  parser.add_argument(
    '--config',
    '--dataset',
    default='digits',
    help='a recipe, or the data set that it is named after',
  )
  parser.add_argument(
    '--checkpoint',
    help='a run to look at instead, or one of its folders checkpoints/STEP',
  )
  parser.add_argument('--out', type=cli.folder, default=Path('runs/analysis'))
  args, texts = parser.parse_with_fields()
  with cli.errors_in_one_line():
    run(args, texts)


def run(args: argparse.Namespace, texts: list[tuple[str, str]]) -> None:
  """Measures and draws what was asked for."""
  if args.kind != 'all' and args.kind not in KINDS:
    raise InputError(unknown('kind', args.kind, [*KINDS, 'all']))
  config = load_recipe(args.config)
  fields = DIGITS if args.config == 'digits' else {}
  set_fields(config, fields | parse_fields(config, texts))
  checkpoint = args.checkpoint
  if checkpoint is None:
    check(config)
  else:
    find_checkpoint(checkpoint)
    checkpoint = epath.Path(checkpoint).expanduser()
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise unwritable(args.out, error) from None
  for kind in KINDS if args.kind == 'all' else [args.kind]:
    start = time.perf_counter()
    print(f'{kind} ...', file=sys.stderr, flush=True)
    measured, drawn = KINDS[kind](config, checkpoint, args.out)
    write_json(args.out / f'{kind}.json', plain(measured))
    seconds = time.perf_counter() - start
    names = ', '.join(path.name for path in drawn)
    print(f'{kind}: {names}, {seconds:.0f} s', file=sys.stderr, flush=True)


def check(config: ConfigDict) -> None:
  """Raises InputError for a recipe that can't be run with each method."""
  data = open_dataset(config.data)
  for _, each in _each(config, METHODS):
    check_config(each, jax.device_count())
    build_model(each, data.num_classes)
    make_timetable(each, data.train_size)


def of_propagation(config: ConfigDict, checkpoint: Path | None, out: Path):
  """Variances, shares and path lengths: at the start, or of a checkpoint."""
  if checkpoint:
    run = load_run(checkpoint)
    model, variables, images, _ = networks.of_run(run, 128)
    captured = propagation.beside_theory(
      capture(model, variables, images, train=False),
      build_method(run.config),
      model.stage_sizes,
      project_first=run.config.model.width != 1,
    )
    measured = {run.config.model.depth: {_method(run): captured}}
  else:
    measured = propagation.measure()
    (out / 'effective_depth.md').write_text(propagation.table(measured))
  return measured, propagation.draw(measured, out)


def of_curvature(config: ConfigDict, checkpoint: Path | None, out: Path):
  """The largest eigenvalue of the Hessian on the digits, or of a run's loss."""
  if checkpoint:
    run = load_run(checkpoint)
    found = curvature.of_loss(run.model, run.data, run.variables['params'])
    found = {name: np.array([value]) for name, value in found.items()}
    measured = {run.config.model.depth: {_method(run): found}}
  else:
    measured = curvature.measure()
  return measured, curvature.draw(measured, out)


def of_shattered(config: ConfigDict, checkpoint: Path | None, out: Path):
  """Autocorrelation of the gradients of random networks; needs no data."""
  measured = shattered.measure()
  return measured, shattered.draw(measured, out)


def of_paths(config: ConfigDict, checkpoint: Path | None, out: Path):
  """Gradient norm by path length: at the start of each method, or saved."""
  if checkpoint:
    run = load_run(checkpoint)
    nets = {_method(run): (networks.of_run(run, 32), False)}
  else:
    nets = {
      name: (networks.at_start(each, 32), True)
      for name, each in _each(config, METHODS)
    }
  measured = {
    name: paths.measure(*network, train=train)
    for name, (network, train) in nets.items()
  }
  return measured, paths.draw(measured, out)


def of_training(config: ConfigDict, checkpoint: Path | None, out: Path):
  """Effective depth and eigenvalue along training, of each method or a run."""
  if checkpoint:
    workdirs = {_method(load_run(checkpoint)): checkpoint}
  else:
    workdirs = {name: out / 'runs' / name for name in METHODS}
    for name, each in _each(config, METHODS):
      train(each, workdirs[name])
  measured = along_training.measure(workdirs)
  return measured, along_training.draw(measured, out)


def of_lesions(config: ConfigDict, checkpoint: Path | None, out: Path):
  """Test error without blocks: of each method, trained first, or saved."""
  if checkpoint:
    run = load_run(checkpoint)
    nets = {_method(run): networks.of_run(run)}
  else:
    trainable = {k: v for k, v in METHODS.items() if k != 'none'}
    nets = {
      name: networks.trained(each, out / 'runs' / name)
      for name, each in _each(config, trainable)
    }
  measured = {name: lesions.measure(*net) for name, net in nets.items()}
  return measured, lesions.draw(measured, out)


def _each(
  config: ConfigDict, methods: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, ConfigDict]]:
  for name, fields in methods.items():
    yield name, set_fields(config.copy_and_resolve_references(), dict(fields))


def _method(run: Saved) -> str:
  """The method of a run, as it is drawn."""
  return run.config.model.method


def plain(value: Any) -> Any:
  """Arrays as lists, for JSON."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


KINDS: dict[str, Callable] = {
  'propagation': of_propagation,
  'curvature': of_curvature,
  'training': of_training,
  'paths': of_paths,
  'lesions': of_lesions,
  'shattered': of_shattered,
}


if __name__ == '__main__':
  main()
