"""Steps that move, join, cut and look up entries: what becomes of the axis of examples."""

from collections.abc import Callable, Sequence
import dataclasses
import math

from fop_optax.capture.examples.values import (
  Batch,
  Cause,
  Constant,
  Piece,
  Unknown,
  Value,
  causes_of,
)

Shape = tuple[int, ...]
Source = Callable[[], str]


def remapped(
  value: Value, place: Callable[[int], int | None], uniform: Sequence[int] = ()
) -> Value:
  """`value` with axis `a` at `place(a)`, or nowhere; `uniform` are new axes."""
  if isinstance(value, Unknown):
    return value
  if isinstance(value, Constant):
    axes = {place(axis) for axis in value.uniform} - {None}
    iota = None if value.iota is None else place(value.iota)
    kept = frozenset(axis for axis in axes if axis is not None) | frozenset(uniform)
    return dataclasses.replace(value, uniform=kept, iota=iota, columns=())
  pieces = []
  for piece in value.pieces:
    axis = place(piece.axis) if piece.axis >= 0 else piece.axis
    if axis is None:
      return Unknown(value.causes)
    pieces.append(piece._replace(axis=axis))
  return dataclasses.replace(value, pieces=tuple(sorted(pieces)), columns=())


def broadcast(value: Value, shape: Shape, new: Shape, dimensions: Sequence[int]) -> Value:
  """`broadcast_in_dim`."""
  uniform = [axis for axis in range(len(new)) if axis not in dimensions]
  uniform += [axis for size, axis in zip(shape, dimensions, strict=True) if size != new[axis]]
  return remapped(value, lambda axis: dimensions[axis], uniform)


def transpose(value: Value, permutation: Sequence[int]) -> Value:
  return remapped(value, list(permutation).index)


def squeeze(value: Value, dimensions: Sequence[int], rank: int) -> Value:
  kept = [axis for axis in range(rank) if axis not in dimensions]
  return remapped(value, lambda axis: kept.index(axis) if axis in kept else None)


def reshape(value: Value, shape: Shape, new: Shape) -> Value:
  """A reshape, which may merge an axis with others or split it."""
  if isinstance(value, Unknown):
    return value
  if isinstance(value, Constant):
    uniform, iota = _uniform(value.uniform, shape, new), None
    if value.iota is not None:
      found = _relocated(Piece(value.iota, shape[value.iota]), shape, new) or ()
      iota = found[0].axis if len(found) == 1 and found[0].outer == found[0].inner == 1 else None
    return dataclasses.replace(value, uniform=uniform, iota=iota, columns=())
  pieces: list[Piece] = []
  for piece in value.pieces:
    found = (piece,) if piece.axis < 0 else _relocated(piece, shape, new)
    if found is None:
      return Unknown(value.causes)
    pieces += found
  merged = _merged(sorted(pieces))
  axes = [piece.axis for piece in merged]
  if len(set(axes)) < len(axes):
    return Unknown(value.causes)
  return dataclasses.replace(value, pieces=tuple(merged), columns=())


def _uniform(uniform: frozenset[int], shape: Shape, new: Shape) -> frozenset[int]:
  """The axes after a reshape that lie within neighbouring uniform ones of before."""
  runs, low, high = [], 1, 1  # entries to the left of a run, and with it
  for axis, size in enumerate(shape):
    if axis not in uniform and size != 1:
      runs.append((low, high))
      low = high * size
    high *= size
  runs.append((low, high))
  kept, left = set(), 1
  for axis, size in enumerate(new):
    within = any(low and left % low == 0 and high % (left * size or 1) == 0 for low, high in runs)
    kept |= {axis} if within or size == 1 else set()
    left *= size
  return frozenset(kept)


