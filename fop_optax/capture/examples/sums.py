"""Sums and other reductions over axes, products, convolutions."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from fop_optax.capture.examples.axes import Shape, squeeze
from fop_optax.capture.examples.values import (
  Batch,
  Cause,
  Constant,
  Count,
  Moment,
  Piece,
  Unknown,
  Value,
  causes_of,
)
from fop_optax.capture.values import Path

Source = Callable[[], str]


def growth(shape: Shape, twice: Shape | None, axes: Sequence[int]) -> float | None:
  """With which power of the number of examples the number of entries along `axes` goes."""
  if twice is None or len(twice) != len(shape):
    return None
  ratio = [twice[axis] / shape[axis] for axis in axes if shape[axis]]
  return math.log2(math.prod(ratio)) if ratio and min(ratio) > 0 else 0.0


def reduce_sum(
  value: Value,
  axes: Sequence[int],
  shape: Shape,
  twice: Shape | None,
  source: Source,
  path: Path | None = None,
) -> Value:
  """`sum(value, axes)`; `twice` is the operand's shape in the trace of twice the examples.

  `path` is that of the equation, if there is one.
  """
  more = growth(shape, twice, axes)
  if isinstance(value, Constant):
    numbers, degree = value.numbers, value.degree
    if numbers:
      sizes = (math.prod(s[axis] for axis in axes) for s in (shape, twice or shape))
      one, two = (n * size for n, size in zip((numbers[0], numbers[1] or 0.0), sizes, strict=True))
      numbers = (one, two if twice and numbers[1] is not None else None)
    elif more != 0:
      even = more is not None and all(axis in value.uniform for axis in axes)
      degree = None if degree is None or more is None or not even else degree + more
    value = dataclasses.replace(value, numbers=numbers, degree=degree)
    return squeeze(value, axes, len(shape))
  if isinstance(value, Unknown):
    return value
  gone = [piece for piece in value.pieces if piece.axis in axes]
  value = _summed(value, gone, [shape[axis] for axis in axes], more, source, path)
  return squeeze(value, axes, len(shape))


def _summed(
  value: Batch,
  gone: Sequence[Piece],
  sizes: Sequence[int],
  more: float | None,
  source: Source,
  path: Path | None = None,
) -> Batch:
  """`value` after a sum over axes of these sizes, along which the pieces `gone` lay."""
  if more is None:
    more = _guess(value, gone)
  left = tuple(piece for piece in value.pieces if piece not in gone)
  return dataclasses.replace(
    value,
    pieces=left,
    summed=value.summed or bool(gone),
    degree=None if value.degree is None or more is None else value.degree + more,
    count=value.count.summed(sizes, path),
    factor=value.factor if left else None,
    source=source() if gone else value.source,
    columns=(),
  )


def _guess(value: Batch, gone: Sequence[Piece]) -> float | None:
  """The growth of a sum where there is one trace only: 1 over all examples, 0 over none of them."""
  if not gone:
    return 0.0
  return None if any(piece.stride > 1 for piece in value.pieces) else 1.0


def reduced(value: Value, axes: Sequence[int], rank: int, source: Source) -> Value:
  """Any other reduction: a maximum, a product, a position."""
  if isinstance(value, Constant):
    return squeeze(dataclasses.replace(value, numbers=None, iota=None), axes, rank)
  if isinstance(value, Unknown):
    return value
  left = tuple(piece for piece in value.pieces if piece.axis not in axes)
  gone, causes = left != value.pieces, value.causes
  if value.factor:
    causes |= {value.factor}
  bent = value.bent
  if gone or value.summed:
    bent = bent or Cause("statistic", source())
  value = dataclasses.replace(
    value,
    pieces=left,
    summed=value.summed or gone,
    bent=bent,
    degree=value.degree if value.degree == 0 else None,
    factor=None,
    moment=None,
    count=Count(),
    causes=causes,
    source=source() if gone else value.source,
    columns=(),
  )
  return squeeze(value, axes, rank)


def dot(equation: Any, operands: Sequence[Value], twice: Any, source: Source) -> Value:
  """`dot_general`: examples are free, matched, or summed over; else pairs of them meet."""
  if any(isinstance(v, Unknown) for v in operands):
    return Unknown(causes_of(operands))
  contract, together = equation.params["dimension_numbers"]
  shapes = [tuple(v.aval.shape) for v in equation.invars[:2]]
  axes = _dot_axes(shapes, contract, together)
  more = None
  if twice is not None:
    more = growth(shapes[0], tuple(twice.invars[0].aval.shape), contract[0])
  left, right = operands
  if isinstance(left, Constant) and isinstance(right, Constant):
    free = [
      axes[side].get(axis)
      for side, v in ((0, left), (1, right))
      for axis in v.uniform
      if axis not in together[side]
    ]
    uniform = {axis for axis in free if axis is not None}
    same = more == 0 and left.degree is not None and right.degree is not None
    return Constant(
      frozenset(uniform),
      free=left.free or right.free,
      degree=(left.degree or 0.0) + (right.degree or 0.0) if same else None,
      active=left.active or right.active,
    )
  met = [(*contract[s], *together[s]) for s in (0, 1)]
  partner = [dict(zip(met[s], met[1 - s], strict=True)) for s in (0, 1)]
  sizes = [shapes[0][axis] for axis in contract[0]]
  if isinstance(left, Batch) and isinstance(right, Batch):
    return _of_two(left, right, axes, partner, sizes, more, source)
  side = 0 if isinstance(left, Batch) else 1
  value, constant = operands[side], operands[1 - side]
  assert isinstance(value, Batch) and isinstance(constant, Constant)
  causes = value.causes
  for piece in value.pieces:
    other = partner[side].get(piece.axis)
    if other is not None and piece[2:] == (1, 1, 1) and not constant.constant_along(other):
      causes |= {Cause("place", source())}
  gone = [piece for piece in value.pieces if piece.axis in contract[side]]
  value = dataclasses.replace(
    value,
    causes=causes,
    degree=_times(value.degree, constant.degree),
    active=value.active or constant.active,
    count=Count() if constant.active else value.count,
    moment=value.moment if value.summed else None,
  )
  return _moved(_summed(value, gone, sizes, more, source), axes[side])


def _dot_axes(shapes, contract, together) -> list[dict[int, int | None]]:
  """For each operand: its axes -> those of the output, None for contracted ones."""
  axes: list[dict[int, int | None]] = [{}, {}]
  after = len(together[0])
  for side, shape in enumerate(shapes):
    for axis in range(len(shape)):
      if axis in together[side]:
        axes[side][axis] = list(together[side]).index(axis)
      elif axis in contract[side]:
        axes[side][axis] = None
      else:
        axes[side][axis] = after
        after += 1
  return axes


def _moved(value: Batch, axes: dict[int, int | None]) -> Batch:
  pieces = []
  for piece in value.pieces:
    axis = axes[piece.axis] if piece.axis >= 0 else piece.axis
    if axis is not None:
      pieces.append(piece._replace(axis=axis))
  return dataclasses.replace(value, pieces=tuple(sorted(pieces)), columns=())


def _of_two(left: Batch, right: Batch, axes, partner, sizes, more, source: Source) -> Value:
  """The product of two values that depend on the examples."""
  causes, pieces, gone, matched = left.causes | right.causes, [], [], []
  for piece in left.pieces:
    other = right.at(piece.axis if piece.axis < 0 else partner[0].get(piece.axis, len(axes[1])))
    if other is not None and other[1:] == piece[1:]:
      matched.append(other)
    elif piece.axis < 0 and not right.summed:
      return Unknown(causes)
    elif piece.axis >= 0 and piece.axis in partner[0] and not right.summed:
      return Unknown(causes | ({Cause("pairs", source())} if right.pieces else set()))
    place = axes[0][piece.axis] if piece.axis >= 0 else piece.axis
    if place is None:
      gone.append(piece)
    else:
      pieces.append(piece._replace(axis=place))
  for piece in right.pieces:
    if piece in matched:
      continue
    same = any((p.size, p.stride) == (piece.size, piece.stride) for p in left.pieces)
    place = axes[1][piece.axis] if piece.axis >= 0 else piece.axis
    if same:
      causes |= {Cause("pairs", source())}
    elif place is None:
      gone.append(piece)
    else:
      pieces.append(piece._replace(axis=place))
  if (left.pieces and right.summed and not right.pieces) or (right.pieces and left.summed):
    causes |= {Cause("statistic", source())}
  both = left.active and right.active
  bent = left.bent or right.bent
  if left.summed and right.summed and (left.active or right.active):
    bent = bent or Cause("statistic", source())
  counts = sorted((left, right), key=lambda v: (v.active, len(v.count.sizes)))
  root = left.moment.root if left.moment and left.moment == right.moment else None
  value = Batch(
    pieces=(*pieces, *gone),
    summed=left.summed and right.summed,
    bent=bent,
    degree=_times(left.degree, right.degree),
    active=left.active or right.active,
    factor=left.factor or right.factor,
    moment=Moment(root, 2) if gone and root is not None else None,
    count=Count() if both else counts[-1].count,
    causes=causes,
    source=left.source or right.source,
  )
  value = _summed(value, gone, sizes, more, source)
  return dataclasses.replace(value, pieces=tuple(sorted(value.pieces)))


def _times(first: float | None, second: float | None) -> float | None:
  return None if first is None or second is None else first + second


def convolution(equation: Any, operands: Sequence[Value], source: Source) -> Value:
  """`conv_general_dilated` of an input that depends on the examples."""
  value, kernel = operands
  if isinstance(value, Unknown) or isinstance(kernel, Unknown):
    return Unknown(causes_of(operands))
  if not isinstance(value, Batch):
    if isinstance(kernel, Batch):
      return Unknown(kernel.causes)
    return Constant(free=True, active=value.active or kernel.active)
  numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
  out = equation.outvars[0].aval.shape
  causes, pieces = causes_of(operands), []
  if equation.params["batch_group_count"] != 1:
    return Unknown(causes)
  per_example = isinstance(kernel, Batch) and not kernel.summed
  for piece in value.pieces:
    place = numbers.lhs_spec.index(piece.axis) if piece.axis >= 0 else -1
    if place == -1:
      pieces.append(piece)
    elif place == 0 and not per_example:
      pieces.append(piece._replace(axis=numbers.out_spec[0]))
    elif place == 1 and groups % (piece.outer * piece.size) == 0:
      inner = out[numbers.out_spec[1]] // (piece.outer * piece.size)
      pieces.append(piece._replace(axis=numbers.out_spec[1], inner=inner))
    else:
      return Unknown(causes if per_example else causes | {Cause("order", source())})
  if isinstance(kernel, Batch) and kernel.summed:
    causes |= {Cause("statistic", source())}
  return Batch(
    tuple(sorted(pieces)),
    value.summed,
    value.bent,
    value.degree,
    value.active or kernel.active,
    causes=causes | ({value.factor} if value.factor else set()),
    source=value.source,
  )
