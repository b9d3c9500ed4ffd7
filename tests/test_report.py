"""The report of a study, from results whose numbers are known."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
from studies import EVIL, UNFINISHED, make_grid, make_study, write_runs

from skipinit_jax.experiments.downloads import write_downloads
from skipinit_jax.experiments.findings import Findings
from skipinit_jax.experiments.grid import TEST, VALIDATION, Axis, Cell
from skipinit_jax.experiments.report import write_comparison, write_report
from skipinit_jax.experiments.selection import runs_at
from skipinit_jax.experiments.tables import difference, make_tables


class Page(HTMLParser):
  """What a page is made of."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.ids, self.links, self.data = [], [], [], []
    self.tables, self.open = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append((tag, attrs))
    self.ids += [attrs['id']] if 'id' in attrs else []
    self.links += [attrs['href']] if tag == 'a' else []
    if tag == 'table':
      self.tables.append([])
    elif tag == 'tr':
      self.tables[-1].append([])
    elif tag in ('td', 'th'):
      self.tables[-1][-1].append('')
    elif tag == 'small':
      self.tables[-1][-1][-1] += ' '
    self.open.append(tag)

  def handle_endtag(self, tag):
    while self.open and self.open.pop() != tag:
      pass

  def handle_data(self, data):
    self.data.append(data)
    if {'td', 'th'} & set(self.open):
      self.tables[-1][-1][-1] += data


@pytest.fixture(scope='module')
def reported(tmp_path_factory):
  """The workdir, page and Markdown of the study."""
  workdir = tmp_path_factory.mktemp('study')
  grid = make_grid(overrides={'compilation_cache': EVIL})
  write_runs(workdir, grid)
  path = write_report(make_study(grid), grid, 'cifar10', workdir)
  assert path == workdir / 'report.html'
  return workdir, Page(path.read_text()), (workdir / 'report.md').read_text()


def test_cells_are_in_the_papers_form(reported):
  """Seeds lie .1 to either side of their mean, whose standard error is .1.

  Of Student's t with one degree of freedom 95 % lie within 12.7.
  """
  _, page, _ = reported
  rate = '2−2 (2−2 to 2−1)'  # noqa: RUF001
  assert page.tables[0] == [
    ['depth', 'BatchNorm', 'SkipInit 0', 'Neither'],
    ['accuracy (%)', 'optimal rate'] * 3,
    ['16', '93.5 ± 1.3', rate, '93.5 ± 1.3', rate, '–', '–'],  # noqa: RUF001
    [
      '100',
      '90.0 ± 1.3',
      rate,
      '2 of 3 rates done',
      '',
      '–',  # noqa: RUF001
      '–',  # noqa: RUF001
    ],
  ]
  assert ('sup', {}) in page.tags
  text = ''.join(page.data)
  assert text.count('all 6 runs diverged') == 2
  assert 'Unfinished: 1 of 6 cells are not done. 1 problem, listed' in text


def test_ours_stands_beside_the_published(reported):
  _, page, _ = reported
  assert [[row[0], *row[1:4]] for row in page.tables[2][1:]] == [
    # 93.5 - 93.1, and the root of 0.1² + 0.2².
    ['depth 16, BatchNorm', '93.5 ± 1.3', '93.1 ± 0.2', '+0.4 ± 0.2'],
    ['depth 16, SkipInit 0', '93.5 ± 1.3', 'not published', ''],
    [
      'depth 16, Neither',
      '–',  # noqa: RUF001
      '92.0 ± 0.1',
      'theirs trains, ours does not',
    ],
    ['depth 100, BatchNorm', '90.0 ± 1.3', 'not published', ''],
    ['depth 100, SkipInit 0', '2 of 3 rates done', 'not published', ''],
    ['depth 100, Neither', '–', '–', 'both do not train'],  # noqa: RUF001
  ]
  rates = page.tables[2][1][5]
  assert rates == '2−2 (2−3 to 2−2)'  # noqa: RUF001


