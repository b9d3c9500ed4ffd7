"""The studies: what is varied, how a rate is chosen, what was published.

A study has a grid for each data set that it knows. A grid has panels, rows and
columns; each of their values sets fields of a recipe, and a cell of the table
is one of each. Every cell is trained at all rates and seeds with some training
images held out; its rate is chosen on those, and the test split is looked at
once, after training on the whole training split at that rate.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from skipinit_jax import published
from skipinit_jax.errors import InputError, unknown
from skipinit_jax.variants import VARIANTS, Fields


@dataclasses.dataclass(frozen=True)
class Axis:
  """What is varied along one side of a table.

  Attributes:
    name: for people: 'depth', 'batch', 'method'.
    values: what is printed -> the fields that it sets.
  """

  name: str
  values: Mapping[str, Fields]


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
  """A study at the size that a data set is worth.

  Attributes:
    recipe: that all runs start from.
    fields: that all runs set; like those of the axes, values, or functions of
      the fields before them (in the order: these, rows, panels, columns).
    rows, columns, panels: axes of the table; `columns` are VARIANTS by key.
    rates: exponents of 2 of the learning rates, times `unit`.
    validation: training images held out to choose the rate.
    seeds: runs of every cell and rate.
    best: of these, how many enter a mean: the best so many.
    choices: what is our choice and not the paper's, for the report.
    overrides: fields that have the last word, as given on the command line.
  """

  recipe: str
  fields: Fields
  rows: Axis
  columns: tuple[str, ...]
  rates: tuple[int, ...]
  validation: int
  seeds: int
  best: int
  panels: Axis = Axis('', {'': {}})
  unit: float = 1.0
  choices: str = ''
  overrides: Fields = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
  """An experiment.

  Attributes:
    name, title: short, and in words.
    question: what it asks.
    grids: by data set.
    published: column -> row -> what a paper publishes, on `published_for`.
    source: of those figures.
    published_for: the data set that they are about.
    curve: the figure of accuracy goes along 'rows' (a number: depth, batch).
    rates_curve: a figure of the optimal rate along the rows.
  """

  name: str
  title: str
  question: str
  grids: Mapping[str, Grid]
  published: Mapping[str, Mapping[int, published.Accuracy]]
  source: str
  published_for: str = 'cifar10'
  rates_curve: bool = False


def depths(*values: int) -> Axis:
  """Rows by depth."""
  return Axis('depth', {str(d): {'model.depth': d} for d in values})


def batches(*values: int, **fields: Any) -> Axis:
  """Rows by batch size."""
  return Axis(
    'batch', {str(b): {'batch_size': b, **batch_fields(b)} for b in values}
  )


def batch_fields(batch: int) -> Fields:
  """What must follow the batch: ghost batches of at most 64 images."""
  return {'model.statistics_group': str(min(batch, 64))}


# Small enough for minutes on two CPU cores.
DIGITS = {
  'epochs': 8.0,
  'eval_every_epochs': 8.0,
  'checkpoint_every_steps': 100,
  'optimizer.l2': 5e-4,
  'watch_every_steps': 45,
}
DIGITS_CHOICES = (
  'On the digits everything but the method is our choice: n-1 Wide-ResNets, '
  'batch 32, 8 epochs with a cosine, shifts of a pixel.'
)
CIFAR_CHOICES = (
  'Our choices: batches of 128, ghost batches of 64, L2 on kernels only, rates '
  'chosen on 5,000 held out training images.'
)
FIXUP_RATE = (
  "Fixup has one rate for all parameters, as in the later code of the paper's "
  'group.'
)
CIFAR = {'model.width': 2, 'eval_every_epochs': 10.0, 'watch_every_steps': 500}


def cifar(grid: Grid) -> dict[str, Grid]:
  """A grid for CIFAR-10, and the same for CIFAR-100."""
  return {
    'cifar10': grid,
    'cifar100': dataclasses.replace(grid, recipe='cifar100'),
  }


def budgets(epochs: float, batch: int) -> Axis:
  """Panels: so many epochs, and as many steps as they have at that batch.

  The rate is held for half of them and halved in every twentieth, as 200
  epochs are on CIFAR.
  """

  def fields(length: Callable[[Fields], float]) -> Fields:
    return {
      'epochs': length,
      'eval_every_epochs': length,
      'schedule.hold_epochs': lambda f: length(f) / 2,
      'schedule.every_epochs': lambda f: length(f) / 20,
    }

  return Axis(
    'budget',
    {
      'constant epochs': fields(lambda f: epochs),
      'constant steps': fields(lambda f: epochs * f['batch_size'] / batch),
    },
  )


ONE_EPOCH = {
  'epochs': 1.0,
  'eval_every_epochs': 1.0,
  'schedule.name': 'constant',
}
TABLE_1 = (
  'batchnorm',
  'fixup',
  'skipinit_sqrt',
  'skipinit',
  'skipinit_1',
  'none',
)
TABLE_2 = ('skipinit', 'skipinit_1', 'divide_sqrt2', 'skipinit_no_l2')
PARTS = (
  'fixup',
  'fixup_zero_last',
  'fixup_rescale',
  'fixup_multiplier',
  'fixup_biases',
  'fixup_no_part',
)
FIRST = ('batchnorm', 'fixup', 'skipinit_sqrt', 'skipinit', 'none')
IMAGENET_ROWS = (*(n for n in VARIANTS if n.startswith('imagenet:')), 'clipped')


def by_depth(
  columns: tuple[str, ...],
  *,
  digits: Mapping[str, Any],
  cifar10: Mapping[str, Any],
) -> dict[str, Grid]:
  """Grids of depths: what they share, and what is said of each data set."""
  small = {
    'recipe': 'digits',
    'fields': DIGITS,
    'rows': depths(16, 100),
    'columns': columns,
    'validation': 240,
    'choices': DIGITS_CHOICES,
  }
  published_size = {
    'recipe': 'cifar10',
    'fields': CIFAR,
    'rows': depths(16, 100, 1000),
    'columns': columns,
    'validation': 5000,
    'choices': CIFAR_CHOICES,
  }
  return {
    'digits': Grid(**(small | digits)),
    **cifar(Grid(**(published_size | cifar10))),
  }


DEPTH = Study(
  name='depth',
  title='Accuracy against depth',
  question='Do deep residual networks train with batch normalization or the '
  'scalar, and not without?',
  grids=by_depth(
    TABLE_1,
    digits={
      'rows': depths(16, 40, 100),
      'rates': (-6, -4, -3, -2),
      'seeds': 1,
      'best': 1,
    },
    cifar10={'rates': (-5, -4, -3, -2, -1, 0), 'seeds': 7, 'best': 5},
  ),
  published={
    **published.DEPTH,
    'skipinit_1': published.ABLATIONS['skipinit_1'],
  },
  source=f'{published.DEPTH_SOURCE} and, for SkipInit 1, table 2',
)

ABLATIONS = Study(
  name='ablations',
  title='What the scalar must be',
  question='Does the scalar have to start small, and does L2 make it train?',
  grids=by_depth(
    TABLE_2,
    digits={'rates': (-6, -4, -3, -2), 'seeds': 2, 'best': 2},
    cifar10={'rates': (-6, -5, -4, -3, -2, -1), 'seeds': 7, 'best': 5},
  ),
  published={**published.ABLATIONS, 'skipinit': published.DEPTH['skipinit']},
  source=f'{published.ABLATIONS_SOURCE} and, for SkipInit 0, table 1',
)

FIXUP_PARTS = Study(
  name='fixup_parts',
  title="Fixup's parts, each alone",
  question="Which of Fixup's parts make deep networks train?",
  grids=by_depth(
    PARTS,
    digits={'rates': (-8, -6, -4, -3), 'seeds': 1, 'best': 1},
    cifar10={
      'rates': (-7, -5, -4, -3, -2, -1),
      'seeds': 3,
      'best': 3,
      'choices': f"{CIFAR_CHOICES} Fixup's own blocks, with its classifier at "
      'zero in every column.',
    },
  ),
  published={},
  source='',
)

BATCH_SIZE = Study(
  name='batch_size',
  title='Accuracy, loss and rates against the batch',
  question='Does batch normalization reach larger batches and rates?',
  grids={
    'digits': Grid(
      recipe='digits',
      fields={**DIGITS, 'model.depth': 16},
      panels=budgets(epochs=8.0, batch=64),
      rows=batches(8, 64, 512),
      columns=('batchnorm', 'skipinit', 'none'),
      rates=(-8, -6, -4, -2, 0),
      validation=240,
      seeds=1,
      best=1,
      choices='On the digits everything but the method is our choice: the 16-1 '
      'network, 8 epochs or as many steps as 8 epochs of batch 64, a cosine.',
    ),
    **cifar(
      Grid(
        recipe='cifar10',
        fields={**CIFAR, 'model.depth': 16, 'model.width': 4},
        panels=budgets(epochs=200.0, batch=128),
        rows=batches(2, 8, 32, 128, 512, 1024, 2048, 4096),
        columns=('batchnorm', 'skipinit', 'none'),
        rates=(-9, -7, -5, -4, -3, -2, -1, 0, 1),
        validation=5000,
        seeds=15,
        best=12,
        choices=f'{CIFAR_CHOICES} As many steps as 200 epochs of batch 128.',
      )
    ),
  },
  published={},
  source='',
  rates_curve=True,
)

IMAGENET = Study(
  name='imagenet',
  title='Batches without batch normalization',
  question='What do large batches cost without batch normalization, and what '
  'do Dropout and biases give back?',
  grids={
    'digits': Grid(
      recipe='digits',
      fields={**DIGITS, 'model.depth': 40, 'optimizer.reference_batch': 32},
      rows=batches(32, 128, 512),
      columns=IMAGENET_ROWS,
      rates=(-5, -4, -3),
      validation=240,
      seeds=1,
      best=1,
      choices='On the digits everything but the method is our choice: the 40-1 '
      'network, 8 epochs, a cosine, a rate that grows with the batch. '
      f'{FIXUP_RATE}',
    ),
    'imagenet2012': Grid(
      recipe='imagenet',
      fields={'watch_every_steps': 1000},
      rows=batches(256, 1024, 4096),
      columns=IMAGENET_ROWS,
      rates=(-1, 0, 1),
      unit=0.1,
      validation=10_000,
      seeds=1,
      best=1,
      choices='Our choices: rates of 2^-1, 2^0 and 2^1 times 0.1 per 256 '
      'images (the paper tuned each row), chosen on 10,000 held out images; '
      'Dropout 0.25, no label smoothing, L2 on kernels only, ghost batches of '
      f'64. {FIXUP_RATE} The last row is ours.',
    ),
  },
  published=published.IMAGENET,
  source=published.IMAGENET_SOURCE,
  published_for='imagenet2012',
)

FIRST_EPOCH = Study(
  name='first_epoch',
  title='Accuracy after one epoch',
  question='Does the depth slow the first epoch down?',
  grids={
    'digits': Grid(
      recipe='digits',
      fields={**DIGITS, **ONE_EPOCH, 'batch_size': 8},
      rows=depths(10, 40, 100),
      columns=FIRST,
      rates=(-7, -5, -4, -3),
      validation=240,
      seeds=1,
      best=1,
      choices='On the digits everything but the method is our choice: n-1 '
      'Wide-ResNets, batch 8, a constant rate.',
    ),
    **cifar(
      Grid(
        recipe='cifar10',
        fields={**CIFAR, **ONE_EPOCH},
        rows=depths(10, 100, 1000, 10_000),
        columns=FIRST,
        rates=(-6, -5, -4, -3, -2, -1),
        validation=5000,
        seeds=3,
        best=3,
        choices=f'{CIFAR_CHOICES} The published figures are of another network '
        'family and of one rate.',
      )
    ),
  },
  published=published.FIRST_EPOCH,
  source=published.FIRST_EPOCH_SOURCE,
)

STUDIES = {
  s.name: s
  for s in (DEPTH, ABLATIONS, FIXUP_PARTS, BATCH_SIZE, IMAGENET, FIRST_EPOCH)
}


def find_study(name: str, dataset: str) -> tuple[Study, Grid]:
  """A study and its grid for a data set.

  Raises:
    InputError: there is no such study, or it has no such grid.
  """
  if name not in STUDIES:
    raise InputError(unknown('study', name, STUDIES))
  study = STUDIES[name]
  if dataset not in study.grids:
    raise InputError(unknown(f'data set of {name}', dataset, study.grids))
  return study, study.grids[dataset]
