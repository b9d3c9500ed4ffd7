"""Every recipe, resolved, equals its copy in tests/golden/.

A changed default, recipe or method shows up there as a diff in every recipe
that it affects. To accept it: python -m tests.test_golden
"""

import dataclasses
import difflib
import json
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from configs import imagenet
from skipinit_jax.training.network import build_method
from skipinit_jax.training.optimizer import peak_rate
from skipinit_jax.training.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests' / 'golden'
RECIPES = (
  'digits',
  'mnist5k',
  'cifar10',
  'cifar100',
  'synthetic',
  'imagenet',
  *(f'imagenet:{row}' for row in imagenet.ROWS),
  'imagenet:regularized_skipinit,batch=4096',
)


def resolved(recipe: str) -> str:
  """Every field by dotted name, the fields of its method, the peak rate."""
  config = load_recipe(recipe)
  method = dataclasses.asdict(build_method(config))
  fields = flatten_dict(config.to_dict(), sep='.')
  fields |= {f'resolved.method.{name}': value for name, value in method.items()}
  fields['resolved.peak_rate'] = peak_rate(config)
  lines = (f'{name}: {json.dumps(fields[name])}\n' for name in sorted(fields))
  return ''.join(lines)


def golden(recipe: str) -> Path:
  name = recipe.replace(':', '-').replace(',', '-').replace('=', '')
  return GOLDEN / f'{name}.yaml'


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipe_resolves_to_its_golden_file(recipe):
  old, new = golden(recipe).read_text(), resolved(recipe)
  diff = difflib.unified_diff(
    old.splitlines(), new.splitlines(), 'golden', recipe, n=0, lineterm=''
  )
  assert old == new, (
    '\n'.join(diff) + '\nto accept it: python -m tests.test_golden'
  )


def test_every_recipe_has_a_golden_file_and_the_reverse():
  assert set(GOLDEN.iterdir()) == {golden(recipe) for recipe in RECIPES}
  files = {path.stem for path in ROOT.glob('configs/[!_]*.py')}
  assert files == {recipe.partition(':')[0] for recipe in RECIPES}


def test_a_changed_method_shows(monkeypatch):
  from skipinit_jax.models.methods import METHODS

  changed = dataclasses.replace(METHODS['fixup'], reduced_rate=0.2)
  monkeypatch.setitem(METHODS, 'fixup', changed)
  with pytest.raises(
    AssertionError, match=r'\+resolved.method.reduced_rate: 0\.2'
  ):
    test_recipe_resolves_to_its_golden_file('imagenet:fixup')


if __name__ == '__main__':
  for path in GOLDEN.iterdir():
    path.unlink()
  for recipe in RECIPES:
    golden(recipe).write_text(resolved(recipe))