def test_markdown_says_the_same(reported):
  _, page, text = reported
  powers = str.maketrans('⁻⁰¹²³⁴⁵⁶⁷⁸⁹', '−0123456789')  # noqa: RUF001
  lines = [
    [part.strip() for part in line.translate(powers).split('|')[1:-1]]
    for line in text.splitlines()
    if line.startswith('| ') and not line.startswith('| ---')
  ]
  first, second, third = page.tables[:3]
  assert lines == [lines[0], *first[2:], *second, *third]
  for name in re.findall(r'\]\((figures/.*)\)', text):
    assert (reported[0] / name).read_bytes().startswith(b'\x89PNG')


def test_what_was_tuned_on_which_split_is_said(reported):
  text = ''.join(reported[1].data)
  for words in (
    'trained at 3 learning rates',
    '240 training images held out',
    'The test split was evaluated exactly once',
    '2 seeds a rate, and 240',
    '95 % interval for the mean over the seeds',
    'elsewhere the standard error of that mean',
    # Two runs a rate and cell; of one cell a rate and the tests lack.
    '44 of 48 done, 16 of these diverged; 7 minutes',
    '1 x abacus',
    'abc123',
    'jax 0.12.0',
    'A paper, table 7',
  ):
    assert words in text, words


def test_strings_are_text_and_never_elements(reported):
  _, page, text = reported
  assert 'script' not in {tag for tag, _ in page.tags}
  assert ''.join(page.data).count(EVIL) == 48  # 46 commands, two facts.
  prose = re.sub('(`{3,})sh\n.*?\n\\1', '', text, flags=re.DOTALL)
  assert '&lt;script&gt;' in prose
  assert '<script>' not in prose


def test_every_cell_links_to_its_runs(reported):
  workdir, page, _ = reported
  anchors = {link[1:] for link in page.links if link.startswith('#')}
  assert anchors <= set(page.ids)
  assert len(set(page.ids)) == len(page.ids)
  assert len([a for a in anchors if a.startswith('runs-')]) == 6
  files = [link for link in page.links if not link.startswith('#')]
  # All numbers, three files of each run, and the broken result.
  assert files[:2] == ['results.csv', 'results.json']
  assert len(files) == len(set(files)) == 2 + 3 * 44 + 1
  assert all((workdir / link).is_file() for link in files)
  commands = [
    row[-1] for table in page.tables for row in table if len(row) == 10
  ]
  assert sum('python -m skipinit_jax.training' in c for c in commands) == 46


def test_a_broken_result_is_a_problem_and_no_error(reported):
  _, page, text = reported
  broken = runs_at(
    make_grid(overrides={'compilation_cache': EVIL}), UNFINISHED, -1, VALIDATION
  )[0]
  assert f'runs/{broken.id}/result.json' in ''.join(page.data)
  assert 'JSONDecodeError' in text


def test_nothing_is_loaded_from_outside(reported):
  workdir, page, _ = reported
  policy = [
    attrs['content']
    for tag, attrs in page.tags
    if tag == 'meta' and attrs.get('http-equiv') == 'Content-Security-Policy'
  ]
  assert policy[0].startswith("default-src 'none'")
  for tag, attrs in page.tags:
    assert tag not in {'script', 'link', 'iframe', 'img', 'base', 'object'}
    for name in ('src', 'srcset', 'data', 'xlink:href'):
      assert attrs.get(name, '#').startswith(('#', 'data:')), attrs
  style = (workdir / 'report.html').read_text().split('<style>')[1]
  assert '@import' not in style.split('</style>')[0]


def test_figures_show_all_that_is_done(reported):
  workdir, page, _ = reported
  names = {path.stem for path in (workdir / 'figures').glob('*.svg')}
  assert names == {
    'accuracy',
    'rates-depth-16',
    'rates-depth-100',
    'loss-depth-16',
    'loss-depth-100',
    'alpha-depth-16-skipinit-0',
  }
  drawn = [attrs for tag, attrs in page.tags if tag == 'svg']
  assert len(drawn) == len(names)
  assert all(a['role'] == 'img' and a['aria-label'] for a in drawn)
  text = ''.join(page.data)
  assert 'Not done, so not drawn: depth 100, SkipInit 0.' in text
  svg = (workdir / 'figures' / 'accuracy.svg').read_text()
  assert 'currentColor' in svg
  assert '#010203' not in svg
  assert '>chance</text>' in svg


