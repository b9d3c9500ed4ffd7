"""The benchmarks: what they compare, their tables, and those in the docs."""

import io
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  cpu_loops,
  cpu_parts,
  gpu_cost,
  growth,
  input_budget,
  input_pipeline,
  on_gpu,
  peers,
  throughput,
  tpu_cost,
)
from skipinit_jax.data.stand_in import stand_in
from skipinit_jax.models import ResNet, layers
from skipinit_jax.models.skipinit import SkipInitConv
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.network import build_model
from skipinit_jax.training.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('data', throughput.DATA.values())
@pytest.mark.parametrize(
  'network', [n for n in peers.NETWORKS if n not in ('example', 'torch')]
)
def test_our_networks_are_recipes_that_can_run(network, data):
  config = peers.recipe(network, data, 1024)
  check_config(config, 4)
  side = {'cifar10': 32, 'imagenet2012': 224}[data]
  assert stand_in(config.data).image_shape == (side, side, 3)
  model = build_model(config, 10, 'gpu')
  assert model.dtype == 'bfloat16'
  assert (config.micro_batches > 1) == ('micro' in network)
  assert (config.steps_per_call > 1) == network.startswith('calls')


def test_the_scalar_on_the_activation_is_the_folded_one():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), 'float32')
  folded = SkipInitConv(4, (3, 3), init_value=0.7)
  variables = folded.init(jax.random.key(0), x)
  theirs = peers.ScaledConv(4, (3, 3), init_value=0.7)
  assert jax.tree.structure(
    theirs.init(jax.random.key(0), x)
  ) == jax.tree.structure(variables)
  np.testing.assert_allclose(
    theirs.apply(variables, x), folded.apply(variables, x), rtol=1e-5, atol=1e-6
  )
  with peers.as_network('activation'):
    assert layers.SkipInitConv is peers.ScaledConv
  assert layers.SkipInitConv is SkipInitConv


def test_the_example_is_a_resnet50():
  # V1.5 with batch normalization, as everywhere: 25,557,032 parameters.
  def init():
    images = jnp.zeros((1, *peers.IMAGE))
    model = peers.ExampleResNet50()
    return model.init(jax.random.key(0), images, train=False)['params']

  leaves = jax.tree.leaves(jax.eval_shape(init))
  assert sum(leaf.size for leaf in leaves) == 25_557_032


def test_costs_are_relative_to_the_example():
  def row(scale):
    return {
      'bytes_accessed': 4e9 * scale,
      'hbm_bytes': 2e9 * scale,
      'activation_bytes': 2**30 * scale,
      'compute_seconds': 0.01,
      'memory_seconds': 0.02 * scale,
    }

  lines = tpu_cost.table(
    {'batch_per_chip': 128, 'rows': {'example': row(1), 'skipinit': row(0.25)}}
  )
  assert lines.splitlines()[-1] == (
    '| ours: SkipInit, alpha folded | 1.00 GB = 0.25 | 0.50 GB = 0.25 | '
    '0.25 GiB = 0.25 | 12,800 |'
  )


def test_speeds_are_medians_and_ratios_are_taken_round_by_round():
  def runs(*rates):
    return [
      {'images_per_second': r, 'peak_bytes': 2e9, 'host_seconds': 1e-3}
      for r in rates
    ]

  lines = throughput.table(
    {
      'resnet50:8': {
        'skipinit': runs(200, 600, 400),
        'example': runs(100, 200, 400),
        'torch': [{'error': 'CUDA out of memory'}],
      }
    }
  ).splitlines()
  assert lines[2].startswith("| resnet50, batch 8 | Flax's example")
  # 2, 3 and 1 times as fast: the median is 2, not 400 / 200.
  assert '| 400 (200 to 600) | 2.00 (1.00 to 3.00) | 2.00 | 1.0 |' in lines[3]
  assert 'did not run: CUDA out of memory' in lines[4]


@pytest.mark.parametrize('case', cpu_loops.CASES)
def test_loops_are_recipes_that_can_run(case):
  for loop in cpu_loops.loops(case):
    config = cpu_loops.recipe(case, loop)
    check_config(config, 1)
    assert config.model.scan == ('scan' in loop)
    assert (config.micro_batches > 1) == ('micro' in loop)
    assert (config.steps_per_call > 1) == ('steps' in loop)


