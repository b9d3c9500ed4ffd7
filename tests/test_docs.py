"""The documentation: its code runs, its commands parse, its site is whole."""

import contextlib
import functools
import html.parser
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.parse

import pytest
from browser import PHONE, needs_chromium, probe
from runs import ROOT

import skipinit_jax
from skipinit_jax import export, published
from skipinit_jax.ahead_of_time import __main__ as ahead_of_time
from skipinit_jax.analysis import __main__ as analysis
from skipinit_jax.data import __main__ as data
from skipinit_jax.errors import InputError
from skipinit_jax.experiments import __main__ as experiments
from skipinit_jax.experiments.studies import find_study
from skipinit_jax.training import __main__ as training
from skipinit_jax.training.recipes import load_recipe, parse_fields
from skipinit_jax.variants import VARIANTS

PAGES = sorted(ROOT.glob('docs/*.md'))
TEXTS = [*PAGES, ROOT / 'README.md']
# Its commands run in test_contributing.py.
CONTRIBUTING = ROOT / 'CONTRIBUTING.md'
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
SCRIPTS = PYPROJECT['project']['scripts']


def blocks(path, language):
  pattern = rf'^```{language}\n(.*?)^```'
  return re.findall(pattern, path.read_text(), re.DOTALL | re.MULTILINE)


def with_blocks(language):
  return [path for path in TEXTS if blocks(path, language)]


def name(path):
  return path.name


@pytest.mark.parametrize(
  'page', [p for p in with_blocks('python') if p in PAGES], ids=name
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  namespace, source = {'__name__': page.stem}, ''
  for block in blocks(page, '(?:python|diff)'):
    diff = block.startswith(('-', '+'))
    source = changed(source, block) if diff else block
    exec(compile(source, page.name, 'exec'), namespace)


def changed(source, diff):
  """The block of Python before a diff, with its lines taken out and put in.

  A run of lines that is put in comes where the first of as many that were taken
  out stood; the changes of a page are at most three lines each.
  """
  out = [line[1:] for line in diff.splitlines() if line[:1] == '-']
  put = [line[1:] for line in diff.splitlines() if line[:1] == '+']
  assert len(put) <= 3
  ours = source.splitlines()
  first = len(out) - len(put)  # These go, without anything in their place.
  for i, line in enumerate(out):
    at = ours.index(line)
    ours[at : at + 1] = [] if i < first else [put[i - first]]
  return '\n'.join(ours)


def commands(path):
  """(what is run, its arguments) for every command of ours in a page."""
  for block in blocks(path, 'sh'):
    for line in block.replace('\\\n', ' ').splitlines():
      words = shlex.split(line, comments=True)
      for i, word in enumerate(words):
        rest = words[i + 1 :]
        ends = (j for j, w in enumerate(rest) if set(w) <= set(';&|<>'))
        rest = rest[: next(ends, len(rest))]
        if word == 'train.py' or word.startswith('launch/'):
          assert (ROOT / word).exists(), word
          yield 'skipinit_jax.training', rest
        elif i == 0 and word in SCRIPTS:
          yield 'skipinit_jax.training', rest
        elif word == '-m' and '.' in rest[0]:
          yield rest[0], rest[1:]


def parse_training(command, arguments):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['train.py', *arguments])
    # The folders of the examples.
    patch.setattr(os, 'access', lambda *_: True)
    training.parse(command.parser())


def parse_study(arguments):
  args, texts = experiments.parser().parse_with_fields(arguments)
  if args.action != 'list':
    _, grid = find_study(args.study, args.dataset or experiments.DATASET)
    parse_fields(load_recipe(grid.recipe), texts)


def parse_analysis(arguments):
  got = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['analysis', *arguments])
    patch.setattr(analysis, 'run', lambda *args: got.extend(args))
    analysis.main()
  args, texts = got
  if args.kind not in (*analysis.KINDS, 'all'):
    raise InputError(args.kind)
  parse_fields(load_recipe(args.config), texts)


def parse_data(arguments):
  args, texts = data._parser().parse_with_fields(arguments)
  if texts:
    parse_fields(load_recipe(args.config), texts)


def parse_export(arguments):
  got = []

  def wanted(checkpoint, out, platforms, folded):
    got.extend(platforms)
    raise InterruptedError

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['export', *arguments])
    patch.setattr(export, 'export', wanted)
    with contextlib.suppress(InterruptedError):
      export.main()
  assert got
  assert set(got) <= set(export.PLATFORMS)


PARSERS = {
  'skipinit_jax.training': functools.partial(parse_training, training),
  'skipinit_jax.ahead_of_time': functools.partial(
    parse_training, ahead_of_time
  ),
  'skipinit_jax.experiments': parse_study,
  'skipinit_jax.data': parse_data,
  'skipinit_jax.analysis': parse_analysis,
  'skipinit_jax.export': parse_export,
}


