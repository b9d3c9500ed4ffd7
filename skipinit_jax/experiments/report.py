"""A study's report: a page that needs nothing but itself, and Markdown."""

import functools
import importlib.resources
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from skipinit_jax import markdown
from skipinit_jax.experiments import words
from skipinit_jax.experiments.downloads import (
  CSV,
  JSON,
  latex,
  write_downloads,
)
from skipinit_jax.experiments.facts import make_facts, state_of
from skipinit_jax.experiments.figures import write_figures
from skipinit_jax.experiments.findings import Findings
from skipinit_jax.experiments.grid import Grid
from skipinit_jax.experiments.selection import Outcome
from skipinit_jax.experiments.studies import Study
from skipinit_jax.experiments.tables import Table, make_tables, side_by_side

FILES = ('config.json', 'metrics.jsonl', 'result.json')


def write_report(study: Study, grid: Grid, dataset: str, workdir: Path) -> Path:
  """Writes report.html, report.md, the figures of both, and all numbers.

  Args:
    study: the study, finished or not.
    grid: the study's grid for the data set.
    dataset: its name.
    workdir: the study's folder, with its runs.

  Returns:
    The path of report.html.
  """
  findings = Findings(study, grid, dataset, workdir)
  write_downloads(findings)
  return _write(workdir / 'report.html', make_content(findings))


def write_comparison(ours: Findings, theirs: Findings) -> Path:
  """Writes comparison.html and .md into the first study's folder.

  Returns:
    The path of comparison.html.
  """
  names = [each.workdir.name for each in (ours, theirs)]
  facts = [
    (f'{name} of {where}', text)
    for each, where in zip((ours, theirs), names, strict=True)
    for name, text in make_facts(each)
  ]
  content = {
    'title': f'{names[0]} beside {names[1]}',
    'question': f'{ours.study.title}; {theirs.study.title}',
    'state': ' '.join(
      f'{name}: {state}'
      for each, name in zip((ours, theirs), names, strict=True)
      if (state := state_of(each))
    ),
    'tables': [side_by_side(ours, theirs)],
    'figures': {},
    'facts': facts,
    'anchors': {},
    'runs': {},
    'problems': [*ours.problems, *theirs.problems],
    'downloads': (),
  }
  return _write(ours.workdir / 'comparison.html', content)


def _write(page: Path, content: dict[str, Any]) -> Path:
  """Renders the templates of a page and of its Markdown."""
  text = page.with_suffix('.md')
  page.write_text(_html().get_template('report.html').render(content), 'utf-8')
  text.write_text(
    _markdown().get_template('report.md').render(content), 'utf-8'
  )
  return page


def make_content(findings: Findings) -> dict[str, Any]:
  """The values that both templates show."""
  study, grid, workdir = findings.study, findings.grid, findings.workdir
  return {
    'workdir': workdir,
    'question': study.question,
    'runs': findings.runs,
    'problems': findings.problems,
    'done': findings.done,
    'title': f'{study.title}: {words.dataset_name(findings.dataset)}',
    'state': state_of(findings),
    'tables': list(make_tables(findings)),
    'figures': write_figures(workdir / 'figures', findings),
    'facts': make_facts(findings),
    'anchors': {cell: f'runs-{i}' for i, cell in enumerate(findings.runs, 1)},
    'names': {cell: words.cell_name(grid, cell) for cell in findings.runs},
    'rate_text': functools.partial(words.rate_text, grid),
    'numbers': lambda run: _numbers(findings.outcomes.get(run.id)),
    'downloads': (CSV, JSON),
    'files': lambda run: [
      name for name in FILES if (run.folder(workdir) / name).exists()
    ],
  }


def _numbers(outcome: Outcome | None) -> list[str]:
  """A run's status, accuracy, loss, steps and seconds."""
  if outcome is None:
    return ['not done', '', '', '', '']
  return [
    outcome.status,
    f'{100 * outcome.top1:.2f}',
    words.DASH if outcome.loss is None else f'{outcome.loss:.4g}',
    f'{outcome.steps:,}',
    f'{outcome.seconds:,.1f}',
  ]


def _environment(**options: Any) -> jinja2.Environment:
  return jinja2.Environment(
    loader=jinja2.PackageLoader('skipinit_jax.experiments'),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    **options,
  )


def _html() -> jinja2.Environment:
  """Escapes all that is not Markup."""
  environment = _environment(autoescape=True)
  folder = importlib.resources.files('skipinit_jax.experiments') / 'templates'
  css = (folder / 'report.css').read_text('utf-8')
  environment.globals['css'] = Markup(css)  # Braces in it are no template.
  environment.filters['sup'] = _with_superscripts
  environment.filters['described'] = _described
  environment.filters['latex'] = latex
  return environment


def _markdown() -> jinja2.Environment:
  """Escapes, as Markdown, all that is not Markup."""
  environment = _environment(
    finalize=lambda v: v if isinstance(v, Markup) else markdown.escape(str(v))
  )
  environment.filters['rows'] = _markdown_table
  environment.filters['fenced'] = _fenced
  return environment


def _with_superscripts(text: str) -> Markup:
  """Escaped, with powers as elements.

  >>> _with_superscripts('x < 2³')
  Markup('x &lt; 2<sup>3</sup>')
  """
  digits = str.maketrans(words.SUPERSCRIPTS, f'{words.MINUS}0123456789')
  return Markup(
    re.sub(
      f'[{words.SUPERSCRIPTS}]+',
      lambda match: f'<sup>{match[0].translate(digits)}</sup>',
      escape(text),
    )
  )


def _described(svg: str, description: str) -> Markup:
  attributes = f'role="img" aria-label="{escape(description)}"'
  return Markup(svg.replace('<svg ', f'<svg {attributes} ', 1))


def _markdown_table(table: Table) -> Markup:
  rows = [[entry.text for entry in row] for row in table.rows]
  return Markup(
    markdown.table(
      [markdown.escape(text) for text in row]
      for row in [table.flat_heads, *rows]
    )
  )


def _fenced(command: str) -> Markup:
  """A block of code, with a fence that nothing in it can close."""
  fence = '`' * (3 + command.count('`'))
  return Markup(f'{fence}sh\n{command}\n{fence}')
