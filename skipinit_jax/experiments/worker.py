"""One run of a study: training, in a folder that it has to itself.

  python -m skipinit_jax.experiments.worker PID FOLDER --config=...

Saves and stops when process PID, which started it, has ended, however that
ended; where one is still saving in FOLDER, the next one waits for it.
"""

import os
import signal
import sys
import threading
import time


def main() -> None:
  """Trains as `python -m skipinit_jax.training` does."""
  parent, folder = int(sys.argv[1]), sys.argv[2]
  from skipinit_jax.training.lock import hold

  with hold(folder, print, wait=True):
    sys.argv[1:] = sys.argv[3:]
    from skipinit_jax.training.__main__ import run

    threading.Thread(target=_outlive_not, args=(parent,), daemon=True).start()
    run()


def _outlive_not(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(0.2)
  os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
  main()
