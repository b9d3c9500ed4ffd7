"""The command line of the analyses.

python -m skipinit_jax.analysis all --dataset=digits --out=runs/analysis
python -m skipinit_jax.analysis paths --dataset=cifar10 --out=runs/analysis
python -m skipinit_jax.analysis lesions --checkpoint=RUN --out=runs/analysis

Each kind writes its figures (SVG and PNG) and its numbers (JSON) to the folder.
A recipe's fields come last, as in --config.model.depth=100; `training`, `paths`
and `lesions` use them.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
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
from skipinit_jax.training.devices import set_cpu_flag
from skipinit_jax.training.network import build_model
from skipinit_jax.training.recipes import (
  load_recipe,
  parse_fields,
  set_fields,
)
from skipinit_jax.training.saved import Saved, is_pretrained, load_run
from skipinit_jax.training.timetable import make_timetable
from skipinit_jax.variants import VARIANTS

# Rows of `VARIANTS` that are compared, and the rates of those that need others.
METHODS: dict[str, dict[str, float]] = {
  'batchnorm': {},
  'skipinit': {},
  'fixup': {'optimizer.learning_rate': 2.0**-3},
  'none': {'optimizer.learning_rate': 2.0**-10},
}
DRAWS = 5  # Of the networks at initialization whose paths are measured.
# Small enough for minutes on two CPU cores.
DIGITS = {
  'model.depth': 40,
  'epochs': 8.0,
  'optimizer.learning_rate': 2.0**-4,
  # With zeros no gradient reaches the blocks.
  'model.classifier_init': 'he',
  # For the analysis along training.
  'watch_every_steps': 9,
  'checkpoint_every_steps': 90,
  'keep_checkpoints': 100,
}


def main() -> None:
  """Parses, and ends in one line where the input is bad."""
  cli.interrupt_as_usual()
  logging.set_verbosity(logging.FATAL)  # Orbax says much of little.
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
    help='analyze this run instead, or one of its folders checkpoints/STEP, or '
    'a trained network by its name',
  )
  parser.add_argument('--out', type=cli.folder, default=Path('runs/analysis'))
  args, texts = parser.parse_with_fields()
  set_cpu_flag()
  with cli.errors_in_one_line():
    run(args, texts)


def run(args: argparse.Namespace, texts: list[tuple[str, str]]) -> None:
  """Measures and draws one kind of analysis, or all."""
  if args.kind != 'all' and args.kind not in KINDS:
    raise InputError(unknown('kind', args.kind, [*KINDS, 'all']))
  config = load_recipe(args.config)
  fields = parse_fields(config, texts)
  refuse_unused(args, fields)
  set_fields(config, (DIGITS if args.config == 'digits' else {}) | fields)
  checkpoint = saved = None
  if args.checkpoint is None:
    check(config)
  else:
    saved = load_run(args.checkpoint)
    checkpoint = epath.Path(args.checkpoint).expanduser()
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise unwritable(args.out, error) from None
  kinds = list(KINDS) if args.kind == 'all' else [args.kind]
  if args.kind == 'all' and is_pretrained(args.checkpoint):
    kinds.remove('training')
  for kind in kinds:
    start = time.perf_counter()
    print(f'{kind} ...', file=sys.stderr, flush=True)
    measured = measure(kind, config, args.out, checkpoint, saved)
    write_json(args.out / f'{kind}.json', plain(measured))
    drawn = KINDS[kind].draw(measured, args.out)
    seconds = time.perf_counter() - start
    names = ', '.join(path.name for path in drawn)
    print(f'{kind}: {names}, {seconds:.0f} s', file=sys.stderr, flush=True)


def refuse_unused(args: argparse.Namespace, fields: Mapping[str, Any]) -> None:
  """Raises InputError for arguments that the analysis would ignore."""
  kind, field = args.kind, next(iter(fields), None)
  if field and args.checkpoint is not None:
    raise InputError(
      f'--config.{field}: the fields of a checkpoint are those of its run; '
      'expected no fields with --checkpoint'
    )
  if field and kind not in ('all', *OF_RECIPES):
    raise InputError(
      f'--config.{field}: {kind} has networks of its own; expected no fields, '
      f'or one of {", ".join(OF_RECIPES)}'
    )
  if args.checkpoint is not None and kind == 'shattered':
    raise InputError(
      f'--checkpoint={args.checkpoint}: shattered has random networks of its '
      'own; expected no checkpoint, or another kind'
    )
  if kind == 'training' and is_pretrained(args.checkpoint):
    raise InputError(
      f'--checkpoint={args.checkpoint}: only its end is known; training '
      'expected a run, or another kind'
    )


def check(config: ConfigDict) -> None:
  """Raises InputError for a recipe that can't be run with each method."""
  data = open_dataset(config.data)
  for each in each_method(config).values():
    check_config(each, jax.device_count())
    build_model(each, data.num_classes)
    make_timetable(each, data.train_size)


def measure(
  kind: str,
  config: ConfigDict,
  out: Path,
  checkpoint: epath.Path | None,
  run: Saved | None,
) -> Mapping[Any, Any]:
  """The arrays of one analysis.

  Args:
    kind: of KINDS.
    config: a recipe, of which every method is measured.
    out: trained networks are in OUT/runs.
    checkpoint: a run, or one of its checkpoints, to measure instead.
    run: what was loaded from it.
  """
  config = run.config if run else config
  method, depth = config.model.method, config.model.depth
  match kind:
    case 'propagation' if run:
      model, variables, images, _ = networks.of_run(run, 128)
      captured = propagation.beside_theory(
        capture(model, variables, images, train=False),
        run.model,
        project_first=config.model.width != 1,
      )
      return {depth: {method: captured}}
    case 'curvature' if run:
      return {depth: {method: curvature.measure_run(run)}}
    case 'training' if checkpoint:
      return along_training.measure({method: checkpoint})
    case 'training':
      workdirs = {name: out / 'runs' / name for name in METHODS}
      for name, each in each_method(config).items():
        train(each, workdirs[name])
      return along_training.measure(workdirs)
    case 'paths' if run:
      network = networks.of_run(run, 32)
      return {method: paths.measure(*network, train=False)}
    case 'paths':
      return {
        name: paths.measure_draws(networks.draws_at_start(each, 32, DRAWS))
        for name, each in each_method(config).items()
      }
    case 'lesions' if run:
      return {method: lesions.measure(*networks.of_run(run))}
    case 'lesions':
      return {
        name: lesions.measure(*networks.trained(each, out / 'runs' / name))
        for name, each in each_method(config).items()
        if name != 'none'  # Does not train.
      }
    case _:  # Of networks of its own.
      return KINDS[kind].measure()


def each_method(config: ConfigDict) -> dict[str, ConfigDict]:
  """A recipe's config with each of METHODS."""
  return {
    name: set_fields(
      config.copy_and_resolve_references(), dict(VARIANTS[name].fields) | rates
    )
    for name, rates in METHODS.items()
  }


def plain(value: Any) -> Any:
  """Arrays as lists, for JSON."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


KINDS: dict[str, Any] = {
  'propagation': propagation,
  'curvature': curvature,
  'training': along_training,
  'paths': paths,
  'lesions': lesions,
  'shattered': shattered,
}
OF_RECIPES = ('training', 'paths', 'lesions')


if __name__ == '__main__':
  main()
