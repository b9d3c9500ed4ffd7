"""Each claim of the papers, and what came of it here.

  python -m benchmarks.claims keep runs/ablations-digits  # docs/ablations.json
  python -m benchmarks.claims                             # docs/claims.md

`keep` takes the means of a study's results.json, after `experiments report`,
without its single runs. `docs/claims.md` is made from all that was kept; README
shows its counts.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from skipinit_jax import cli, markdown
from skipinit_jax.errors import InputError
from skipinit_jax.experiments.downloads import JSON
from skipinit_jax.experiments.selection import Mean, paired
from skipinit_jax.experiments.tables import difference
from skipinit_jax.experiments.words import percent, power
from skipinit_jax.files import write_json
from skipinit_jax.variants import VARIANTS

DOCS = Path(__file__).parents[1] / 'docs'
DE_SMITH = 'De & Smith 2020'
AGREES, CONTRADICTED = 'agreeing', 'contradicted'
UNDECIDED, UNTESTED = 'undecided', 'not tested here'
VERDICTS = (AGREES, CONTRADICTED, UNDECIDED, UNTESTED)


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
  def text(self) -> str:
    """Its method and accuracy."""
    if not self.trains:
      tried = self.values['tried']
      low, high = power(min(tried)), power(max(tried))
      return f'{self.label} does not train ({low} to {high})'
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


def by_row(name: str, found: Mapping[str, tuple[float, float]]) -> str:
  """Differences in words, in points.

  >>> by_row('batch', {'64': (-0.02, 0.01)})
  'batch 64: \u22122.0 ± 1.0 behind'
  """
  words = {
    row: difference(*each).replace('\n', ' ') for row, each in found.items()
  }
  return '; '.join(f'{name} {row}: {text}' for row, text in words.items())


def sign(difference: tuple[float, float]) -> int:
  """1 or -1 where the interval excludes zero, else 0."""
  mean, half = difference
  return 0 if abs(mean) <= half else 1 if mean > 0 else -1


def verdict(agrees: bool | None) -> str:
  """In words; None: the intervals leave it open."""
  if agrees is None:
    return UNDECIDED
  return AGREES if agrees else CONTRADICTED


Test = Callable[[Any], tuple[str, bool | None]]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of a paper.

  Attributes:
    text: the claim, in our words.
    source: the paper, and where in it.
    study: what tests it, a file in docs without its '.json'; empty: none.
    rule: when that agrees with it; or why it is not tested here.
    test: from what was kept, a `Kept` or the file's contents, to what was found
      and whether that agrees.
  """

  text: str
  source: str
  study: str
  rule: str
  test: Test | None = None


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
  text = f'BatchNorm less SkipInit 0, {by_row("batch", found)}'
  if sign(found['512']) != 1:
    return text, None if sign(found['512']) == 0 else False
  more = found['512'][0] - found['64'][0] > found['512'][1] + found['64'][1]
  return text, True if more else None


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


NOT_RUN = 'needs CIFAR-10 or ImageNet on an accelerator; the study is there'
CLAIMS = (
  Claim(
    'Deep residual networks train with batch normalization or with the scalar '
    'at 1/√d or 0, and not without',
    f'{DE_SMITH}, tables 1 and 2',
    'depth',
    'all three train at 100 and 1000 layers, the plain network at neither',
    all_train,
  ),
  Claim(
    'With the scalar at 0 accuracy is about that with batch normalization, '
    'whatever the depth',
    f'{DE_SMITH}, table 1',
    'depth',
    'at depths 16, 40 and 100 less than a point behind',
    as_good_as_bn,
  ),
  Claim(
    'The scalar must start small: at 1 deep networks do not train',
    f'{DE_SMITH}, table 2',
    'ablations',
    'trains at 16 layers, not at 100',
    fails_when_deep('skipinit_1'),
  ),
  Claim(
    'Dividing each block by √2 is worse than the scalar',
    f'{DE_SMITH}, table 2',
    'ablations',
    'behind SkipInit 0 at 16 layers',
    sqrt2_is_worse,
  ),
  Claim(
    'L2 is not what makes networks with the scalar train',
    f'{DE_SMITH}, table 2',
    'ablations',
    'trains at 100 layers without',
    trains_without_l2,
  ),
  Claim(
    'Without L2 they lose points',
    f'{DE_SMITH}, table 2',
    'ablations',
    'behind SkipInit 0 with L2 at 16 and at 100 layers',
    l2_is_worth_points,
  ),
  Claim(
    "Either of Fixup's two rules suffices to train deep networks",
    f'{DE_SMITH}, section on Fixup',
    'fixup_parts',
    'at 100 layers each trains alone, and neither does not',
    either_part,
  ),
  Claim(
    'At small batches the best rates are alike with and without batch '
    'normalization',
    DE_SMITH,
    'batch_size',
    'at batch 8 the ranges of rates within error of the best overlap',
    rates_alike,
  ),
  Claim(
    'Batch normalization is stable at larger rates, where batches are large',
    DE_SMITH,
    'batch_size',
    'at batch 512, a larger stable rate than SkipInit 0',
    reaches_larger_rates,
  ),
  Claim(
    'Without batch normalization accuracy falls as batches grow',
    f'{DE_SMITH}, table 3; the review',
    'batch_size',
    'batch normalization is ahead at 512, and by more than at 64',
    falls_with_the_batch,
  ),
  Claim(
    'Fixup is as good as batch normalization in the first epoch, whatever the '
    'depth',
    'Zhang, Dauphin, Ma 2019, figure 3',
    'first_epoch',
    'less than 5 points behind at 10, 40 and 100 layers',
    good_first_epoch,
  ),
  Claim(
    'Networks that do not normalize their branches, such as the original '
    'transformer, are hard to train when deep; the scalar trains them',
    'the review',
    'transformer',
    'at 64 blocks post-norm stays at chance, pre-norm and SkipInit train',
    post_norm_fails,
  ),
  Claim(
    'With Dropout and biases SkipInit is ahead of batch normalization on '
    'ImageNet at batches of 256 and 1024',
    f'{DE_SMITH}, table 3; the review',
    '',
    f'{NOT_RUN} (`imagenet`), with the control that was not published, batch '
    'normalization with Dropout',
  ),
  Claim(
    'On CIFAR-10 the scalar does about as well as batch normalization and '
    'Fixup, to 1000 layers',
    f'{DE_SMITH}, table 1; the review',
    '',
    f'{NOT_RUN} (`depth`)',
  ),
)


