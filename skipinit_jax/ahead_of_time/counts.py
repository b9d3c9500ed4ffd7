"""Counts what an optimized HLO program does.

A compiler's own `bytes accessed` is not memory traffic: it counts operands that
stay on the chip, and the body of a loop once. The rules here:

- Traffic is the operands and outputs of the top-level instructions: what a
  fusion keeps to itself never leaves the chip.
- A buffer whose layout names a memory space, S(1), is on the chip (or on the
  host) and not counted.
- The body and condition of a loop count as often as it runs; of a conditional
  the most that any branch does, count by count.
- Where an operand is only sliced or gathered from, in fusions within fusions
  too, the bytes taken count, not the whole. A dynamic-update-slice, alone or as
  the result of a fusion, writes its update in place: where it can't, the
  compiler has put a copy before it, which counts by itself.
- An asynchronous copy, slice or collective counts at its start. Parameters,
  constants, tuples and bitcasts are no traffic.
- FLOPs are those of convolutions and matrix products, two for each
  multiplication and addition, leaving out padding and the holes of dilation.
  Elementwise work is left out. (XLA's `cost_analysis` counts elementwise work,
  and the body of a loop once; for CUDA it counts nothing.)
- For CUDA, calls of cuDNN and cuBLAS are convolutions and products too. What
  they need as workspace is chosen on a GPU only, so it is not known here.
- A launch is a top-level instruction that computes, copies or communicates: on
  a GPU a kernel or a call of a library, which may start several.
"""

import dataclasses
import functools
import math
import operator
import re

import numpy as np

