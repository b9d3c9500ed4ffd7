"""Each claim of the papers, and what came of it here.

  python -m benchmarks.claims keep runs/ablations-digits  # docs/ablations.json
  python -m benchmarks.claims keep runs/analysis          # docs/analysis.json
  python -m benchmarks.claims                             # docs/claims.md

`keep` takes the means of a study's results.json, after `experiments report`,
without its single runs, or what claims need of `analysis all`. `docs/claims.md`
is made from all that was kept; README shows its counts.
"""

import dataclasses
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rules
from skipinit_jax import cli, markdown
from skipinit_jax.errors import InputError
from skipinit_jax.experiments.downloads import JSON
from skipinit_jax.experiments.studies import REMEDIES
from skipinit_jax.experiments.tables import exponent
from skipinit_jax.experiments.words import power
from skipinit_jax.files import write_json
from skipinit_jax.published import DEPTH as PUBLISHED
from skipinit_jax.variants import VARIANTS

DOCS = Path(__file__).parents[1] / 'docs'
DE_SMITH = 'De & Smith 2020'
AGREES, CONTRADICTED = 'agreeing', 'contradicted'
UNDECIDED, UNTESTED = 'undecided', 'not tested here'
VERDICTS = (AGREES, CONTRADICTED, UNDECIDED, UNTESTED)


def verdict(agrees: bool | None) -> str:
  """In words; None: the intervals leave it open."""
  if agrees is None:
    return UNDECIDED
  return AGREES if agrees else CONTRADICTED


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
  test: rules.Test | None = None


