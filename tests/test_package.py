"""The package as others get it: layers, imports, the wheel, the README."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'skipinit_jax'
# What each folder may import of ours; what stands alone is open to all.
LAYERS = {
  'models': set(),
  'data': set(),
  'training': {'models', 'data'},
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


HEAVY = (
  'absl.app',
  'ml_collections',
  'sklearn',
  'tensorboardX',
  'tqdm',
  'grain',
  'tensorflow',
  'tensorflow_datasets',
  'cv2',
  'matplotlib',
  'skipinit_jax.models.nnx',
  'skipinit_jax.training',
  'skipinit_jax.data',
)


def modules_after(statement):
  code = f'import sys; {statement}; print(*sys.modules, sep="\\n")'
  command = [sys.executable, '-c', code]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=True
  )
  return set(done.stdout.split()) & set(HEAVY)


def test_import_needs_jax_flax_and_optax_only():
  assert not modules_after('import skipinit_jax')
  # The check itself can fail:
  assert modules_after('import skipinit_jax.training') >= {'ml_collections'}


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


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built from a copy, so that the checkout stays as it is."""
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  ignore = shutil.ignore_patterns('__pycache__')
  for name in ('skipinit_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  command = [sys.executable, '-m', 'build', '--wheel', '--no-isolation']
  done = subprocess.run(
    [*command, '--outdir', folder, source],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return next(folder.glob('*.whl'))


def test_wheel_holds_the_package_and_the_recipes(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = {n for n in archive.namelist() if n.startswith('skipinit_jax/')}
  ours = {
    f'skipinit_jax/{p.relative_to(PACKAGE)}'
    for p in PACKAGE.rglob('*')
    if p.is_file() and p.suffix != '.pyc'
  }
  recipes = {f'skipinit_jax/configs/{p.name}' for p in ROOT.glob('configs/*')}
  recipes = {name for name in recipes if name.endswith('.py')}
  assert names == ours | recipes


def test_wheel_trains_outside_a_checkout(wheel, tmp_path):
  site, empty = tmp_path / 'site', tmp_path / 'empty'
  pip = [sys.executable, '-m', 'pip', 'install', '--no-index', '--no-deps']
  subprocess.run([*pip, '--target', site, wheel], check=True)
  empty.mkdir()
  done = subprocess.run(
    [
      site / 'bin' / 'skipinit-jax',
      '--config=synthetic',
      '--config.epochs=0.25',
      '--workdir=run',
      '--config.model.depth=10',
      '--config.compilation_cache=',
    ],
    cwd=empty,
    env={'PYTHONPATH': str(site), 'PATH': '/usr/bin:/bin'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'completed after 1 steps' in done.stdout
  assert (empty / 'run' / 'result.json').exists()


def test_python_in_the_readme_runs():
  text = (ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 170  # The rest is on the pages of docs/.
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert blocks
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), {})