def test_methods_are_compared_seed_by_seed(tmp_path):
  grid = make_grid()
  write_runs(tmp_path, grid)
  # Of BatchNorm .934 and .936.
  for seed, top1 in enumerate((0.904, 0.908)):
    run = runs_at(grid, Cell('', '16', 'skipinit'), -2, TEST)[seed]
    path = run.folder(tmp_path) / 'result.json'
    result = json.loads(path.read_text())
    result['eval']['top1'] = top1
    path.write_text(json.dumps(result))
  findings = Findings(make_study(grid), grid, 'cifar10', tmp_path)
  table = next(t for t in make_tables(findings) if 'minus that' in t.caption)
  assert table.flat_heads == ['depth', 'SkipInit 0', 'Neither']
  # The differences are 3.0 and 2.8: .1 * 12.7 is 1.3.
  assert [entry.text for entry in table.rows[0]] == [
    '16',
    '\N{MINUS SIGN}2.9 ± 1.3\nbehind',
    '\N{EN DASH}',
  ]
  assert [entry.text for entry in table.rows[1]][1:] == [
    'not done',
    '\N{EN DASH}',
  ]


@pytest.mark.parametrize(
  ('mean', 'half', 'text'),
  [
    (0.02, 0.019, '+2.0 ± 1.9\nahead'),
    (0.02, 0.02, '+2.0 ± 2.0'),
    (-0.02, 0.03, '\N{MINUS SIGN}2.0 ± 3.0'),
    (0.0, 0.0, '0.0 ± 0.0'),
  ],
)
def test_only_what_excludes_zero_is_ahead_or_behind(mean, half, text):
  assert difference(mean, half) == text


def texts_of(table):
  return [[entry.text for entry in row] for row in table.rows]


def test_the_fall_over_the_rows_stands_beside_what_remedies_regain(tmp_path):
  """At depth 100 all are 3.5 points behind; the remedy adds 2 to SkipInit."""
  columns = ('batchnorm', 'skipinit')
  grid = make_grid(
    panels=Axis('', {'a': {'epochs': 1.0}, 'a, LARS': {'epochs': 2.0}}),
    columns=columns,
  )
  write_runs(tmp_path, grid)
  for run in runs_at(grid, Cell('a, LARS', '100', 'skipinit'), -2, TEST):
    path = run.folder(tmp_path) / 'result.json'
    result = json.loads(path.read_text())
    result['eval']['top1'] += 0.02
    path.write_text(json.dumps(result))
  findings = Findings(make_study(grid), grid, 'digits', tmp_path)
  table = next(iter(make_tables(findings)))
  assert table.caption == 'What depth 100 costs and what regains it, a'
  assert [head for head, _ in table.heads] == [
    'method',
    'depth 100 minus depth 16',
    'LARS, minus without',
  ]
  behind = '\N{MINUS SIGN}3.5 ± 0.0\nbehind'
  assert texts_of(table) == [
    ['BatchNorm', behind, '0.0 ± 0.0'],
    ['SkipInit 0', behind, '+2.0 ± 0.0\nahead'],
  ]


def test_a_law_is_shown_for_every_method(tmp_path):
  """All have the lowest loss at 2^-2, at both depths: an exponent near 0."""
  grid = make_grid()
  write_runs(tmp_path, grid)
  findings = Findings(make_study(grid, law=True), grid, 'digits', tmp_path)
  table = next(iter(make_tables(findings)))
  assert table.caption == 'The best rate as a power of the depth'
  first, *_ = texts_of(table)
  name, by_depth, by_effective, depths = first
  assert name == 'BatchNorm'
  assert by_depth == '0.00 ± 0.00'
  assert by_effective == 'not done'  # None of these runs was watched.
  assert depths == '–, –'  # noqa: RUF001
  write_downloads(findings)
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['exponents'][0] == {
    'panel': '',
    'method': 'batchnorm',
    'depth': [0.0, 0.0],
    'effective': None,
    'effective_depths': {'16': None, '100': None},
  }


