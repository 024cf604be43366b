"""What the analysis of examples knows of a variable: one of `Constant`, `Batch` and `Unknown`.

Nothing is said of a value that is not understood: `Unknown` swallows what comes after it, and makes
neither an error nor a warning.
"""

from collections.abc import Hashable, Sequence
import dataclasses
import math
from typing import NamedTuple

from fop_optax.capture.values import Path

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


class Mean(NamedTuple):
  """A mean of so many entries, taken at a line; a weighted one says by which weights.

  `weights` are the path of the equation that sums them up, and their number: entries that a mask
  leaves out are among the `entries`, and only its values say how many these are.
  """

  entries: int = 1
  source: str = ""
  weights: tuple[Path, int] | None = None


@dataclasses.dataclass(frozen=True)
class Count:
  """Of how many entries a value is a mean.

  Attributes:
    sizes: of the axes that were summed over, and not yet divided by.
    means: those taken so far, multiplied; several where terms add up that are means over different
      numbers.
    summed_at: the path of the first sum over axes.
  """

  sizes: tuple[int, ...] = ()
  means: frozenset[Mean] = frozenset({Mean()})
  summed_at: Path | None = None

  def summed(self, sizes: Sequence[int], path: Path | None) -> "Count":
    sizes = tuple(n for n in sizes if n > 1)
    first = path if sizes and not self.sizes and self.summed_at is None else self.summed_at
    return dataclasses.replace(self, sizes=self.sizes + sizes, summed_at=first)

  def divided(self, number: float, source: str) -> "Count":
    """After a division by `number`: a mean, if that is the product of some sizes."""
    left = self._without(number)
    if left is None:
      return self
    means = (m._replace(entries=m.entries * round(number), source=source) for m in self.means)
    return dataclasses.replace(self, sizes=left, means=frozenset(means))

  def over(self, weights: "Count", source: str) -> "Count":
    """After a division by a sum of weights, which counts entries, or by their mean."""
    sizes, (of_weights, *more) = weights.sizes, weights.means
    if more or bool(sizes) == (of_weights.entries > 1):
      return self
    if not sizes:  # a mean over a mean: of the same entries
      number = of_weights.entries
      by = (weights.summed_at, number) if weights.summed_at else None
      known = lambda m: by if m.entries == number and m.weights is None else None
      means = (m._replace(weights=known(m)) for m in self.means)
      return dataclasses.replace(self, means=frozenset(means))
    total, left = math.prod(sizes), list(self.sizes)
    for size in sizes:
      if size in left:
        left.remove(size)
    # weights that are normalised before the sum, or of all that was summed
    whole = math.prod(self.sizes) in (1, total)
    by = (weights.summed_at, total) if whole and weights.summed_at else None
    means = (Mean(m.entries * total, source, by if m.weights is None else None) for m in self.means)
    return dataclasses.replace(self, sizes=tuple(left), means=frozenset(means))

  def weighted(self, weights: "Count") -> "Count":
    """After a product with weights of each entry, which may be normalised."""
    longer = max(self, weights, key=lambda count: len(count.sizes))
    means = frozenset(_both(a, b) for a in self.means for b in weights.means)
    return dataclasses.replace(longer, means=means)

  def added(self, other: "Count", kept: bool) -> "Count":
    """The count of a sum; where the two differ it is both of them if `kept`, else none."""
    left = list(other.sizes)
    shared = []
    for size in self.sizes:
      if size in left:
        left.remove(size)
        shared.append(size)
    at = self.summed_at if self.summed_at == other.summed_at else None
    means: dict[int, Mean] = {}
    for mean in (*self.means, *other.means):
      before = means.get(mean.entries, mean)
      same = mean.weights == before.weights
      means[mean.entries] = mean if same else mean._replace(weights=None)
    if len(means) > 1 and not kept:
      return Count(tuple(shared), summed_at=at)
    return Count(tuple(shared), frozenset(means.values()), at)

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


def _both(first: Mean, second: Mean) -> Mean:
  """The mean of a product; of two kinds of weights nothing is known."""
  one = first.weights is None or second.weights is None
  weights = (first.weights or second.weights) if one else None
  return Mean(first.entries * second.entries, first.source or second.source, weights)


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
