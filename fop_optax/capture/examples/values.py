"""What the analysis of examples knows of a variable: one of `Constant`, `Batch` and `Unknown`.

Nothing is said of a value that is not understood: `Unknown` swallows what comes after it, and makes
neither an error nor a warning.
"""

from collections.abc import Hashable, Sequence
import dataclasses
import math
from typing import NamedTuple

Numbers = tuple[float, float | None]  # in the trace at hand, and in that of twice the examples


class Cause(NamedTuple):
  """How examples come to depend on each other or on their place in the batch.

  `kind` is a key of `assumptions.WORDS`; `root` names the variable whose moments are meant.
  """

  kind: str
  source: str
  root: Hashable = None


class Piece(NamedTuple):
  """The examples along an axis of an array, of size `outer * size * inner`.

  All of them have `stride` 1; a reshape of the batch into chunks makes two pieces, example `n`
  being at `n // stride % size` in each. An axis below zero is a step of an enclosing scan: -1 of
  the outermost.
  """

  axis: int
  size: int
  outer: int = 1
  inner: int = 1
  stride: int = 1


class Moment(NamedTuple):
  """A value made of the variable `root`: itself or its square, or of means of these."""

  root: Hashable
  power: int  # 2 if a square or a second moment takes part


@dataclasses.dataclass(frozen=True)
class Count:
  """Of how many entries a value is a mean.

  Attributes:
    sizes: of the axes that were summed over, and not yet divided by.
    means: the numbers of entries already divided by, as pairs of that and the source line; several
      where terms add up that are means over different numbers.
  """

  sizes: tuple[int, ...] = ()
  means: frozenset[tuple[int, str]] = frozenset({(1, "")})

  def summed(self, sizes: Sequence[int]) -> "Count":
    return dataclasses.replace(self, sizes=self.sizes + tuple(n for n in sizes if n > 1))

  def divided(self, number: float, source: str) -> "Count":
    """After a division by `number`: a mean, if that is the product of some sizes."""
    left = self._without(number)
    if left is None:
      return self
    means = frozenset((n * round(number), source) for n, _ in self.means)
    return Count(left, means)

  def over(self, weights: "Count", source: str) -> "Count":
    """After a division by a sum of weights, which counts entries."""
    total, means = math.prod(weights.sizes), frozenset({(1, "")})
    if weights.means != means or not weights.sizes:
      return self
    left = list(self.sizes)
    for size in weights.sizes:
      if size in left:
        left.remove(size)
    return Count(tuple(left), frozenset((n * total, source) for n, _ in self.means))

  def weighted(self, weights: "Count") -> "Count":
    """After a product with weights of each entry, which may be normalised."""
    sizes = max(self.sizes, weights.sizes, key=len)
    pairs = [(a, b) for a in self.means for b in weights.means]
    return Count(sizes, frozenset((n * m, first or second) for (n, first), (m, second) in pairs))

  def added(self, other: "Count", kept: bool) -> "Count":
    """The count of a sum; where the two differ it is both of them if `kept`, else none."""
    left = list(other.sizes)
    shared = []
    for size in self.sizes:
      if size in left:
        left.remove(size)
        shared.append(size)
    means = dict(self.means) | dict(other.means)
    if len(means) > 1 and not kept:
      return Count(tuple(shared))
    return Count(tuple(shared), frozenset(means.items()))

  def _without(self, number: float) -> tuple[int, ...] | None:
    """The sizes without some whose product is `number`."""
    if number < 2 or number != round(number):
      return None
    options: dict[int, tuple[int, ...]] = {1: ()}  # product -> which sizes
    for place, size in enumerate(self.sizes):
      options = {
        product * n: (*taken, *extra)
        for product, taken in reversed(options.items())
        for n, extra in ((size, (place,)), (1, ()))
      }
    taken = options.get(round(number))
    if taken is None:
      return None
    return tuple(size for place, size in enumerate(self.sizes) if place not in taken)


@dataclasses.dataclass(frozen=True)
class Constant:
  """A value that does not depend on the examples: a parameter, a number, noise.

  Attributes:
    uniform: axes along which all entries are equal.
    free: nothing is claimed of how it varies: of noise, and where a step is not known.
    iota: the axis along which the entries count 0, 1, 2 ...
    numbers: the value of every entry, where it is known.
    degree: it goes with that power of the number of examples; None if not known.
    active: whether it depends on the parameters.
    columns: what was joined along the last axis, piece by piece.
  """

  uniform: frozenset[int] = frozenset()
  free: bool = False
  iota: int | None = None
  numbers: Numbers | None = None
  degree: float | None = 0.0
  active: bool = False
  columns: tuple["Value", ...] = ()

  def constant_along(self, axis: int) -> bool:
    return self.free or self.numbers is not None or axis in self.uniform


@dataclasses.dataclass(frozen=True)
class Batch:
  """A value that depends on the examples.

  Attributes:
    pieces: where they lie; empty if it is a sum over them, or another statistic of them.
    summed: whether it is summed over some of them.
    bent: why it is no linear function of that sum.
    degree: goes with that power of the number of examples if each is repeated; None if not known.
    active: whether it depends on the parameters.
    factor: set if it is a value of each example times a sum of weights, to a power.
    moment: which moment of which variable it is.
    count: of how many entries it is a mean.
    causes: how examples have come to depend on each other.
    source: the line where examples were summed.
    columns: what was joined along the last axis, piece by piece.
  """

  pieces: tuple[Piece, ...]
  summed: bool = False
  bent: Cause | None = None
  degree: float | None = 0.0
  active: bool = False
  factor: Cause | None = None
  moment: Moment | None = None
  count: Count = Count()
  causes: frozenset[Cause] = frozenset()
  source: str = ""
  columns: tuple["Value", ...] = ()

  def at(self, axis: int) -> Piece | None:
    """The piece along an axis."""
    return next((piece for piece in self.pieces if piece.axis == axis), None)


@dataclasses.dataclass(frozen=True)
class Unknown:
  """A value of which nothing is known but what had happened before."""

  causes: frozenset[Cause] = frozenset()


Known = Constant | Batch
Value = Known | Unknown


def causes_of(values: Sequence[Value]) -> frozenset[Cause]:
  """All causes of some values."""
  return frozenset().union(*(v.causes for v in values if not isinstance(v, Constant)))


def join(first: Value, second: Value) -> Value:
  """What is known of a value that is one or the other: of two branches, of steps of a loop."""
  if first == second:
    return first
  if isinstance(first, Constant) and isinstance(second, Constant):
    return Constant(
      uniform=first.uniform & second.uniform,
      free=first.free or second.free,
      degree=first.degree if first.degree == second.degree else None,
      active=first.active or second.active,
    )
  if isinstance(first, Constant):
    first, second = second, first
  if isinstance(first, Batch) and isinstance(second, Constant):
    active = first.active or second.active
    return dataclasses.replace(first, active=active, moment=None, count=Count(), columns=())
  if isinstance(first, Batch) and isinstance(second, Batch) and first.pieces == second.pieces:
    return Batch(
      first.pieces,
      first.summed or second.summed,
      first.bent or second.bent,
      first.degree if first.degree == second.degree else None,
      first.active or second.active,
      first.factor or second.factor,
      count=first.count.added(second.count, first.summed),
      causes=first.causes | second.causes,
      source=first.source or second.source,
    )
  return Unknown(causes_of([first, second]))