def test_two_studies_stand_side_by_side(tmp_path):
  grid = make_grid()
  both = []
  for name, shift in (('first', 0), ('second', 0.02)):
    write_runs(tmp_path / name, grid)
    for path in (tmp_path / name / 'runs').glob('*/result.json'):
      text = path.read_text()
      if '0.934' in text or '0.936' in text:
        result = json.loads(text)
        result['eval']['top1'] += shift
        path.write_text(json.dumps(result))
    both.append(Findings(make_study(grid), grid, 'cifar10', tmp_path / name))
  path = write_comparison(*both)
  assert path == tmp_path / 'first' / 'comparison.html'
  page = Page(path.read_text())
  rate = '2\N{MINUS SIGN}2 (2\N{MINUS SIGN}2 to 2\N{MINUS SIGN}1)'
  assert page.tables[0][:2] == [
    [
      'cell',
      'first (%)',
      'second (%)',
      'second minus first',
      'rate of first',
      'rate of second',
    ],
    [
      'depth 16, BatchNorm',
      '93.5 ± 1.3',
      '95.5 ± 1.3',
      '+2.0 ± 0.0 ahead',
      rate,
      rate,
    ],
  ]
  assert not {'#runs', '#figures'} & {*page.links}
  assert 'Tuned on of second' in page.data
  assert '+2.0 ± 0.0' in path.with_suffix('.md').read_text()


def test_all_numbers_can_be_downloaded(reported):
  workdir, page, _ = reported
  with (workdir / 'results.csv').open(newline='') as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == 46  # Two of them not finished.
  first = lines[0]
  assert (first['row'], first['method'], first['seed']) == (
    '16',
    'batchnorm',
    '0',
  )
  assert float(first['rate']) == 2 ** float(first['exponent']) == 0.125
  assert float(first['top1']) == 0.79
  assert sum(not line['status'] for line in lines) == 2
  results = json.loads((workdir / 'results.json').read_text())
  assert len(results['runs']) == 46
  (cell,) = [
    c
    for c in results['cells']
    if (c['row'], c['method']) == ('16', 'batchnorm')
  ]
  assert cell['exponent'] == -2
  assert cell['test']['seeds'] == [0.934, 0.936]
  assert cell['held_out']['-3']['seeds'] == [0.79, 0.81]
  assert [a for tag, a in page.tags if tag == 'a' and 'download' in a] == [
    {'href': name, 'download': None} for name in ('results.csv', 'results.json')
  ]


def test_tables_are_latex_too(reported):
  _, page, _ = reported
  codes = [text for text in page.data if text.startswith('\\begin{tabular}')]
  assert codes[0].splitlines() == [
    '\\begin{tabular}{lrrrrrr}',
    '\\toprule',
    ' & \\multicolumn{2}{c}{BatchNorm} & \\multicolumn{2}{c}{SkipInit 0} & '
    '\\multicolumn{2}{c}{Neither} \\\\',
    'depth & ' + ' & '.join(['accuracy (\\%) & optimal rate'] * 3) + ' \\\\',
    '\\midrule',
    '16 & '
    + '93.5 $\\pm$ 1.3 & $2^{-2}$ ($2^{-2}$ to $2^{-1}$) & ' * 2
    + '-- & -- \\\\',
    '100 & 90.0 $\\pm$ 1.3 & $2^{-2}$ ($2^{-2}$ to $2^{-1}$) & '
    '2 of 3 rates done &  & -- & -- \\\\',
    '\\bottomrule',
    '\\end{tabular}',
  ]