NOT_RUN = 'needs CIFAR-10 or ImageNet on an accelerator; the study is there'
CLAIMS = (
  Claim(
    'Deep residual networks train with batch normalization or with the scalar '
    'at 1/√d or 0, and not without',
    f'{DE_SMITH}, tables 1 and 2',
    'depth',
    'all three train at 100 and 1000 layers, the plain network at neither',
    rules.all_train,
  ),
  Claim(
    'With the scalar at 0 accuracy is about that with batch normalization, '
    'whatever the depth',
    f'{DE_SMITH}, table 1',
    'depth',
    'at depths 16, 40 and 100 less than a point behind',
    rules.as_good_as_bn,
  ),
  Claim(
    'The scalar must start small: at 1 deep networks do not train',
    f'{DE_SMITH}, table 2',
    'ablations',
    'trains at 16 layers, not at 100',
    rules.fails_when_deep('skipinit_1'),
  ),
  Claim(
    'Dividing each block by √2 is worse than the scalar',
    f'{DE_SMITH}, table 2',
    'ablations',
    'behind SkipInit 0 at 16 layers',
    rules.sqrt2_is_worse,
  ),
  Claim(
    'L2 is not what makes networks with the scalar train',
    f'{DE_SMITH}, table 2',
    'ablations',
    'trains at 100 layers without',
    rules.trains_without_l2,
  ),
  Claim(
    'Without L2 they lose points',
    f'{DE_SMITH}, table 2',
    'ablations',
    'behind SkipInit 0 with L2 at 16 and at 100 layers',
    rules.l2_is_worth_points,
  ),
  Claim(
    "Either zero last kernels or Fixup's rescaling suffices to train deep "
    'networks',
    f'{DE_SMITH}, section on Fixup',
    'fixup_parts',
    'at 100 layers each trains alone, and the network without both fails',
    rules.either_part,
  ),
  Claim(
    'At small batches the best rates are alike with and without batch '
    'normalization',
    DE_SMITH,
    'batch_size',
    'at batch 8 the ranges of rates within error of the best overlap',
    rules.rates_alike,
  ),
  Claim(
    'Batch normalization is stable at larger rates, where batches are large',
    DE_SMITH,
    'batch_size',
    'at batch 512, no seed diverges at a larger rate than with SkipInit 0',
    rules.reaches_larger_rates,
  ),
  Claim(
    'Without batch normalization accuracy falls as batches grow',
    f'{DE_SMITH}, table 3',
    'batch_size',
    'batch normalization is ahead at 512, and by more than at 64',
    rules.falls_with_the_batch,
  ),
  Claim(
    'With the scalar at 0 the best rate is the same at every depth',
    f'{DE_SMITH}, table 1',
    'rate_law',
    'as a power of the depth, from 16 to 100 layers, within 0.25 of 0',
    rules.rate_is_constant,
  ),
  Claim(
    'Fixup is as good as batch normalization in the first epoch, whatever the '
    'depth',
    'Zhang, Dauphin, Ma 2019, figure 3',
    'first_epoch',
    'less than 5 points behind at 10, 40 and 100 layers',
    rules.good_first_epoch,
  ),
  Claim(
    'Networks that do not normalize their branches, such as the original '
    'transformer, are hard to train when deep; the scalar trains them',
    'reviews of the paper',
    'transformer',
    'at 64 blocks post-norm stays at chance, pre-norm and SkipInit train',
    rules.post_norm_fails,
  ),
  Claim(
    'Adaptive clipping lets networks without normalization train at larger '
    'batches',
    'Brock et al. 2021',
    'large_batch',
    'at batch 1152, a normalizer-free network is ahead with it',
    rules.clipping_regains,
  ),
  Claim(
    "With batch normalization block l's branch has 1/(l + 1) of its variance; "
    'without, each block doubles the variance',
    f'{DE_SMITH}, section 1',
    'analysis',
    'within a tenth in the median; a factor of 2 within 0.2',
    rules.branches_are_small,
  ),
  Claim(
    'Gradients come by short paths',
    'Veit, Wilber, Belongie 2016; section 3',
    'analysis',
    'less than half of the blocks, which all paths pass on average',
    rules.paths_are_short,
  ),
  Claim(
    'A trained residual network hardly needs any single block, and fails '
    'smoothly as more are deleted',
    'Veit, Wilber, Belongie 2016; section 4',
    'analysis',
    'less than 5 points without one in the median; the error grows with their '
    'number',
    rules.lesions_are_smooth,
  ),
  Claim(
    'Gradients of deep networks without skip paths look like white noise; skip '
    'paths, and small branches more, keep them correlated',
    'Balduzzi et al. 2017',
    'analysis',
    'at 50 layers the correlation is below 0.1, larger with skip paths, and '
    'larger still with branches times 0.1',
    rules.gradients_shatter,
  ),
  Claim(
    'With Dropout and biases SkipInit is ahead of batch normalization on '
    'ImageNet at batches of 256 and 1024',
    f'{DE_SMITH}, table 3',
    '',
    f'{NOT_RUN} (`imagenet`), with the control that was not published, batch '
    'normalization with Dropout',
  ),
  Claim(
    'On CIFAR-10 the scalar does about as well as batch normalization and '
    'Fixup, to 1000 layers',
    f'{DE_SMITH}, table 1; reviews of it',
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
  return rules.Kept(
    {(c['panel'], c['row'], c['method']): rules.Cell(c) for c in cells},
    {law['method']: law for law in contents.get('exponents', ())},
  )


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
  rows = [['claim', 'verdict', 'found', 'agrees if', 'source']]
  for claim, (text, word) in zip(CLAIMS, judged, strict=True):
    study = f'[{claim.study}]({claim.study}.json): ' if claim.test else ''
    rule = claim.rule if claim.test else ''
    rows.append([claim.text, f'**{word}**', study + text, rule, claim.source])
  return f"""# What the papers claim, and what came of it here

{summary()}.

Made by `python -m benchmarks.claims` from the studies on scikit-learn's digits
([how a rate is chosen](studies.md)): 8x8 images and networks one wide, so that
agreement says that an effect is there, contradiction not that it is nowhere.
± is half of a 95 % interval over seeds; differences are in points, by seed. A
claim is undecided where an interval leaves it open. `analysis` is
`python -m skipinit_jax.analysis all`, `transformer` is
`python -m examples.transformer`, the others are [studies](studies.md).

{markdown.table(rows)}"""


def remedies() -> str:
  """The table of docs/from_batchnorm.md: accuracy by batch and by remedy.

  "ahead" and "behind" are by seed, of the same method without a remedy.
  """
  kept, plain = read('large_batch'), 'constant epochs'
  panels = {'neither': plain} | {name: f'{plain}, {name}' for name in REMEDIES}
  keys = list(dict.fromkeys((r, m) for _, r, m in kept.cells))
  rows = [['batch', 'method', *panels]]
  for row, method in keys:
    base = kept(row, method, plain)
    line = [row, base.label]
    for panel in panels.values():
      cell, sign = kept(row, method, panel), 0
      if panel != plain and cell.trains and base.trains:
        sign = rules.sign(rules.less(cell, base))
      word = {1: ' ahead', 0: '', -1: ' behind'}[sign]
      line.append(cell.accuracy + word)
    rows.append(line)
  return markdown.table(rows)


def headline() -> str:
  """The table of docs/measurements.md: the study of that name."""
  kept = read('headline')
  methods = list(dict.fromkeys(m for _, _, m in kept.cells))
  first = next(iter(kept.cells))[1]
  rows = [['depth', *(kept(first, m).label for m in methods)]]
  for row in dict.fromkeys(r for _, r, _ in kept.cells):
    rows.append([row, *(kept(row, method).accuracy for method in methods)])
  return markdown.table(rows)


def effective_depths() -> str:
  """The table of docs/how_it_works.md: at initialization, beside the theory."""
  found = read('analysis')['effective_depth']
  methods = list(found['16'])
  rows = [['depth', 'blocks', *(VARIANTS[m].label for m in methods)]]
  for depth, of_depth in found.items():
    row = [depth, str(of_depth[methods[0]]['blocks'])]
    for each in of_depth.values():
      mean = statistics.fmean(each['draws'])
      row.append(f'{mean:.2f} ± {each["interval"]:.2f} ({each["theory"]:.2f})')
    rows.append(row)
  return markdown.table(rows)


def rate_law() -> str:
  """The table of docs/measurements.md: exponents of the best rate."""
  rows = [
    [
      'method',
      'exponent, by depth',
      'by effective depth',
      'effective depths',
      'published best rates',
    ]
  ]
  for method, law in read('rate_law').exponents.items():
    published = PUBLISHED.get(method, {}).values()
    rows.append(
      [
        VARIANTS[method].label,
        *(exponent(law[kind]) for kind in ('depth', 'effective')),
        ', '.join(
          '-' if depth is None else f'{depth:.2g}'
          for depth in law['effective_depths'].values()
        ),
        ', '.join(power(accuracy.rate) for accuracy in published) or '-',
      ]
    )
  return markdown.table(rows)


def keep(workdir: Path) -> Path:
  """Keeps the means of a study or of analyses; returns the file."""
  if (workdir / 'training.json').exists():
    training = keep_training(workdir)
    if not (workdir / 'lesions.json').exists():
      return training
    kept, results = DOCS / 'analysis.json', of_analysis(workdir)
  else:
    results = read_results(workdir / JSON)
    del results['runs']
    for cell in results['cells']:
      del cell['held_out']
    kept = DOCS / f'{results["study"]}.json'
  write_json(kept, results)
  return kept


def keep_training(workdir: Path) -> Path:
  """Keeps the analysis along training, by depth."""
  fields = read_results(workdir / 'runs' / 'skipinit' / 'config.json')
  path = DOCS / 'along_training.json'
  kept = json.loads(path.read_text()) if path.exists() else {}
  kept[str(fields['model']['depth'])] = read_results(workdir / 'training.json')
  write_json(path, kept)
  return path


def of_analysis(workdir: Path) -> dict[str, Any]:
  """What claims need of `python -m skipinit_jax.analysis all`."""
  kinds = ('propagation', 'paths', 'lesions', 'shattered')
  found = {kind: read_results(workdir / f'{kind}.json') for kind in kinds}

  def only(kind: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {m: {n: each[n] for n in names} for m, each in kind.items()}

  start = {m: found['propagation']['100'][m] for m in ('batchnorm', 'none')}
  depths = {
    depth: {
      method: {
        'blocks': len(each['share']),
        'draws': each['effective_depth'],
        'interval': each['interval'],
        'theory': sum(each['expected_share']),
      }
      for method, each in of_depth.items()
    }
    for depth, of_depth in found['propagation'].items()
  }
  paths = only(found['paths'], 'effective_depth', 'interval')
  for method, each in found['paths'].items():
    paths[method]['blocks'] = len(each['norm']) - 1
  shattered = {
    name: value if name == 'depths' else np.mean(value, -2).tolist()
    for name, value in found['shattered'].items()
  }
  names = ('whole', 'single', 'several', 'deleted')
  return {
    'propagation': only(start, 'share', 'expected_share', 'output'),
    'effective_depth': depths,
    'paths': paths,
    'lesions': only(found['lesions'], *names),
    'shattered': shattered,
  }


def read_results(path: Path) -> Any:
  """Results in JSON; InputError if there are none."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    raise InputError(
      f'{path}: expected results; first python -m skipinit_jax.experiments '
      f'report {path.parent}, or analysis all --out={path.parent}'
    ) from None


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
