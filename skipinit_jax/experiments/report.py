"""A study's report: one page, and the same in Markdown."""

import functools
import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from skipinit_jax.experiments.figures import Drawing, cell_name, write_figures
from skipinit_jax.experiments.page import as_page
from skipinit_jax.experiments.studies import Grid, Study
from skipinit_jax.experiments.tables import (
  Findings,
  Table,
  dataset_name,
  make_facts,
  make_tables,
  state_of,
)


def write_report(
  study: Study,
  grid: Grid,
  dataset: str,
  workdir: Path,
  problems: Sequence[str] = (),
) -> Path:
  """Writes report.html, report.md and the figures of both.

  Args:
    study: that is reported, finished or not.
    grid: of the study for the data set.
    dataset: its name.
    workdir: of the study, with its runs.
    problems: lines to be shown, besides those on files that can't be read.

  Returns:
    The path of report.html.
  """
  findings = Findings(study, grid, dataset, workdir, problems)
  drawings = write_figures(
    workdir / 'figures',
    grid,
    findings.summaries,
    functools.cache(findings.curve),
    findings.chance,
    rates_curve=study.rates_curve,
  )
  tables = list(make_tables(findings))
  facts = make_facts(findings)
  for name, render in (('report.html', as_page), ('report.md', as_markdown)):
    text = render(findings, tables, drawings, facts)
    (workdir / name).write_text(text, encoding='utf-8')
  return workdir / 'report.html'


def as_markdown(
  findings: Findings,
  tables: Sequence[Table],
  drawings: Sequence[Drawing],
  facts: Sequence[tuple[str, str]],
) -> str:
  """The report in Markdown; of commands, one a cell."""
  study, state = findings.study, state_of(findings)
  parts = [
    f'# {_plain(study.title)}: {_plain(dataset_name(findings.dataset))}',
    _plain(study.question),
    *([f'**{_plain(state)}**'] if state else []),
    'All runs, with their commands and files: [report.html](report.html).',
    '## Results',
  ]
  for table in tables:
    heads = [
      _plain(f'{label} {name}'.strip())
      for label, names in table.heads
      for name in names or ['']
    ]
    lines = [heads, ['---'] * len(heads)]
    lines += [[_plain(entry.text) for entry in row] for row in table.rows]
    parts.append(f'**{_plain(table.caption)}**')
    parts.append('\n'.join(f'| {" | ".join(line)} |' for line in lines))
    parts += ['\n'.join(f'- {_plain(n)}' for n in table.notes)]
  parts.append('## Figures')
  for heading, group in itertools.groupby(drawings, lambda d: d.heading):
    parts.append(f'### {_plain(heading)}')
    for drawing in group:
      parts.append(f'![{_plain(heading)}](figures/{drawing.name}.png)')
      parts.append(_plain(drawing.caption))
  parts.append('## How the numbers came about')
  parts.append('\n'.join(f'- **{_plain(k)}.** {_plain(v)}' for k, v in facts))
  parts.append('## Commands')
  parts.append(
    'Of each cell the last run: on the test split once a rate is chosen.'
  )
  for cell, runs in findings.runs.items():
    command = runs[-1].command(findings.workdir)
    fence = '`' * (3 + command.count('`'))  # That nothing in it can close.
    parts.append(f'{_plain(cell_name(findings.grid, cell))}:')
    parts.append(f'{fence}sh\n{command}\n{fence}')
  if findings.problems:
    parts.append('## Problems')
    parts.append('\n'.join(f'- {_plain(p)}' for p in findings.problems))
  return '\n\n'.join(part for part in parts if part) + '\n'


def _plain(text: str) -> str:
  """Text that Markdown and its HTML take as it is."""
  text = html.escape(text.replace('\n', ' '), quote=False)
  return re.sub(r'([\\`*_\[\]|#])', r'\\\1', text)