def test_chance_is_that_of_the_split(tmp_path):
  grid = make_grid()
  write_runs(tmp_path, grid)
  findings = Findings(make_study(grid), grid, 'cifar10', tmp_path)
  assert findings.chance == {VALIDATION: 0.2, TEST: 0.1}


def test_another_data_set_has_the_published_apart_without_differences(tmp_path):
  grid = make_grid()
  write_runs(tmp_path, grid)
  write_report(make_study(grid), grid, 'digits', tmp_path)
  page = Page((tmp_path / 'report.html').read_text())
  assert page.tables[2] == [
    ['depth', 'BatchNorm', 'Neither'],
    ['16', '93.1 ± 0.2', '92.0 ± 0.1'],
    ['100', 'not published', '–'],  # noqa: RUF001
  ]
  text = ''.join(page.data)
  assert 'Published for CIFAR-10 (another data set and setting)' in text
  assert 'Ours beside the published' not in text


def test_losses_and_stable_rates_with_a_unit_and_panels(tmp_path):
  panels = Axis('budget', {'short': {}, 'long': {'epochs': 3.0}})
  grid = make_grid(unit=0.1, panels=panels, seeds=1, best=1)
  write_runs(tmp_path, grid)
  study = make_study(grid, published={}, rates_curve=True)
  write_report(study, grid, 'cifar10', tmp_path)
  page = Page((tmp_path / 'report.html').read_text())
  assert page.tables[1][2] == [
    '16',
    '0.125',
    '2−1 × 0.1 (largest tried)',  # noqa: RUF001
    '0.125',
    '2−1 × 0.1 (largest tried)',  # noqa: RUF001
    '–',  # noqa: RUF001
    'none',
  ]
  # One seed of 360 images: the root of 0.934 * 0.066 / 360 is 1.3 %.
  assert page.tables[0][2][1] == '93.4 ± 1.3'
  text = ''.join(page.data)
  assert 'Training loss at the end and largest stable learning rate' in text
  assert 'optimal learning rate, long' in text
  assert 'one seed enters, so it says nothing about seeds' in text
  assert (tmp_path / 'figures' / 'optimal-rates-short.svg').exists()


def test_metrics_that_can_not_be_read_are_a_problem_and_no_error(tmp_path):
  grid = make_grid()
  write_runs(tmp_path, grid)
  run = runs_at(grid, Cell('', '16', 'skipinit'), -2, TEST)[0]
  path = run.folder(tmp_path) / 'metrics.jsonl'
  path.write_text('{"no": "step"}\n')
  write_report(make_study(grid), grid, 'cifar10', tmp_path)
  page = Page((tmp_path / 'report.html').read_text())
  assert f'{path}: 1 broken lines skipped' in page.data
  assert page.tables[0][2][3] == '93.5 ± 1.3'


def test_broken_lines_are_skipped_counted_and_named(tmp_path):
  grid = make_grid()
  write_runs(tmp_path, grid)
  run = runs_at(grid, Cell('', '16', 'skipinit'), -2, TEST)[0]
  path = run.folder(tmp_path) / 'metrics.jsonl'
  first, *rest = path.read_text().splitlines()
  lines = [first, first[:-3], *rest, '{"step": 9, "lo']
  path.write_text('\n'.join(lines) + '\n')
  write_report(make_study(grid), grid, 'cifar10', tmp_path)
  page = Page((tmp_path / 'report.html').read_text())
  assert f'{path}: 2 broken lines skipped' in page.data


def test_a_study_that_has_just_begun_has_a_report(tmp_path):
  grid = make_grid()
  write_report(make_study(grid), grid, 'cifar10', tmp_path)
  page = Page((tmp_path / 'report.html').read_text())
  assert page.tables[0][2][1] == '0 of 3 rates done'
  text = ''.join(page.data)
  assert 'Nothing to draw yet.' in text
  assert '0 of 48 done, 0 of these diverged' in text
  # Whose share is not known before a run has counted it.
  assert 'the share of the largest class by three' in text
  assert '## Figures\n\nNothing to draw' in (tmp_path / 'report.md').read_text()
