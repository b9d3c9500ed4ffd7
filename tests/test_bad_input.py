"""Bad input to every command: one line, status 2, nothing done.

The command lines run in forks of one process that has imported everything, in a
folder whose files are compared before and after.
"""

import json
import os
import shlex
import subprocess
import sys

import pytest
from runs import ROOT

TABLE = (ROOT / 'tests/bad_input.txt').read_text()

RECIPES = {
  'empty': '',
  'syntax': 'def get_config():\n  return (',
  'raises': "def get_config():\n  raise ValueError('two\\nlines')",
  'exits': 'raise SystemExit(0)',
  'imports': 'import nowhere',
  'deep': 'def get_config():\n  return get_config()',
  'none': 'def get_config():\n  pass',
  'number': 'get_config = 3',
  'dict': "def get_config():\n  return {'seed': 0}",
  'blank': 'from ml_collections import ConfigDict as get_config',
  'needs': 'def get_config(argument):\n  pass',
  'lacks': 'del config.model.width',
  'typed': "config.batch_size = 'many'",
  'bool': 'config.batch_size = True',
}
CHANGED = """
from skipinit_jax.training.config import default_config
def get_config():
  config = default_config(); {}
  return config
"""

# Runs each command line in a fork and prints what came of it: its status, what
# it wrote to either stream, how often it compiled, and the files it changed.
FORKS = r"""
import importlib, json, os, signal, sys, tempfile, traceback, warnings
from pathlib import Path

warnings.filterwarnings('ignore', 'os.fork')
import jax
import sklearn.datasets, sklearn.model_selection
import tensorflow_datasets, grain, cv2, simplejpeg, PIL.Image

MODULES = {
  'train': 'skipinit_jax.training.__main__',
  'data': 'skipinit_jax.data.__main__',
  'experiments': 'skipinit_jax.experiments.__main__',
  'analysis': 'skipinit_jax.analysis.__main__',
  'ahead_of_time': 'skipinit_jax.ahead_of_time.__main__',
  'export': 'skipinit_jax.export',
  'watching': 'benchmarks.watching',
  'stable_rates': 'benchmarks.stable_rates',
  'growth': 'benchmarks.growth',
  'throughput': 'benchmarks.throughput',
  'tpu_cost': 'benchmarks.tpu_cost',
  'gpu_cost': 'benchmarks.gpu_cost',
  'on_gpu': 'benchmarks.on_gpu',
  'input_pipeline': 'benchmarks.input_pipeline',
  'input_budget': 'benchmarks.input_budget',
}
modules = {name: importlib.import_module(m) for name, m in MODULES.items()}
outside = Path(sys.argv[1])
compiled = []
jax.monitoring.register_event_duration_secs_listener(
  lambda name, _, **__: compiled.append(name) if 'backend_compile' in name
  else None
)

def files():
  return {
    str(p): (s.st_mode, s.st_size, s.st_mtime_ns * p.is_file())
    for p in Path('.').rglob('*') if '__pycache__' not in p.parts
    for s in [p.lstat()]
  }

def child(command, args):
  module = modules[command]
  sys.argv = [command, *args]
  try:
    named = command in ('train', 'ahead_of_time')
    status = module.run() if named else module.main()
  except SystemExit as end:
    status = end.code
  except BaseException:
    traceback.print_exc()
    status = 99
  (outside / 'compiled').write_text(str(len(compiled)))
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status or 0)

results = []
before = files()
for command, *args in json.load(sys.stdin):
  with open(outside / 'out', 'wb+') as out, open(outside / 'err', 'wb+') as err:
    (outside / 'compiled').write_text('')
    pid = os.fork()
    if not pid:
      signal.alarm(100)
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      child(command, args)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out.seek(0), err.seek(0)
    after = files()
    results.append({
      'status': status,
      'out': out.read().decode(errors='replace'),
      'err': err.read().decode(errors='replace'),
      'compiled': (outside / 'compiled').read_text(),
      'changed': sorted(k for k in before.keys() | after.keys()
                        if before.get(k) != after.get(k)),
    })
    before = after
print(json.dumps(results))
"""


def cases():
  for line in TABLE.splitlines():
    if line and not line.startswith('#'):
      given, _, parts = line.partition(' -> ')
      yield given, words(given), words(parts)


def words(text):
  """Splits at spaces outside double quotes."""
  lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
  lexer.whitespace_split, lexer.quotes, lexer.escape = True, '"', ''
  lexer.commenters = ''
  return list(lexer)


def arguments(words):
  """With the recipe of `train`, and with HUGE spelled out."""
  words = [word.replace('HUGE', '1' * 10_000) for word in words]
  named = any(word.partition('=')[0] == '--config' for word in words)
  if words[0] == 'train' and not named:
    words.insert(1, '--config=synthetic')
  return words


def write_bad_files(folder):
  """What the table's command lines are pointed at."""
  for name, text in RECIPES.items():
    if name in ('lacks', 'typed', 'bool'):
      text = CHANGED.format(text)
    (folder / f'{name}.py').write_text(text)
  (folder / 'binary.py').write_bytes(bytes(range(256)))
  (folder / 'a_file').write_text('text')
  for name in ('digits', 'synthetic', 'imagenet'):
    (folder / name).write_text('raise SystemExit("executed")')
  (folder / 'dangling').symlink_to('gone')
  for name in (
    'empty',
    'folder',
    'images/train/cat',
    'run',
    'broken_run',
    'broken_study',
    'half_study',
    'broken_set/cifar10/3.0.2',
    'home',
  ):
    (folder / name).mkdir(parents=True)
  (folder / 'folder/x').write_text('')
  (folder / 'run/config.json').write_text('{"data": {"name": "digits"}}')
  (folder / 'broken_run/config.json').write_text('{"data": ')
  (folder / 'broken_study/study.json').write_text('{"overrides": ')
  (folder / 'half_study/study.json').write_text('[]')
  info = folder / 'broken_set/cifar10/3.0.2/dataset_info.json'
  info.write_text('{"fileFormat": ')


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bad')
  write_bad_files(folder)
  outside = tmp_path_factory.mktemp('outside')
  lines = [arguments(words) for _, words, _ in cases()]
  done = subprocess.run(
    [sys.executable, '-c', FORKS, str(outside)],
    input=json.dumps(lines),
    cwd=folder,
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'HOME': str(folder / 'home'),
      'TMPDIR': str(folder / 'home'),
      'PYTHONDONTWRITEBYTECODE': '1',
      'PYTHONIOENCODING': 'utf-8',
    },
    capture_output=True,
    text=True,
    check=False,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  given = [given for given, _, _ in cases()]
  return dict(zip(given, json.loads(done.stdout), strict=True))


def test_the_table_is_large_and_over_all_commands():
  given = [given for given, _, _ in cases()]
  assert len(given) == len(set(given)) >= 160
  assert all(parts for _, _, parts in cases())


@pytest.mark.parametrize(
  ('given', 'parts'), [(given, parts) for given, _, parts in cases()]
)
def test_bad_input_is_one_line_and_nothing_is_done(given, parts, results):
  got = results[given]
  assert got['status'] == 2, got['err']
  assert got['out'] == ''
  (line,) = got['err'].splitlines()
  assert line.startswith('error: ')
  assert len(line) <= 300
  for part in parts:
    assert part in line
  assert got['changed'] == []
  assert got['compiled'] in ('', '0')
