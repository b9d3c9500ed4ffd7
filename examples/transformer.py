"""A vision transformer on the digits: what can replace normalization?

  python -m examples.transformer --out=docs/transformer

The reviewers of De & Smith (2020) remark that networks which do not normalize
their branches, such as the original transformer, are hard to train. Here are
four kinds of transformer of 4, 16 and 64 blocks; each block is an attention
branch f and an MLP branch f:

  postnorm  LayerNorm(x + f(x)), as in Vaswani et al. 2017
  prenorm   x + f(LayerNorm(x)), and a LayerNorm at the end
  skipinit  x + alpha f(x), alpha starting at 0; no normalization
  none      x + f(x); no normalization

SGD with momentum trains transformers poorly, so all four use Adam, a linear
warm-up over a tenth of the steps and a cosine. The rate of every kind and depth
is chosen on 360 held-out training images; networks trained on the whole
training split are evaluated exactly once on the 360 test images. Takes 15
minutes of a CPU core; `--small` tries one rate at 4 blocks. Writes OUT.json and
OUT.png.
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skipinit_jax import Join, SkipInitDense, markdown, plotting
from skipinit_jax.models.stages import Stage
from skipinit_jax.training.result import versions

# Kind -> label, and the variant in whose style it is drawn.
KINDS = {
  'postnorm': ('post-norm', 'batchnorm'),
  'prenorm': ('pre-norm', 'fixup'),
  'skipinit': ('SkipInit 0', 'skipinit'),
  'none': ('neither', 'none'),
}
BATCH_SIZE = 16
HELD_OUT = 360  # Images, to choose the rates; as many again to test.
COMPILING = 20  # Compiling takes as long as training this many blocks.


class Plan(NamedTuple):
  """The grid of runs. Rates are 2^exponent.

  While the best exponent is at an edge, the search goes on in steps of 2, from
  `lowest` to `highest` at most.
  """

  depths: tuple[int, ...] = (4, 16, 64)
  exponents: tuple[int, ...] = (-12, -10, -8)
  lowest: int = -16
  highest: int = -4
  seeds: tuple[int, ...] = (0, 1, 2)
  steps: int = 450


SMALL = Plan((4,), (-8,), -8, -8, (0, 1), steps=67)  # An epoch.


class Residual(nn.Module):
  """A branch and its join with the skip path.

  Attributes:
    kind: one of KINDS.
    branch: branch(x, last) is f(x), ends in the layer last, and makes its other
      layers in this module.
  """

  kind: str
  branch: Callable[[jax.Array, nn.Module], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: (batch, tokens, features); returns the same shape."""
    last = SkipInitDense if self.kind == 'skipinit' else nn.Dense
    y = nn.LayerNorm(name='norm')(x) if self.kind == 'prenorm' else x
    y = self.branch(y, last(x.shape[-1], name='last'))
    x = Join(name='join')(x, y)
    return nn.LayerNorm(name='norm')(x) if self.kind == 'postnorm' else x


def attention(x: jax.Array, last: nn.Module, heads: int = 4) -> jax.Array:
  """Self-attention between all tokens."""
  qkv = nn.Dense(3 * x.shape[-1], name='qkv')(x)
  qkv = qkv.reshape(*x.shape[:-1], 3 * heads, -1)
  query, key, value = jnp.split(qkv, 3, axis=-2)
  out = jax.nn.dot_product_attention(query, key, value)
  return last(out.reshape(x.shape))


def mlp(x: jax.Array, last: nn.Module) -> jax.Array:
  """Two layers; the hidden one is four times as wide."""
  return last(nn.relu(nn.Dense(4 * x.shape[-1], name='first')(x)))


class Block(nn.Module):
  """Attention, then MLP."""

  kind: str
  strides: int = 1  # Unused here; `Stage` passes it to its blocks.

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """x: (batch, tokens, features); `train` is ignored."""
    x = Residual(self.kind, attention, name='attention')(x)
    return Residual(self.kind, mlp, name='mlp')(x)


