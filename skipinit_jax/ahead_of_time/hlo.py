"""Counts what an optimized HLO program does, from its text.

A compiler's own `bytes accessed` is not memory traffic: it counts operands that
stay on the chip, and the body of a loop once. The rules here:

- Traffic is the operands and outputs of the top-level instructions: what a
  fusion keeps to itself never leaves the chip.
- A buffer whose layout names a memory space, S(1), is on the chip (or on the
  host) and not counted.
- The body and condition of a loop count as often as it runs, the larger branch
  of a conditional once.
- Where an operand is only sliced or gathered from, in fusions within fusions
  too, what is taken counts, not the whole. A dynamic-update-slice, alone or as
  the result of a fusion, writes its update in place: where it can't, the
  compiler has put a copy before it, which counts by itself.
- An asynchronous copy, slice or collective counts at its start. Parameters,
  constants, tuples and bitcasts are no traffic.
- FLOPs are those of convolutions and matrix products, two a multiplication and
  addition, leaving out padding and the holes of dilation. Elementwise work is
  left out.

Sizes are logical, without the padding of tiled layouts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from skipinit_jax.errors import InputError, unknown

WIDTHS = {
  1: 's1 u1',
  2: 's2 u2',
  4: 's4 u4 f4e2m1fn',
  8: 'pred s8 u8 f8e3m4 f8e4m3 f8e4m3fn f8e4m3b11fnuz f8e4m3fnuz f8e5m2 '
  'f8e5m2fnuz f8e8m0fnu',
  16: 's16 u16 f16 bf16',
  32: 's32 u32 f32',
  64: 's64 u64 f64 c64',
  128: 'c128',
}
BITS = {name: bits for bits, names in WIDTHS.items() for name in names.split()}
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
# Custom calls of the TPU compiler that only name memory.
NAMING = ('"AllocateBuffer"', '"ConcatBitcast"')
_ARRAY = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
  """An array type: its bytes, its sides, and whether it lies in main memory."""

  dtype: str
  bytes: int
  sides: tuple[int, ...]
  in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name, opcode: as in the text.
    arrays: of its type, in order; several for a tuple.
    operands: names.
    attributes: the rest of the line.
    root: whether it is its computation's result.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a program does, on one device."""

  hbm_bytes: float = 0
  flops: float = 0
  collective_bytes: float = 0

  def __add__(self, other: 'Counts') -> 'Counts':
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))  # noqa: B905
    return Counts(*(a + b for a, b in pairs))

  def times(self, factor: float) -> 'Counts':
    """All counts, so many times."""
    return Counts(*(factor * v for v in dataclasses.astuple(self)))


def count(text: str) -> Counts:
  """Counts an optimized HLO module, as `compiled.as_text()` gives it."""
  return Program(text).count()


