"""How a report's numbers came about, in sentences."""

from skipinit_jax.experiments.findings import Findings
from skipinit_jax.experiments.grid import TEST, Grid
from skipinit_jax.experiments.words import (
  DASH,
  duration,
  rate_text,
  seeds_text,
  widening,
)

TESTED = (
  'The test split was evaluated exactly once, at the chosen rate, after '
  'training on the whole training split; it chose no rate.'
)


def make_facts(findings: Findings) -> list[tuple[str, str]]:
  """Heading and text of each fact."""
  grid, outcomes = findings.grid, findings.outcomes.values()
  diverged = sum(o.status == 'diverged' for o in outcomes)
  seconds = sum(o.seconds for o in outcomes)
  facts = [
    ('Tuned on', _tuning(grid)),
    ('Tested on', TESTED),
    ('Errors', _errors(grid, {o.eval_size for o in outcomes})),
    (
      f'Does not train ({DASH})',
      'The test accuracy is not above the share of the largest class'
      + (f' ({findings.chance[TEST]:.1%})' if findings.chance[TEST] else '')
      + ' by three standard errors.',
    ),
    ('Setting', grid.choices),
    (
      'Changed by hand',
      ', '.join(f'{name}={value}' for name, value in grid.overrides.items()),
    ),
    ('Published figures', findings.study.source),
    (
      'Runs',
      f'{len(outcomes):,} of {findings.total:,} done, {diverged:,} of these '
      f'diverged; {duration(seconds)} of run time in all.',
    ),
  ]
  for name in ('device', 'revision', 'versions'):
    values = dict.fromkeys(getattr(outcome, name) for outcome in outcomes)
    facts.append((name.capitalize(), '; '.join(values)))
  return [(name, text) for name, text in facts if text]


def state_of(findings: Findings) -> str:
  """What a reader must know before the numbers; empty if all is well."""
  parts = []
  unfinished = sum(s.result is None for s in findings.summaries.values())
  if unfinished:
    parts.append(
      f'Unfinished: {unfinished} of {len(findings.summaries)} cells are not '
      'done.'
    )
  if count := len(findings.problems):
    parts.append(f'{count} problem{"s" * (count > 1)}, listed at the end.')
  return ' '.join(parts)


def _tuning(grid: Grid) -> str:
  low, high = (
    rate_text(grid, rate) for rate in (grid.rates[0], grid.rates[-1])
  )
  return (
    f'Every cell was trained at {len(grid.rates)} learning rates, {low} to '
    f'{high}{widening(grid)}, with {seeds_text(grid)}, and '
    f'{grid.validation:,} training images held out. The rate of the best '
    'accuracy on those was chosen, at equal accuracy that of the smallest '
    'loss. In brackets: the smallest and the largest rate whose error bars '
    "meet the best one's."
  )


def _errors(grid: Grid, sizes: set[int]) -> str:
  if grid.best == 1:
    images = ' or '.join(f'{size:,}' for size in sorted(sizes)) or 'all'
    return (
      '± is the standard error of a share of the images evaluated on '
      f'({images}): one seed enters, so it says nothing about seeds.'
    )
  if grid.best == grid.seeds:
    return (
      '± in test accuracies is half of a 95 % interval for the mean over the '
      "seeds, by Student's t; elsewhere the standard error of that mean, and "
      'with one seed that of a share of the images evaluated on.'
    )
  return (
    f'± is the standard error of the mean of the best {grid.best} of '
    f'{grid.seeds} seeds: best on the held out images where a rate is chosen, '
    'best on the test images in a test accuracy.'
  )
