"""Finds sums in an optimized HLO program that lose terms."""

import math

from skipinit_jax.ahead_of_time.hlo import Instruction, parse


def narrow_sums(
  text: str, dtype: str = 'bf16', more_than: int = 512
) -> list[str]:
  """The reductions that add up many elements in a narrow dtype.

  A bfloat16 sum of equal terms stops growing at 256 of them.

  Args:
    text: an optimized HLO module.
    dtype: of the accumulator, as HLO spells it.
    more_than: elements that go into one element of the result.

  Returns:
    The names of the instructions, including those inside fusions and loops.
  """
  return [
    op.name
    for computation in parse(text).computations.values()
    for op in computation.instructions
    if any(array.dtype == dtype for array in op.arrays)
    and _elements_reduced(op) > more_than
    and any(o.opcode == 'add' for o in op.called['to_apply'].instructions)
  ]


def _elements_reduced(op: Instruction) -> float:
  """Input elements for each output element of a reduction, else 0."""
  if op.opcode == 'reduce':
    whole = math.prod(op.operands[0].arrays[0].sides)
    return whole / max(math.prod(op.arrays[0].sides), 1)
  if op.opcode == 'reduce-window':
    (window,) = op.find(r'size=([\dx]+)')
    return math.prod(int(side) for side in window.split('x'))
  return 0
