"""Recipes as configs, without flags: for studies, analyses and notebooks."""

import difflib
import runpy
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from skipinit_jax.errors import InputError
from skipinit_jax.training.changes import flatten
from skipinit_jax.training.config import recipe_path


def load_recipe(name: str) -> ConfigDict:
  """The config of a recipe, by name or path, with get_config's argument."""
  file, colon, argument = recipe_path(name).partition(':')
  get_config = runpy.run_path(file)['get_config']
  return get_config(argument) if colon else get_config()


def set_fields(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
  """Sets fields by their dotted names; returns the same config.

  Raises:
    InputError: a field that the recipe does not have.
  """
  for name, value in fields.items():
    part, last = _field(config, name)
    part[last] = value
  return config


def parse_overrides(recipe: str, arguments: Iterable[str]) -> dict[str, Any]:
  """The fields of arguments such as --config.epochs=2, typed as the recipe's.

  Raises:
    InputError: something else, an unknown field, or a value of another type.
  """
  fields = {}
  for argument in arguments:
    name, equals, text = argument.removeprefix('--config.').partition('=')
    if not argument.startswith('--config.') or not equals:
      raise InputError(
        f'unexpected argument {argument!r}; fields are set as in '
        '--config.epochs=2'
      )
    part, last = _field(load_recipe(recipe), name)
    fields[name] = _value(name, part.get_type(last), text)
  return fields


def _field(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
  """The part of a config that a dotted name leads to, and the last name."""
  *path, last = name.split('.')
  part = config
  for step in path:
    part = part.get(step) if isinstance(part, ConfigDict) else None
  if not isinstance(part, ConfigDict) or last not in part:
    near = difflib.get_close_matches(name, flatten(config.to_dict()), 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise InputError(f'the recipe has no field {name!r}{hint}')
  return part, last


def _value(name: str, kind: type, text: str) -> Any:
  if kind is bool and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    if kind in (int, float, str):
      return kind(text)
  except ValueError:
    pass
  raise InputError(f'{name}={text}: expected a value of type {kind.__name__}')
