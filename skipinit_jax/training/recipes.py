"""Recipes: finding, loading and changing them."""

import ast
import inspect
import runpy
import traceback
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from skipinit_jax.errors import InputError, nearest, unknown
from skipinit_jax.training.checks import check_types


def recipe_path(name: str) -> str:
  """The file of a bundled recipe, by its name, or of any other, by its path.

  Names come first: the recipe 'digits' is never a file `digits` in the current
  folder, but './digits' and 'digits.py' are files if they exist.

  Args:
    name: 'digits', 'configs/digits.py', or a path; a colon and get_config's
      argument may follow, and are kept.

  Raises:
    InputError: neither a recipe nor a file.
  """
  file, colon, argument = name.partition(':')
  package = Path(__file__).resolve().parents[1]
  folder = package / 'configs'  # In an installed wheel,
  if not folder.is_dir():
    folder = package.parent / 'configs'  # and in a checkout.
  recipes = sorted(path.stem for path in folder.glob('[!_]*.py'))
  if file not in recipes:
    if file and _is_file(file):
      return name
    file = file.removeprefix('configs/').removesuffix('.py')
    if file not in recipes:
      raise InputError(unknown('recipe', name.partition(':')[0], recipes))
  return f'{folder / file}.py{colon}{argument}'


def _is_file(name: str) -> bool:
  try:
    path = Path(name)
    if path.is_dir():
      raise InputError(f'recipe {name!r} is a folder; expected a file')
    return path.is_file()
  except OSError:  # No file can have such a name.
    return False


def load_recipe(name: str) -> ConfigDict:
  """The config of a recipe.

  Args:
    name: see `recipe_path`.

  Raises:
    InputError: there is no such recipe, or it returns no config; one line.
  """
  file, colon, argument = recipe_path(name).partition(':')
  try:
    with warnings.catch_warnings():  # About its syntax.
      warnings.simplefilter('ignore')
      get_config = runpy.run_path(file).get('get_config')
    if not callable(get_config):
      raise InputError(f'recipe {file!r} has no function get_config()')
    taken = inspect.signature(get_config).parameters
    if colon and not taken:
      raise InputError(
        f'recipe {name!r}: expected no argument after the colon, as this '
        'recipe takes none'
      )
    config = get_config(argument) if colon else get_config()
  except InputError:
    raise
  except (Exception, SystemExit) as error:
    raise InputError(f'recipe {name!r}: {_reason(error, file)}') from None
  if not isinstance(config, ConfigDict):
    raise InputError(
      f'recipe {file!r}: get_config() returned {config!r}, expected a '
      'ConfigDict'
    )
  try:
    check_types(config)
  except InputError as error:
    raise InputError(f'recipe {file!r}: {error}') from None
  return config


def _reason(error: BaseException, file: str) -> str:
  """The error that a recipe raised, and at which of its lines."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == file
  ]
  if isinstance(error, SyntaxError) and error.filename == file:
    lines, error = [error.lineno], type(error)(error.msg)
  where = f'line {lines[-1]}: ' if lines else ''
  return f'{where}{type(error).__name__}: {error}'


def set_fields(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
  """Sets fields by their dotted names; returns the same config.

  Raises:
    InputError: a field that the recipe does not have, or a value of another
      type than the field's.
  """
  for name, value in fields.items():
    part, last = _field(config, name)
    try:
      part[last] = value
    except (TypeError, ValueError):
      raise _wrong_type(name, value, part.get_type(last)) from None
  return config


def parse_fields(
  config: ConfigDict, texts: Iterable[tuple[str, str]]
) -> dict[str, Any]:
  """Converts the values of fields from text to the types of the config.

  Args:
    config: a recipe.
    texts: dotted names, and the text for each.

  Raises:
    InputError: an unknown field, or a value of another type.
  """
  fields = {}
  for name, text in texts:
    part, last = _field(config, name)
    fields[name] = _value(name, part.get_type(last), text)
  return fields


def _field(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
  """The part of a config that holds a field, and the field's name in it."""
  *path, last = name.split('.')
  part = config
  for step in path:
    part = part.get(step) if isinstance(part, ConfigDict) else None
  if not isinstance(part, ConfigDict) or last not in part:
    hint = nearest(name, flatten_dict(config.to_dict(), sep='.'))
    raise InputError(f'the recipe has no field {name!r}{hint}')
  return part, last


def _value(name: str, kind: type, text: str) -> Any:
  if kind is bool and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    if kind in (int, float, str):
      return kind(text)
    if kind is tuple:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        value = ast.literal_eval(text)
      if isinstance(value, tuple):
        return value
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    pass
  raise _wrong_type(name, text, kind)


def _wrong_type(name: str, value: Any, kind: type) -> InputError:
  if kind is ConfigDict:
    return InputError(
      f'{name}={value}: expected one of its fields, as in --config.{name}.FIELD'
    )
  example = ', as in (1,)' if kind is tuple else ''
  return InputError(
    f'{name}={value}: expected a value of type {kind.__name__}{example}'
  )
