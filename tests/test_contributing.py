"""CONTRIBUTING.md: its examples are followed, in a copy of the repository."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'CONTRIBUTING.md'
EXAMPLES = PAGE.read_text().split('\n## Worked examples\n')[1]
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.DOTALL | re.MULTILINE)


@pytest.fixture
def copy(tmp_path):
  folder = tmp_path / 'repository'
  skipped = shutil.ignore_patterns('.*', '__pycache__', 'docs', 'runs', 'site')
  shutil.copytree(ROOT, folder, ignore=skipped)
  return folder


def patch(folder, block):
  """Applies a diff whose lines must be in its file exactly once."""
  first, *lines = block.splitlines()
  file = folder / first.removeprefix('--- ')
  assert all(line[:1] in ('', ' ', '+', '-') for line in lines), block
  old = ''.join(f'{line[1:]}\n' for line in lines if line[:1] != '+')
  new = ''.join(f'{line[1:]}\n' for line in lines if line[:1] != '-')
  text = file.read_text()
  assert text.count(old) == 1, f'{first}:\n{old}'
  file.write_text(text.replace(old, new))


def write(folder, block):
  """Writes a block to the file that its first line names."""
  place, _, code = block.partition('\n')
  if place.startswith('# In a new file, '):
    file = folder / place.removeprefix('# In a new file, ')
    assert not file.exists(), place
    file.write_text(code)
  else:
    file = folder / place.removeprefix('# At the end of ')
    file.write_text(file.read_text() + code)


def run(folder, block):
  """Runs commands as a reader would, with this Python."""
  for line in block.splitlines():
    program, *arguments = shlex.split(line)
    assert program == 'python', line
    if '--topology' in line and not importlib.util.find_spec('libtpu'):
      continue
    done = subprocess.run(
      [sys.executable, *arguments],
      cwd=folder,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, f'{line}\n{done.stdout}{done.stderr}'
    assert 'deselected / 0 selected' not in done.stdout


@pytest.mark.parametrize(
  'commands',  # They train, test and compile in the copy.
  [False, pytest.param(True, marks=pytest.mark.slow)],
)
def test_worked_examples_work(commands, copy):
  follow = {'diff': patch, 'python': write, 'sh': run}
  blocks = [
    (language, block)
    for language, block in BLOCK.findall(EXAMPLES)
    if commands or language != 'sh'
  ]
  for language, block in blocks:
    follow[language](copy, block)
  assert {'diff', 'python'} <= {language for language, _ in blocks}
  command = [sys.executable, '-m', 'ruff', 'check', '.']
  subprocess.run(command, cwd=copy, check=True)
  assert (copy / 'runs' / 'stripes' / 'result.json').exists() == commands


def test_a_diff_that_does_not_fit_is_refused(copy):
  with pytest.raises(AssertionError, match='small_beta'):
    patch(copy, '--- train.py\n-small_beta\n+small_gamma\n')


def test_the_layout_names_every_file_of_the_package():
  layout = PAGE.read_text().split('\n## The layout\n')[1].split('\n## ')[0]
  rows = dict(re.findall(r'^\| `([\w.]+)` \| (.*) \|$', layout, re.M))
  package = ROOT / 'skipinit_jax'
  folders = {path.parent for path in package.rglob('*.py')}
  assert {package / name for name in rows} == folders
  for name, files in rows.items():
    found = {path.stem for path in (package / name).glob('[!_]*.py')}
    assert set(re.findall(r'`(\w+)`', files)) == found, name


def test_the_layout_names_folders_that_exist():
  folders = re.findall(r'^\| `(\w+)/` \|', PAGE.read_text(), re.M)
  assert len(folders) > 5
  assert all((ROOT / folder).is_dir() for folder in folders)
