"""The studies: what is varied, how a rate is chosen, what was published.

A study has a grid for each data set that it knows. A grid has panels, rows and
columns; each of their values sets fields of a recipe, and a cell of the table
is one of each. Every cell is trained at all rates with some training images
held out; while the best rate is the smallest or the largest tried, or nothing
trains, the next one is tried too. The rate is chosen on the held-out images.
Test runs train on the whole training split at that rate, and each evaluates the
test split exactly once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from skipinit_jax import published
from skipinit_jax.errors import InputError, unknown
from skipinit_jax.experiments.grid import Axis, Grid
from skipinit_jax.published import Accuracy
from skipinit_jax.variants import CLIPPED, VARIANTS, Fields


@dataclasses.dataclass(frozen=True)
class Study:
  """An experiment.

  Attributes:
    name, title: short, and in words.
    question: what it asks.
    grids: by data set.
    published: column -> row -> a paper's figure, on `published_for`.
    source: the paper and table of those figures.
    published_for: the data set of those figures.
    rates_curve: whether the optimal rate is drawn along the rows.
    law: whether a power law of it is fitted to the rows, which are depths.
  """

  name: str
  title: str
  question: str
  grids: Mapping[str, Grid]
  published: Mapping[str, Mapping[int, Accuracy]] = dataclasses.field(
    default_factory=dict
  )
  source: str = ''
  published_for: str = 'cifar10'
  rates_curve: bool = False
  law: bool = False


def depths(*values: int) -> Axis:
  """Rows by depth."""
  return Axis('depth', {str(d): {'model.depth': d} for d in values})


def batches(*values: int) -> Axis:
  """Rows by batch size, with ghost batches of at most 64 images."""
  return Axis(
    'batch',
    {
      str(b): {'batch_size': b, 'model.statistics_group': str(min(b, 64))}
      for b in values
    },
  )


def budgets(epochs: float, batch: int) -> Axis:
  """Panels: a number of epochs, and the number of steps in them at a batch.

  The rate is held for half of them and halved every twentieth, as in 200 epochs
  on CIFAR.
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


def train_for(epochs: float) -> dict[str, Any]:
  """Fields of a number of epochs, with one evaluation at their end."""
  return {'epochs': epochs, 'eval_every_epochs': epochs}


# Small enough for minutes on two CPU cores.
UNWATCHED = {
  **train_for(8.0),
  'checkpoint_every_steps': 100,
  'optimizer.l2': 5e-4,
}
DIGITS = {**UNWATCHED, 'watch_every_steps': 45}
CIFAR = {
  'model.width': 2,
  'eval_every_epochs': 10.0,
  'watch_every_steps': 500,
  'checkpoint_every_steps': 10_000,  # Depth 1000 has 0.5 GB in each.
}
ONE_EPOCH = {**train_for(1.0), 'schedule.name': 'constant'}
OURS = 'Everything but the method is our choice:'
CIFAR_CHOICES = (
  'Our choices: batches of 128, ghost batches of 64, L2 on kernels only, rates '
  'chosen on 5,000 held out training images.'
)
FIXUP_RATE = (
  "Fixup has one rate for all parameters, as in the later code of the paper's "
  'group.'
)
SMALL = {'digits': 240, 'mnist5k': 800}  # Images held out.


def on_small(
  fields: Fields = DIGITS,
  choices: str = 'n-1 Wide-ResNets, 8 epochs with a cosine, the batch and '
  'shifts of the recipe.',
  **grid: Any,
) -> dict[str, Grid]:
  """A grid for the digits, and the same for MNIST; `grid` as in Grid."""
  grid = {'widest': (-16, 4), 'seeds': 3, 'tuning_seeds': 1, 'best': 3} | grid
  return {
    name: Grid(
      recipe=name,
      fields=fields,
      choices=f'{OURS} {choices}',
      validation=held_out,
      **grid,
    )
    for name, held_out in SMALL.items()
  }


def on_cifar(
  fields: Fields = CIFAR, choices: str = CIFAR_CHOICES, **grid: Any
) -> dict[str, Grid]:
  """A grid for CIFAR-10, and the same for CIFAR-100; `grid` as in Grid."""
  return {
    name: Grid(
      recipe=name, fields=fields, choices=choices, validation=5000, **grid
    )
    for name in ('cifar10', 'cifar100')
  }