class Program:
  """An HLO module, parsed.

  Attributes:
    computations: name -> instruction's name -> instruction.
    entry: name of the entry computation.
  """

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ''
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      if start := _COMPUTATION.match(line):
        current = self.computations[start[2]] = {}
        if start[1]:
          self.entry = start[2]
      elif found := _INSTRUCTION.match(line):
        current[found[1]] = _parse(line, found[1], found[2])

  def count(self) -> Counts:
    """Everything, loops as often as they run."""
    return self._computation(self.entry)

  def traffic(self) -> Iterator[tuple[float, int, str]]:
    """HBM bytes, runs and name of every instruction, for a look op by op."""
    yield from self._traffic(self.entry, 1)

  def _traffic(self, name: str, runs: int) -> Iterator[tuple[float, int, str]]:
    for op in self.computations[name].values():
      if op.opcode in ('while', 'call'):
        for inner in _CALLED.findall(op.attributes):
          times = self.trip_count(op) if op.opcode == 'while' else 1
          yield from self._traffic(inner, runs * times)
      else:
        own = self._hbm(op, self.computations[name])
        if own:
          yield runs * own, runs, op.name

  @functools.cache  # noqa: B019
  def _computation(self, name: str) -> Counts:
    ops = self.computations[name]
    total = Counts()
    for op in ops.values():
      called = _CALLED.findall(op.attributes)
      if op.opcode == 'while':
        inside = sum(map(self._computation, called), Counts())
        total += inside.times(self.trip_count(op))
      elif op.opcode == 'call':
        total += sum(map(self._computation, called), Counts())
      elif op.opcode == 'conditional':
        names = called or re.findall(
          r'%([\w.\-]+)', op.attributes.split('branch_computations=')[-1]
        )
        total += max(map(self._computation, names), key=lambda c: c.hbm_bytes)
      else:
        total += Counts(
          hbm_bytes=self._hbm(op, ops),
          flops=self._flops(op, ops),
          collective_bytes=self._collective(op, ops),
        )
    return total

  def narrow_sums(self, dtype: str = 'bf16', more_than: int = 512) -> list[str]:
    """The reductions that add up many elements in a narrow dtype.

    A bfloat16 sum of equal terms stops growing at 256 of them.

    Args:
      dtype: of the accumulator, as HLO spells it.
      more_than: elements that go into one element of the result.

    Returns:
      The names of the instructions, those inside fusions and loops included.
    """
    return [
      op.name
      for ops in self.computations.values()
      for op in ops.values()
      if any(a.dtype == dtype for a in op.arrays)
      and _elements_reduced(op, ops) > more_than
      and self._adds(op)
    ]

  def _adds(self, reduction: Instruction) -> bool:
    """Whether a reduction is a sum, not a maximum or an argmax."""
    called = self.computations[_CALLED.search(reduction.attributes)[1]]
    return any(op.opcode == 'add' for op in called.values())

  def trip_count(self, loop: Instruction) -> int:
    """How often a loop runs, from the compiler's note or its condition."""
    if known := re.search(
      r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes
    ):
      return int(known[1])
    names = dict(re.findall(r'(condition|body)=%?([\w.\-]+)', loop.attributes))
    compared = [
      op
      for name in self._reachable(names['condition'])
      for op in self.computations[name].values()
    ]
    bound = max((_value(op) or 0 for op in compared), default=0)
    last = any('direction=LE' in op.attributes for op in compared)
    counter = re.search(
      r'index=(\d+)', ' '.join(op.attributes for op in compared)
    )
    start, step = self._start_and_step(
      loop, names['body'], int(counter[1]) if counter else 0
    )
    return max(math.ceil((bound + last - start) / step), 1)

  def _start_and_step(
    self, loop: Instruction, body: str, index: int
  ) -> tuple[int, int]:
    """Of a loop's counter, 0 and 1 where the program does not show them."""
    outside = next(
      ops for ops in self.computations.values() if ops.get(loop.name) is loop
    )
    initial = self._element(outside[loop.operands[0]], index, outside)
    inside = self.computations[body]
    root = next(op for op in inside.values() if op.root)
    following = self._element(root, index, inside)
    steps = []
    if following is not None and following.opcode == 'add':
      steps = [_value(inside[name]) for name in following.operands]
    start = None if initial is None else _value(initial)
    return start or 0, next((step for step in steps if step), 1)

  def _element(
    self, op: Instruction, index: int, ops: dict[str, Instruction]
  ) -> Instruction | None:
    """Where an element of a tuple comes from, None for what is no tuple."""
    if op.opcode != 'tuple' or index >= len(op.operands):
      return None
    return self._origin(ops[op.operands[index]], ops)[0]

  def _reachable(self, name: str) -> list[str]:
    names = [name]
    for op in self.computations[name].values():
      for called in _CALLED.findall(op.attributes):
        names += self._reachable(called)
    return names

  def _hbm(self, op: Instruction, ops: dict[str, Instruction]) -> float:
    opcode = op.opcode
    if opcode in FREE or opcode.endswith(('-done', '-update')):
      return 0
    if opcode == 'custom-call' and any(n in op.attributes for n in NAMING):
      return 0
    if opcode == 'copy-start':  # (destination, source, context)
      return sum(map(_in_hbm, op.arrays[:2]))
    if opcode == 'slice-start':  # ((source), destination, context)
      return sum(a.in_hbm for a in op.arrays[:2]) * op.arrays[1].bytes
    read = 0.0
    for place, name in enumerate(op.operands):
      if name in ops:
        whole = sum(map(_in_hbm, ops[name].arrays))
        taken = self._taken(op, place, whole, ops) if whole else 0
        read += min(whole, taken)
    return self._written(op, ops) + read

  def _written(self, op: Instruction, ops: dict[str, Instruction]) -> float:
    """Bytes that an instruction writes to main memory."""
    outputs = op.arrays
    starts = op.opcode.endswith('-start') and op.opcode != 'all-reduce-start'
    if starts:  # ((operands), outputs, context ...)
      outputs = op.arrays[len(op.operands) : 2 * len(op.operands)]
    results = [(op, ops)] * len(outputs)
    if op.opcode == 'fusion':
      results = self._results(op)
    if len(results) != len(outputs):
      return sum(map(_in_hbm, outputs))
    return sum(
      min(array.bytes, _size_of_update(*result)) * array.in_hbm
      for array, result in zip(outputs, results, strict=True)
    )

  def _results(self, fusion: Instruction) -> list[tuple[Instruction, dict]]:
    """What a fusion's outputs come from, with the computation it is in."""
    inside = self.computations[_CALLED.search(fusion.attributes)[1]]
    root = next(op for op in inside.values() if op.root)
    roots = [root]
    if root.opcode == 'tuple':
      roots = [inside[name] for name in root.operands]
    return [self._origin(op, inside) for op in roots]

  def _origin(self, op, ops) -> tuple[Instruction, dict]:
    """Follows a value back through what does not change it."""
    while op.opcode in ('bitcast', 'copy'):
      op = ops[op.operands[0]]
    if op.opcode == 'fusion' and len(op.arrays) == 1:
      origin, inside = self._results(op)[0]
      if origin.opcode == 'dynamic-update-slice':
        return origin, inside
    return op, ops

  def _taken(self, op, place: int, whole: float, ops) -> float:
    """Bytes that an instruction reads of its operand at `place`."""
    if op.opcode in ('dynamic-slice', 'gather', 'slice') and place == 0:
      return sum(array.bytes for array in op.arrays)
    if op.opcode == 'dynamic-update-slice' and place == 0:
      return 0  # Written in place: what is not updated stays as it is.
    if op.opcode != 'fusion':
      return whole
    inside = self.computations[_CALLED.search(op.attributes)[1]]
    return self._used(_parameter(inside, place), whole, inside)

  def _used(self, value: Instruction, whole: float, ops) -> float:
    """Bytes that a computation reads of one of its values."""
    taken = 0.0
    for user in ops.values():
      for place, name in enumerate(user.operands):
        if name != value.name:
          continue
        if user.opcode == 'bitcast' or self._passes_on(user):
          taken += self._used(user, whole, ops)
        else:
          taken += self._taken(user, place, whole, ops)
    return taken

  def _passes_on(self, op: Instruction) -> bool:
    """Whether a fusion inside a fusion only copies, and so reads nothing."""
    if op.opcode != 'fusion' or len(op.operands) > 1:
      return False
    inside = self.computations[_CALLED.search(op.attributes)[1]]
    return {o.opcode for o in inside.values()} <= {
      'parameter',
      'bitcast',
      'copy',
    }

  def _collective(self, op: Instruction, ops: dict[str, Instruction]) -> float:
    """Bytes that a collective is given, started as an operation or alone."""
    if op.opcode == 'async-start':
      inside = self.computations[_CALLED.search(op.attributes)[1]]
      return sum(self._collective(o, inside) for o in inside.values())
    if op.opcode.removesuffix('-start') not in COLLECTIVES:
      return 0
    return sum(a.bytes for name in op.operands for a in ops[name].arrays)

  def _flops(self, op: Instruction, ops: dict[str, Instruction]) -> float:
    if op.opcode == 'convolution':
      return _convolution_flops(op, ops)
    if op.opcode == 'dot':
      left = ops[op.operands[0]].arrays[0].sides
      axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', op.attributes)
      contracted = [left[int(i)] for i in axes[1].split(',') if i]
      return 2 * math.prod(op.arrays[0].sides) * math.prod(contracted)
    if op.opcode in ('fusion', 'async-start'):
      names = _CALLED.findall(op.attributes)
      return sum(
        self._flops(inner, self.computations[name])
        for name in names
        for inner in self.computations[name].values()
      )
    return 0


