"""Ctrl-C while a command of this package still imports: one line, status 130.

Importing this does it, since Python imports a package before the command in it;
nothing changes where another program imports the package.
"""

import os
import signal
import sys

_TRAIN = os.path.join(os.path.dirname(__file__), os.pardir, 'train.py')


def interrupt_as_usual() -> None:
  """Makes SIGINT a KeyboardInterrupt again."""
  if signal.getsignal(signal.SIGINT) is _leave:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command(argv: list[str], orig_argv: list[str]) -> bool:
  """Whether Python is starting `train.py` or `-m skipinit_jax...`."""
  if argv[:1] == ['-m']:  # While Python looks for the module.
    module = orig_argv[orig_argv.index('-m') + 1] if '-m' in orig_argv else ''
    return module.split('.')[0] == 'skipinit_jax'
  # A spawned child has its parent's argv.
  return (
    bool(argv)
    and argv[0] in orig_argv
    and os.path.realpath(argv[0]) == os.path.realpath(_TRAIN)
  )


def _leave(number, frame) -> None:
  del frame
  os.write(2, b'stopped by SIGINT while starting\n')
  os._exit(128 + number)


if (
  _is_command(sys.argv, sys.orig_argv)
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, _leave)
