"""Studies, their grids, and what is read from the results of runs."""

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from skipinit_jax import cli, published
from skipinit_jax.errors import InputError
from skipinit_jax.experiments import estimate
from skipinit_jax.experiments.grid import (
  TEST,
  VALIDATION,
  Axis,
  Cell,
  Grid,
  cells,
  make_run,
)
from skipinit_jax.experiments.selection import (
  Mean,
  Outcome,
  choose_rate,
  mean,
  read_outcome,
  runs_at,
  seeds_of,
  summarize,
  total_runs,
  wanted,
)
from skipinit_jax.experiments.studies import STUDIES, find_study
from skipinit_jax.files import dumps
from skipinit_jax.training.changes import FREE
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.network import build_model
from skipinit_jax.training.recipes import (
  load_recipe,
  parse_fields,
  set_fields,
)
from skipinit_jax.variants import VARIANTS

GRIDS = [(s, d) for s in STUDIES for d in STUDIES[s].grids]


def tiny(**changes):
  grid = Grid(
    recipe='digits',
    fields={'epochs': 2.0},
    rows=Axis('depth', {str(d): {'model.depth': d} for d in (10, 16)}),
    columns=('skipinit', 'none'),
    rates=(-6, -4),
    validation=240,
    seeds=2,
    best=1,
  )
  return dataclasses.replace(grid, **changes)


def outcome(top1=0.5, status='completed', loss=1.0, images=100):
  return Outcome(status, top1, loss, loss, 0.1, images, 1.0, 10)


# Declarations.


@pytest.mark.parametrize(('name', 'dataset'), GRIDS)
def test_every_cell_is_a_recipe_that_can_run(name, dataset):
  _, grid = find_study(name, dataset)
  for cell in cells(grid):
    config = make_run(grid, cell, grid.rates[0], 0, TEST).config
    check_config(config, 1)
    build_model(config, 10, 'cpu')
    assert config.data.name == dataset
  assert grid.best <= grid.seeds


@pytest.mark.parametrize(('name', 'dataset'), GRIDS)
def test_cells_differ(name, dataset):
  _, grid = find_study(name, dataset)
  seen = {}
  for cell in cells(grid):
    run = make_run(grid, cell, grid.rates[0], 0, TEST)
    # Panels may share a run where they agree; rows and columns may not.
    place = cell.row, cell.column
    assert seen.setdefault(run.id, place) == place


def test_columns_are_variants_and_published_ones_are_known():
  columns = {
    c for s in STUDIES.values() for g in s.grids.values() for c in g.columns
  }
  assert columns == VARIANTS.keys()
  for study in STUDIES.values():
    grid = study.grids.get(study.published_for)
    for column, rows in study.published.items():
      assert column in grid.columns
      assert {str(row) for row in rows} <= grid.rows.values.keys()


def test_imagenet_rows_are_those_of_the_recipe():
  grid = STUDIES['imagenet'].grids['imagenet2012']
  for column in grid.columns:
    row = column.removeprefix('imagenet:')
    if row == column:
      continue
    for batch in (256, 4096):
      ours = make_run(grid, Cell('', str(batch), column), 0, 0, TEST).config
      theirs = load_recipe(f'imagenet:{row},batch={batch}')
      theirs.watch_every_steps, theirs.diverged_status = 1000, 0
      theirs.eval_every_epochs = 90.0
      assert ours.to_dict() == theirs.to_dict()


def test_published_figures_are_those_of_the_tables():
  # Transcribed once more, by row, from De & Smith 2020, tables 1 and 2.
  rows = {
    16: '93.5 93.0 93.3 93.0 92.4 89.8',
    100: '94.7 94.2 94.2 - 88.9 91.7',
    1000: '94.6 94.2 94.3 - - 92.1',
  }
  columns = {**published.DEPTH, **published.ABLATIONS}
  names = ('batchnorm', 'skipinit_sqrt', 'skipinit', 'skipinit_1')
  names += ('divide_sqrt2', 'skipinit_no_l2')
  for depth, text in rows.items():
    for name, value in zip(names, text.split(), strict=True):
      expected = None if value == '-' else float(value)
      assert columns[name][depth].value == expected


