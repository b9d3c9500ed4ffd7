"""The command line of the analyses."""

import json
import sys

import numpy as np
import pytest

from skipinit_jax.analysis import __main__ as cli
from skipinit_jax.analysis import networks
from skipinit_jax.training import train
from skipinit_jax.training.recipes import load_recipe, set_fields

TINY = {
  **{'model.depth': 10, 'epochs': 1.0, 'eval_every_epochs': 1.0},
  **{'compilation_cache': '', 'batch_size': 32},
}
FLAGS = [f'--config.{name}={value}' for name, value in TINY.items()]


def command(capsys, *args):
  """Exit status and standard error of a command."""
  status = 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['analysis', *args])
    try:
      cli.main()
    except SystemExit as end:
      status = end.code
  return status, capsys.readouterr().err


def test_paths_of_every_method_and_of_a_run(tmp_path, capsys, monkeypatch):
  few = {name: cli.METHODS[name] for name in ('batchnorm', 'skipinit')}
  monkeypatch.setattr(cli, 'METHODS', few)
  out = tmp_path / 'out'
  status, err = command(capsys, 'paths', f'--out={out}', *FLAGS)
  assert status == 0, err
  measured = json.loads((out / 'paths.json').read_text())
  assert measured.keys() == few.keys()
  assert len(measured['skipinit']['norm']) == 4  # Three blocks.
  # At alpha = 0 no gradient passes a branch.
  assert measured['skipinit']['effective_depth'] == 0
  assert measured['batchnorm']['effective_depth'] > 0
  assert (out / 'paths.svg').exists()
  assert (out / 'paths.png').exists()

  config = set_fields(load_recipe('digits'), TINY)
  train(config, tmp_path / 'run')
  status, err = command(
    capsys, 'paths', f'--workdir={tmp_path}/run', f'--out={tmp_path}/of_run'
  )
  assert status == 0, err
  measured = json.loads((tmp_path / 'of_run' / 'paths.json').read_text())
  assert measured['skipinit']['effective_depth'] > 0  # It has moved.


def test_the_network_of_a_run_is_the_one_it_evaluated(tmp_path):
  config = set_fields(
    load_recipe('digits'), TINY | {'model.method': 'batchnorm'}
  )
  result = train(config, tmp_path)
  network = networks.of_run(tmp_path)
  logits = network.model.apply(network.variables, network.images, train=False)
  top1 = np.mean(np.argmax(logits, -1) == network.labels)
  assert top1 == pytest.approx(result['eval']['top1'])


@pytest.mark.parametrize(
  ('args', 'line'),
  [
    (['path'], "unknown kind 'path'; did you mean 'paths'?"),
    (['paths', '--config=digit'], "unknown recipe 'digit'"),
    (['paths', '--config.model.dept=3'], "no field 'model.dept'"),
    (['paths', '--config.model.depth=11'], 'depth=11 of a Wide-ResNet'),
    (['paths', '--workdir=nowhere'], 'nowhere holds no run'),
  ],
)
def test_a_mistake_is_one_line(args, line, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  status, err = command(capsys, *args)
  assert status == 2
  lines = [x for x in err.splitlines() if x != 'paths ...']
  assert len(lines) == 1
  assert lines[0].startswith('error: ')
  assert line in lines[0]