class Transformer(nn.Module):
  """A vision transformer for 8x8 images, of 16 patches.

  Attributes:
    kind: one of KINDS.
    depth: number of blocks.
    width: features of a token.
    scan: run the blocks as one scanned block: 64 compile as fast as 4.
  """

  kind: str
  depth: int
  width: int = 32
  scan: bool = True

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = True) -> jax.Array:
    """images: (batch, 8, 8); returns logits (batch, 10)."""
    patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    # The mean square of the original transformer's sines and cosines is 1/2.
    init = nn.initializers.normal(0.5**0.5)
    position = self.param('position', init, (1, 16, self.width))
    x = nn.Dense(self.width, name='embed')(patches) + position
    block = functools.partial(Block, self.kind)
    x = Stage(block, self.depth, 1, self.scan, name='stage')(x, train=train)
    if self.kind == 'prenorm':
      x = nn.LayerNorm(name='norm')(x)
    return nn.Dense(10, name='classifier')(x.mean(1))


def load() -> tuple[np.ndarray, np.ndarray]:
  """Images (1797, 8, 8) from -1 to 1 and labels: to fit, held out, to test."""
  digits = load_digits()

  def split(rows):
    labels = digits.target[rows]
    return train_test_split(
      rows, test_size=HELD_OUT, stratify=labels, random_state=0
    )

  training, test = split(np.arange(len(digits.target)))  # As in the project.
  rows = np.concatenate([*split(training), test])
  return digits.images[rows].astype(np.float32) / 8 - 1, digits.target[rows]


def batches(n: int, steps: int, seed: int) -> np.ndarray:
  """Which of n images each step takes, (steps, batch): epoch after epoch."""
  rng = np.random.default_rng(seed)
  epochs = math.ceil(steps * BATCH_SIZE / n)
  rows = np.concatenate([rng.permutation(n) for _ in range(epochs)])
  return rows[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)