def _parse(line: str, name: str, rest: str) -> Instruction:
  end = _end_of_type(rest)
  kind, after = rest[:end], rest[end:].lstrip()
  opcode, _, inner = after.partition('(')
  close = _closing(inner)
  operands = re.findall(r'%([\w.\-]+)', inner[:close])
  attributes = inner[close + 1 :]
  if opcode in ('constant', 'parameter'):
    attributes = f'({inner[:close]})'
  return Instruction(
    name=name,
    opcode=opcode,
    arrays=tuple(_arrays(kind)),
    operands=tuple(operands),
    attributes=attributes,
    root=line.lstrip().startswith('ROOT '),
  )


def _end_of_type(text: str) -> int:
  """Where an instruction's type ends: after a tuple's bracket, or a word."""
  if not text.startswith('('):
    return text.index(' ')
  return _closing(text[1:]) + 2


def _closing(text: str) -> int:
  """The place of the bracket that closes one opened before `text`."""
  depth = 1
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return i
  return len(text)


def _arrays(kind: str) -> Iterator[Array]:
  for dtype, sides, layout in _ARRAY.findall(kind):
    if dtype in ('token', 'opaque'):
      continue
    if dtype not in BITS:
      raise InputError(unknown('dtype in an HLO program', dtype, BITS))
    lengths = tuple(int(s.lstrip('<=')) for s in sides.split(',') if s)
    space = re.search(r'S\((\d+)\)', layout)
    yield Array(
      dtype=dtype,
      bytes=math.ceil(math.prod(lengths) * BITS[dtype] / 8),
      sides=lengths,
      in_hbm=not (space and int(space[1])),
    )


