"""Sums, products and functions of values entry by entry.

`role` says what an equation does: `"add"`, `"sub"`, `"mul"`, `"div"`, `"select"` (the choice comes
first), `"bound"` (maximum, minimum, clamp), `"compare"` (`"below"` is one), `"square"`, `"same"`
(casts, copies), `"negative"`, or `"other"`, any other function.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

from fop_optax.capture.examples.values import (
  Batch,
  Cause,
  Constant,
  Count,
  Known,
  Moment,
  Numbers,
  Unknown,
  Value,
  causes_of,
)


class Site(NamedTuple):
  """Where an equation stands: its name as a root, its source line, and the number of examples."""

  name: Hashable
  source: Callable[[], str]
  examples: int


def degree_of(numbers: Numbers | None, examples: int) -> float | None:
  """With which power of the number of examples a number goes: 1 for N, -1 for 1 / N."""
  if numbers is None:
    return 0.0
  number, twice = numbers
  if twice is None:  # one trace only: it may be made of N
    near = [n for n in (number, 1 / number if number else 0) if abs(n - round(n)) < 1e-4]
    return None if any(n and round(n) % examples == 0 for n in near) else 0.0
  if number == twice:
    return 0.0
  if not number or not twice or (number < 0) != (twice < 0):
    return None
  degree = math.log2(twice / number)
  return float(round(degree * 2) / 2) if abs(degree * 2 - round(degree * 2)) < 0.3 else None


def elementwise(
  site: Site, role: str, operands: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> Value:
  """The value of `role` applied to operands of these shapes, equal but for axes of size one."""
  known = [v for v in operands if not isinstance(v, Unknown)]
  if len(known) < len(operands):
    return Unknown(causes_of(operands))
  batch = [v for v in known if isinstance(v, Batch)]
  if not batch:
    return _constants(site, role, [v for v in known if isinstance(v, Constant)], shapes)
  if role == "same":
    return known[0]
  role = {"sub": "add", "below": "compare"}.get(role, role)
  widest = max(batch, key=lambda v: len(v.pieces))
  causes = causes_of(batch)
  peers: list[Known] = []
  statistics = []
  for number, v in enumerate(known):
    if isinstance(v, Constant) or v.pieces == widest.pieces:
      peers.append(v)
    elif set(v.pieces) < set(widest.pieces) and v.summed:
      statistics.append((number, v))
    elif site.examples == 1 or set(v.pieces) < set(widest.pieces):
      return Unknown(causes)
    else:
      causes |= {Cause("pairs", site.source())}
  if any(_aligned(v, widest, shape) for v, shape in zip(known, shapes, strict=True)):
    causes |= {Cause("place", site.source())}
  choice = known[0] if role == "select" else None
  out = _peers(site, role, peers, choice)
  out = dataclasses.replace(out, causes=out.causes | causes)
  for number, v in statistics:
    out = _with_statistic(site, role, out, v, number)
  return out


def _aligned(value: Value, widest: Batch, shape: tuple[int, ...]) -> bool:
  """Whether a constant differs from example to example."""
  return isinstance(value, Constant) and any(
    0 <= piece.axis < len(shape)
    and piece[1:] == (shape[piece.axis], 1, 1, 1)
    and piece.size > 1
    and not value.constant_along(piece.axis)
    for piece in widest.pieces
  )


def _peers(site: Site, role: str, peers: Sequence[Known], choice: Known | None) -> Batch:
  """Values that have the examples at the same axes, and constants."""
  batch = [v for v in peers if isinstance(v, Batch)]
  first = batch[0]
  cases = batch[1:] if choice is first and len(batch) > 1 else batch
  active = any(v.active for v in (*peers, *cases)) and role != "compare"
  out = Batch(
    first.pieces,
    summed=any(v.summed for v in batch),
    degree=_degree(role, peers, cases, site),
    active=active,
    moment=_moment(site, role, peers),
    count=_count(site, role, peers, cases),
    source=next((v.source for v in batch if v.source), ""),
  )
  if out.summed:
    return dataclasses.replace(out, bent=_bent(site, role, peers, cases))
  factors = [v.factor for v in batch if v.factor]
  if not factors:
    return out
  kept = role in ("add", "mul", "negative") or (role == "div" and batch[-1].factor is None)
  kept = kept or (role == "select" and all(v.factor is None for v in batch if v not in cases))
  kept = kept or (role == "div" and len(batch) == 1 and peers[0] is first)
  if kept:
    return dataclasses.replace(out, factor=factors[0])
  return dataclasses.replace(out, causes=frozenset(factors))


def _degree(role: str, peers: Sequence[Known], cases: Sequence[Batch], site: Site) -> float | None:
  degrees = [
    degree_of(v.numbers, site.examples) if isinstance(v, Constant) and v.numbers else v.degree
    for v in peers
  ]
  own = [v.degree for v in cases]
  if role in ("negative", "compare"):
    return own[0] if role == "negative" else 0.0
  if role in ("add", "select", "bound"):
    if None in own:
      return None
    if len(set(own)) > 1:
      return max((d for d in own if d is not None), key=abs)
    others = {v.degree for v in peers if isinstance(v, Constant) and v.numbers != (0.0, 0.0)}
    if role == "add" and own[0] and not cases[0].summed and others - set(own):
      return None
    return own[0]
  if None in degrees:
    return None
  known = [d for d in degrees if d is not None]
  if role == "mul":
    return sum(known)
  if role == "div":
    return known[0] - sum(known[1:])
  if role == "square":
    return 2 * known[0]
  return None if any(known) else 0.0


def _bent(site: Site, role: str, peers: Sequence[Known], cases: Sequence[Batch]) -> Cause | None:
  """Why a function of sums over examples is not linear in them, if it is not."""
  bent = next((v.bent for v in cases if v.bent), None)
  if role in ("add", "negative", "select"):
    return bent
  if role == "compare":
    return None
  moving = [v for v in cases if v.active]
  if role in ("mul", "div"):
    last = peers[-1]
    below = role == "div" and isinstance(last, Batch) and last.active
    weights = [v for v in cases if not v.active] if moving else []
    even = all(_weighs(v, role) for v in weights)
    if len(moving) <= 1 and not below and even:
      return next((v.bent for v in moving if v.bent), None) if moving else bent
  if role == "bound" and not moving:
    return bent
  return bent or Cause("statistic", site.source())


def _weighs(statistic: Batch, role: str) -> bool:
  """Whether it is a sum of weights that something is divided by; a mean of them counts too."""
  degree = statistic.degree
  return degree is None or degree < 0 or (role == "div" and degree >= 0)


def _moment(site: Site, role: str, peers: Sequence[Known]) -> Moment | None:
  batch = [v for v in peers if isinstance(v, Batch)]
  roots = {v.moment.root if v.moment else None for v in batch}
  (root,) = roots if len(roots) == 1 else (None,)
  power = max(v.moment.power if v.moment else 1 for v in batch)
  if any(v.summed for v in batch):  # functions of moments and of constants
    return Moment(root, power) if root is not None else None
  if root is not None and (role == "square" or (role == "mul" and len(batch) == 2)):
    return Moment(root, 2) if power == 1 else Moment(site.name, 1)
  numbers = all(isinstance(v, Batch) or (isinstance(v, Constant) and v.numbers) for v in peers)
  scaled = role in ("mul", "div", "negative") and numbers
  if root is not None and len(batch) == 1 and (scaled or len(peers) == 1) and role != "other":
    return Moment(root, power)
  return Moment(site.name, 1)


def _count(site: Site, role: str, peers: Sequence[Known], cases: Sequence[Batch]) -> Count:
  first = cases[0]
  if role == "negative" or (role == "bound" and not first.active):
    return first.count
  if role in ("add", "select"):
    count = first.count
    for v in cases[1:]:
      count = count.added(v.count, v.summed)
    return count
  if role not in ("mul", "div"):
    return Count()
  if len(cases) == 1:
    numbers = [v.numbers[0] for v in peers if isinstance(v, Constant) and v.numbers]
    if role == "div" and peers[0] is not first:
      return Count()
    if not numbers or role == "div":
      return first.count.divided(numbers[0], site.source()) if numbers else first.count
    inverse = 1 / numbers[0] if numbers[0] else 0.0
    whole = abs(inverse - round(inverse)) < 1e-4 and round(inverse) % site.examples == 0
    return first.count.divided(round(inverse), site.source()) if whole else first.count
  moving = [v for v in cases if v.active]
  if role == "div":
    return Count() if cases[-1].active else first.count.over(cases[-1].count, site.source())
  if len(moving) > 1:
    return Count()
  first, *weights = moving + [v for v in cases if not v.active]
  return functools.reduce(lambda count, v: count.weighted(v.count), weights, first.count)


def _with_statistic(site: Site, role: str, out: Batch, statistic: Batch, number: int) -> Batch:
  """A value of each example after a statistic of the examples has entered it."""
  causes = out.causes | statistic.causes
  if role == "select" and number == 0:
    return dataclasses.replace(out, causes=causes)
  times = role in ("mul", "div")
  linear = not statistic.active and statistic.bent is None and statistic.degree is not None
  if times and linear and _weighs(statistic, role) and not (role == "div" and number == 0):
    sign, count = 1, out.count
    if role == "div":
      # of what is summed over already, and not over the examples, they are not the weights
      own = dataclasses.replace(statistic.count, summed_at=None)
      own = own if out.count.sizes else statistic.count
      sign, count = -1, out.count.over(own, site.source())
    degree = None if out.degree is None else out.degree + sign * (statistic.degree or 0.0)
    factor = out.factor or Cause("statistic", site.source())
    return dataclasses.replace(out, causes=causes, factor=factor, degree=degree, count=count)
  root = statistic.moment.root if statistic.moment else None
  out = dataclasses.replace(out, active=out.active or statistic.active, count=Count())
  if root is not None and out.moment == Moment(root, 1) and role in ("add", "mul", "div"):
    normalised = times and statistic.moment is not None and statistic.moment.power == 2
    old = {cause for cause in causes if cause.root == root}
    kept = [cause for cause in out.causes if cause.root == root and cause.kind == "normalised"]
    own = kept[:1] or [Cause("normalised" if normalised else "statistic", site.source(), root)]
    return dataclasses.replace(out, causes=(causes - old) | set(own))
  causes |= {Cause("statistic", site.source())}
  return dataclasses.replace(out, causes=causes, moment=Moment(site.name, 1))


def _constants(
  site: Site, role: str, operands: Sequence[Constant], shapes: Sequence[tuple[int, ...]]
) -> Constant:
  if role == "same":
    return operands[0]
  if role == "select" and operands[0].numbers and len(operands) == 3:
    return operands[2 if operands[0].numbers[0] else 1]
  uniform = frozenset(
    axis
    for axis in range(max(map(len, shapes)))
    if all(
      axis >= len(shape) or shape[axis] == 1 or axis in v.uniform or v.numbers
      for v, shape in zip(operands, shapes, strict=True)
    )
  )
  degrees = [degree_of(v.numbers, site.examples) if v.numbers else v.degree for v in operands]
  return Constant(
    uniform=uniform,
    free=any(v.free for v in operands),
    numbers=_fold(role, operands),
    degree=_constant_degree(role, degrees),
    active=any(v.active for v in operands) and role not in ("compare", "below"),
  )


def _constant_degree(role: str, degrees: Sequence[float | None]) -> float | None:
  known = [d for d in degrees if d is not None]
  if len(known) < len(degrees):
    return None
  if role in ("mul", "square"):
    return sum(known) * (2 if role == "square" else 1)
  if role == "div":
    return known[0] - sum(known[1:])
  if role in ("add", "sub", "bound", "select", "negative") and len(set(known)) == 1:
    return known[0]
  return None if any(known) else 0.0


_FOLDS: dict[str, Callable[..., float]] = {
  "add": lambda a, b: a + b,
  "sub": lambda a, b: a - b,
  "mul": lambda a, b: a * b,
  "div": lambda a, b: a / b if b else math.nan,
  "negative": lambda a: -a,
}


def _fold(role: str, operands: Sequence[Constant]) -> Numbers | None:
  """The result of simple arithmetic on known numbers."""
  if role == "below" and operands[0].iota is not None and operands[1].numbers:
    return (0.0, 0.0) if operands[1].numbers[0] <= 0 else None  # a count from 0 is never below it
  pairs = [v.numbers for v in operands if v.numbers]
  if role not in _FOLDS or len(pairs) < len(operands):
    return None
  number = _FOLDS[role](*(pair[0] for pair in pairs))
  twice = [pair[1] for pair in pairs if pair[1] is not None]
  second = _FOLDS[role](*twice) if len(twice) == len(pairs) else None
  finite = math.isfinite(number) and (second is None or math.isfinite(second))
  return (number, second) if finite else None
