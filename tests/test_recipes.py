"""The recipes in configs/: loaded as the command line loads them."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from skipinit_jax import cli, published
from skipinit_jax.errors import InputError
from skipinit_jax.training.checks import check_config
from skipinit_jax.training.config import default_config
from skipinit_jax.training.network import build_method, build_model
from skipinit_jax.training.recipes import (
  load_recipe,
  parse_fields,
  recipe_path,
  set_fields,
)

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / 'configs').glob('[!_]*.py'))
SHAPES = {
  'imagenet2012': (224, 224, 3),
  'digits': (8, 8, 1),
  'mnist5k': (28, 28, 1),
}
CLASSES = {'imagenet2012': 1000, 'cifar100': 100}


def load(recipe, *overrides):
  """The config of `--config=...` and overrides."""
  name = recipe.removeprefix('--config=')
  _, texts = cli.Parser(fields=True).parse_with_fields(overrides)
  config = load_recipe(name)
  return set_fields(config, parse_fields(config, texts))


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
def test_recipe_gives_its_command_and_what_was_measured(path):
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  assert docstring.splitlines()[0].endswith('.')
  assert f'python train.py --config=configs/{path.name}' in docstring
  assert 'Machine' in docstring
  assert 'Result: ' in docstring or 'result: not measured' in docstring


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_has_every_default_field(path):
  ours = flatten_dict(load(f'--config={path}').to_dict(), sep='.')
  new = ours.keys() ^ flatten_dict(default_config().to_dict(), sep='.').keys()
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
  with pytest.raises(InputError, match='depth'):
    load(f'--config={path}', '--config.model.dept=16')
  with pytest.raises(InputError, match='depth'):
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
  with pytest.raises(InputError) as error:
    load(f'--config={ROOT}/configs/imagenet.py:{argument}')
  assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
  'name', ['digits', 'configs/digits.py', 'configs/digits', 'digits.py']
)
def test_bundled_recipe_is_found_by_its_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert Path(recipe_path(name)) == ROOT / 'configs/digits.py'
  assert recipe_path(f'{name}:x') == f'{ROOT}/configs/digits.py:x'


@pytest.mark.parametrize('name', ['digits', 'imagenet:fixup'])
def test_a_file_never_shadows_a_bundled_recipe(name, tmp_path, monkeypatch):
  stem, colon, argument = name.partition(':')
  for shadow in (stem, f'{stem}.py'):
    (tmp_path / shadow).write_text('raise SystemExit("executed")')
  monkeypatch.chdir(tmp_path)
  assert recipe_path(name) == f'{ROOT}/configs/{stem}.py{colon}{argument}'
  assert load_recipe(name).data.name.startswith(stem)
  # A path is a path.
  assert recipe_path(f'./{stem}.py') == f'./{stem}.py'
  with pytest.raises(InputError, match='SystemExit: executed'):
    load_recipe(f'./{stem}')


def test_recipe_of_ones_own_is_taken_as_it_is(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('')
  assert recipe_path(f'{path}:argument') == f'{path}:argument'


def test_unknown_recipe_names_the_nearest():
  with pytest.raises(InputError, match="'digit'; did you mean 'digits'"):
    recipe_path('digit')
