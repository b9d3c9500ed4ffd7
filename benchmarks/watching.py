"""The cost of `watch_every_steps`: `watch_step` beside a training step.

  python -m benchmarks.watching --out=docs/watching.json

The digits' recipe at several depths. In each round, in a random order: steps,
and looks (`watch_step`); the step's program is the same whether a run watches.
Writes the times of every round in milliseconds, their medians, and what a look
every 100 steps adds to a step in percent; compiling is left out.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from benchmarks.input_pipeline import machine
from skipinit_jax import cli
from skipinit_jax.data import open_dataset
from skipinit_jax.files import write_json
from skipinit_jax.training.devices import message, replicate
from skipinit_jax.training.network import build_model
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.program import make_program
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.result import versions

EVERY = 100


def main() -> None:
  count = cli.number(int, 1, 10**6)
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--depths', type=count, nargs='+', default=[16, 100])
  parser.add_argument('--rounds', type=count, default=7)
  parser.add_argument('--steps', type=count, default=20, help='a round')
  parser.add_argument('--out', type=cli.file, required=True)
  args = parser.parse_args()
  with cli.errors_in_one_line():
    for depth in args.depths:
      build_model(recipe(depth), 10)
  result = {
    'command': ' '.join(['python', '-m', 'benchmarks.watching', *sys.argv[1:]]),
    'machine': machine(),
    'versions': versions(),
    'depths': {
      str(d): measure(d, args.rounds, args.steps) for d in args.depths
    },
  }
  write_json(args.out, result)
  for depth, found in result['depths'].items():
    print(f'depth {depth}: {found["medians"]} ms, {found["percent"]:.2f} %')


def measure(depth: int, rounds: int, steps: int) -> dict[str, Any]:
  """Milliseconds of a step and of a look; rounds and medians."""
  calls = {'step': stepper(depth), 'look': looker(depth)}
  times: dict[str, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    call()  # Compiles.
  order = random.Random(0)
  for _ in tqdm.trange(rounds, desc=f'depth {depth}'):
    # In random order: what ran before affects the caches.
    for name, call in order.sample(list(calls.items()), len(calls)):
      start = time.perf_counter()
      for _ in range(steps):
        out = call()
      jax.block_until_ready(out)
      times[name].append(1e3 * (time.perf_counter() - start) / steps)
  medians = {k: round(statistics.median(v), 3) for k, v in times.items()}
  percent = 100 * medians['look'] / EVERY / medians['step']
  return {'rounds': times, 'medians': medians, 'percent': percent}


def stepper(depth: int) -> Callable[[], Any]:
  """Makes a function that takes the next step of a run."""
  program, state, batch = run(depth)

  def step() -> Any:
    nonlocal state
    state, metrics = program.train_step(state, batch, message(), 1)
    return metrics

  return step


def looker(depth: int) -> Callable[[], Any]:
  """Makes a function that calls `watch_step`."""
  program, state, batch = run(depth)
  return lambda: program.watch_step(state, batch)


def recipe(depth: int) -> ConfigDict:
  return set_fields(load_recipe('digits'), {'model.depth': depth})


def run(depth: int) -> tuple[Any, Any, Any]:
  config = recipe(depth)
  data = open_dataset(config.data)
  program = make_program(config, data)
  state = program.initial_state(config.seed, peak_rate(config))
  batch, _ = next(data.inputs(replicate, config, 0))
  return program, replicate(state), batch


if __name__ == '__main__':
  main()
