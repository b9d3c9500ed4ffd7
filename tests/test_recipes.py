"""The recipes in configs/: loaded as the command line loads them."""

import ast
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from skipinit_jax import published
from skipinit_jax.errors import InputError
from skipinit_jax.training.changes import flatten
from skipinit_jax.training.config import (
  build_method,
  build_model,
  check_config,
  default_config,
  recipe_path,
)

# Of ml_collections, which loads the recipe.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / 'configs').glob('[!_]*.py'))
SHAPES = {'imagenet2012': (224, 224, 3), 'digits': (8, 8, 1)}
CLASSES = {'imagenet2012': 1000, 'cifar100': 100}


def load(*args):
  """The config of `--config=...` and overrides, by absl's flags."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', flag_values=values)
  argv = ['program', *args]
  with mock.patch.object(sys, 'argv', argv):  # It looks for overrides there.
    values(argv)
    return holder.value


def logits_and_model(config):
  model = build_model(config, CLASSES.get(config.data.name, 10))
  shape = SHAPES.get(config.data.name, (32, 32, 3))
  images = jnp.zeros((2, *shape))

  def run(key):
    return model.init_with_output(key, images, train=False)[0]

  return jax.eval_shape(run, jax.random.key(0)), model


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_network_builds(path):
  config = load(f'--config={path}')
  check_config(config, 4)
  logits, model = logits_and_model(config)
  assert logits.shape == (2, model.num_classes)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_is(path):
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  assert docstring.splitlines()[0].endswith('.')


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_has_every_default_field(path):
  ours = flatten(load(f'--config={path}').to_dict())
  new = ours.keys() ^ flatten(default_config().to_dict()).keys()
  # Only a data set brings fields of its own.
  assert all(name in ours and name.startswith('data.') for name in new)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_overrides_of_the_right_type_only(path):
  config = load(
    f'--config={path}',
    '--config.optimizer.learning_rate=0.5',
    '--config.model.method=none',
    '--config.model.method=batchnorm',
  )
  assert config.optimizer.learning_rate == 0.5
  assert config.model.method == 'batchnorm'  # The last one counts.
  with pytest.raises(AttributeError, match='depth'):
    load(f'--config={path}', '--config.model.dept=16')
  with pytest.raises(flags.IllegalFlagValueError, match='depth'):
    load(f'--config={path}', '--config.model.depth=deep')


@pytest.mark.parametrize(
  ('row', 'method', 'biases', 'drops'),
  [
    ('batchnorm', 'batchnorm', False, False),
    ('fixup', 'fixup', False, False),
    ('skipinit', 'skipinit', True, False),
    ('fixup_dropout', 'fixup', False, True),
    ('regularized_skipinit', 'skipinit', True, True),
    ('batchnorm_dropout', 'batchnorm', False, True),
  ],
)
def test_imagenet_rows(row, method, biases, drops):
  path = ROOT / 'configs/imagenet.py'
  for batch in published_batches():
    config = load(f'--config={path}:{row},batch={batch}')
    check_config(config, 4)
    assert (config.model.method, config.model.biases) == (method, biases)
    assert (config.model.dropout > 0) == drops
    assert config.batch_size == batch
    assert build_method(config).normalize == (method == 'batchnorm')
    # Fixup's rows follow DeepMind's code: nothing has a rate of its own.
    assert config.optimizer.reduced_rate == (method != 'fixup')


def published_batches():
  return sorted({b for row in published.IMAGENET.values() for b in row})


@pytest.mark.parametrize(
  ('argument', 'parts'),
  [
    ('fixupp', ['fixup', 'batchnorm_dropout']),
    ('fixup,size=3', ['size', 'batch']),
    ('fixup,batch=many', ['many']),
  ],
)
def test_imagenet_refuses_a_wrong_argument(argument, parts):
  with pytest.raises(flags.IllegalFlagValueError) as error:
    load(f'--config={ROOT}/configs/imagenet.py:{argument}')
  # ml_collections quotes a traceback; the last line is ours.
  line = str(error.value).strip().splitlines()[-1]
  assert all(part in line for part in parts)


@pytest.mark.parametrize(
  'name', ['digits', 'configs/digits.py', 'configs/digits', 'digits.py']
)
def test_bundled_recipe_is_found_by_its_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert Path(recipe_path(name)) == ROOT / 'configs/digits.py'
  assert recipe_path(f'{name}:x') == f'{ROOT}/configs/digits.py:x'


def test_recipe_of_ones_own_is_taken_as_it_is(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('')
  assert recipe_path(f'{path}:argument') == f'{path}:argument'


def test_unknown_recipe_names_the_nearest():
  with pytest.raises(InputError, match="'digit'; did you mean 'digits'"):
    recipe_path('digit')
