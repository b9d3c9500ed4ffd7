"""Accuracy on the digits against depth, best of a grid of learning rates.

  python benchmarks/depth.py run --workdir=runs/depth
  python benchmarks/depth.py draw --workdir=runs/depth --out=docs/depth

`run` trains what is not there yet: every method and depth at every rate with
`VALIDATION` images of the training split held out, to choose the rate on those;
then at the chosen rate on the whole training split, evaluated on the test
split. `draw` reads the runs' own result.json and writes OUT.png, OUT.md (the
table, with the rates) and OUT.json (every run).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

METHODS = {
  'skipinit': ('SkipInit, alpha = 0', '#0072B2', 'o', '-'),
  'batchnorm': ('Batch normalization', '#E69F00', 's', '--'),
  'none': ('Neither', '#D55E00', 'X', ':'),
}
DEPTHS = (16, 40, 70, 100)
RATES = (-9, -7, -5, -4)  # Powers of two.
VALIDATION = 240
TRAIN_PY = Path(__file__).resolve().parents[1] / 'train.py'


def train(workdir: Path, method: str, depth: int, rate: int, held: int) -> dict:
  """The result of one run of the digits recipe; trained if it is not there."""
  split = 'validation' if held else 'test'
  run = workdir / split / f'{method}-{depth}-{rate}'
  if not (run / 'result.json').exists():
    command = [
      *(sys.executable, str(TRAIN_PY), '--config=digits', f'--workdir={run}'),
      f'--config.model.method={method}',
      f'--config.model.depth={depth}',
      f'--config.optimizer.learning_rate={2.0**rate}',
      f'--config.data.validation={held}',
      '--config.eval_every_epochs=20',
      '--config.diverged_status=0',
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  return json.loads((run / 'result.json').read_text())


def run_all(workdir: Path) -> None:
  points = [(m, d) for d in DEPTHS for m in METHODS]
  for i, (method, depth) in enumerate(points):
    print(f'{i + 1}/{len(points)}: {method}, depth {depth}', flush=True)
    scores = {}
    for rate in RATES:
      result = train(workdir, method, depth, rate, VALIDATION)
      scores[rate] = result['eval']['top1']
      print(f'  2^{rate}: {result["status"]}, {scores[rate]:.3f}', flush=True)
    best = max(scores, key=scores.get)
    result = train(workdir, method, depth, best, 0)
    print(f'  test at 2^{best}: {result["eval"]["top1"]:.3f}', flush=True)


def collect(workdir: Path) -> list[dict]:
  """One row per method and depth, from the runs' result.json."""
  rows = []
  for method in METHODS:
    for depth in DEPTHS:
      runs = {
        rate: train(workdir, method, depth, rate, VALIDATION) for rate in RATES
      }
      best = max(runs, key=lambda rate: runs[rate]['eval']['top1'])
      test = train(workdir, method, depth, best, 0)
      rows.append(
        {
          'method': method,
          'depth': depth,
          'rate': f'2^{best}',
          'validation': {
            f'2^{rate}': {
              'status': run['status'],
              'top1': run['eval']['top1'],
            }
            for rate, run in runs.items()
          },
          'test_top1': test['eval']['top1'],
          'status': test['status'],
          'seconds': test['seconds'],
          'device': test['device'],
          'versions': test['versions'],
          'revision': test['revision'],
        }
      )
  return rows


def table(rows: list[dict]) -> str:
  """Markdown: test accuracy and chosen rate by method and depth."""
  lines = [
    '| method | ' + ' | '.join(f'depth {d}' for d in DEPTHS) + ' |',
    '|---' * (len(DEPTHS) + 1) + '|',
  ]
  for method, (label, *_) in METHODS.items():
    cells = [
      f'{row["test_top1"]:.1%} ({row["rate"]})'
      for row in rows
      if row['method'] == method
    ]
    lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def draw(rows: list[dict], path: Path) -> None:
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  plt.rcParams.update({'font.size': 11, 'axes.spines.top': False})
  figure, axes = plt.subplots(figsize=(6.4, 3.8), layout='constrained')
  for method, (label, color, marker, line) in METHODS.items():
    points = [r for r in rows if r['method'] == method]
    axes.plot(
      [r['depth'] for r in points],
      [100 * r['test_top1'] for r in points],
      **{'label': label, 'color': color, 'marker': marker, 'linestyle': line},
      **{'linewidth': 2, 'markersize': 7, 'clip_on': False},
    )
  axes.axhline(10, color='0.6', linewidth=1, zorder=0)
  axes.text(DEPTHS[0], 11.5, 'chance', color='0.4', fontsize=9)
  axes.set(
    xlabel='depth (layers)',
    ylabel='test accuracy (%)',
    ylim=(0, 101),
    xticks=DEPTHS,
    title='Digits, n-1 Wide-ResNet, rate tuned for each point',
  )
  axes.spines['right'].set_visible(False)
  axes.legend(frameon=False, loc='center right', bbox_to_anchor=(1, 0.55))
  figure.savefig(path, dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('action', choices=('run', 'draw'))
  parser.add_argument('--workdir', type=Path, default=Path('runs/depth'))
  parser.add_argument('--out', type=Path, default=Path('docs/depth'))
  args = parser.parse_args()
  if args.action == 'run':
    run_all(args.workdir)
    return
  rows = collect(args.workdir)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix('.json').write_text(json.dumps(rows, indent=1) + '\n')
  args.out.with_suffix('.md').write_text(table(rows))
  draw(rows, args.out.with_suffix('.png'))
  print(table(rows))


if __name__ == '__main__':
  main()
