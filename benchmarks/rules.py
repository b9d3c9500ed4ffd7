"""What each claim is tested by: from what was kept of a study to a judgement.

A test takes what was kept and returns what was found, in words, and whether
that agrees with the claim; None where the intervals leave it open.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from skipinit_jax.experiments.selection import Mean, paired
from skipinit_jax.experiments.tables import difference, exponent
from skipinit_jax.experiments.words import percent, power
from skipinit_jax.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell of a study as it was kept."""

  values: Mapping[str, Any]

  @property
  def label(self) -> str:
    """Its method."""
    return VARIANTS[self.values['method']].label

  @property
  def trains(self) -> bool:
    """Whether it beats chance, at any rate."""
    return bool(self.values['trains'])

  @property
  def test(self) -> Mean:
    """Its accuracy on the test split."""
    return Mean(**self.values['test'])

  @property
  def accuracy(self) -> str:
    """In percent, with the interval over seeds, or why there is none."""
    if not self.trains:
      return '-'
    if self.test.diverged == len(self.test.seeds):
      return 'diverged'
    return percent(self.test.top1, self.test.bar)

  @property
  def text(self) -> str:
    """Its method and accuracy."""
    if not self.trains:
      tried = self.values['tried']
      low, high = power(min(tried)), power(max(tried))
      return f'{self.label}: fails ({low} to {high})'
    return f'{self.label} {percent(self.test.top1, self.test.bar)}'

  @property
  def rates(self) -> tuple[int, int]:
    """The exponents of the rates within error of its best."""
    low, high = self.values['within_error']
    return low, high


@dataclasses.dataclass(frozen=True)
class Kept:
  """A study that was kept."""

  cells: Mapping[tuple[str, str, str], Cell]
  # By method, as `experiments.laws` has them.
  exponents: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __call__(self, row: str, method: str, panel: str = '') -> Cell:
    return self.cells[panel, row, method]


def less(ours: Cell, theirs: Cell) -> tuple[float, float]:
  """The mean difference by seed, and half of its 95 % interval.

  Raises:
    ValueError: cells that have not the same seeds, several.
  """
  found = paired(ours.test, theirs.test)
  if found is None:
    raise ValueError(f'{ours.text}, {theirs.text}: not the same seeds')
  return found


def in_words(mean: float, half: float) -> str:
  """A difference on one line, in points."""
  return difference(mean, half).replace('\n', ' ')


def by_row(name: str, found: Mapping[str, tuple[float, float]]) -> str:
  """Differences in words, in points.

  >>> by_row('batch', {'64': (-0.02, 0.01)})
  'batch 64: \u22122.0 ± 1.0 behind'
  """
  return '; '.join(
    f'{name} {row}: {in_words(*each)}' for row, each in found.items()
  )


def sign(difference: tuple[float, float]) -> int:
  """1 or -1 where the interval excludes zero, else 0."""
  mean, half = difference
  return 0 if abs(mean) <= half else 1 if mean > 0 else -1


Test = Callable[[Any], tuple[str, bool | None]]


def all_train(kept: Kept) -> tuple[str, bool]:
  """Depth: with batch normalization or the scalar, not without."""
  with_, without = ('batchnorm', 'skipinit_sqrt', 'skipinit'), 'none'
  cells = [kept(r, m) for r in ('100', '1000') for m in (*with_, without)]
  agrees = all(c.trains != (c.values['method'] == without) for c in cells)
  text = '; '.join(
    f'depth {row}: ' + ', '.join(kept(row, m).text for m in (*with_, without))
    for row in ('100', '1000')
  )
  return text, agrees


def as_good_as_bn(kept: Kept) -> tuple[str, bool | None]:
  """Depth: the scalar at 0 is as good as batch normalization."""
  found = {r: less(kept(r, 'skipinit'), kept(r, 'batchnorm')) for r in DEPTHS}
  text = by_row('depth', found)
  behind = [mean for mean, half in found.values() if mean + half < -0.01]
  close = all(mean - half > -0.01 for mean, half in found.values())
  return text, False if behind else True if close else None


DEPTHS = ('16', '40', '100')


