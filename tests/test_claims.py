"""The claims: judged by rules that can fail, and the page that shows them."""

import json

import pytest

from benchmarks import claims, rules, versions
from benchmarks.rules import Cell, Kept
from skipinit_jax.analysis import along_training
from skipinit_jax.errors import InputError


def cell(method, seeds=(0.9, 0.91, 0.92), *, trains=True, **values):
  mean = sum(seeds) / len(seeds)
  test = {'top1': mean, 'error': 0.01, 'interval': 0.02, 'seeds': list(seeds)}
  test |= {'loss': None, 'train_loss': None, 'diverged': 0}
  tried = {'tried': [-16, -2], 'within_error': [-4, -2], 'largest_stable': -2}
  return Cell(
    tried | {'method': method, 'trains': trains, 'test': test} | values
  )


def kept(cells, panel=''):
  return Kept(
    {
      (panel, row, c.values['method']): c
      for row, cs in cells.items()
      for c in cs
    }
  )


def of_depths(*, plain=False, scalar=True):
  methods = {'batchnorm': True, 'skipinit_sqrt': True, 'skipinit': scalar}
  return kept(
    {
      row: [cell(m, trains=t) for m, t in (methods | {'none': plain}).items()]
      for row in ('100', '1000')
    }
  )


def test_depth_agrees_only_if_all_train_and_the_plain_network_does_not():
  text, agrees = rules.all_train(of_depths())
  assert agrees
  assert 'depth 100: BatchNorm 91.0 ± 2.0' in text
  assert 'Neither: fails (2⁻¹⁶ to 2⁻²)' in text
  assert not rules.all_train(of_depths(plain=True))[1]
  assert not rules.all_train(of_depths(scalar=False))[1]


@pytest.mark.parametrize(
  ('seeds', 'agrees'),
  [
    ((0.900, 0.910, 0.920), True),  # Equal, seed by seed.
    ((0.850, 0.861, 0.869), False),  # 5 points behind each time.
    ((0.850, 0.910, 0.970), None),  # As good in the mean, with a wide interval.
  ],
)
def test_a_difference_decides_only_where_its_interval_does(seeds, agrees):
  cells = {
    row: [cell('batchnorm'), cell('skipinit', seeds)] for row in rules.DEPTHS
  }
  assert rules.as_good_as_bn(kept(cells))[1] is agrees


@pytest.mark.parametrize(
  ('gaps', 'agrees'),
  [
    ((0.0, 0.05), True),
    ((0.0, -0.05), False),
    ((0.05, 0.05), None),  # Ahead, and no more than before.
    ((0.0, 0.0), None),
  ],
)
def test_the_fall_with_the_batch_must_be_larger_than_before(gaps, agrees):
  cells = {
    row: [
      cell('batchnorm', (0.9 + gap, 0.911 + gap, 0.92 + gap)),
      cell('skipinit', (0.9, 0.91, 0.921)),
    ]
    for row, gap in zip(('64', '512'), gaps, strict=True)
  }
  found = kept(cells, rules.EPOCHS)
  assert rules.falls_with_the_batch(found)[1] is agrees


def test_rates_are_alike_where_their_ranges_meet():
  def found(low, high):
    ours = cell('skipinit', within_error=[low, high])
    cells = {'8': [cell('batchnorm'), ours]}
    return rules.rates_alike(kept(cells, rules.EPOCHS))[1]

  assert found(-6, -4)
  assert not found(-6, -5)
  assert not found(-1, 0)


@pytest.mark.parametrize('claim', claims.CLAIMS, ids=lambda c: c.text[:40])
def test_every_claim_has_a_test_or_a_reason(claim):
  assert claim.source
  assert claim.rule
  assert bool(claim.study) == bool(claim.test)
  text, word = claims.judge(claim)
  assert text
  assert word in claims.VERDICTS


def test_what_is_kept_has_no_single_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(claims, 'DOCS', tmp_path)
  with pytest.raises(InputError, match='expected results; first'):
    claims.keep(tmp_path)
  values = dict(cell('none').values, panel='', row='16', held_out={'-2': {}})
  results = {'study': 'depth', 'cells': [values], 'runs': [{'id': 'abc'}]}
  (tmp_path / claims.JSON).write_text(json.dumps(results))
  assert claims.keep(tmp_path) == tmp_path / 'depth.json'
  assert 'abc' not in (tmp_path / 'depth.json').read_text()
  assert claims.read('depth')('16', 'none').text == 'Neither 91.0 ± 2.0'
  assert claims.read('ablations') is None


def analysed(**changes):
  """What was kept of analyses that agree with every claim, with changes."""
  found = {
    'propagation': {
      'batchnorm': {'share': [0.5, 0.34], 'expected_share': [0.5, 1 / 3]},
      'none': {'output': [2.0, 4.1, 7.9]},
    },
    'paths': {
      'batchnorm': {'effective_depth': 3.0, 'interval': 0.2, 'blocks': 18}
    },
    'lesions': {
      'batchnorm': {
        'whole': 0.02,
        'single': [0.03, 0.02, 0.9, 0.04],
        'several': [[0.03, 0.05], [0.2, 0.1], [0.8, 0.9]],
        'deleted': [1, 2, 3],
      }
    },
    'shattered': {
      'depths': [2, 50],
      **{
        name: [[1.0] * 16, [1.0, *15 * [at_50]]]
        for name, at_50 in (
          ('feedforward_bn', 0.01),
          ('batchnorm_1', 0.3),
          ('batchnorm_0.1', 0.8),
          ('skipinit', 0.99),
        )
      },
    },
  }
  for path, value in changes.items():
    *names, last = path.split('__')
    place = found
    for name in names:
      place = place[name]
    place[last] = value
  return found