def test_a_constant_budget_is_one_of_steps_or_of_epochs():
  grid = STUDIES['batch_size'].grids['cifar10']
  epochs, steps = grid.panels.values
  for batch in (2, 128, 4096):
    a, b = (
      make_run(grid, Cell(panel, str(batch), 'none'), 0, 0, TEST).config
      for panel in (epochs, steps)
    )
    assert a.epochs == 200
    assert b.epochs / batch == pytest.approx(200 / 128)
    assert a.batch_size == b.batch_size == batch


def test_unknown_study_and_data_set_are_one_line():
  with pytest.raises(InputError, match="'dept'; did you mean 'depth'"):
    find_study('dept', 'digits')
  with pytest.raises(InputError, match="data set of depth 'cifar'; did you"):
    find_study('depth', 'cifar')


# Runs.


def test_a_run_is_known_by_what_changes_its_numbers():
  grid, cell = tiny(), Cell('', '10', 'none')
  run = make_run(grid, cell, -4, 1, VALIDATION)
  assert run.config.optimizer.learning_rate == 2**-4
  assert (run.config.seed, run.config.data.validation) == (1, 240)
  others = [
    make_run(grid, cell, -6, 1, VALIDATION),
    make_run(grid, cell, -4, 0, VALIDATION),
    make_run(grid, cell, -4, 1, TEST),
    make_run(grid, Cell('', '16', 'none'), -4, 1, VALIDATION),
    make_run(grid, Cell('', '10', 'skipinit'), -4, 1, VALIDATION),
    make_run(tiny(overrides={'epochs': 3.0}), cell, -4, 1, VALIDATION),
  ]
  assert len({run.id, *(r.id for r in others)}) == 7
  free = tiny(overrides={'stuck_after_seconds': 5.0})
  assert make_run(free, cell, -4, 1, VALIDATION).id == run.id


def test_fields_that_came_later_keep_the_names_of_runs_before():
  """The name by hand, from the fields that there were."""
  grid, cell = tiny(), Cell('', '10', 'none')
  run = make_run(grid, cell, -4, 1, VALIDATION)
  fields = flatten_dict(run.config.to_dict(), sep='.')
  for name in (*FREE, 'optimizer.name', 'optimizer.clip_alpha'):
    fields.pop(name, None)
  text = dumps(fields, sort_keys=True).encode()
  assert run.id == hashlib.sha256(text).hexdigest()[:12]
  lars = tiny(overrides={'optimizer.name': 'lars'})
  assert make_run(lars, cell, -4, 1, VALIDATION).id != run.id


def test_the_command_makes_the_config(tmp_path):
  run = make_run(tiny(unit=0.1), Cell('', '16', 'skipinit'), -3, 1, TEST)
  parser = cli.Parser(fields=True)
  parser.add_argument('--config')
  parser.add_argument('--workdir')
  args, texts = parser.parse_with_fields(run.arguments(tmp_path))
  config = load_recipe(args.config)
  loaded = set_fields(config, parse_fields(config, texts))
  assert loaded.to_dict() == run.config.to_dict()
  assert run.config.optimizer.learning_rate == pytest.approx(0.0125)


def test_overrides_are_typed_and_have_the_last_word():
  fields = parse_fields(
    load_recipe('digits'),
    [
      ('epochs', '3'),
      ('model.biases', 'false'),
      ('model.alpha', '0.5'),
      ('optimizer.clip_norm', '2'),
    ],
  )
  assert fields == {
    'epochs': 3.0,
    'model.biases': False,
    'model.alpha': '0.5',
    'optimizer.clip_norm': 2.0,
  }
  run = make_run(
    tiny(overrides={'epochs': 3.0}), Cell('', '10', 'none'), -4, 0, TEST
  )
  assert run.config.epochs == 3.0


# Means and rates.


def test_mean_is_of_the_best_and_its_error_theirs():
  values = [0.9, 0.2, 0.8, 0.7]
  got = mean([outcome(v, loss=v) for v in values], best=3)
  assert got.top1 == pytest.approx(0.8)
  assert got.error == pytest.approx(np.std([0.9, 0.8, 0.7], ddof=1) / 3**0.5)
  assert got.loss == pytest.approx(0.8)
  assert (got.runs, got.diverged) == (4, 0)