def fails_when_deep(method: str) -> Test:
  """Ablations: trains at depth 16, and at 100 not."""

  def test(kept: Kept) -> tuple[str, bool]:
    cells = [kept(row, method) for row in ('16', '100')]
    text = f'depth 16: {cells[0].text}; depth 100: {cells[1].text}'
    return text, cells[0].trains and not cells[1].trains

  return test


def sqrt2_is_worse(kept: Kept) -> tuple[str, bool | None]:
  """Ablations: at depth 16 behind the scalar at 0."""
  found = less(kept('16', 'divide_sqrt2'), kept('16', 'skipinit'))
  agrees = {-1: True, 0: None, 1: False}[sign(found)]
  return by_row('depth', {'16': found}), agrees


def trains_without_l2(kept: Kept) -> tuple[str, bool]:
  """Ablations: at depth 100 without L2."""
  cell = kept('100', 'skipinit_no_l2')
  return f'depth 100: {cell.text}', cell.trains


def l2_is_worth_points(kept: Kept) -> tuple[str, bool | None]:
  """Ablations: behind without L2, at both depths."""
  found = {
    row: less(kept(row, 'skipinit_no_l2'), kept(row, 'skipinit'))
    for row in ('16', '100')
  }
  text = by_row('depth', found)
  signs = {sign(d) for d in found.values()}
  return text, True if signs == {-1} else False if signs <= {1} else None


def either_part(kept: Kept) -> tuple[str, bool]:
  """Fixup's parts, each alone at depth 100, and none."""
  parts = ('fixup_zero_last', 'fixup_rescale')
  cells = [kept('100', m) for m in (*parts, 'fixup_no_part')]
  agrees = all(c.trains for c in cells[:2]) and not cells[2].trains
  return 'depth 100: ' + ', '.join(c.text for c in cells), agrees


EPOCHS = 'constant epochs'


def rates_alike(kept: Kept) -> tuple[str, bool]:
  """The ranges of good rates overlap at the smallest batch."""
  cells = [kept('8', m, EPOCHS) for m in ('batchnorm', 'skipinit')]
  (low, high), (low2, high2) = (c.rates for c in cells)
  text = ', '.join(
    f'{c.label} {power(c.rates[0])} to {power(c.rates[1])}' for c in cells
  )
  return f'batch 8: {text}', low <= high2 and low2 <= high


def reaches_larger_rates(kept: Kept) -> tuple[str, bool]:
  """The largest stable rate at the largest batch."""
  cells = [kept('512', m, EPOCHS) for m in ('batchnorm', 'skipinit')]
  ours, theirs = (c.values['largest_stable'] for c in cells)
  text = ', '.join(
    f'{c.label} {power(c.values["largest_stable"])}' for c in cells
  )
  return f'batch 512, largest stable rates: {text}', ours > theirs


def falls_with_the_batch(kept: Kept) -> tuple[str, bool | None]:
  """Batch normalization is ahead at 512, and by more than at 64."""
  found = {
    r: less(kept(r, 'batchnorm', EPOCHS), kept(r, 'skipinit', EPOCHS))
    for r in ('64', '512')
  }
  text = f'BatchNorm minus SkipInit 0, {by_row("batch", found)}'
  if sign(found['512']) != 1:
    return text, None if sign(found['512']) == 0 else False
  more = found['512'][0] - found['64'][0] > found['512'][1] + found['64'][1]
  return text, True if more else None


def rate_is_constant(kept: Kept) -> tuple[str, bool | None]:
  """The exponent of SkipInit 0's best rate by depth is within 0.25 of 0."""
  laws = {
    method: kept.exponents[method]['depth']
    for method in ('skipinit', 'batchnorm', 'fixup', 'skipinit_sqrt')
  }
  text = ', '.join(
    f'{VARIANTS[method].label} {exponent(fit)}' for method, fit in laws.items()
  )
  if laws['skipinit'] is None:
    return text, None
  found, half = laws['skipinit']
  if abs(found) + half < 0.25:
    return text, True
  return text, False if abs(found) - half > 0.25 else None


def good_first_epoch(kept: Kept) -> tuple[str, bool | None]:
  """Fixup is not behind by more than 5 points after an epoch, at any depth."""
  found = {
    row: less(kept(row, 'fixup'), kept(row, 'batchnorm'))
    for row in ('10', '40', '100')
  }
  text = by_row('depth', found)
  if any(mean + half < -0.05 for mean, half in found.values()):
    return text, False
  return text, True if all(m - h > -0.05 for m, h in found.values()) else None