@pytest.mark.parametrize('page', with_blocks('sh'), ids=name)
def test_commands_of_a_page_parse(page):
  for module, arguments in commands(page):
    if module in PARSERS:
      PARSERS[module](arguments)
    elif module != 'venv':
      assert importlib.util.find_spec(module), module


@pytest.mark.parametrize(
  ('module', 'arguments', 'named'),
  [
    ('skipinit_jax.training', ['--config.model.dept=16'], 'model.dept'),
    ('skipinit_jax.training', ['--workdri=runs/mine'], '--workdri'),
    ('skipinit_jax.experiments', ['run', 'dept'], 'dept'),
    ('skipinit_jax.data', ['prepare', 'cifar10', '--dir=DATA'], '--data-dir'),
    (
      'skipinit_jax.data',
      ['rate', '--data-dir=DATA', '--config.data.nam=folder'],
      'data.nam',
    ),
    ('skipinit_jax.analysis', ['path'], 'path'),
    ('skipinit_jax.export', ['--checkpoint=RUN', '--output=DIR'], '--out'),
  ],
)
def test_commands_that_would_fail_do_not_parse(
  module, arguments, named, capsys
):
  with pytest.raises((InputError, SystemExit)) as raised:
    PARSERS[module](arguments)
  assert named in f'{raised.value} {capsys.readouterr().err}'


def slug(heading):
  """The anchor that GitHub gives a heading."""
  kept = re.sub(r'[^\w\- ]', '', heading.strip().lower())
  return kept.replace(' ', '-')


def without_code(path):
  text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.S | re.M)
  return re.sub(r'`[^`\n]*`', 'code', text)


@pytest.mark.parametrize('page', [*TEXTS, CONTRIBUTING], ids=name)
def test_links_between_files_lead_somewhere(page):
  links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', without_code(page))
  for link in (a or b for a, b in links):
    if link.startswith(('http://', 'https://')):
      continue
    file, _, anchor = link.partition('#')
    target = page.parent / file if file else page
    assert target.exists(), link
    # Anchors of the reference are made from docstrings; see the test below.
    if anchor and not target.name.startswith('api'):
      text = re.sub(r'^```.*?^```', '', target.read_text(), flags=re.S | re.M)
      headings = re.findall(r'^#+ (.+)$', text, re.M)
      assert anchor in map(slug, headings), link


def test_names_in_the_reference_exist():
  text = '\n'.join(page.read_text() for page in PAGES)
  named = re.findall(r'^::: (\S+)\n((?:    .+\n)*)', text, re.M)
  assert len(named) > 50
  for dotted, options in named:
    found = pkgutil.resolve_name(dotted)
    for members in re.findall(r'members: \[(.+)\]', options):
      for member in members.split(', '):
        assert hasattr(found, member), f'{dotted}.{member}'


