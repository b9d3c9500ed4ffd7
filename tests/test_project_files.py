"""What a forge and its users read: citation, workflow, hooks, addresses."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from benchmarks import versions
from skipinit_jax import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
URL = PROJECT['urls']['Repository']
TOOLS = {'pip', 'python', 'ruff', 'basedpyright', 'pytest', 'zensical'}
TOOLS |= {'twine', 'cp', 'echo'}


def load(name):
  return yaml.safe_load((ROOT / name).read_text())


def test_citation_is_of_this_version_and_of_the_paper():
  cited = load('CITATION.cff')
  assert cited['version'] == __version__
  assert cited['license'] == PROJECT['license']
  assert cited['repository-code'] == URL
  assert cited['authors'] == PROJECT['authors']
  paper = cited['references'][0]
  assert paper['url'] == PROJECT['urls']['Paper']
  assert [a['family-names'] for a in paper['authors']] == ['De', 'Smith']


def test_addresses_of_the_project_lead_to_its_files():
  for address in PROJECT['urls'].values():
    _, blob, file = address.partition(f'{URL}/blob/main/')
    assert not blob or (ROOT / file).exists(), address


def commands(job):
  """The command lines of a job, as lists of words."""
  for step in job['steps']:
    for line in step.get('run', '').splitlines():
      yield shlex.split(line)


@pytest.fixture(scope='module')
def jobs():
  return load('.github/workflows/ci.yml')['jobs']


def test_workflows_run_commands_that_exist(jobs):
  release = load('.github/workflows/release.yml')['jobs']
  assert 'run' not in str(release['publish']['steps'])  # It has a right.
  for name, job in {**jobs, 'release': release['build']}.items():
    assert job['steps'][0]['uses'].startswith('actions/checkout@'), name
    lines = list(commands(job))
    assert lines, name
    for words in lines:
      assert words[0] in TOOLS | set(PROJECT['scripts']), words
      if '-r' in words:
        assert (ROOT / words[words.index('-r') + 1]).is_file(), words
      if words[:2] == ['python', '-m']:
        assert importlib.util.find_spec(words[2]), words


def test_workflow_checks_all_that_the_local_script_does(jobs):
  script = (ROOT / '.ci' / 'run').read_text()
  checks = re.findall(r'^\.venv/bin/(.+)$', script, re.M)
  assert checks
  assert set(checks) <= {' '.join(words) for words in commands(jobs['lint'])}


def test_workflow_tests_the_oldest_and_the_newest_jax(jobs):
  rows = jobs['tests']['strategy']['matrix']['include']
  tested = [str(Requirement(row['jax']).specifier) for row in rows]
  jax = next(r for r in PROJECT['dependencies'] if r.startswith('jax>'))
  allowed = Requirement(jax).specifier
  minors = [f'0.{i}' for i in range(100) if f'0.{i}.0' in allowed]
  assert tested == [f'=={minors[0]}.*', f'=={minors[-1]}.*']
  for row in rows:
    assert row['python'] in SpecifierSet(PROJECT['requires-python'])
  assert f'>={rows[0]["python"]}' == PROJECT['requires-python']


def test_workflow_installs_the_wheel_with_the_oldest_packages(jobs):
  matrix = jobs['modules']['strategy']['matrix']
  oldest, newest = matrix['wanted']
  assert not newest
  wanted = [Requirement(text) for text in oldest.split()]
  allowed = [Requirement(text) for text in PROJECT['dependencies']]
  assert tuple(oldest.split()) == versions.OLDEST
  for ours, theirs in zip(wanted, allowed, strict=True):
    assert ours.name == theirs.name
    low = str(ours.specifier).removeprefix('==')
    assert f'>={low}'.removesuffix('.0') in str(theirs.specifier)
  for python in matrix['python']:
    assert python in SpecifierSet(PROJECT['requires-python'])


def test_hooks_are_checks_of_the_workflow(jobs):
  (repository,) = load('.pre-commit-config.yaml')['repos']
  assert repository['repo'] == 'local'  # Nothing is fetched.
  tools = {words[0] for words in commands(jobs['lint'])} - {'pip'}
  assert {hook['entry'].split()[0] for hook in repository['hooks']} == tools
  assert {hook['language'] for hook in repository['hooks']} == {'system'}