def test_loops_are_compared_round_by_round():
  times = {'unrolled': [1, 2, 4], 'scan over blocks': [2, 2, 6]}
  found = {
    'milliseconds': times,
    'compile_seconds': dict.fromkeys(times, 3.0),
  }
  last = cpu_loops.table({'digits-40:256': found}).splitlines()[-1]
  assert last == '|  | scan over blocks | 2.0 | 1.50 (1.00 to 2.00) | 3.0 |'


@pytest.mark.parametrize(
  'part', [p for p in cpu_parts.PARTS.values() if not isinstance(p, str)]
)
def test_parts_are_timed_that_compute_the_same(part):
  size, side, *channels = part
  small = (size, min(side, 8), *channels)
  ours, theirs = (cpu_parts.make(small, x)() for x in (True, False))
  assert ours.shape == theirs.shape
  assert float(abs(theirs).max()) > 0
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_parts_are_shown_by_setting():
  settings = {s: [[3.0, 1.0], [5.0, 2.0]] for s in cpu_parts.SETTINGS}
  lines = cpu_parts.table({'a pool': settings}).splitlines()
  assert lines[0].startswith(
    "| | JAX's, as it is | ours, as it is | JAX's, flag"
  )
  cells = '4.0 (3.0 to 5.0) | 1.5 (1.0 to 2.0)'
  assert lines[2] == '| a pool | ' + ' | '.join([cells] * 3) + ' |'


@pytest.mark.sampled(1)
@pytest.mark.parametrize('symmetric', [False, True])
def test_the_network_that_jax_differentiates_is_ours(symmetric):
  x = jnp.ones((2, 16, 16, 3))

  def gradient(network):
    with peers.as_network(network):
      model = ResNet(
        (1, 1), num_classes=4, bottleneck=True, symmetric_padding=symmetric
      )
      variables = model.init(jax.random.key(0), x, train=False)
      loss = lambda v: (model.apply(v, x, train=True) ** 2).sum()  # noqa: E731
      traced = jax.jit(jax.grad(loss)).trace(variables)
      return traced.lower().as_text(), jax.grad(loss)(variables)

  (ours, a), (theirs, b) = gradient(''), gradient('jax')
  assert 'select_and_scatter' in theirs
  assert 'select_and_scatter' not in ours
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b
  )


def test_micro_batches_and_several_steps_are_not_for_cpus():
  names = throughput.networks('wrn16-4:32', 'cpu')
  assert not {'micro4', 'calls8', 'torch', 'example'} & {*names}
  assert {'micro4', 'calls8'} <= {*throughput.networks('wrn16-4:128', 'gpu')}


@pytest.mark.parametrize(
  ('file', 'table'),
  [
    ('tpu_cost', tpu_cost.table),
    ('gpu_cost', gpu_cost.of_networks),
    ('gpu_cost', gpu_cost.of_recipes),
    ('throughput', lambda r: throughput.table(r['cases'])),
    ('input_pipeline', input_pipeline.table),
    ('input_budget', input_budget.table_of_parts),
    ('input_budget', input_budget.table_of_ways),
    ('cpu_loops', lambda r: cpu_loops.table(r['cases'])),
    ('cpu_parts', lambda r: cpu_parts.table(r['parts'])),
  ],
)
def test_tables_of_the_docs_are_those_of_the_files(file, table):
  report = json.loads((ROOT / 'docs' / f'{file}.json').read_text())
  page = {'cpu': 'cpu.md', 'gpu': 'gpu.md'}.get(file[:3], 'measurements.md')
  assert table(report) in (ROOT / 'docs' / page).read_text()


def test_the_readme_says_how_fast_images_are_read():
  rounds = json.loads((ROOT / 'docs' / 'input_pipeline.json').read_text())
  ours, theirs = (
    [each['cpu'] for each in rounds['rounds'][name]]
    for name in ('ours, 2 workers', 'tf.data, decode_and_crop_jpeg')
  )
  ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
  said = f"read at {statistics.median(ratios):.2f} times [tf.data's rate]"
  assert said in (ROOT / 'README.md').read_text()


def test_steps_need_no_more_than_they_did():
  """The bars that the programs for an H100 and a v5e were brought under."""
  gpu, tpu = (
    json.loads((ROOT / 'docs' / f'{name}.json').read_text())['rows']
    for name in ('gpu_cost', 'tpu_cost')
  )
  memory = {
    name: row['activation_bytes'] / gpu['example']['activation_bytes']
    for name, row in gpu.items()
  }
  assert memory['skipinit'] <= 0.51
  assert memory['micro4'] <= 0.16
  for name, gigabytes, gibibytes in (
    ('skipinit', 17.53, 2.49),
    ('micro4', 10.35, 0.84),
  ):
    assert round(tpu[name]['hbm_bytes'] / 1e9, 2) <= gigabytes
    assert round(tpu[name]['activation_bytes'] / 2**30, 2) <= gibibytes


