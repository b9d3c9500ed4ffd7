"""A process that makes runs of a study, one after another.

  python -m skipinit_jax.experiments.worker

Each line of standard input is a run, JSON: its folder, where its output goes,
and the arguments of `python -m skipinit_jax.training`. Each is answered by a
line with its exit status. At the end of standard input, which the parent
closes, or the operating system once the parent is gone, the run is saved and
the worker ends. If another worker is still saving in a folder, this one waits
for it.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

OUTPUT = 'output.txt'  # Standard output and error of a run, in its folder.


def main() -> None:
  """Makes the runs that are asked for."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback between runs.
  answers = os.fdopen(os.dup(1), 'w')
  lines: queue.Queue[str] = queue.Queue()
  threading.Thread(target=_read, args=(lines,), daemon=True).start()
  train = None
  while line := lines.get():
    folder, arguments = json.loads(line)
    _redirect(folder)
    # Later than the line, since what importing prints belongs to a run.
    train = train or _trainer()
    print(train(folder, arguments), file=answers, flush=True)


def _read(lines: queue.Queue[str]) -> None:
  for line in sys.stdin:
    lines.put(line)
  lines.put('')
  # Not SIGTERM: the whole process group may have received one already, and a
  # second one stops without saving.
  os.kill(os.getpid(), signal.SIGUSR1)


def _redirect(folder: str) -> None:
  Path(folder).mkdir(parents=True, exist_ok=True)
  with open(Path(folder) / OUTPUT, 'w') as output:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)


def _trainer() -> Callable[[str, list[str]], int]:
  """A function of a run's folder and arguments that returns its exit status."""
  from skipinit_jax.training import __main__ as training
  from skipinit_jax.training.lock import hold
  from skipinit_jax.training.program import LastProgram

  training.set_up()
  make = LastProgram()

  def train(folder: str, arguments: list[str]) -> int:
    sys.argv[1:] = arguments
    try:
      with hold(folder, print, wait=True):
        training.main(*training.parse(training.parser()), make)
    except SystemExit as end:
      return end.code if isinstance(end.code, int) else 0
    return 0

  return train


if __name__ == '__main__':
  main()