def test_one_seed_has_the_error_of_a_share():
  rng = np.random.default_rng(0)
  shares = rng.binomial(400, 0.3, 20_000) / 400
  got = mean([outcome(0.3, images=400)], best=1)
  assert got.error == pytest.approx(shares.std(), rel=0.03)


def test_a_diverged_run_counts_as_a_result_and_last():
  runs = [outcome(0.8), outcome(0.0, 'diverged', None)]
  assert mean(runs, best=1).top1 == 0.8
  both = mean(runs, best=2)
  assert (both.top1, both.loss, both.diverged) == (0.4, None, 1)


def at(top1, error=0.01, loss=1.0):
  return Mean(top1, error, loss, loss, 0, 1)


def test_the_range_is_of_rates_whose_errors_meet():
  rate, near = choose_rate(
    {-6: at(0.87), -5: at(0.885), -4: at(0.9), -3: at(0.88), -2: at(0.5)}
  )
  assert (rate, near) == (-4, (-5, -3))
  assert choose_rate({-2: at(0.9, loss=2.0), -1: at(0.9, loss=1.0)})[0] == -1
  assert choose_rate({-2: at(0.0, loss=None), -1: at(0.0, loss=3.0)})[0] == -1


class Fake:
  """Results by rule, for those runs that are done."""

  def __init__(self, rule):
    self.rule, self.done = rule, set()

  def __call__(self, run):
    return self.rule(run) if run.id in self.done else None


def finish(fake, grid):
  """Finishes what is wanted, again and again; the numbers of runs."""
  numbers = []
  while runs := wanted(grid, fake):
    numbers.append(len(runs))
    fake.done |= {run.id for run in runs}
  return numbers


def test_tests_wait_for_the_rate_and_run_at_it_alone():
  grid = tiny()
  fake = Fake(lambda run: outcome(0.9 if run.rate == -6 else 0.8))
  # Two rows, two columns: two rates and two seeds each, then two tests each.
  assert finish(fake, grid) == [16, 8]
  assert total_runs(grid, fake) == len(fake.done) == 24
  for cell in cells(grid):
    assert all(fake(r) for r in runs_at(grid, cell, -6, TEST))
    assert not any(fake(r) for r in runs_at(grid, cell, -4, TEST))


def test_a_cell_is_tested_as_soon_as_its_own_rates_are_done():
  grid, cell = tiny(), Cell('', '10', 'none')
  fake = Fake(lambda run: outcome())
  for rate in grid.rates:
    fake.done |= {r.id for r in runs_at(grid, cell, rate, VALIDATION)}
  tests = [run for run in wanted(grid, fake) if run.split == TEST]
  assert {run.cell for run in tests} == {cell}
  assert summarize(grid, cell, fake).rate is not None
  assert summarize(grid, cell, fake).result is None


def test_runs_that_panels_share_are_run_once():
  panels = Axis('budget', {'a': {}, 'b': {'epochs': 2.0}})
  grid = tiny(panels=panels)
  fake = Fake(lambda run: outcome())
  assert finish(fake, grid) == [16, 8]
  assert total_runs(grid, fake) == 24


@pytest.mark.parametrize(
  ('top1', 'trains'), [(0.18, False), (0.191, True), (0.0, False)]
)
def test_training_is_to_beat_the_largest_class_by_three_errors(top1, trains):
  # 0.1 + 3 sqrt(0.1 0.9 / 100) = 0.19.
  grid, cell = tiny(), Cell('', '10', 'none')
  fake = Fake(lambda run: outcome(top1))
  finish(fake, grid)
  assert summarize(grid, cell, fake).trains == trains