def _in_hbm(array: Array) -> int:
  return array.bytes if array.in_hbm else 0


def _size_of_update(op: Instruction, ops: dict[str, Instruction]) -> float:
  """Bytes that a dynamic-update-slice writes; no limit for anything else."""
  if op.opcode != 'dynamic-update-slice':
    return math.inf
  return ops[op.operands[1]].arrays[0].bytes


def _elements_reduced(op: Instruction, ops: dict[str, Instruction]) -> float:
  """Input elements for each output element of a reduction, else 0."""
  if op.opcode == 'reduce':
    whole = math.prod(ops[op.operands[0]].arrays[0].sides)
    return whole / max(math.prod(op.arrays[0].sides), 1)
  if op.opcode == 'reduce-window':
    window = re.search(r'size=([\dx]+)', op.attributes)
    return math.prod(int(side) for side in window[1].split('x'))
  return 0


def _value(op: Instruction) -> int | None:
  """The value of a scalar integer constant, None for anything else."""
  found = re.fullmatch(r'\((-?\d+)\)', op.attributes)
  return int(found[1]) if op.opcode == 'constant' and found else None


def _parameter(ops: dict[str, Instruction], number: int) -> Instruction:
  return next(
    op
    for op in ops.values()
    if op.opcode == 'parameter' and op.attributes == f'({number})'
  )


def _convolution_flops(op: Instruction, ops: dict[str, Instruction]) -> float:
  left, right = (ops[name].arrays[0].sides for name in op.operands[:2])
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', op.attributes)
  of_left, of_right, of_output = labels[1], labels[2], labels[3]
  output = op.arrays[0].sides
  flops = 2 * output[of_output.index('b')] * output[of_output.index('f')]
  flops *= right[of_right.index('i')]
  window = re.search(r'window=\{([^}]*)\}', op.attributes)
  fields = dict(
    item.split('=') for item in (window[1].split() if window else [])
  )
  spatial = sorted(label for label in of_output if label.isdigit())
  for i, label in enumerate(spatial):

    def field(name: str, default: str, i: int = i) -> str:
      return fields[name].split('x')[i] if name in fields else default

    low, _ = (int(v) for v in field('pad', '0_0').split('_'))
    flops *= _pairs(
      inputs=left[of_left.index(label)],
      taps=right[of_right.index(label)],
      outputs=output[of_output.index(label)],
      low=low,
      stride=int(field('stride', '1')),
      holes=int(field('lhs_dilate', '1')),
      spread=int(field('rhs_dilate', '1')),
    )
  return flops


def _pairs(inputs, taps, outputs, low, stride, holes, spread) -> int:
  """(output, tap) pairs of one axis that meet an input and not padding."""
  pairs = 0
  for tap in range(taps):
    for out in range(outputs):
      place = out * stride + tap * spread - low
      pairs += 0 <= place <= (inputs - 1) * holes and place % holes == 0
  return pairs
