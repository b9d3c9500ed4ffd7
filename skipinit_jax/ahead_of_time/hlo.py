"""Parses an optimized HLO module, as `compiled.as_text()` gives it.

Names become references: an instruction knows its operands, its users and the
computations that it calls. `counts` adds up what a module does.
"""

import dataclasses
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
_ARRAY = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(
  r'(calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_REFERENCE = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array type.

  Attributes:
    dtype: as HLO spells it.
    sides: its shape.
    bytes: its logical size, without the padding of tiled layouts.
    in_hbm: whether it lies in main memory: no layout S(1) or above.
  """

  dtype: str
  sides: tuple[int, ...]
  bytes: int
  in_hbm: bool

  @property
  def hbm_bytes(self) -> int:
    """Its bytes if it lies in main memory, else 0."""
    return self.bytes if self.in_hbm else 0


@dataclasses.dataclass(eq=False, repr=False)
class Instruction:
  """One line of HLO.

  Attributes:
    name, opcode: as in the text.
    arrays: of its type, in order; several for a tuple.
    attributes: the rest of the line; of a constant or a parameter its value or
      number in parentheses, as in '(7)'.
    root: whether it is its computation's result.
    operands: in order.
    users: the instructions that have this one as an operand, each with the
      operand's index.
    called: the computations that it names, by attribute: 'calls', 'body', ...;
      'branch0', 'branch1', ... for a conditional's list.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  attributes: str
  root: bool
  operands: list['Instruction'] = dataclasses.field(default_factory=list)
  users: list[tuple['Instruction', int]] = dataclasses.field(
    default_factory=list
  )
  called: dict[str, 'Computation'] = dataclasses.field(default_factory=dict)

  @property
  def value(self) -> int | None:
    """A scalar integer constant's value or a parameter's number, else None."""
    found = re.fullmatch(r'\((-?\d+)\)', self.attributes)
    return int(found[1]) if found else None

  def find(self, pattern: str) -> tuple[str, ...]:
    """The groups of a regular expression that the attributes must match."""
    found = re.search(pattern, self.attributes)
    assert found, f'{self.name}: no {pattern} in {self.attributes}'
    return found.groups()


@dataclasses.dataclass(eq=False)
class Computation:
  """Instructions, in the text's order."""

  instructions: list[Instruction]

  @property
  def root(self) -> Instruction:
    """The instruction that is the result."""
    return next(op for op in self.instructions if op.root)

  def parameter(self, number: int) -> Instruction:
    """The instruction that stands for an argument."""
    return next(
      op
      for op in self.instructions
      if op.opcode == 'parameter' and op.value == number
    )


@dataclasses.dataclass(eq=False)
class Module:
  """A program: all computations by name, and the one that it starts with."""

  computations: dict[str, Computation]
  entry: Computation


def parse(text: str) -> Module:
  """Parses the text of a module.

  Raises:
    InputError: an array of an unknown dtype.
  """
  computations: dict[str, Computation] = {}
  entry = current = Computation([])
  unresolved: list[tuple[Instruction, dict[str, Instruction], str]] = []
  names: dict[str, Instruction] = {}
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      names, current = {}, Computation([])
      computations[start[2]] = current
      entry = current if start[1] else entry
    elif found := _INSTRUCTION.match(line):
      op, operands = _parse_instruction(found[2], found[3], bool(found[1]))
      current.instructions.append(op)
      names[op.name] = op
      unresolved.append((op, names, operands))
  for op, names, operands in unresolved:
    op.operands += [
      names[name] for name in _REFERENCE.findall(operands) if name in names
    ]
    for index, operand in enumerate(op.operands):
      operand.users.append((op, index))
    for key, name in _calls(op.attributes):
      if name in computations:
        op.called.setdefault(key, computations[name])
  return Module(computations, entry)


def origin(op: Instruction) -> Instruction:
  """Follows a value back through bitcasts, copies and in-place updates.

  A fusion with one output counts as an update if its result is one.
  """
  while op.opcode in ('bitcast', 'copy'):
    op = op.operands[0]
  if op.opcode == 'fusion' and len(op.arrays) == 1:
    inner = results(op)[0]
    if inner.opcode == 'dynamic-update-slice':
      return inner
  return op


def results(fusion: Instruction) -> list[Instruction]:
  """The instructions inside a fusion that its outputs come from."""
  root = fusion.called['calls'].root
  roots = root.operands if root.opcode == 'tuple' else [root]
  return [origin(op) for op in roots]


def trip_count(loop: Instruction) -> int:
  """How often a loop runs, from the compiler's note or its condition."""
  note = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
  if note:
    return int(note[1])
  compared = list(_reachable(loop.called['condition']))
  bounds = [op.value or 0 for op in compared if op.opcode == 'constant']
  includes_bound = any('direction=LE' in op.attributes for op in compared)
  counter = re.search(
    r'index=(\d+)', ' '.join(op.attributes for op in compared)
  )
  index = int(counter[1]) if counter else 0
  initial = _element(loop.operands[0], index)
  start = 0
  if initial is not None and initial.opcode == 'constant':
    start = initial.value or 0
  following = _element(loop.called['body'].root, index)
  steps = []
  if following is not None and following.opcode == 'add':
    steps = [op.value for op in following.operands if op.opcode == 'constant']
  step = next((step for step in steps if step), 1)
  runs = max(bounds, default=0) + includes_bound - start
  return max(math.ceil(runs / step), 1)


def _element(op: Instruction, index: int) -> Instruction | None:
  """Where an element of a tuple comes from, None for what is no tuple."""
  if op.opcode != 'tuple' or index >= len(op.operands):
    return None
  return origin(op.operands[index])


def _reachable(computation: Computation) -> Iterator[Instruction]:
  yield from computation.instructions
  for op in computation.instructions:
    for called in op.called.values():
      yield from _reachable(called)


def _calls(attributes: str) -> Iterator[tuple[str, str]]:
  yield from _CALLED.findall(attributes)
  if branches := _BRANCHES.search(attributes):
    for i, name in enumerate(_REFERENCE.findall(branches[1])):
      yield f'branch{i}', name


def _parse_instruction(
  name: str, rest: str, root: bool
) -> tuple[Instruction, str]:
  """An instruction without its references, and the text of its operands."""
  # A tuple's type ends with its bracket, any other at a space.
  end = _closing(rest, 1) + 1 if rest.startswith('(') else rest.index(' ')
  opcode, _, inner = rest[end:].lstrip().partition('(')
  close = _closing(inner)
  operands, attributes = inner[:close], inner[close + 1 :]
  if opcode in ('constant', 'parameter'):
    attributes = f'({operands})'
  arrays = tuple(_arrays(rest[:end]))
  return Instruction(name, opcode, arrays, attributes, root), operands


def _closing(text: str, start: int = 0) -> int:
  """The index of the bracket that closes one opened before `start`."""
  depth = 1
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
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
      sides=lengths,
      bytes=math.ceil(math.prod(lengths) * BITS[dtype] / 8),
      in_hbm=not (space and int(space[1])),
    )