def evaluate(
  model: nn.Module, params: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean cross-entropy, and accuracy, a fraction."""
  logits = model.apply({'params': params}, images)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean(), (logits.argmax(-1) == labels).mean()


@functools.partial(jax.jit, static_argnums=0)
def train(
  model: nn.Module,
  data: tuple[jax.Array, jax.Array],
  rows: jax.Array,
  held: jax.Array,
  rate: float,
  seed: int,
) -> tuple[jax.Array, jax.Array]:
  """Loss and accuracy on the rows `held` after steps on `rows`.

  Compiled once for each model: rates, seeds and splits are arguments.
  """
  images, labels = data
  steps = len(rows)
  schedule = optax.warmup_cosine_decay_schedule(0, 1, steps // 10, steps)
  tx = optax.adam(lambda count: rate * schedule(count))
  gradient = jax.grad(evaluate, argnums=1, has_aux=True)

  def step(state, batch):
    params, opt_state = state
    grads, _ = gradient(model, params, images[batch], labels[batch])
    updates, opt_state = tx.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  params = model.init(jax.random.key(seed), images[:1])['params']
  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows)
  return evaluate(model, params, images[held], labels[held])


def search(plan: Plan, run: Callable[[int], dict]) -> tuple[int, list[dict]]:
  """The best exponent, and run(exponent) for each; ties: the smallest rate."""
  found: dict[int, dict] = {}
  todo = list(plan.exponents)
  while todo:
    found |= {e: {'exponent': e, **run(e)} for e in todo}
    best = min(found, key=lambda e: (-found[e]['accuracy'], e))
    beyond = {max(found): max(found) + 2, min(found): min(found) - 2}.get(best)
    goes_on = beyond is not None and plan.lowest <= beyond <= plan.highest
    todo = [beyond] if goes_on else []
  return best, [found[e] for e in sorted(found)]


def measure(plan: Plan) -> list[dict[str, Any]]:
  """Every kind and depth: all rates on held-out images, the best on test."""
  data = load()
  n, start, done = len(data[0]) - HELD_OUT, time.perf_counter(), 0
  each = len(plan.exponents) + len(plan.seeds)
  total = len(KINDS) * sum(COMPILING + depth * each for depth in plan.depths)

  def run(model, n, exponent, seed=0):
    """Trains on the first n images, evaluates on those that come next."""
    nonlocal done
    held, rows = np.arange(n, n + HELD_OUT), batches(n, plan.steps, seed)
    loss, accuracy = train(model, data, rows, held, 2.0**exponent, seed)
    result = {
      'seed': seed,
      'accuracy': round(float(accuracy), 4),
      'loss': float(loss) if np.isfinite(loss) else None,
    }
    done += model.depth
    left = (time.perf_counter() - start) * max(total / done - 1, 0) / 60
    print(
      f'{model.depth:2} blocks, {model.kind}, rate 2^{exponent}, seed {seed}: '
      f'accuracy {accuracy:.1%}; about {left:.1f} minutes left',
      flush=True,
    )
    return result

  cells = []
  for depth, kind in itertools.product(plan.depths, KINDS):
    model = Transformer(kind, depth)
    done += COMPILING
    best, rates = search(plan, functools.partial(run, model, n - HELD_OUT))
    tests = [run(model, n, best, seed) for seed in plan.seeds]
    accuracies = [test['accuracy'] for test in tests]
    cells.append(
      {
        'depth': depth,
        'kind': kind,
        'exponent': best,
        'mean': np.mean(accuracies),
        'spread': np.std(accuracies, ddof=1),
        'held_out': rates,
        'test': tests,
      }
    )
  return cells


def table(cells: list[dict[str, Any]]) -> str:
  """Test accuracy: mean, standard deviation over the seeds, and rate."""
  rows = [['blocks', *(label for label, _ in KINDS.values())]]
  for depth, row in itertools.groupby(cells, lambda cell: cell['depth']):
    entries = [
      f'{100 * c["mean"]:.1f} ± {100 * c["spread"]:.1f} (2^{c["exponent"]})'
      for c in row
    ]
    rows.append([str(depth), *entries])
  return markdown.table(rows)


@plotting.style()
def draw(cells: list[dict[str, Any]], path: Path) -> None:
  """Test accuracy against depth, a line for each kind."""
  figure, (axes,) = plotting.new_figure(width=5.6, height=3.4)
  for kind, (label, variant) in KINDS.items():
    mine = [cell for cell in cells if cell['kind'] == kind]
    axes.errorbar(
      [cell['depth'] for cell in mine],
      [100 * cell['mean'] for cell in mine],
      [100 * cell['spread'] for cell in mine],
      **plotting.marked_style(variant),
      capsize=3,
      label=label,
    )
  axes.axhline(10, color='0.6', linewidth=1, zorder=0)
  depths = sorted({cell['depth'] for cell in cells})
  axes.text(depths[0], 11, 'chance', color='0.4', va='bottom', fontsize=9)
  axes.set_xscale('log', base=2)
  axes.set_xticks(depths, [str(depth) for depth in depths])
  axes.set(xlabel='depth (blocks)', ylabel='test accuracy (%)', ylim=(0, 102))
  plotting.legend(figure, *axes.get_legend_handles_labels(), columns=4)
  figure.savefig(path, dpi=160)


def cpu() -> str:
  """The processor's name, as Linux gives it."""
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(': ')[1] for line in lines if 'model name' in line]
  return names[0] if names else platform.machine()


def main() -> None:
  """Measures, and writes OUT.json and OUT.png."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=Path, help='where to write, no suffix')
  parser.add_argument('--small', action='store_true', help='a quick try')
  args = parser.parse_args()
  plan = SMALL if args.small else Plan()
  cells = measure(plan)
  print(table(cells), end='')
  if args.out is None:
    return
  report = {
    'command': ' '.join(['python -m examples.transformer', *sys.argv[1:]]),
    'machine': f'{cpu()}, {os.cpu_count()} CPUs',
    'cpu_seconds': round(time.process_time()),
    'versions': versions(),
    'plan': {**plan._asdict(), 'batch_size': BATCH_SIZE, 'width': 32},
    'cells': cells,
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix('.json').write_text(json.dumps(report, indent=1) + '\n')
  draw(cells, args.out.with_suffix('.png'))


if __name__ == '__main__':
  main()