DEPTH_COLUMNS = (
  'batchnorm',
  'fixup',
  'skipinit_sqrt',
  'skipinit',
  'skipinit_1',
  'none',
)
DEPTH = Study(
  name='depth',
  title='Accuracy against depth',
  question='Do deep residual networks train with batch normalization or the '
  'scalar, and not without?',
  grids={
    **on_small(
      fields=DIGITS | train_for(12.0),
      rows=Axis(
        'depth',
        {
          **depths(16, 40, 100).values,
          '1000': {'model.depth': 1000, **train_for(6.0)},
        },
      ),
      columns=DEPTH_COLUMNS,
      rates=(-6, -4, -3, -2),
      widest=(-16, 2),
      seeds=5,
      tuning_seeds=3,
      fewer={'100': (1, 5), '1000': (1, 1)},
      best=5,
      choices='n-1 Wide-ResNets, 12 epochs with a cosine, at depth 1000 only '
      '6; the batch and shifts of the recipe.',
    ),
    **on_cifar(
      rows=depths(16, 100, 1000),
      columns=DEPTH_COLUMNS,
      rates=(-5, -4, -3, -2, -1, 0),
      seeds=7,
      best=5,
    ),
  },
  published=published.DEPTH | {'skipinit_1': published.ABLATIONS['skipinit_1']},
  source=f'{published.DEPTH_SOURCE} and, for SkipInit 1, table 2',
)

HEADLINE = Study(
  name='headline',
  title='Accuracy against depth, the short version',
  question='Depth without its shallow and its slow rows: do the same networks '
  'train and fail?',
  grids=on_small(
    fields=UNWATCHED | train_for(12.0),
    rows=depths(16, 100),
    columns=DEPTH_COLUMNS,
    rates=(-6, -4, -2),
    choices='n-1 Wide-ResNets, 12 epochs with a cosine; the batch and shifts '
    'of the recipe.',
  ),
)

ABLATION_COLUMNS = ('skipinit', 'skipinit_1', 'divide_sqrt2', 'skipinit_no_l2')
ABLATIONS = Study(
  name='ablations',
  title='What the scalar must be',
  question='Does the scalar have to start small, and does L2 make it train?',
  grids={
    **on_small(
      rows=depths(16, 100),
      columns=ABLATION_COLUMNS,
      rates=(-6, -4, -3, -2),
    ),
    **on_cifar(
      rows=depths(16, 100, 1000),
      columns=ABLATION_COLUMNS,
      rates=(-6, -5, -4, -3, -2, -1),
      seeds=7,
      best=5,
    ),
  },
  published=published.ABLATIONS | {'skipinit': published.DEPTH['skipinit']},
  source=f'{published.ABLATIONS_SOURCE} and, for SkipInit 0, table 1',
)

PARTS = tuple(name for name in VARIANTS if name.startswith('fixup'))
FIXUP_PARTS = Study(
  name='fixup_parts',
  title="Fixup's parts, each alone",
  question="Which of Fixup's parts make deep networks train?",
  grids={
    **on_small(rows=depths(16, 100), columns=PARTS, rates=(-8, -6, -4, -3)),
    **on_cifar(
      rows=depths(16, 100, 1000),
      columns=PARTS,
      rates=(-7, -5, -4, -3, -2, -1),
      seeds=3,
      best=3,
      choices=f"{CIFAR_CHOICES} Fixup's own blocks, with its classifier at "
      'zero in every column.',
    ),
  },
)

BATCH_COLUMNS = ('batchnorm', 'skipinit', 'none')
BATCH_SIZE = Study(
  name='batch_size',
  title='Accuracy, loss and rates against the batch',
  question='Does batch normalization reach larger batches and rates?',
  grids={
    **on_small(
      fields=DIGITS | {'model.depth': 16},
      panels=budgets(epochs=8.0, batch=64),
      rows=batches(8, 64, 512),
      columns=BATCH_COLUMNS,
      rates=(-8, -6, -4, -2, 0),
      choices='the 16-1 network, 8 epochs or as many steps as 8 epochs of '
      'batch 64, a cosine.',
    ),
    **on_cifar(
      fields=CIFAR | {'model.depth': 16, 'model.width': 4},
      panels=budgets(epochs=200.0, batch=128),
      rows=batches(2, 8, 32, 128, 512, 1024, 2048, 4096),
      columns=BATCH_COLUMNS,
      rates=(-9, -7, -5, -4, -3, -2, -1, 0, 1),
      seeds=15,
      best=12,
      choices='Our choices: 200 epochs, or as many steps as 200 epochs of '
      'batch 128; ghost batches of at most 64, L2 on kernels only, rates '
      'chosen on 5,000 held out training images.',
    ),
  },
  rates_curve=True,
)

REMEDIES: Mapping[str, Fields] = {
  'clipped': CLIPPED,
  'clipped but for alpha': {**CLIPPED, 'optimizer.clip_alpha': False},
  'LARS': {'optimizer.name': 'lars'},
  'Muon': {'optimizer.name': 'muon'},
}


