"""The package as importers see it: layers, imports, the README."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'skipinit_jax'
# What each folder may import of ours; what stands alone is open to all.
LAYERS = {
  'models': set(),
  'data': set(),
  'training': {'models', 'data', 'pretrained'},
  'ahead_of_time': {'models', 'data', 'training'},
  'experiments': {'models', 'data', 'training', 'ahead_of_time'},
  'analysis': {'models', 'data', 'training'},
}
# A command line compares images with chips; its folder needs neither.
COMMANDS = {'data/__main__.py': {'training', 'ahead_of_time'}}
SHARED = {'cli', 'errors', 'files', 'markdown', 'plotting', 'published'}
SHARED = {*SHARED, 'intervals', 'variants', 'version'}


def imports(path):
  """Modules of ours that a file imports, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    else:
      continue
    assert not getattr(node, 'level', 0), f'relative import in {path}'
    yield from (n for n in names if n.split('.')[0] == 'skipinit_jax')


def test_folders_import_only_the_layers_below():
  found = {p.name for p in PACKAGE.iterdir() if (p / '__init__.py').exists()}
  assert found == set(LAYERS)
  for layer, below in LAYERS.items():
    for path in (PACKAGE / layer).glob('*.py'):
      above = COMMANDS.get(str(path.relative_to(PACKAGE)), set())
      for name in imports(path):
        part = name.split('.')[1]
        allowed = below | above | SHARED | {layer}
        assert part in allowed, f'{path.relative_to(ROOT)} imports {name}'


def packages_after(statement):
  """Packages beside Python's own that a new process has imported."""
  code = f'import sys; {statement}; print(*sys.modules, sep="\\n")'
  command = [sys.executable, '-c', code]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=True
  )
  names = {name.partition('.')[0] for name in done.stdout.split()}
  return names - sys.stdlib_module_names


def test_import_needs_jax_flax_and_optax_only():
  before = packages_after('import jax, flax.linen, optax')
  after = packages_after('import skipinit_jax')
  assert after - before == {'skipinit_jax'}
  # The check itself can fail:
  trainer = packages_after('import skipinit_jax.training')
  assert trainer - before >= {'ml_collections'}


def test_import_leaves_out_nnx_and_the_trainer():
  code = 'import skipinit_jax, sys; print(*sys.modules, sep="\\n")'
  command = [sys.executable, '-c', code]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=True
  )
  ours = {n for n in done.stdout.split() if n.startswith('skipinit_jax.')}
  folders = {'.'.join(name.split('.')[:2]) for name in ours}
  assert not folders & {f'skipinit_jax.{x}' for x in set(LAYERS) - {'models'}}
  assert 'skipinit_jax.models.nnx' not in ours
  assert 'skipinit_jax.models.resnet' in ours


def pyproject():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def requirements(name):
  lines = (ROOT / name).read_text().splitlines()
  return {line for line in lines if line and line[0] not in '#-'}


def test_requirements_equal_the_train_extra():
  project = pyproject()['project']
  train = project['dependencies'] + project['optional-dependencies']['train']
  assert requirements('requirements.txt') == set(train)


def test_every_folder_is_packaged():
  packages = set(pyproject()['tool']['setuptools']['packages'])
  folders = {'skipinit_jax', 'skipinit_jax.configs'}
  folders |= {f'skipinit_jax.{layer}' for layer in LAYERS}
  assert packages == folders


def test_python_in_the_readme_runs():
  text = (ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 170  # The rest is on the pages of docs/.
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert blocks
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), {})