@pytest.mark.parametrize(
  ('best', 'tried'),
  [
    (-5, [-6, -5, -4, -2]),  # Inside: nothing is added.
    (-9, [-10, -9, -8, -7, -6, -5, -4, -2]),  # One at a time, as -6 and -5.
    (1, [-6, -5, -4, -2, 0, 2]),  # Two at a time, as -4 and -2.
    (-20, [*range(-12, -4), -4, -2]),  # Down to the bound.
    (7, [-6, -5, -4, -2, 0, 2]),  # Up to it.
  ],
)
def test_a_grid_is_widened_while_the_best_rate_is_at_its_edge(best, tried):
  grid = tiny(rates=(-6, -5, -4, -2), widest=(-12, 3), best=2)
  fake = Fake(lambda run: outcome(0.9 - abs(run.rate - best) / 100))
  finish(fake, grid)
  for cell in cells(grid):
    summary = summarize(grid, cell, fake)
    assert list(summary.tried) == tried == sorted(summary.by_rate)
    assert summary.at_the_edge == (best in (-20, 7))
    assert summary.result is not None
    assert not any(fake(r) for r in runs_at(grid, cell, -1, VALIDATION))
  assert len(fake.done) == total_runs(grid, fake)


def test_a_cell_that_fails_is_tried_down_to_the_bound():
  # One column trains from 2^-10 down, the other nowhere.
  grid = tiny(widest=(-14, 0))
  bad = outcome(0.0, 'diverged', None)

  def rule(run):
    if run.cell.column == 'none' or run.rate > -10:
      return bad
    return outcome(0.5 + run.rate / 100)

  fake = Fake(rule)
  finish(fake, grid)
  for row in grid.rows.values:
    trains = summarize(grid, Cell('', row, 'skipinit'), fake)
    assert list(trains.tried) == [-12, -10, -8, -6, -4]
    assert (trains.rate, trains.trains) == (-10, True)
    fails = summarize(grid, Cell('', row, 'none'), fake)
    assert list(fails.tried) == [-14, -12, -10, -8, -6, -4]
    assert fails.why_not == 'all 12 runs diverged, at rates of 2^-14 to 2^-4'


@pytest.mark.parametrize(
  ('trains', 'diverges', 'tried'),
  [
    (-2, 1, [-6, -4, -2, 0]),  # Larger ones may train: they come first.
    (-10, -2, [-12, -10, -8, -6, -4, -2]),  # Up until one diverges, then down.
    (9, 9, [-12, -10, -8, -6, -4, -2, 0, 2]),  # Nothing: both bounds.
  ],
)
def test_where_nothing_trains_and_nothing_diverges_larger_rates_are_tried(
  trains, diverges, tried
):
  grid = tiny(widest=(-12, 3))

  def rule(run):
    if run.rate >= diverges:
      return outcome(0.0, 'diverged', None)
    return outcome(0.9 if run.rate == trains else 0.1)

  fake = Fake(rule)
  finish(fake, grid)
  for cell in cells(grid):
    summary = summarize(grid, cell, fake)
    assert list(summary.tried) == tried
    assert summary.trains == (trains in tried)


def test_a_row_can_have_fewer_seeds():
  grid = tiny(seeds=4, tuning_seeds=3, best=4, fewer={'16': (1, 2)})
  fake = Fake(lambda run: outcome(0.5 + run.seed / 100))
  assert finish(fake, grid) == [2 * 2 * (3 + 1), 2 * (4 + 2)]
  many, few = (
    summarize(grid, Cell('', row, 'none'), fake).result for row in ('10', '16')
  )
  assert (many.runs, many.top1) == (4, pytest.approx(0.515))
  assert (few.runs, few.top1) == (2, pytest.approx(0.505))


def test_why_a_cell_does_not_train_is_said():
  grid, cell = tiny(), Cell('', '10', 'none')
  bad = outcome(0.0, 'diverged', None)
  for rule, words in (
    (lambda run: bad, 'all 4 runs diverged, at rates of 2^-6 to 2^-4'),
    (
      lambda run: outcome(0.1),
      'all 4 runs ended finite, at chance, at rates of 2^-6 to 2^-4',
    ),
    (
      lambda run: bad if run.rate == -4 else outcome(0.1),
      '2 of 4 runs diverged, the others ended at chance, at rates of 2^-6 to '
      '2^-4',
    ),
  ):
    fake = Fake(rule)
    finish(fake, grid)
    assert summarize(grid, cell, fake).why_not == words


def test_a_cell_that_trains_at_one_rate_is_not_one_that_does_not():
  grid, cell = tiny(best=2), Cell('', '10', 'none')
  bad = outcome(0.0, 'diverged', None)
  fake = Fake(lambda run: outcome(0.9) if run.split == VALIDATION else bad)
  finish(fake, grid)
  summary = summarize(grid, cell, fake)
  assert summary.trains
  assert summary.result.diverged == 2
  assert summary.why_not.startswith('reached 90.0 ± 0.0 on the held out')


