"""Rules that the repository's own source keeps."""

import ast
import subprocess
from collections.abc import Iterator

import pytest
from runs import ROOT


def literal_splats(source: str) -> Iterator[int]:
  """Lines where a literal is unpacked at once: f(*(a, b)), {**{'c': d}}.

  They hide keywords from readers and type checkers. Keys that are computed,
  as in f(**{name: value}), can't be written otherwise.
  """
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Starred(value=ast.Tuple() | ast.List() | ast.Set()):
        yield node.lineno
      case ast.Dict():
        pairs = zip(node.keys, node.values, strict=True)
        if any(k is None and isinstance(v, ast.Dict) for k, v in pairs):
          yield node.lineno
      case ast.keyword(arg=None, value=ast.Dict(keys=keys)):
        if all(key is None or isinstance(key, ast.Constant) for key in keys):
          yield node.lineno


@pytest.mark.parametrize(
  'source',
  [
    'f(*(a, b))',
    'f(*[a], c)',
    '(1, *(2, 3))',
    "f(**{'a': 1})",
    "f(**{'a': 1, **more})",
    "{**{'a': 1}, 'b': 2}",
  ],
)
def test_literal_splats_are_found(source):
  assert list(literal_splats(source)) == [1]


@pytest.mark.parametrize(
  'source',
  ['f(*a, **b)', 'f(**{name: 1})', '{**a, 1: 2}', '(*a, *(x for x in b))'],
)
def test_other_unpacking_is_not(source):
  assert not list(literal_splats(source))


def test_nothing_unpacks_a_literal():
  listed = subprocess.run(
    ['git', 'ls-files', '-co', '--exclude-standard', '*.py'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  files = [ROOT / name for name in listed.stdout.split()]
  assert len(files) > 100
  found = [
    f'{file.relative_to(ROOT)}:{line}'
    for file in files
    if file.exists()
    for line in literal_splats(file.read_text())
  ]
  assert not found
