"""What is exported runs elsewhere and computes what the run computes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from skipinit_jax import export as exporting
from skipinit_jax.data.augment import Augmentation
from skipinit_jax.errors import InputError, RunError
from skipinit_jax.export import export, load
from skipinit_jax.training import train
from skipinit_jax.training.recipes import load_recipe, set_fields
from skipinit_jax.training.saved import load_run

TINY = {
  'model.depth': 10,
  'epochs': 0.3,
  'batch_size': 32,
  'compilation_cache': '',
  'eval_every_epochs': 1.0,
  'optimizer.learning_rate': 2.0**-7,
  'model.classifier_init': 'he',
}
STEPS = round(0.3 * 1437 / 32)
BFLOAT16 = {
  'model__method': 'batchnorm',
  'model__statistics_group': '8',
  'dtype': 'bfloat16',
}
# Runs the program without this package, and saves the logits.
ELSEWHERE = """
import sys
import jax.export
import numpy as np
file, images, out = sys.argv[1:]
program = jax.export.deserialize(bytearray(open(file, 'rb').read()))
images = np.load(images)
logits = [np.asarray(program.call(images[:n])) for n in (len(images), 1)]
np.savez(out, *logits)
assert not {'skipinit_jax', 'flax'} & sys.modules.keys()
"""


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Trains a run once, with these fields beside TINY."""
  folder, made = tmp_path_factory.mktemp('runs'), {}

  def run(**fields):
    name = '-'.join(f'{k}={v}' for k, v in fields.items()) or 'plain'
    if name not in made:
      fields = {k.replace('__', '.'): v for k, v in fields.items()}
      train(set_fields(load_recipe('digits'), TINY | fields), folder / name)
      made[name] = folder / name
    return made[name]

  return run


def elsewhere(out, images, tmp_path):
  """Logits of all images, and of the first alone, by another process."""
  np.save(tmp_path / 'images.npy', images)
  files = [out / 'model.stablehlo', tmp_path / 'images.npy', tmp_path / 'o.npz']
  subprocess.run(
    [sys.executable, '-I', '-c', ELSEWHERE, *map(str, files)],
    env={'JAX_PLATFORMS': 'cpu'},
    cwd=tmp_path,
    check=True,
  )
  return list(np.load(tmp_path / 'o.npz').values())


def own_logits(saved, variables, images):
  """As an evaluation computes them, with normalization written out."""
  mean, std = saved.data.augmentation.mean, saved.data.augmentation.std
  images = (images.astype(np.float64) - mean) / std
  model = saved.model.clone(dtype='float32')
  return model.apply(variables, images.astype(np.float32), train=False)


def close(found, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
  ('fields', 'scalars', 'gain'),
  [
    ({'ema_decay': 0.5}, 3, 1.0),
    (BFLOAT16, 0, 1.0),
    (
      {
        'model__method': 'divide_sqrt2',
        'model__depth': 16,
        'model__scan': True,
        'model__biases': True,
      },
      0,
      2**-0.5,
    ),
  ],
)
def test_the_program_runs_elsewhere(fields, scalars, gain, runs, tmp_path):
  run, out = runs(**fields), tmp_path / 'out'
  described = export(run, out)
  assert described == json.loads((out / 'model.json').read_text())
  assert described['step'] == STEPS
  assert len(described['folded']['leaves']) == scalars
  assert described['folded']['gain'] == gain
  assert described['platforms'] == ['cpu', 'cuda', 'tpu']

  saved = load_run(run)
  averaged = saved.averages is not None
  assert averaged == ('ema_decay' in fields)
  images = saved.data.eval_images[:7]
  expected = own_logits(saved, saved.averages or saved.variables, images)
  assert np.ptp(expected, axis=0).max() > 0.01  # They tell images apart.
  logits, first = elsewhere(out, images, tmp_path)
  assert logits.dtype == np.float32
  close(logits, expected)
  close(first, expected[:1])
  if averaged:
    last = own_logits(saved, saved.variables, images)
    assert np.abs(last - expected).max() > 1e-3 * np.abs(expected).max()

  # The weights and what is written about them make the network again.
  names = load_file(out / 'weights.safetensors').keys()
  assert not [name for name in names if name.endswith('alpha')]
  assert not [name for name in names if '.blocks.' in name]
  model, variables = load(out)
  assert model.method.gain == 1
  assert model.scan == saved.model.scan
  pixels = Augmentation(10, *map(np.array, _mean_and_std(described)))
  close(model.apply(variables, pixels.normalize(images), train=False), expected)


