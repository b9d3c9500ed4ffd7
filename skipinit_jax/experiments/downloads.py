"""A study's numbers as files for other programs."""

import csv
import dataclasses
from typing import Any

from skipinit_jax.experiments.findings import Findings
from skipinit_jax.experiments.grid import Run
from skipinit_jax.experiments.laws import effective_depths, exponents
from skipinit_jax.experiments.selection import Mean, Summary
from skipinit_jax.experiments.tables import Table
from skipinit_jax.experiments.words import DASH, MINUS, SUPERSCRIPTS, TIMES
from skipinit_jax.files import write_json

CSV, JSON = 'results.csv', 'results.json'
RUN = ('panel', 'row', 'method', 'split', 'exponent', 'rate', 'seed', 'id')
OUTCOME = ('status', 'top1', 'loss', 'train_loss', 'steps', 'seconds')


def write_downloads(findings: Findings) -> None:
  """Writes every run as a line of results.csv, and with every cell's means and
  choice of rate as results.json, into the study's folder; there too, where the
  study asks for them, the exponents of `laws`."""
  runs = [
    {'panel': cell.panel, 'row': cell.row, 'method': cell.column}
    | _run(findings, run)
    for cell, of_cell in findings.runs.items()
    for run in of_cell
  ]
  with (findings.workdir / CSV).open('w', encoding='utf-8', newline='') as file:
    writer: csv.DictWriter[str] = csv.DictWriter(file, (*RUN, *OUTCOME))
    writer.writeheader()
    writer.writerows(runs)
  cells = [
    {'panel': cell.panel, 'row': cell.row, 'method': cell.column}
    | _cell(summary)
    for cell, summary in findings.summaries.items()
  ]
  grid = findings.grid
  results = {
    'study': findings.study.name,
    'dataset': findings.dataset,
    'unit': grid.unit,
    'overrides': dict(grid.overrides),
    'cells': cells,
    'runs': runs,
  }
  if findings.study.law:
    results['exponents'] = [
      {'panel': panel, 'method': column}
      | exponents(findings, panel, column)
      | {'effective_depths': effective_depths(findings, panel, column)}
      for panel in grid.panels.values
      for column in grid.columns
    ]
  write_json(findings.workdir / JSON, results)


def _run(findings: Findings, run: Run) -> dict[str, Any]:
  outcome = findings.outcomes.get(run.id)
  values: dict[str, Any] = dict.fromkeys(OUTCOME)
  if outcome:
    values = {name: getattr(outcome, name) for name in OUTCOME}
  return {
    'split': run.split,
    'exponent': run.rate,
    'rate': findings.grid.unit * 2.0**run.rate,
    'seed': run.seed,
    'id': run.id,
    **values,
  }


def _cell(summary: Summary) -> dict[str, Any]:
  def numbers(mean: Mean | None) -> dict[str, Any] | None:
    return mean and dataclasses.asdict(mean)

  return {
    'tried': list(summary.tried),
    'held_out': {str(r): numbers(m) for r, m in summary.by_rate.items()},
    'exponent': summary.rate,
    'within_error': summary.rates,
    'largest_stable': summary.largest_stable,
    'at_the_edge': summary.rate is not None and summary.at_the_edge,
    'test': numbers(summary.result),
    'trains': summary.trains,
    'why_not': summary.why_not,
  }


def latex(table: Table) -> str:
  """A table in LaTeX, which needs the package booktabs."""
  grouped = [(label, len(names)) for label, names in table.heads]
  heads = [_cells(_text(head) for head in table.flat_heads)]
  if any(count for _, count in grouped):
    top = [
      rf'\multicolumn{{{count}}}{{c}}{{{_text(label)}}}' if count else ''
      for label, count in grouped
    ]
    below = [
      _text(name) for label, names in table.heads for name in names or [label]
    ]
    heads = [_cells(top), _cells(below)]
  body = [_cells(_text(entry.text) for entry in row) for row in table.rows]
  columns = 'l' + 'r' * (len(table.flat_heads) - 1)
  lines = [
    rf'\begin{{tabular}}{{{columns}}}',
    r'\toprule',
    *heads,
    r'\midrule',
    *body,
    r'\bottomrule',
    r'\end{tabular}',
  ]
  return '\n'.join(lines)


def _cells(texts: Any) -> str:
  return ' & '.join(texts) + r' \\'


def _text(text: str) -> str:
  r"""Text that LaTeX takes as it is.

  >>> _text('93.5 ± 0.1')
  '93.5 $\\pm$ 0.1'
  >>> _text('2⁻³ & more_')
  '$2^{-3}$ \\& more\\_'
  """
  out, power = '', ''
  for letter in f'{text} ':
    if letter in SUPERSCRIPTS:
      power += '-0123456789'[SUPERSCRIPTS.index(letter)]
      continue
    if power:  # Of the digits before it.
      base = out[len(out.rstrip('0123456789')) :]
      out = f'{out.removesuffix(base)}${base}^{{{power}}}$'
      power = ''
    out += LATEX.get(letter, letter)
  return out.removesuffix(' ')


LATEX = {
  **{letter: f'\\{letter}' for letter in '&%$#_{}'},
  '\\': r'\textbackslash{}',
  '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}',
  '±': r'$\pm$',
  '√': r'$\surd$',
  '\n': ' ',
  DASH: '--',
  MINUS: '$-$',
  TIMES: r'$\times$',
}