def test_growth_is_drawn_from_what_was_measured(tmp_path):
  report = json.loads((ROOT / 'docs' / 'growth.json').read_text())
  growth.draw(report, tmp_path / 'growth.png')
  assert (tmp_path / 'growth.png').stat().st_size > 10_000
  assert (ROOT / 'docs' / 'growth.png').stat().st_size < 200_000


def test_rounds_end_in_time_and_count_whole(monkeypatch):
  clock = [0.0]

  def measured(name, case):
    clock[0] += 10
    if name == 'torch' or clock[0] > ends + 10:
      return {'error': 'the time was up'}
    found = {'images_per_second': clock[0], 'host_seconds': 1e-3}
    return found | {'peak_bytes': 5}

  monkeypatch.setattr(on_gpu.time, 'monotonic', lambda: clock[0])
  cases = {'resnet50:8': ['example', 'torch'], 'wrn16-4:8': ['batchnorm']}

  def after(rounds):
    clock[0], results = 0.0, {}
    for _ in range(rounds):
      on_gpu.speed(cases, results, measured, ends)
    return results

  ends = -1
  cut = after(1)
  assert list(cut) == ['resnet50:8']
  assert list(cut['resnet50:8']) == ['example']
  ends = 100
  results = after(3)
  lengths = {
    name: len(runs) for case in results.values() for name, runs in case.items()
  }
  assert lengths == {'example': 3, 'torch': 1, 'batchnorm': 3}
  # Compiling has taken the memory of the first.
  runs = results['resnet50:8']['example']
  assert [run['peak_bytes'] for run in runs] == [None, 5, 5]
  assert 'did not run: the time was up' in on_gpu.tables({'speed': results})
  ends = 25  # The second round ends at 50, too late.
  assert [len(r) for c in after(2).values() for r in c.values()] == [1, 1, 1]


def test_the_line_that_says_why_a_process_ended():
  trace = """Traceback (most recent call last):
    ...
jax.errors.JaxRuntimeError: INTERNAL: it broke
--------------------
For simplicity, JAX has removed its internal frames from the traceback.
"""
  assert throughput.complaint(trace).endswith('INTERNAL: it broke')
  oom = trace.replace('INTERNAL: it broke', 'RESOURCE_EXHAUSTED: 9 GiB') + 'x\n'
  assert throughput.complaint(oom).endswith('RESOURCE_EXHAUSTED: 9 GiB')
  assert throughput.complaint('\n') == 'no output'


def test_tables_of_a_gpu_say_what_did_not_run():
  fast, slow = {'steps_per_second': 30.0}, {'steps_per_second': 10.0}
  lines = on_gpu.tables(
    {
      'packed': {'1': slow, '4': fast},
      'vmap': {'1': slow, '4': {'error': 'no memory'}},
      'deterministic': {
        'as usual': [fast | {'digest': 'a'}, fast | {'digest': 'b'}],
        'deterministic': [slow | {'digest': 'a'}, slow | {'digest': 'a'}],
      },
    }
  )
  assert '| 4 | 30.0 | 3.00 |' in lines
  assert '| 4 | did not run: no memory | - |' in lines
  assert '| as usual | no | 30.0 | 1.00 |' in lines
  assert '| deterministic | yes | 10.0 | 0.33 |' in lines


@pytest.mark.sampled(1)
@pytest.mark.parametrize('part', [*on_gpu.SERVE])
def test_parts_of_a_gpu_run_here_too(part, monkeypatch, capsys):
  monkeypatch.setattr('sys.stdin', io.StringIO('go\n'))
  found = on_gpu.SERVE[part](toy_recipe(), 0.01, 2)
  assert found['steps_per_second'] > 0
  if part == 'deterministic':
    again = on_gpu.SERVE[part](toy_recipe(), 0.01, 2)
    other = on_gpu.SERVE[part](toy_recipe(), 0.01, 3)
    assert again['digest'] == found['digest'] != other['digest']
  assert ('ready' in capsys.readouterr().out) == (part == 'packed')


def toy_recipe():
  config = load_recipe('digits')
  config.model.depth, config.batch_size = 10, 8
  return config