def post_norm_fails(kept: Mapping[str, Any]) -> tuple[str, bool]:
  """Transformers of 64 blocks: post-norm at chance, pre-norm and SkipInit not.

  Ten classes are about equally frequent.
  """
  found = {
    c['kind']: 100 * c['mean'] for c in kept['cells'] if c['depth'] == 64
  }
  kinds = ('postnorm', 'prenorm', 'skipinit')
  text = ', '.join(f'{kind} {found[kind]:.1f}' for kind in kinds)
  agrees = found['postnorm'] < 20 < min(found['prenorm'], found['skipinit'])
  return f'64 blocks: {text}', agrees


def clipping_regains(kept: Kept) -> tuple[str, bool | None]:
  """Large batches: adaptive clipping is ahead of none, for `nf` at 1152."""
  found = {
    m: less(kept('1152', m, f'{EPOCHS}, clipped'), kept('1152', m, EPOCHS))
    for m in ('nf', 'skipinit')
  }
  words = [f'{VARIANTS[m].label} {in_words(*d)}' for m, d in found.items()]
  agrees = {-1: False, 0: None, 1: True}[sign(found['nf'])]
  return f'batch 1152: {", ".join(words)}', agrees


def branches_are_small(kept: Mapping[str, Any]) -> tuple[str, bool]:
  """Propagation, depth 100: shares of branches, and the growth of a block."""
  norm, plain = (kept['propagation'][m] for m in ('batchnorm', 'none'))
  off = [
    abs(ours / theory - 1)
    for ours, theory in zip(norm['share'], norm['expected_share'], strict=True)
  ]
  first, last = plain['output'][0], plain['output'][-1]
  growth = (last / first) ** (1 / (len(plain['output']) - 1))
  text = (
    f"depth 100: with batch normalization a branch's share differs by "
    f'{statistics.median(off):.0%} in the median, {max(off):.0%} at most; '
    f'without, a block multiplies the second moment by {growth:.2f}'
  )
  return text, statistics.median(off) < 0.1 and abs(growth - 2) < 0.2


def paths_are_short(kept: Mapping[str, Any]) -> tuple[str, bool]:
  """Paths: with batch normalization, gradients pass less than half the blocks.

  Half is what they pass if all paths are alike.
  """
  found = kept['paths']['batchnorm']
  depth, half, blocks = (
    found[k] for k in ('effective_depth', 'interval', 'blocks')
  )
  text = f'{depth:.1f} ± {half:.1f} of {blocks} blocks'
  return text, depth + half < blocks / 2


def lesions_are_smooth(kept: Mapping[str, Any]) -> tuple[str, bool]:
  """Lesions: without one block, the error stays near; without many it grows."""
  found = kept['lesions']['batchnorm']
  whole = found['whole']
  single = statistics.median(found['single'])
  several = [statistics.fmean(draws) for draws in found['several']]
  text = (
    f'test error {whole:.1%}; without one block {single:.1%} '
    f'in the median; without {found["deleted"][-1]} of {len(found["single"])} '
    f'{several[-1]:.1%}'
  )
  grows = all(b > a - 0.05 for a, b in itertools.pairwise(several))
  return text, single - whole < 0.05 and grows and several[-1] > 2 * single


def gradients_shatter(kept: Mapping[str, Any]) -> tuple[str, bool]:
  """Shattered gradients, 50 layers: correlation of neighbouring inputs."""
  found = kept['shattered']
  at = found['depths'].index(50)
  kinds = ('feedforward_bn', 'batchnorm_1', 'batchnorm_0.1', 'skipinit')
  values = [statistics.fmean(found[kind][at][1:6]) for kind in kinds]
  names = ('feed-forward', 'skip paths', 'branches times 0.1', 'SkipInit 0')
  text = ', '.join(f'{n} {v:.2f}' for n, v in zip(names, values, strict=True))
  rises = all(a < b for a, b in itertools.pairwise(values[:3]))
  return f'lags 1 to 5: {text}', rises and values[0] < 0.1
