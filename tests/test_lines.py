"""Metric lines in a file and as objects of a bucket."""

import pytest
from etils import epath
from runs import empty_bucket

from skipinit_jax.training.lines import Lines


@pytest.fixture(params=['file', 'bucket'])
def workdir(request, tmp_path):
  if request.param == 'file':
    return tmp_path
  return f'{empty_bucket()}/run'


def written(workdir, *steps):
  lines = Lines(workdir)
  lines.resume(0)
  for number, step in enumerate(steps):
    lines.append({'step': step, 'number': number})
  lines.close()


def test_lines_come_back_in_order(workdir):
  written(workdir, 2, 4, 4, 10, 100)
  lines = Lines(workdir).read()
  assert [line['step'] for line in lines] == [2, 4, 4, 10, 100]
  assert [line['number'] for line in lines] == list(range(5))


def test_a_run_that_goes_on_writes_later_lines_again(workdir):
  written(workdir, 2, 4, 6, 8)
  lines = Lines(workdir)
  lines.resume(4)
  lines.append({'step': 6, 'again': True})
  lines.close()
  assert Lines(workdir).read() == [
    {'step': 2, 'number': 0},
    {'step': 4, 'number': 1},
    {'step': 6, 'again': True},
  ]


def test_a_damaged_object_is_counted_and_kept(workdir):
  if not isinstance(workdir, str):
    return  # A file's damage: test_damaged_states.
  written(workdir, 2, 4, 6)
  folder = epath.Path(workdir) / 'metrics'
  (folder / '0000000004-0000000001.json').write_text('{"step": 4, "num')
  lines = Lines(workdir)
  _, (said,) = lines.resume(6)
  lines.append({'step': 6, 'number': 3})  # Under a name of its own.
  assert '1 of 3 lines can not be read' in said
  assert [line['number'] for line in Lines(workdir).read()] == [0, 2, 3]
  aside = epath.Path(workdir) / 'damaged-metrics/0000000004-0000000001.json'
  assert aside.read_text() == '{"step": 4, "num'


def test_numbers_that_are_not_finite_become_null(workdir):
  lines = Lines(workdir)
  lines.resume(0)
  lines.append({'step': 1, 'norm': float('nan'), 'deep': {'x': float('inf')}})
  lines.close()
  assert Lines(workdir).read() == [
    {'step': 1, 'norm': None, 'deep': {'x': None}}
  ]
