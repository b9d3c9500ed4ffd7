"""Ctrl-C while a command is still importing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT

COMMANDS = {
  'train.py': ['train.py', '--config=synthetic'],
  'training': ['-m', 'skipinit_jax.training', '--config=synthetic'],
  'experiments': ['-m', 'skipinit_jax.experiments', 'run', 'depth'],
  'analysis': ['-m', 'skipinit_jax.analysis', '--help'],
  'ahead_of_time': ['-m', 'skipinit_jax.ahead_of_time', '--help'],
  'data': ['-m', 'skipinit_jax.data', '--help'],
  'export': ['-m', 'skipinit_jax.export', '--help'],
}
# What has just been loaded when the signal comes.
MOMENTS = ('_multiarray_umath', 'libjax_common', 'ml_dtypes')


def interrupted_at(moment, command, cwd):
  process = subprocess.Popen(
    [sys.executable, *command],
    cwd=cwd,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  maps = Path(f'/proc/{process.pid}/maps')
  end = time.monotonic() + 120
  while moment not in maps.read_text():
    assert process.poll() is None
    assert time.monotonic() < end
    time.sleep(0.002)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  return process.returncode, out, err


@pytest.mark.parametrize(
  ('name', 'moment'),
  [('train.py', moment) for moment in MOMENTS]
  + [(name, MOMENTS[i % 2]) for i, name in enumerate(COMMANDS) if i],
)
def test_interrupted_imports_end_in_one_line(name, moment, tmp_path):
  command = COMMANDS[name]
  status, out, err = interrupted_at(moment, command, ROOT)
  assert (status, out) == (130, '')
  assert err == 'stopped by SIGINT while starting\n'


OTHER = """
import signal
before = signal.getsignal(signal.SIGINT)
import skipinit_jax
assert signal.getsignal(signal.SIGINT) is before
assert before is signal.default_int_handler
"""


def test_another_program_keeps_its_handler(tmp_path):
  program = tmp_path / 'train.py'  # Of the same name as ours.
  program.write_text(OTHER)
  package = tmp_path / 'other'
  package.mkdir()
  (package / '__init__.py').write_text(OTHER)
  (package / '__main__.py').write_text('')
  for command in (
    [program],
    ['-m', 'other', 'skipinit_jax.training'],
    ['-c', OTHER, 'train.py'],
  ):
    subprocess.run(
      [sys.executable, *command],
      cwd=tmp_path,
      env={'PYTHONPATH': f'{ROOT}:{tmp_path}'},
      check=True,
    )