def _relocated(piece: Piece, shape: Shape, new: Shape) -> tuple[Piece, ...] | None:
  """Where the entries along `piece` lie after a reshape: it may be split over several axes."""
  before = math.prod(shape[: piece.axis]) * piece.outer
  end = before * piece.size
  if piece.size == 1:
    return _single(piece, before, new)
  pieces, product = [], 1
  for axis, size in enumerate(new):
    low, high = max(product, before), min(product * size, end)
    if low < high:
      if low % product or high % low or (product * size) % high or end % high:
        return None
      stride = end // high * piece.stride
      pieces.append(Piece(axis, high // low, low // product, product * size // high, stride))
    product *= size
  return tuple(pieces) if math.prod(p.size for p in pieces) == piece.size else None


def _single(piece: Piece, before: int, new: Shape) -> tuple[Piece, ...] | None:
  """The same for a single example: an axis of size one, if there is one at its place."""
  options, product = [], 1
  for axis, size in enumerate(new):
    if before % product == 0 and size % (before // product) == 0:
      outer = before // product
      options.append(Piece(axis, 1, outer, size // outer, piece.stride))
    product *= size
  return (min(options, key=lambda p: (p.outer * p.inner, p.axis)),) if options else None


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
  """Pieces with neighbours on one axis made one."""
  out: list[Piece] = []
  for piece in sorted(pieces, key=lambda p: (p.axis, p.outer)):
    last = out[-1] if out else None
    if (
      last is not None
      and last.axis == piece.axis >= 0
      and last.outer * last.size == piece.outer
      and last.stride == piece.stride * piece.size
    ):
      out[-1] = Piece(piece.axis, last.size * piece.size, last.outer, piece.inner, piece.stride)
    else:
      out.append(piece)
  return out


def cut(
  value: Value, axis: int, window: tuple[int, int, int], size: int, grows: bool, source: Source
) -> Value:
  """Entries `start:stop:step` along an axis of `size`; `grows` where more examples give more.

  Whole examples of one kind stay examples: one position of each, or one of several joined batches.
  """
  start, stop, step = window
  if isinstance(value, Constant):
    iota = value.iota if value.iota != axis or (start, step) == (0, 1) else None
    return dataclasses.replace(value, iota=iota, columns=())
  piece = value.at(axis) if isinstance(value, Batch) else None
  if not isinstance(value, Batch) or piece is None or window == (0, size, 1):
    return value
  others = tuple(p for p in value.pieces if p != piece)
  block = piece.size * piece.inner
  if piece.outer > 1 and step == 1 and start % block == stop % block == 0:
    piece = piece._replace(outer=(stop - start) // block)
  elif piece.inner > 1 and step == piece.inner and start < step and stop > size - step:
    piece = piece._replace(inner=1)
  elif value.pieces == (piece,) and grows:
    return Unknown(value.causes | {Cause("order", source())})
  else:  # single examples, as of a loop over them
    return Unknown(value.causes)
  return dataclasses.replace(value, pieces=tuple(sorted((*others, piece))), columns=())


def concatenate(
  values: Sequence[Value], shapes: Sequence[Shape], axis: int, source: Source
) -> Value:
  """Arrays joined along an axis."""
  if any(isinstance(v, Unknown) for v in values):
    return Unknown(causes_of(values))
  batch = [v for v in values if isinstance(v, Batch)]
  last = axis == len(shapes[0]) - 1 and all(shape[axis] == 1 for shape in shapes)
  columns = tuple(values) if last else ()
  constants = [v for v in values if isinstance(v, Constant)]
  if not batch:
    return Constant(
      uniform=frozenset.intersection(*(v.uniform for v in constants)) - {axis},
      free=any(v.free for v in constants),
      degree=0.0 if all(v.degree == 0 for v in constants) else None,
      active=any(v.active for v in constants),
      columns=columns,
    )
  first, causes = batch[0], causes_of(batch)
  if any(v.pieces != first.pieces or v.summed != first.summed for v in batch):
    return Unknown(causes)
  pieces = first.pieces
  piece = first.at(axis)
  if piece:
    if constants or len(set(shapes)) > 1:
      return Unknown(causes)
    pieces = tuple(p._replace(outer=p.outer * len(batch)) if p == piece else p for p in pieces)
    if piece.outer > 1 and piece.inner > 1:
      return Unknown(causes)
  degrees = {v.degree for v in batch}
  return dataclasses.replace(
    first,
    pieces=pieces,
    bent=next((v.bent for v in batch if v.bent), None),
    degree=degrees.pop() if len(degrees) == 1 else None,
    active=any(v.active for v in values if not isinstance(v, Unknown)),
    factor=next((v.factor for v in batch if v.factor), None),
    moment=None,
    causes=causes,
    columns=columns,
  )


def ordered(value: Value, axes: Sequence[int], source: Source) -> Value:
  """A step that goes along `axes`: a cumulative sum, a sort, a reversal."""
  if isinstance(value, Batch) and any(value.at(axis) for axis in axes):
    return dataclasses.replace(value, causes=value.causes | {Cause("order", source())})
  return value