def with_remedies(panels: Axis, repaired: str) -> Axis:
  """The panels, and `repaired` with each of REMEDIES: 'repaired, remedy'."""
  fields = panels.values[repaired]
  more = {f'{repaired}, {k}': {**fields, **v} for k, v in REMEDIES.items()}
  return Axis(panels.name, {**panels.values, **more})


LARGE_BATCHES = {'digits': (32, 256, 1152), 'mnist5k': (32, 256, 1024, 3200)}
LARGE_BATCH = Study(
  name='large_batch',
  title='What repairs large batches',
  question='Without batch normalization accuracy falls as the batch grows: '
  'what regains how much of it?',
  grids={
    name: on_small(
      fields=UNWATCHED | {'model.depth': 16},
      # More steps are a remedy of their own.
      panels=with_remedies(budgets(epochs=16.0, batch=256), 'constant epochs'),
      rows=batches(*sizes),
      columns=(
        'batchnorm',
        'batchnorm_whole',
        'skipinit',
        'imagenet:regularized_skipinit',
        'fixup',
        'nf',
      ),
      rates=(-6, -4, -2),
      choices='the 16-1 network, 16 epochs or as many steps as 16 epochs of '
      'batch 256, a cosine. Adaptive clipping at 0.01 times 4096 / batch; LARS '
      "with the rate as a kernel's relative step; Muon with decoupled decay.",
    )[name]
    for name, sizes in LARGE_BATCHES.items()
  },
  rates_curve=True,
)

IMAGENET_ROWS = (*(n for n in VARIANTS if n.startswith('imagenet:')), 'clipped')
IMAGENET = Study(
  name='imagenet',
  title='Batches without batch normalization',
  question='What do large batches cost without batch normalization, and what '
  'do Dropout and biases give back?',
  grids={
    **on_small(
      fields=DIGITS | {'model.depth': 40, 'optimizer.reference_batch': 32},
      rows=batches(32, 128, 512),
      columns=IMAGENET_ROWS,
      rates=(-5, -4, -3),
      choices='the 40-1 network, 8 epochs, a cosine, a rate that grows with '
      f'the batch. {FIXUP_RATE}',
    ),
    'imagenet2012': Grid(
      recipe='imagenet',
      fields={'watch_every_steps': 1000},
      rows=batches(256, 1024, 4096),
      columns=IMAGENET_ROWS,
      rates=(-1, 0, 1),
      unit=0.1,
      validation=10_000,
      choices='Our choices: rates of 2^-1, 2^0 and 2^1 times 0.1 per 256 '
      'images (the paper tuned each row), chosen on 10,000 held out images; '
      'Dropout 0.25, no label smoothing, L2 on kernels only, ghost batches of '
      f'64. {FIXUP_RATE} The last two columns are ours.',
    ),
  },
  published=published.IMAGENET,
  source=published.IMAGENET_SOURCE,
  published_for='imagenet2012',
)

FIRST_COLUMNS = ('batchnorm', 'fixup', 'skipinit_sqrt', 'skipinit', 'none')
FIRST_EPOCH = Study(
  name='first_epoch',
  title='Accuracy after one epoch',
  question='Does the depth slow the first epoch down?',
  grids={
    **on_small(
      fields=DIGITS | ONE_EPOCH | {'batch_size': 8},
      rows=depths(10, 40, 100),
      columns=FIRST_COLUMNS,
      rates=(-7, -5, -4, -3),
      choices='n-1 Wide-ResNets, batch 8, a constant rate.',
    ),
    **on_cifar(
      fields=CIFAR | ONE_EPOCH,
      rows=depths(10, 100, 1000, 10_000),
      columns=FIRST_COLUMNS,
      rates=(-6, -5, -4, -3, -2, -1),
      seeds=3,
      best=3,
      choices=f'{CIFAR_CHOICES} The published figures are of another network '
      'family and of one rate.',
    ),
  },
  published=published.FIRST_EPOCH,
  source=published.FIRST_EPOCH_SOURCE,
)

RATE_LAW = Study(
  name='rate_law',
  title='The best rate against the depth',
  question='How does the best learning rate fall with the depth, and with the '
  'effective depth that is measured?',
  grids=on_small(
    fields=UNWATCHED,
    test_fields={'watch_every_steps': 45},  # For the effective depth.
    rows=depths(16, 28, 52, 100),
    columns=('batchnorm', 'fixup', 'skipinit_sqrt', 'skipinit'),
    rates=(-7, -6, -5, -4, -3, -2),
    tuning_seeds=3,
    seeds=1,
    best=1,
  ),
  rates_curve=True,
  law=True,
)

STUDIES = {
  s.name: s
  for s in (
    DEPTH,
    HEADLINE,
    ABLATIONS,
    FIXUP_PARTS,
    BATCH_SIZE,
    LARGE_BATCH,
    IMAGENET,
    FIRST_EPOCH,
    RATE_LAW,
  )
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
