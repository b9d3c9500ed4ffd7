"""One run of a study: training that stops when its parent process does.

  python -m skipinit_jax.experiments.worker FOLDER --config=...

Saves and stops at the end of its standard input, which the parent closes, or
the operating system once the parent is gone. If another worker is still saving
in FOLDER, this one waits for it.
"""

import os
import signal
import sys
import threading


def main() -> None:
  """Trains as `python -m skipinit_jax.training` does."""
  threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
  folder = sys.argv[1]
  from skipinit_jax.training.lock import hold

  with hold(folder, print, wait=True):
    sys.argv[1:] = sys.argv[2:]
    from skipinit_jax.training.__main__ import run

    run()


def _stop_at_the_end_of_input() -> None:
  while os.read(sys.stdin.fileno(), 1):
    pass
  # Not SIGTERM: the whole process group may have received one already, and a
  # second one stops without saving.
  os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == '__main__':
  main()