from skipinit_jax.ahead_of_time.hlo import (
  Computation,
  Instruction,
  parse,
  results,
  trip_count,
)

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
FREE = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
  'domain',
)
# Calls of cuDNN: target -> the places of input, kernel and output of the
# convolution whose products it computes; RESULT is what the call returns.
RESULT = -1
CUDNN = {
  'convForward': (0, 1, RESULT),
  'convBiasActivationForward': (0, 1, RESULT),
  'convForwardGraph': (0, 1, RESULT),
  'convBackwardInput': (RESULT, 1, 0),
  'convBackwardFilter': (0, RESULT, 1),
}
_TARGET = re.compile(r'custom_call_target="__(cudnn|cublas|cub)\$([\w$]+)"')
WORKSPACE = ('u8', 's8')  # Dtypes of scratch memory that calls return too.
# Custom calls of the TPU compiler that only name memory.
NAMING = ('"AllocateBuffer"', '"ConcatBitcast"')


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a program does on one device.

  Attributes:
    hbm_bytes: to and from main memory.
    flops: of convolutions and matrix products.
    collective_bytes: handed to collectives.
    collectives, launches, sorts: how many.
  """

  hbm_bytes: float = 0
  flops: float = 0
  collective_bytes: float = 0
  collectives: float = 0
  launches: float = 0
  sorts: float = 0

  def __add__(self, other: 'Counts') -> 'Counts':
    ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Counts(*map(operator.add, ours, theirs))

  def larger(self, other: 'Counts') -> 'Counts':
    """The larger of each count."""
    ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Counts(*map(max, ours, theirs))

  def times(self, factor: float) -> 'Counts':
    """All counts, multiplied."""
    return Counts(*(factor * value for value in dataclasses.astuple(self)))


def count(text: str) -> Counts:
  """Counts an optimized HLO module, as `compiled.as_text()` gives it."""
  return _count(parse(text).entry)


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


def _count(computation: Computation) -> Counts:
  total = Counts()
  for op in computation.instructions:
    if op.opcode not in ('while', 'call', 'conditional'):
      handed = _collective(op)
      total += Counts(
        hbm_bytes=_hbm(op),
        flops=_flops(op),
        collective_bytes=handed,
        collectives=handed > 0,
        launches=_computes(op),
        sorts=_sorts(op),
      )
      continue
    inside = [_count(called) for called in op.called.values()]
    if op.opcode == 'conditional':
      total += functools.reduce(Counts.larger, inside)
    else:
      runs = trip_count(op) if op.opcode == 'while' else 1
      total += sum(inside, Counts()).times(runs)
  return total


def _computes(op: Instruction) -> bool:
  """Whether an instruction does more than name memory or wait."""
  if op.opcode in FREE or op.opcode.endswith(('-done', '-update')):
    return False
  names = op.opcode == 'custom-call' and any(n in op.attributes for n in NAMING)
  return not names


def _hbm(op: Instruction) -> float:
  """Bytes that an instruction reads from and writes to main memory."""
  if not _computes(op):
    return 0
  if op.opcode == 'copy-start':  # (destination, source, context)
    return sum(a.hbm_bytes for a in op.arrays[:2])
  if op.opcode == 'slice-start':  # ((source), destination, context)
    return sum(a.in_hbm for a in op.arrays[:2]) * op.arrays[1].bytes
  read = 0.0
  for index, operand in enumerate(op.operands):
    if whole := sum(a.hbm_bytes for a in operand.arrays):
      read += min(whole, _taken(op, index, whole))
  return _written(op) + read


def _written(op: Instruction) -> float:
  """Bytes that an instruction writes to main memory."""
  outputs = op.arrays
  if op.opcode.endswith('-start') and op.opcode != 'all-reduce-start':
    # ((operands), outputs, context ...)
    outputs = op.arrays[len(op.operands) : 2 * len(op.operands)]
  if _library(op)[0] in ('cudnn', 'cublas'):
    outputs = [a for a in outputs if a.dtype not in WORKSPACE]
  sources = [op] * len(outputs)
  if op.opcode == 'fusion':
    sources = results(op)
  if len(sources) != len(outputs):
    return sum(array.hbm_bytes for array in outputs)
  return sum(
    min(array.bytes, _size_of_update(source)) * array.in_hbm
    for array, source in zip(outputs, sources, strict=True)
  )


def _taken(op: Instruction, index: int, whole: float) -> float:
  """Bytes that an instruction reads of the operand at `index`."""
  if op.opcode in ('dynamic-slice', 'gather', 'slice') and index == 0:
    return sum(array.bytes for array in op.arrays)
  if op.opcode == 'dynamic-update-slice' and index == 0:
    return 0  # Written in place: the rest stays as it is.
  if op.opcode == 'fusion':
    return _used(op.called['calls'].parameter(index), whole)
  return whole


def _used(value: Instruction, whole: float) -> float:
  """Bytes that a computation reads of one of its values."""
  return sum(
    _used(user, whole)
    if user.opcode == 'bitcast' or _only_copies(user)
    else _taken(user, index, whole)
    for user, index in value.users
  )


def _only_copies(op: Instruction) -> bool:
  """Whether a fusion inside a fusion only copies, and so reads nothing."""
  if op.opcode != 'fusion' or len(op.operands) > 1:
    return False
  inside = {o.opcode for o in op.called['calls'].instructions}
  return inside <= {'parameter', 'bitcast', 'copy'}


def _collective(op: Instruction) -> float:
  """Bytes that a collective is given, started as an operation or alone."""
  if op.opcode == 'async-start':
    return sum(map(_collective, op.called['calls'].instructions))
  if op.opcode.removesuffix('-start') not in COLLECTIVES:
    return 0
  return sum(a.bytes for operand in op.operands for a in operand.arrays)


def _sorts(op: Instruction) -> int:
  """Sorts, as operations or inside a fusion, and those of CUB."""
  if op.opcode == 'fusion':
    return sum(map(_sorts, op.called['calls'].instructions))
  return op.opcode == 'sort' or 'Sort' in _library(op)[1]


def _library(op: Instruction) -> tuple[str, str]:
  """The CUDA library that an instruction calls and its function, or ''."""
  if op.opcode != 'custom-call':
    return '', ''
  found = _TARGET.search(op.attributes)
  return (found[1], found[2]) if found else ('', '')


def _flops(op: Instruction) -> float:
  library, function = _library(op)
  if library == 'cudnn' and function in CUDNN:
    arrays = [operand.arrays[0] for operand in op.operands] + [op.arrays[0]]
    return _convolution_flops(op, *(arrays[i].sides for i in CUDNN[function]))
  if library == 'cublas':
    left = op.operands[0].arrays[0].sides
    (axes,) = op.find(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
    contracted = [left[int(i)] for i in re.findall(r'\d+', axes)]
    return 2 * math.prod(op.arrays[0].sides) * math.prod(contracted)
  if op.opcode == 'convolution':
    left, right = (operand.arrays[0].sides for operand in op.operands[:2])
    return _convolution_flops(op, left, right, op.arrays[0].sides)
  if op.opcode == 'dot':
    left = op.operands[0].arrays[0].sides
    (axes,) = op.find(r'lhs_contracting_dims=\{([\d,]*)\}')
    contracted = [left[int(i)] for i in axes.split(',') if i]
    return 2 * math.prod(op.arrays[0].sides) * math.prod(contracted)
  if op.opcode in ('fusion', 'async-start'):
    return sum(map(_flops, op.called['calls'].instructions))
  return 0


def _convolution_flops(
  op: Instruction,
  left: tuple[int, ...],
  right: tuple[int, ...],
  output: tuple[int, ...],
) -> float:
  """Of a convolution with these sides of input, kernel and output."""
  of_left, of_right, of_output = op.find(r'dim_labels=(\w+)_(\w+)->(\w+)')
  window = re.search(r'window=\{([^}]*)\}', op.attributes)
  fields = dict(
    item.split('=') for item in (window[1].split() if window else [])
  )
  flops = 2 * output[of_output.index('b')] * output[of_output.index('f')]
  flops *= right[of_right.index('i')]
  spatial = sorted(label for label in of_output if label.isdigit())
  for i, label in enumerate(spatial):

    def field(name: str, default: int, i: int = i) -> int:
      sides = fields.get(name, '').split('x')
      return int(sides[i].split('_')[0]) if name in fields else default

    # Pairs of an output and a tap that meet an input, not padding or a hole.
    inputs, holes = left[of_left.index(label)], field('lhs_dilate', 1)
    outputs = np.arange(output[of_output.index(label)])[:, None]
    taps = np.arange(right[of_right.index(label)])
    places = outputs * field('stride', 1) + taps * field('rhs_dilate', 1)
    places -= field('pad', 0)
    inside = (places >= 0) & (places <= (inputs - 1) * holes)
    flops *= int((inside & (places % holes == 0)).sum())
  return flops


def _size_of_update(op: Instruction) -> float:
  """Bytes that a dynamic-update-slice writes; no limit for anything else."""
  if op.opcode != 'dynamic-update-slice':
    return math.inf
  return op.operands[1].arrays[0].bytes


def _elements_reduced(op: Instruction) -> float:
  """Input elements for each output element of a reduction, else 0."""
  if op.opcode == 'reduce':
    whole = math.prod(op.operands[0].arrays[0].sides)
    return whole / max(math.prod(op.arrays[0].sides), 1)
  if op.opcode == 'reduce-window':
    (window,) = op.find(r'size=([\dx]+)')
    return math.prod(int(side) for side in window.split('x'))
  return 0