@pytest.mark.parametrize(
  ('rule', 'change'),
  [
    (rules.branches_are_small, {'propagation__none__output': [2.0, 3.0, 4.0]}),
    (rules.branches_are_small, {'propagation__batchnorm__share': [0.5, 0.5]}),
    (rules.paths_are_short, {'paths__batchnorm__interval': 7.0}),
    (rules.lesions_are_smooth, {'lesions__batchnorm__single': [0.3] * 4}),
    (
      rules.lesions_are_smooth,
      {'lesions__batchnorm__several': [[0.9], [0.1], [0.8]]},
    ),
    (
      rules.gradients_shatter,
      {'shattered__feedforward_bn': [[1.0] * 16, [0.2] * 16]},
    ),
    (
      rules.gradients_shatter,
      {'shattered__batchnorm_1': [[1.0] * 16, [0.9] * 16]},
    ),
  ],
)
def test_analyses_agree_until_what_they_found_is_changed(rule, change):
  assert rule(analysed())[1] is True
  assert rule(analysed(**change))[1] is False


@pytest.mark.parametrize(
  ('gap', 'agrees'), [(0.2, True), (-0.2, False), (0.0, None)]
)
def test_clipping_regains_where_its_interval_says_so(gap, agrees):
  seeds = (0.5, 0.52, 0.51)
  clipped = tuple(
    s + gap + d for s, d in zip(seeds, (0, 0.01, -0.01), strict=True)
  )
  cells = {
    (panel, '1152', m): cell(m, values)
    for m in ('nf', 'skipinit')
    for panel, values in (
      (rules.EPOCHS, seeds),
      (f'{rules.EPOCHS}, clipped', clipped),
    )
  }
  text, found = rules.clipping_regains(Kept(cells))
  assert found is agrees
  assert 'batch 1152' in text


@pytest.mark.parametrize(
  ('fit', 'agrees'),
  [
    ((0.05, 0.1), True),
    ((-0.2, 0.1), None),
    ((0.4, 0.1), False),
    ((-0.4, 0.1), False),
    (None, None),
  ],
)
def test_the_best_rate_is_constant_where_its_interval_says_so(fit, agrees):
  others = ('batchnorm', 'fixup', 'skipinit_sqrt')
  laws = {m: {'depth': (-1.0, 0.1)} for m in others}
  study = Kept({}, laws | {'skipinit': {'depth': fit}})
  text, found = rules.rate_is_constant(study)
  assert found is agrees
  assert 'Fixup \u22121.00 ± 0.10' in text


def test_the_tables_along_training_are_those_of_their_file():
  kept = json.loads((claims.DOCS / 'along_training.json').read_text())
  page = (claims.DOCS / 'how_it_works.md').read_text()
  assert {'40', '100', '1000'} <= kept.keys()
  for measured in kept.values():
    assert along_training.table(measured).strip() in page


def test_what_is_kept_along_training_has_its_depth(tmp_path, monkeypatch):
  monkeypatch.setattr(claims, 'DOCS', tmp_path)
  for depth in (16, 40):
    run = tmp_path / str(depth) / 'runs' / 'skipinit'
    run.mkdir(parents=True)
    (run / 'config.json').write_text(json.dumps({'model': {'depth': depth}}))
    found = {'skipinit': {'epoch': [depth]}}
    (tmp_path / str(depth) / 'training.json').write_text(json.dumps(found))
    path = claims.keep(tmp_path / str(depth))
  kept = json.loads(path.read_text())
  assert [m['skipinit']['epoch'] for m in kept.values()] == [[16], [40]]


def test_the_page_is_made_from_what_was_kept():
  assert (claims.DOCS / 'claims.md').read_text() == claims.page()
  readme = (claims.DOCS.parent / 'README.md').read_text()
  assert f'({claims.summary()})' in readme


def test_the_table_of_large_batches_is_that_of_its_file():
  assert claims.remedies() in (claims.DOCS / 'from_batchnorm.md').read_text()


def test_the_table_of_effective_depths_is_that_of_its_file():
  page = (claims.DOCS / 'how_it_works.md').read_text()
  assert claims.effective_depths() in page


def test_the_table_of_the_law_is_that_of_its_file():
  assert claims.rate_law() in (claims.DOCS / 'measurements.md').read_text()


def test_the_table_of_the_headline_is_that_of_its_file():
  assert claims.headline() in (claims.DOCS / 'measurements.md').read_text()


def test_the_table_of_versions_is_that_of_its_file():
  kept = json.loads((claims.DOCS / 'versions.json').read_text())
  assert versions.table(kept) in (claims.DOCS / 'library.md').read_text()
