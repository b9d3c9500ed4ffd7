"""One run of a study: training, in a folder that it has to itself.

  python -m skipinit_jax.experiments.worker FOLDER --config=...

Saves and stops at the end of its standard input, which who started it closes,
or the operating system when that process has ended, however it ended. Where one
is still saving in FOLDER, the next one waits for it.
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
  # Not SIGTERM, of which the group of processes may have been sent one too: a
  # second one stops without saving.
  os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == '__main__':
  main()
