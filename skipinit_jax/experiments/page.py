"""The report as a page that needs nothing but itself."""

import html
import importlib.resources
import itertools
import re
from collections.abc import Iterator, Sequence

from skipinit_jax.experiments.figures import Drawing, cell_name
from skipinit_jax.experiments.grid import Run
from skipinit_jax.experiments.tables import (
  DASH,
  MINUS,
  Entry,
  Findings,
  Table,
  dataset_name,
  rate_text,
  state_of,
)

FILES = ('config.json', 'metrics.jsonl', 'result.json')
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
  """HTML: text in it is escaped."""


def element(tag: str, *children: str, **attributes: object) -> Markup:
  """An element; children that are not Markup, and attributes, are escaped.

  >>> element('a', 'x < 2³', href='#"', class_='b')
  '<a href="#&quot;" class="b">x &lt; 2<sup>3</sup></a>'
  """
  named = ''.join(
    f' {name.strip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for name, value in attributes.items()
  )
  inner = ''.join(c if isinstance(c, Markup) else _text(c) for c in children)
  return Markup(f'<{tag}{named}>{inner}</{tag}>')


def _text(text: str) -> str:
  """Escaped, with powers as elements."""
  digits = str.maketrans('⁻⁰¹²³⁴⁵⁶⁷⁸⁹', f'{MINUS}0123456789')
  return re.sub(
    '[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+',
    lambda match: f'<sup>{match[0].translate(digits)}</sup>',
    html.escape(text),
  )


def as_page(
  findings: Findings,
  tables: Sequence[Table],
  drawings: Sequence[Drawing],
  facts: Sequence[tuple[str, str]],
) -> str:
  """The report as a page that needs nothing but itself."""
  study = findings.study
  title = f'{study.title}: {dataset_name(findings.dataset)}'
  css = importlib.resources.files(__package__) / 'report.css'
  sections = {
    'tables': ('Results', [_table(findings, table) for table in tables]),
    'figures': ('Figures', list(_figures(drawings))),
    'method': ('How the numbers came about', [_facts(facts)]),
    'runs': ('Runs', list(_run_lists(findings))),
  }
  if findings.problems:
    lines = [element('li', problem) for problem in findings.problems]
    sections['problems'] = ('Problems', [element('ul', *lines)])
  links = [
    element('li', element('a', name, href=f'#{key}'))
    for key, (name, _) in sections.items()
  ]
  state = state_of(findings)
  body = element(
    'body',
    element('a', 'Skip to the results', href='#tables', class_='skip'),
    element(
      'header',
      element('h1', title),
      element('p', study.question),
      *([element('p', state, class_='warn')] if state else []),
    ),
    element('nav', element('ul', *links), aria_label='Contents'),
    element(
      'main',
      *(
        element('section', element('h2', name, id=key), *parts)
        for key, (name, parts) in sections.items()
      ),
    ),
  )
  head = element(
    'head',
    Markup('<meta charset="utf-8">'),
    Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
    Markup('<meta name="viewport" content="width=device-width">'),
    element('title', title),
    element('style', Markup(css.read_text(encoding='utf-8'))),
  )
  return f'<!doctype html>\n{element("html", head, body, lang="en")}\n'


def _table(findings: Findings, table: Table) -> Markup:
  grouped = any(names for _, names in table.heads)
  first, second = [], []
  for label, names in table.heads:
    if names:
      first.append(element('th', label, scope='colgroup', colspan=len(names)))
      second += [element('th', name, scope='col') for name in names]
    else:
      first.append(element('th', label, scope='col', rowspan=1 + grouped))
  rows = []
  for head, *entries in table.rows:
    cells_ = [element('td', _entry(findings, entry)) for entry in entries]
    rows.append(element('tr', element('th', head.text, scope='row'), *cells_))
  notes = [element('li', note) for note in table.notes]
  return Markup(
    _scroll(
      table.caption,
      element(
        'table',
        element('caption', element('span', table.caption)),
        element('thead', *(element('tr', *r) for r in (first, second) if r)),
        element('tbody', *rows),
        class_='grouped' if grouped else 'plain',
      ),
    )
    + (element('ul', *notes) if notes else '')
  )


def _entry(findings: Findings, entry: Entry) -> Markup:
  first, _, second = entry.text.partition('\n')
  if entry.cell:
    label = {'aria_label': entry.label} if entry.label else {}
    anchor = findings.anchors[entry.cell]
    first = element('a', first, href=f'#{anchor}', **label)
  parts = [first, element('small', second)] if second else [first]
  return Markup(
    ''.join(p if isinstance(p, Markup) else _text(p) for p in parts)
  )


def _scroll(label: str, inner: Markup) -> Markup:
  """Around what may be wider than a phone; a keyboard can scroll it too."""
  return element(
    'div', inner, class_='scroll', role='region', aria_label=label, tabindex=0
  )


def _figures(drawings: Sequence[Drawing]) -> Iterator[Markup]:
  if not drawings:
    yield element('p', 'Nothing to draw yet.')
  for heading, group in itertools.groupby(drawings, lambda d: d.heading):
    figures = [
      element(
        'figure',
        Markup(
          drawing.svg.replace(
            '<svg ',
            f'<svg role="img" aria-label="{html.escape(drawing.caption)}" ',
            1,
          )
        ),
        element('figcaption', drawing.caption),
      )
      for drawing in group
    ]
    yield element('h3', heading)
    yield element('div', *figures, class_='figures')


def _facts(facts: Sequence[tuple[str, str]]) -> Markup:
  pairs = [
    part
    for name, text in facts
    for part in (element('dt', name), element('dd', text))
  ]
  return element('dl', *pairs)


def _run_lists(findings: Findings) -> Iterator[Markup]:
  """The runs of each cell, folded up."""
  grid = findings.grid
  heads = (
    'split',
    'rate',
    'seed',
    'status',
    'top-1 (%)',
    'loss',
    'steps',
    'seconds',
    'files',
    'command',
  )
  head = element('tr', *(element('th', name, scope='col') for name in heads))
  for cell, runs in findings.runs.items():
    name = cell_name(grid, cell)
    done = sum(run.id in findings.done for run in runs)
    table = element(
      'table',
      element('caption', element('span', f'Runs of {name}')),
      element('thead', head),
      element('tbody', *(_run_row(findings, run) for run in runs)),
    )
    # The anchor is inside: browsers unfold what a link leads into.
    yield element(
      'details',
      element('summary', f'{name}: {done} of {len(runs)} runs done'),
      element(
        'div',
        _scroll(f'Runs of {name}', table),
        class_='runs',
        id=findings.anchors[cell],
        tabindex=-1,
      ),
    )


def _run_row(findings: Findings, run: Run) -> Markup:
  outcome = findings.done.get(run.id)
  numbers = ['not done', '', '', '', '']
  if outcome:
    loss = DASH if outcome.loss is None else f'{outcome.loss:.4g}'
    numbers = [
      outcome.status,
      f'{100 * outcome.top1:.2f}',
      loss,
      f'{outcome.steps:,}',
      f'{outcome.seconds:,.1f}',
    ]
  files = [
    element('a', name, href=f'runs/{run.id}/{name}')
    for name in FILES
    if (run.folder(findings.workdir) / name).exists()
  ]
  command = element('code', run.command(findings.workdir))
  return element(
    'tr',
    element('th', run.split, scope='row'),
    element('td', rate_text(findings.grid, run.rate)),
    element('td', str(run.seed)),
    *(element('td', number) for number in numbers),
    element('td', Markup(' '.join(files))),
    element('td', element('details', element('summary', 'command'), command)),
  )
