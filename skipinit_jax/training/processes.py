"""Several processes on several hosts, through `jax.distributed`."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from skipinit_jax.errors import InputError, RunError, reason


def initialize(
  distributed: bool,
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  heartbeat_seconds: int,
) -> None:
  """Joins the other processes, before anything else of JAX is used.

  Args:
    distributed: whether Cloud TPU, Slurm or Open MPI tells who the others are.
    coordinator, num_processes, process_id: all three, if nobody does.
    heartbeat_seconds: silence after which a process counts as lost.

  Raises:
    InputError: arguments that don't go together, or nobody to ask.
  """
  named = {
    '--coordinator': coordinator,
    '--num-processes': num_processes,
    '--process-id': process_id,
  }
  missing = [flag for flag, value in named.items() if value is None]
  if len(missing) == 3 and not distributed:
    return
  if missing and len(missing) < 3:
    raise InputError(
      f'{", ".join(missing)} must be given too, with '
      f'{", ".join(flag for flag in named if flag not in missing)}'
    )
  if coordinator is not None:
    host, _, port = coordinator.rpartition(':')
    valid = port.isascii() and port.isdecimal() and len(port) < 6
    if not host.strip() or not valid or not 0 < int(port) < 2**16:
      raise InputError(
        f'--coordinator={coordinator}: expected HOST:PORT of process 0, as in '
        'host0:1234'
      )
  # Both are given, or neither is.
  if process_id is not None and process_id >= (num_processes or 0):
    raise InputError(
      f'--process-id={process_id} must be less than '
      f'--num-processes={num_processes}'
    )
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except (ValueError, RuntimeError) as error:
    raise InputError(
      f'the processes could not find each other: {reason(error)}; '
      'outside Cloud TPU, Slurm and Open MPI give --coordinator, '
      '--num-processes and --process-id'
    ) from None


def several() -> bool:
  """Whether this is one of several processes."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(event: str) -> None:
  """Waits until every process has come to `event`, a name for errors."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(event)


def from_first(value: int) -> int:
  """The first process's value, in every process."""
  if not several():
    return value
  return int(multihost_utils.broadcast_one_to_all(value))


def agree(trouble: Exception | None) -> Exception | None:
  """The trouble of the first process that has any, in every process.

  Args:
    trouble: an InputError or RunError of this process, or None.
  """
  if not several():
    return trouble
  kinds = {b'i': InputError, b'r': RunError}
  text = b''
  if trouble is not None:
    kind = b'i' if isinstance(trouble, InputError) else b'r'
    text = kind + str(trouble).encode()[:1000]
  # Every process sends the same number of bytes.
  ours = np.frombuffer(text.ljust(1001, b'\0'), np.uint8)
  for process, theirs in enumerate(multihost_utils.process_allgather(ours)):
    if text := theirs.tobytes().rstrip(b'\0'):
      line = text[1:].decode(errors='replace')
      return kinds[text[:1]](f'process {process}: {line}')
  return None


def shut_down() -> None:
  """Waits for the other processes and leaves; only after a normal end."""
  if several():
    jax.distributed.shutdown()