def read(study: str) -> Any:
  """What was kept of a study; None if nothing was."""
  path = DOCS / f'{study}.json'
  if not path.exists():
    return None
  contents = json.loads(path.read_text())
  if 'study' not in contents:
    return contents
  cells = contents['cells']
  return Kept({(c['panel'], c['row'], c['method']): Cell(c) for c in cells})


def judge(claim: Claim) -> tuple[str, str]:
  """What was found here, and the verdict."""
  if claim.test is None:
    return claim.rule, UNTESTED
  kept = read(claim.study)
  if kept is None:
    return f'the study `{claim.study}` is not run yet', UNTESTED
  text, agrees = claim.test(kept)
  return text, verdict(agrees)


def counts(verdicts: list[str]) -> str:
  """How many claims had which verdict.

  >>> counts(['agreeing', 'undecided', 'agreeing'])
  '3 claims: 2 agreeing, 1 undecided'
  """
  number = Counter(verdicts)
  parts = [f'{number[v]} {v}' for v in VERDICTS if number[v]]
  return f'{len(verdicts)} claims: {", ".join(parts)}'


def summary() -> str:
  """The counts, which README shows."""
  return counts([judge(claim)[1] for claim in CLAIMS])


def page() -> str:
  """docs/claims.md."""
  judged = [judge(claim) for claim in CLAIMS]
  rows = [['claim', 'source', 'agrees if', 'found', 'verdict']]
  for claim, (text, word) in zip(CLAIMS, judged, strict=True):
    study = f'`{claim.study}`: ' if claim.test else ''
    rule = claim.rule if claim.test else ''
    rows.append([claim.text, claim.source, rule, study + text, f'**{word}**'])
  return f"""# What the papers claim, and what came of it here

{summary()}.

Made by `python -m benchmarks.claims` from the studies on scikit-learn's digits
([how a rate is chosen](studies.md)): 8x8 images and networks one wide, so that
agreement says that an effect is there, contradiction not that it is nowhere.
± is half of a 95 % interval over seeds; differences are in points, by seed. A
claim is undecided where an interval leaves it open.

{markdown.table(rows)}"""


def keep(workdir: Path) -> Path:
  """Keeps the means of a study that has a report; returns the file."""
  path = workdir / JSON
  try:
    results = json.loads(path.read_text())
  except (OSError, ValueError):
    raise InputError(
      f'{path}: expected the results of a study; first python -m '
      f'skipinit_jax.experiments report {workdir}'
    ) from None
  del results['runs']
  for cell in results['cells']:
    del cell['held_out']
  kept = DOCS / f'{results["study"]}.json'
  write_json(kept, results)
  return kept


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('action', nargs='?', choices=['keep'])
  parser.add_argument('workdir', nargs='?', type=cli.folder)
  args = parser.parse_args()
  with cli.errors_in_one_line():
    if args.action == 'keep':
      if args.workdir is None:
        raise InputError('keep: expected the folder of a study')
      print(keep(args.workdir))
      return
  (DOCS / 'claims.md').write_text(page())
  print(DOCS / 'claims.md', file=sys.stderr)


if __name__ == '__main__':
  main()
