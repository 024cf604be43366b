"""What is counted in the optimized HLO of a compiled program, of one device.

FLOPs are those of products, convolutions and LAPACK: loops count as often as they run, of branches
the one with most. What is moved between devices counts once, also in a loop or a branch.
"""

import math
import re
from typing import NamedTuple

# times n^3 of a square matrix, by a part of the name of the custom call
LAPACK = {"potrf": 1 / 3, "trsm": 1, "syevd": 9, "geqrf": 4 / 3, "orgqr": 4 / 3}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COLLECTIVE = re.compile(
  r"\s+(?:ROOT )?\S+ = (.*?)"
  r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_CALLED = re.compile(r"(?:to_apply|calls|body)=%?([\w.\-]+)")


class Instruction(NamedTuple):
  name: str
  type: str
  op: str
  rest: str  # operands and attributes


def flops(compiled) -> float:
  """Of one run of a compiled program."""
  computations, entry = _parse(compiled.as_text())
  return _of(computations, entry)


class Collective(NamedTuple):
  """An operation between devices."""

  name: str
  where: str  # "entry", or the computation that it is in: of a branch, of a loop
  bytes: int  # of what comes out of it


class Moved(NamedTuple):
  """All of them together."""

  operations: int
  bytes: int


def collectives(compiled) -> list[Collective]:
  """The operations between devices of a compiled program."""
  where, found = "", []
  for line in compiled.as_text().splitlines():
    if head := _HEAD.match(line):
      where = "entry" if head[1] else head[2]
    if match := _COLLECTIVE.match(line):
      sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * int(bits or 8) // 8
        for bits, dims in re.findall(r"(?:f|bf|s|u|c|pred)(\d*)\[([\d,]*)\]", match[1])
      ]
      found.append(Collective(match[2], where, sum(sizes)))
  return found


def moved(compiled) -> Moved:
  """How many operations between devices there are, and the bytes that come out of them."""
  found = collectives(compiled)
  return Moved(len(found), sum(own.bytes for own in found))


class Counts(NamedTuple):
  """How much a program holds."""

  conditionals: int
  loops: int
  fusions: int
  different: int  # of them, but for those of XLA's libraries


def counts(compiled) -> Counts:
  """What a compiled program holds; two fusions are the same if all but their names is."""
  text = re.sub(r", metadata=\{[^}]*\}", "", compiled.as_text())
  bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
  fusions = re.findall(r" fusion\(.*?kind=(\w+), calls=%?([\w.\-]+)", text)
  number = lambda op: len(re.findall(rf" {op}\(", text))
  own = {_anonymous(bodies[name]) for kind, name in fusions if kind != "kCustom"}
  return Counts(number("conditional"), number("while"), len(fusions), len(own))


def _anonymous(body: str) -> str:
  """The lines of a computation with numbers for names, in the order in which they come."""
  numbers: dict[str, int] = {}
  return re.sub(r"%[\w.\-]+", lambda name: f"%{numbers.setdefault(name[0], len(numbers))}", body)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  computations: dict[str, dict[str, Instruction]] = {}
  entry, own = "", {}
  for line in text.splitlines():
    if head := _HEAD.match(line):
      own = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif found := _LINE.match(line):
      own[found[1]] = Instruction(*found.groups())
  return computations, entry


def _of(computations, name: str) -> float:
  return sum(_one(computations, computations[name], own) for own in computations[name].values())


def _one(computations, known, own: Instruction) -> float:
  if own.op == "conditional":
    branches = re.search(r"branch_computations=\{([^}]*)\}", own.rest)
    names = (
      branches[1] if branches else ", ".join(re.findall(r"_computation=(%?[\w.\-]+)", own.rest))
    )
    return max(_of(computations, branch.lstrip("%")) for branch in names.split(", "))
  times = 1
  if own.op == "while":
    times = int(re.search(r'known_trip_count":\{"n":"(\d+)"', own.rest)[1])
  if own.op in ("while", "call", "fusion"):
    return times * _of(computations, _CALLED.search(own.rest)[1])
  shapes = _shapes(own.type)
  if own.op == "dot":
    left = _operand(known, own, 0)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", own.rest)[1]
    return 2.0 * math.prod(shapes[0]) * math.prod(left[int(i)] for i in contracted.split(",") if i)
  if own.op == "convolution":  # each output meets the kernel of its features
    kernel = _operand(known, own, 1)
    labels = re.search(r"dim_labels=\w+_(\w+)->", own.rest)[1]
    return 2.0 * math.prod(shapes[0]) * math.prod(kernel) / kernel[labels.index("o")]
  if own.op == "triangular-solve":
    return float(math.prod(shapes[0]) * shapes[0][-2])
  if own.op == "cholesky":
    return math.prod(shapes[0]) * shapes[0][-1] / 3
  if own.op == "custom-call":
    target = re.search(r'custom_call_target="([^"]+)"', own.rest)[1]
    share = sum(share for part, share in LAPACK.items() if part in target)
    return share * math.prod(shapes[0]) * shapes[0][-1]
  return 0.0


def _shapes(text: str) -> list[tuple[int, ...]]:
  return [
    tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", text)
  ]


def _operand(known, own: Instruction, number: int) -> tuple[int, ...]:
  """The shape of an operand, which stands before it or where it is made."""
  operands = own.rest.split("), ")[0]
  if shapes := _shapes(operands):
    return shapes[number]
  name = operands.split(",")[number].strip().rstrip(")").lstrip("%")
  return _shapes(known[name].type)[0]