def test_promises_name_tests_that_exist():
  named = re.findall(
    r'\btest_\w+(?:\.py)?', (ROOT / 'docs/runs.md').read_text()
  )
  files = [name for name in named if name.endswith('.py')]
  texts = [(ROOT / 'tests' / file).read_text() for file in set(files)]
  tests = set(named) - set(files)
  assert len(tests) > 5
  for test in tests:
    assert any(f'def {test}(' in text for text in texts), test


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp('site')
  shutil.copytree(ROOT / 'docs', folder / 'docs')  # It follows no links.
  shutil.copy(ROOT / 'mkdocs.yml', folder)
  (folder / 'skipinit_jax').symlink_to(ROOT / 'skipinit_jax')
  done = subprocess.run(
    [sys.executable, '-m', 'zensical', 'build', '--strict'],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  output = done.stdout + done.stderr
  assert done.returncode == 0, output
  assert 'No issues found' in output, output
  return folder / 'site'


class Html(html.parser.HTMLParser):
  """What a page loads, links to, and can be linked at."""

  def __init__(self, path):
    super().__init__()
    self.loads, self.links, self.ids = [], [], set()
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.ids |= {attrs.get('id'), attrs.get('name')} - {None}
    if tag == 'a' and 'href' in attrs:
      self.links.append(attrs['href'])
    elif tag == 'link' and attrs.get('rel') not in ('next', 'prev'):
      self.loads.append(attrs['href'])
    elif 'src' in attrs:
      self.loads.append(attrs['src'])


@pytest.fixture(scope='module')
def pages(site):
  found = {p: Html(p) for p in site.rglob('*.html') if p.name != '404.html'}
  assert {p.stem for p in found} == {p.stem for p in PAGES}
  return found


def test_the_site_loads_nothing_from_elsewhere(site, pages):
  for path, page in pages.items():
    assert page.loads
    for url in page.loads:
      assert not re.match(r'\w+:|//', url), f'{path.name}: {url}'
      assert (path.parent / urllib.parse.urlsplit(url).path).exists(), url
  for css in site.rglob('*.css'):
    assert not re.search(r'@import|url\(["\']?(https?:|//)', css.read_text())


def test_links_of_the_site_lead_somewhere(pages):
  for path, page in pages.items():
    for link in page.links:
      if link.startswith(('http://', 'https://')):
        continue
      url = urllib.parse.urlsplit(link)
      target = (path.parent / url.path).resolve() if url.path else path
      assert target.exists(), f'{path.name}: {link}'
      anchor = urllib.parse.unquote(url.fragment)
      if anchor:
        assert anchor in pages[target].ids, f'{path.name}: {link}'


def test_the_reference_has_what_the_package_exports(pages):
  ids = set().union(*(page.ids for page in pages.values()))
  documented = {i.rpartition('.')[2] for i in ids if i.startswith('skipinit_')}
  exports = {*skipinit_jax.__all__} - {'METHODS', '__version__'}
  sizes = {n for n in exports if re.fullmatch(r'ResNet\d+', n)}
  assert exports - sizes <= documented


PROBE = """
addEventListener('load', () => parent.postMessage(JSON.stringify({
  wide: document.documentElement.scrollWidth
    - document.documentElement.clientWidth,
  search: Boolean(document.querySelector('[role=dialog][aria-label=Search]')),
}), '*'));
"""


@needs_chromium
@pytest.mark.parametrize('page', ['library', 'measurements', 'api'])
def test_a_phone_scrolls_tables_and_not_the_page(site, page):
  text = (site / f'{page}.html').read_text()
  # The layout needs no scripts, and Chromium's virtual time waits for the
  # theme's worker.
  text = re.sub(r'<script.*?</script>', '', text, flags=re.DOTALL)
  found = probe(text, site, PROBE, PHONE)
  assert found['wide'] <= 0
  assert found['search']


def test_light_and_dark_are_the_readers(site):
  text = (site / 'index.html').read_text()
  schemes = re.findall(
    r'data-md-color-media="([^"]+)" data-md-color-scheme="(\w+)"', text
  )
  assert schemes == [
    ('(prefers-color-scheme: light)', 'default'),
    ('(prefers-color-scheme: dark)', 'slate'),
  ]


def cells_of(text):
  """The rows of all Markdown tables, as tuples of cells."""
  rows = re.findall(r'^\| ?(.*?) ?\|$', text, re.M)
  return {tuple(cell.strip() for cell in row.split('|')) for row in rows}


def test_published_figures_are_the_ones_that_reports_print():
  found = cells_of((ROOT / 'docs' / 'how_it_works.md').read_text())
  for depth in (16, 100, 1000):
    row = [str(depth)]
    for method in ('batchnorm', 'skipinit_sqrt', 'skipinit'):
      figure = published.DEPTH[method][depth]
      row.append(f'{figure.value} ± {figure.error} (2^{figure.rate})')
    assert tuple(row) in found
  for method, figures in published.IMAGENET.items():
    row = [f'{figure.value} / {figure.top5}' for figure in figures.values()]
    assert (VARIANTS[method].label, *row) in found


def test_the_transformers_table_is_that_of_its_file():
  path = ROOT / 'docs' / 'transformer.json'
  spec = importlib.util.spec_from_file_location(
    'transformer', ROOT / 'examples' / 'transformer.py'
  )
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  table = example.table(json.loads(path.read_text())['cells'])
  printed = cells_of((ROOT / 'docs' / 'measurements.md').read_text())
  assert len(cells_of(table)) >= 4
  assert cells_of(table) - {('---',) * 5} <= printed


def test_the_headline_is_what_the_study_found():
  results = json.loads((ROOT / 'docs' / 'depth.json').read_text())
  grid = find_study('depth', 'digits')[1]
  cells = {(c['row'], c['method']): c for c in results['cells']}
  assert cells.keys() == {
    (r, c) for r in grid.rows.values for c in grid.columns
  }

  def text(cell):
    test = cell['test']
    if test is None:
      return '…'
    if not cell['trains']:
      return '–'  # noqa: RUF001
    half = test['error'] if test['interval'] is None else test['interval']
    return f'{100 * test["top1"]:.1f} ± {100 * half:.1f}'

  readme = (ROOT / 'README.md').read_text()
  for row in grid.rows.values:
    line = [row, *(text(cells[row, column]) for column in grid.columns)]
    assert f'| {" | ".join(line)} |\n' in readme
    # Nothing fails that was not tried at small rates too.
    for column in grid.columns:
      if cells[row, column]['trains'] is False:
        assert min(cells[row, column]['tried']) <= -10