def test_largest_stable_rate_is_the_last_at_which_no_seed_diverged():
  grid, cell = tiny(rates=(-6, -4, -2)), Cell('', '10', 'none')
  bad = outcome(0.0, 'diverged', None)
  fake = Fake(
    lambda run: bad if run.rate == -2 and run.seed == 1 else outcome(0.5)
  )
  finish(fake, grid)
  assert summarize(grid, cell, fake).largest_stable == -4


def test_a_result_that_can_not_be_read_is_named(tmp_path):
  assert read_outcome(tmp_path) is None
  (tmp_path / 'result.json').write_text('{"status": "completed"')
  with pytest.raises(ValueError, match=r'result\.json: JSONDecodeError'):
    read_outcome(tmp_path)
  (tmp_path / 'result.json').write_text('{"status": "completed"}')
  with pytest.raises(ValueError, match="KeyError\\('eval'\\)"):
    read_outcome(tmp_path)
  text = '{"status": "completed", "eval": {"top1": null}}'
  (tmp_path / 'result.json').write_text(text)
  with pytest.raises(ValueError, match='TypeError'):
    read_outcome(tmp_path)


def test_the_test_split_is_looked_at_once():
  for dataset, epochs in (('digits', 12), ('cifar10', 200)):
    _, grid = find_study('depth', dataset)
    config = make_run(grid, next(cells(grid)), -4, 0, TEST).config
    assert config.eval_every_epochs == config.epochs == epochs


# Cost.


def test_flops_of_an_image_are_counted_by_hand():
  # Wide-ResNet 10-1 on 8x8x1: (side, side, 3x3 or 1x1, in, out).
  convolutions = [
    (8, 9, 1, 16),
    (8, 9, 16, 16),
    (8, 9, 16, 16),
    (4, 9, 16, 32),
    (4, 9, 32, 32),
    (4, 1, 16, 32),
    (2, 9, 32, 64),
    (2, 9, 64, 64),
    (2, 1, 32, 64),
  ]
  expected = sum(2 * s * s * k * i * o for s, k, i, o in convolutions)
  got = estimate.image_flops('wide_resnet', 10, 1, (8, 8, 1), 10)
  assert got == expected + 2 * 64 * 10
  # ResNet-50 V2: 4.1 billion multiplications, as everywhere.
  got = estimate.image_flops('resnet', 50, None, (224, 224, 3), 1000)
  assert got == pytest.approx(2 * 4.09e9, rel=0.01)


def test_flops_of_deep_networks_lie_on_the_line_of_shallow_ones():
  shape = (8, 8, 1)
  line = estimate.image_flops('wide_resnet', 40, 1, shape, 10)
  steps = [
    estimate.image_flops('wide_resnet', d, 1, shape, 10) for d in (10, 16, 22)
  ]
  assert steps[2] - steps[1] == steps[1] - steps[0]
  assert line == steps[2] + 3 * (steps[2] - steps[1])


@pytest.mark.parametrize('study', STUDIES)
def test_runs_that_cells_share_are_priced_once(study):
  grid = STUDIES[study].grids['digits']
  assert estimate.cost(grid)['runs'] == total_runs(grid, lambda run: None)


def test_cost_adds_up_over_the_grid():
  grid = tiny()
  got = estimate.cost(grid)
  assert got['runs'] == total_runs(grid, lambda run: None) == 24
  # Runs that tune have fewer images.
  tuning, tests = seeds_of(grid, '10')
  cell = len(grid.rates) * tuning * (1437 - grid.validation) + tests * 1437
  assert got['images'] == 2 * cell * len([*cells(grid)])
  by_depth = [
    estimate.image_flops('wide_resnet', d, None, (8, 8, 1), 10)
    for d in (10, 16)
  ]
  assert got['flops'] == pytest.approx(3 * got['images'] / 2 * sum(by_depth))
  assert math.isfinite(got['cpu_seconds'])
  assert list(itertools.islice(cells(grid), 1)) == [Cell('', '10', 'skipinit')]
