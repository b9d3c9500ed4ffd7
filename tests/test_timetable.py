"""The calls of a run: they tile its steps and end where something is due."""

import itertools
import random

import pytest

from skipinit_jax.training.config import default_config
from skipinit_jax.training.timetable import Timetable, make_timetable


def ends_of_calls(times, start=0):
  step, ends = start, []
  while step < times.total:
    count = times.count(step)
    assert 1 <= count <= times.per_call
    step += count
    ends.append(step)
  return ends


def due(times, step):
  kinds = times.logs, times.evaluates, times.saves, times.watches
  return any(kind(step) for kind in kinds)


def random_tables(number):
  rng = random.Random(0)
  for _ in range(number):
    intervals = [rng.randint(1, 12) for _ in range(4)]
    watch = rng.choice([None, rng.randint(1, 12)])
    yield Timetable(rng.randint(1, 60), *intervals, 7.5, watch)


def test_calls_tile_the_run_and_end_on_every_due_step():
  for times in random_tables(300):
    ends = ends_of_calls(times)
    assert ends[-1] == times.total
    assert {s for s in range(1, times.total + 1) if due(times, s)} <= {*ends}
    # As long as they can be: a call ends early only where something is due.
    for before, end in itertools.pairwise([0, *ends]):
      assert end - before == times.per_call or due(times, end)


def test_calls_after_a_due_step_do_not_depend_on_where_the_run_began():
  for times in random_tables(100):
    ends = ends_of_calls(times)
    for start in [s for s in ends if due(times, s)]:
      assert ends_of_calls(times, start) == [e for e in ends if e > start]


def test_each_thing_is_due_at_multiples_and_at_the_end():
  times = Timetable(10, 4, 3, 5, per_call=1, per_epoch=3.0, watch_every=6)
  steps = range(1, 11)
  assert [s for s in steps if times.logs(s)] == [4, 8, 10]
  assert [s for s in steps if times.evaluates(s)] == [3, 6, 9, 10]
  assert [s for s in steps if times.saves(s)] == [5, 10]
  assert [s for s in range(11) if times.watches(s)] == [0, 6, 10]


@pytest.mark.parametrize(
  ('epochs', 'eval_epochs', 'total', 'eval_every'),
  [(3.0, 1.0, 84, 28), (0.5, 0.25, 14, 7), (2.0, 1e-4, 56, 1)],
)
def test_epochs_become_steps_once(epochs, eval_epochs, total, eval_every):
  config = default_config()
  config.batch_size, config.epochs = 25, epochs
  config.eval_every_epochs, config.steps_per_call = eval_epochs, 6
  config.log_every_steps, config.checkpoint_every_steps = 11, 13
  times = make_timetable(config, 700)
  assert times == Timetable(total, 11, eval_every, 13, 6, 28.0)
