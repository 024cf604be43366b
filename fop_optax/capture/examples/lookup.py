"""Lookups by index: `gather`, with which indexing and `take_along_axis` are written."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from fop_optax.capture.examples.values import (
  Batch,
  Cause,
  Constant,
  Count,
  Unknown,
  Value,
  causes_of,
)


def gather(
  equation: Any, operand: Value, indices: Value, grows: bool, source: Callable[[], str]
) -> Value:
  """Entries of `operand` at `indices`, of which the last axis says where along which axes.

  `logits[arange(n), y]` takes of each example its own: a count along the examples.
  """
  if isinstance(operand, Unknown) or isinstance(indices, Unknown):
    return Unknown(causes_of([operand, indices]))
  numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
  shape, rank = equation.invars[0].aval.shape, equation.outvars[0].aval.ndim
  places = [axis for axis in range(rank) if axis not in numbers.offset_dims]  # of the indices' axes
  taken = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  kept = [axis for axis in range(len(shape)) if axis not in taken]
  offsets = dict(zip(kept, numbers.offset_dims, strict=True))
  if isinstance(operand, Constant) and isinstance(indices, Constant):
    uniform = {places[axis] for axis in indices.uniform if axis < len(places)}
    uniform |= {offsets[axis] for axis in operand.uniform if axis in offsets}
    free, active = operand.free or indices.free, operand.active
    return Constant(frozenset(uniform), free, degree=operand.degree, active=active)
  causes = causes_of([operand, indices])
  pieces = []
  if isinstance(indices, Batch):
    for piece in indices.pieces:
      if piece.axis == len(places):
        return Unknown(causes)
      pieces.append(piece._replace(axis=places[piece.axis]) if piece.axis >= 0 else piece)
    if indices.summed and isinstance(operand, Batch) and operand.pieces:
      causes |= {Cause("statistic", source())}
  own = operand.pieces if isinstance(operand, Batch) else ()
  for piece in own:
    axis = piece.axis
    if axis < 0:
      found = piece
    elif axis in numbers.operand_batching_dims:
      side = numbers.start_indices_batching_dims[list(numbers.operand_batching_dims).index(axis)]
      found = piece._replace(axis=places[side])
      if isinstance(indices, Constant) and not indices.constant_along(side):
        causes |= {Cause("place", source())}
    elif axis in offsets and sizes[axis] == shape[axis]:
      found = piece._replace(axis=offsets[axis])
    else:
      place = _counted(indices, list(numbers.start_index_map).index(axis), places)
      if place is None or axis in offsets:
        named = isinstance(indices, Constant) and not indices.free and grows
        return Unknown(causes | ({Cause("order", source())} if named else set()))
      found = piece._replace(axis=place)
    if found in pieces:
      continue
    if any((p.size, p.stride) == (found.size, found.stride) for p in pieces):
      causes |= {Cause("pairs", source())}
    else:
      pieces.append(found)
  value = operand if isinstance(operand, Batch) else indices
  assert isinstance(value, Batch)
  return dataclasses.replace(
    value,
    pieces=tuple(sorted(pieces)),
    active=not isinstance(operand, Unknown) and operand.active,
    degree=operand.degree,
    count=value.count if isinstance(operand, Batch) else Count(),
    moment=None,
    causes=causes,
    columns=(),
  )


def window(operand: Constant, starts: Sequence[Value]) -> Value:
  """A part of a table that begins at numbers of the example at which a scan stands."""
  found = [v for v in starts if isinstance(v, Batch) and v.pieces]
  pieces = {piece for value in found for piece in value.pieces}
  if len(pieces) != 1 or not all(isinstance(v, Constant) or v in found for v in starts):
    return Unknown(causes_of(starts))
  return dataclasses.replace(
    found[0],
    pieces=tuple(pieces),
    active=operand.active,
    degree=operand.degree,
    count=Count(),
    moment=None,
    causes=causes_of(starts),
    columns=(),
  )


def _counted(indices: Value, column: int, places: list[int]) -> int | None:
  """The axis of the result along which this column of the indices counts 0, 1, 2 ..."""
  if isinstance(indices, Unknown):
    return None
  value = indices.columns[column] if indices.columns else indices
  if isinstance(value, Constant) and value.iota is not None and value.iota < len(places):
    return places[value.iota]
  return None


def scatter_axes(equation: Any, indices: Value) -> dict[int, int]:
  """Axes of the updates of a `scatter` -> those of its operand along which they are written.

  Those of axes along which the indices say where to write are left out, unless they count.
  """
  numbers = equation.params["dimension_numbers"]
  rank = equation.invars[0].aval.ndim
  window = list(numbers.update_window_dims)
  places = [axis for axis in range(equation.invars[2].aval.ndim) if axis not in window]
  taken = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
  kept = [axis for axis in range(rank) if axis not in taken]
  sizes = [v.aval.shape for v in (equation.invars[0], equation.invars[2])]
  axes = {
    own: axis
    for own, axis in zip(window, kept, strict=True)
    if sizes[0][axis] == sizes[1][own]  # whole
  }
  batching = zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
  axes |= {places[side]: axis for side, axis in batching}
  for column, axis in enumerate(numbers.scatter_dims_to_operand_dims):
    place = _counted(indices, column, places) if axis in numbers.inserted_window_dims else None
    if place is not None:
      axes[place] = axis
  return axes
