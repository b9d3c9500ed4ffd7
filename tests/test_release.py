"""What is published: a source distribution, and the wheel built from it."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from skipinit_jax import __version__

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = 'skipinit-jax/skipinit-jax'
PAGES = f'https://github.com/{REPOSITORY}/blob/v{__version__}/'
IMAGES = f'https://raw.githubusercontent.com/{REPOSITORY}/v{__version__}/'
# What a source distribution has beside the files of the repository.
GENERATED = ('PKG-INFO', 'setup.cfg', 'skipinit_jax.egg-info/')


def run(*command, **kwargs):
  done = subprocess.run(
    list(map(str, command)),
    capture_output=True,
    text=True,
    check=False,
    **kwargs,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def tracked():
  """Paths of the files that git has, those not yet committed included."""
  if not (ROOT / '.git').exists():
    pytest.skip('not a checkout')
  flags = ('--cached', '--others', '--exclude-standard')
  names = run('git', 'ls-files', *flags, cwd=ROOT).splitlines()
  return {name for name in names if (ROOT / name).exists()}


@pytest.fixture(scope='module')
def built(tracked, tmp_path_factory):
  """The folder with both files, built as CONTRIBUTING says, from a copy."""
  folder = tmp_path_factory.mktemp('built')
  source = folder / 'source'
  for name in tracked:
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, source / name)
  # What lies around in a checkout that is worked in.
  for name in ('runs/a/b.py', 'docs/__pycache__/c.pyc', '.venv/d.py'):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text('')
  build(source, folder / 'dist')
  return folder / 'dist'


def build(source, dist, *flags):
  """Builds as of a fixed second, which is what timestamps become."""
  program = [sys.executable, '-m', 'build', '--no-isolation', *flags]
  environment = {**os.environ, 'SOURCE_DATE_EPOCH': '1700000000'}
  run(*program, '--outdir', dist, source, env=environment)


@pytest.fixture(scope='module')
def wheel(built):
  return next(built.glob('*.whl'))


def test_source_distribution_holds_what_git_holds(built, tracked):
  with tarfile.open(next(built.glob('*.tar.gz'))) as archive:
    names = {m.name.partition('/')[2] for m in archive if m.isfile()}
  assert {n for n in names if not n.startswith(GENERATED)} == tracked


def test_wheel_holds_the_package_and_the_recipes(wheel, tracked):
  with zipfile.ZipFile(wheel) as archive:
    names = {n for n in archive.namelist() if '.dist-info/' not in n}
  ours = {n for n in tracked if n.startswith('skipinit_jax/')}
  recipes = {
    f'skipinit_jax/{n}'
    for n in tracked
    if n.startswith('configs/') and n.endswith('.py')
  }
  assert names == ours | recipes


def test_the_same_files_make_the_same_wheel(built, wheel, tmp_path):
  source = built.parent / 'source'
  for name in ('build', 'skipinit_jax.egg-info'):  # Left by the first.
    shutil.rmtree(source / name, ignore_errors=True)
  os.utime(source / 'skipinit_jax' / '__init__.py', (1, 10**9))
  build(source, tmp_path, '--wheel')
  assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_twine_finds_nothing_wrong(built):
  said = run(
    sys.executable, '-m', 'twine', 'check', '--strict', *built.iterdir()
  )
  assert said.count('PASSED') == 2


def test_links_of_the_long_description_lead_to_files_of_the_release(wheel):
  with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith('/METADATA'))
    text = email.message_from_bytes(archive.read(name)).get_payload()
  links = re.findall(r'(!?)\[[^\]]*\]\(([^)]+)\)', text)
  ours = [(i, x) for i, x in links if i or REPOSITORY in x]
  assert len([1 for image, _ in ours if image]) == text.count('![') > 0
  for image, address in ours:
    start = IMAGES if image else PAGES
    assert address.startswith(start), address
    file = address.removeprefix(start).partition('#')[0]
    assert (ROOT / file).exists(), address
  others = {x for _, x in links} - {x for _, x in ours}
  assert all(x.startswith('https://') for x in others), others
  readme = re.findall(r'\]\(([^)]+)\)', (ROOT / 'README.md').read_text())
  assert len(links) == len(readme)


def test_changelog_begins_with_this_version():
  heads = re.findall(
    r'^## (.+)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE
  )
  released = [head for head in heads if head != 'Unreleased']
  assert heads.index(released[0]) == len(heads) - len(released) <= 1
  pattern = rf'{re.escape(__version__)}, \d{{4}}-\d{{2}}-\d{{2}}'
  assert re.fullmatch(pattern, released[0]), released[0]


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


@pytest.mark.parametrize(
  ('right', 'wrong', 'rule'),
  [
    ('', '', None),
    ('num_classes=10', "num_classes='ten'", 'reportArgumentType'),
    (
      'import WideResNet',
      'import WideResnet as WideResNet',
      'reportAttributeAccessIssue',
    ),
  ],
)
def test_type_checkers_read_the_package(right, wrong, rule, wheel, tmp_path):
  """A script as users write it, with the wheel that they install."""
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'site')
  script = (ROOT / 'examples' / 'minimal.py').read_text()
  assert right in script
  (tmp_path / 'script.py').write_text(script.replace(right, wrong))
  settings = {
    'include': ['script.py'],
    'extraPaths': ['site'],
    'typeCheckingMode': 'standard',
  }
  (tmp_path / 'pyrightconfig.json').write_text(json.dumps(settings))
  program = [sys.executable, '-m', 'basedpyright', '--outputjson']
  done = subprocess.run(
    [*program, '--pythonpath', sys.executable],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  found = json.loads(done.stdout)['generalDiagnostics']
  assert {f.get('rule') for f in found} == ({rule} if rule else set()), found