def _mean_and_std(described):
  normalization = described['normalization']
  return normalization['mean'], normalization['std']


def test_scalars_are_kept_where_asked(runs, tmp_path):
  run = runs(ema_decay=0.5)
  described = export(run, tmp_path, ['cpu'], folded=False)
  assert described['folded'] == {'leaves': [], 'gain': 1.0}
  saved = load_run(run)
  weights = load_file(tmp_path / 'weights.safetensors')
  alpha = weights['params.stage1.block1.conv2.alpha']
  kept = saved.averages['params']['stage1']['block1']['conv2']['alpha']
  assert alpha == kept
  images = saved.data.eval_images[:2]
  program = (tmp_path / 'model.stablehlo').read_bytes()
  logits = jax.export.deserialize(bytearray(program)).call(images)
  close(logits, own_logits(saved, saved.averages, images))


def test_a_named_checkpoint_in_float32(runs, tmp_path):
  """A bfloat16 run exports a float32 program; step 0 is the start."""
  run = runs(**BFLOAT16)
  described = export(run / 'checkpoints' / '0', tmp_path, ['cpu'])
  assert (described['step'], described['method']) == (0, 'batchnorm')
  program = (tmp_path / 'model.stablehlo').read_bytes()
  text = jax.export.deserialize(bytearray(program)).mlir_module()
  assert 'stablehlo.convolution' in text
  assert 'bf16' not in text


def test_another_network_is_no_success(runs, tmp_path, monkeypatch, capsys):
  """Weights changed behind its back: exit status 1, and no model.json."""
  save = exporting.save_weights

  def damaged(path, tree):
    save(path, tree)
    weights = load_file(path)
    weights['params.classifier.bias'] += 1
    save_file(weights, path)

  out = tmp_path / 'out'
  run = runs(ema_decay=0.5)
  export(run, out, ['cpu'])
  monkeypatch.setattr(exporting, 'save_weights', damaged)
  with pytest.raises(RunError, match=r'weights\.safetensors computes other lo'):
    export(run, out, ['cpu'])
  assert not (out / 'model.json').exists()
  with pytest.raises(InputError, match='out holds no export'):
    load(out)
  args = ['export', f'--checkpoint={run}', f'--out={out}']
  monkeypatch.setattr(sys, 'argv', args)
  with pytest.raises(SystemExit) as end:
    exporting.main()
  assert end.value.code == 1
  assert 'error: ' in capsys.readouterr().err


def test_the_command(runs, tmp_path, monkeypatch, capsys):
  run = runs(ema_decay=0.5)
  monkeypatch.setattr(
    sys, 'argv', ['export', f'--checkpoint={run}', f'--out={tmp_path}']
  )
  exporting.main()
  lines = capsys.readouterr().out.splitlines()
  assert (
    f'step {STEPS}, parameters: moving averages; folded 3 scalars' in lines[0]
  )
  assert len([x for x in lines if 'read again, largest relative er' in x]) == 2
  assert lines[-1] == f'done: {tmp_path}/model.json, for cpu, cuda, tpu'


@pytest.mark.parametrize(
  ('args', 'line'),
  [
    (['--platforms=cpu,tup'], "unknown platform 'tup'; did you mean 'tpu'?"),
    (['--platforms=cpu,gpu'], "platform 'gpu': expected 'cuda' or 'rocm'"),
    (['--platforms=tpu'], 'platforms=tpu: without cpu, which this machine'),
    (['--checkpoint=nowhere'], 'nowhere holds no run'),
    (
      ['--checkpoint={}/checkpoints/9'],
      f'steps saved: 0, {STEPS}',
    ),
    (['--out={}/config.json'], 'is a file; expected a folder'),
  ],
)
def test_a_mistake_is_one_line(args, line, runs, tmp_path, monkeypatch, capsys):
  run = runs(ema_decay=0.5)
  good = [f'--checkpoint={run}', f'--out={tmp_path}', '--platforms=cpu']
  args = [arg.format(run) for arg in args]
  monkeypatch.setattr(sys, 'argv', ['export', *good, *args])
  capsys.readouterr()  # What training the run said, if this test is the first.
  with pytest.raises(SystemExit) as end:
    exporting.main()
  assert end.value.code == 2
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1
  assert err[0].startswith('error: ')
  assert line in err[0]
