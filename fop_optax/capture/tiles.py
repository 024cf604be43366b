"""Factors in blocks: long sides are split, so that a layer becomes a grid of layers.

With the rows of its matrix in m ranges and its columns in n, tile `(i, j)` is a layer of its own,
whose factors are the blocks `A_i` and `G_j` on the diagonals of `A` and `G`. What correlates one
range with another is taken for zero.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from fop_optax import views
from fop_optax.layers import Bias, Factors, Layer, Layers


class Range(NamedTuple):
  """Entries of one side."""

  start: int
  stop: int

  def within(self, side: int) -> bool:
    """Whether there are others."""
    return self.stop - self.start < side


class Tile(NamedTuple):
  """A part of the matrix of a layer."""

  layer: int
  rows: Range  # without the bias
  columns: Range
  bias: bool  # whether the homogeneous coordinate belongs to these rows


def split(layers: Layers, size: int | None) -> tuple[Layers, tuple[Tile, ...]]:
  """The layers with no side longer than `size`, the bias not counted, and what part each is.

  Ranges of a side are as equal as can be. Sides of which the diagonal is kept stay whole.
  """
  entries, tiles = [], []
  for index, layer in enumerate(layers):
    for tile in _grid(index, layer, size):
      entries.append(_part(layer, tile, layers.shapes))
      tiles.append(tile)
  return dataclasses.replace(layers, entries=tuple(entries)), tuple(tiles)


def cut(factors: Sequence[Factors], tiles: Sequence[Tile]) -> tuple[Factors, ...]:
  """The factors of tiles, out of those of the layers that they are parts of."""

  def block(side, own, more):
    each = slice(own.start, own.stop + more)
    return side[(slice(None), *[each] * (side.ndim - 1))]

  return tuple(
    Factors(
      block(factors[tile.layer].A, tile.rows, int(tile.bias)),
      block(factors[tile.layer].G, tile.columns, 0),
    )
    for tile in tiles
  )


def _grid(index: int, layer: Layer, size: int | None) -> Iterator[Tile]:
  ranges = [
    [Range(0, n)] if diagonal or size is None else _ranges(n, size)
    for n, diagonal in zip((layer.inputs, layer.outputs), layer.diagonal, strict=True)
  ]
  for rows in ranges[0]:
    for columns in ranges[1]:
      last = rows.stop == layer.inputs
      yield Tile(index, rows, columns, last and bool(_biases(layer, columns)))


def _ranges(n: int, size: int) -> list[Range]:
  own = np.array_split(np.arange(n), -(-n // size))
  return [Range(int(each[0]), int(each[-1]) + 1) for each in own]


def _part(layer: Layer, tile: Tile, shapes: Sequence[tuple[int, ...]]) -> Layer:
  (r0, r1), (c0, c1) = tile.rows, tile.columns
  if not tile.rows.within(layer.inputs) and not tile.columns.within(layer.outputs):
    return layer
  rectangle = ("slice", (0, r0, c0), (layer.stack, r1, c1), (1, 1, 1))
  biases = _biases(layer, tile.columns) if tile.bias else ()
  return dataclasses.replace(
    layer,
    path=f"{layer.path}[{r0}:{r1}, {c0}:{c1}]",
    view=views.simplify((*layer.view, rectangle), shapes[layer.weight]),
    inputs=r1 - r0,
    outputs=c1 - c0,
    biases=tuple(own._replace(view=views.simplify(own.view, shapes[own.leaf])) for own in biases),
  )


def _biases(layer: Layer, columns: Range) -> tuple[Bias, ...]:
  """What the biases of a layer have in a range of its columns."""
  if not columns.within(layer.outputs):
    return layer.biases
  whole, width = (layer.stack, layer.outputs), columns.stop - columns.start
  out = []
  for leaf, view, place in layer.biases:
    entries = views.index_map(place, whole)  # the bias is of some matrices and of some columns
    matrices, own = entries[:, 0] // layer.outputs, entries[0] % layer.outputs
    inside = np.flatnonzero((columns.start <= own) & (own < columns.stop))
    if len(inside):
      view = (*view, views.take(entries.shape, 1, inside.tolist()))
      there = (own[inside] - columns.start).tolist()
      steps = (
        views.take((layer.stack, width), 0, matrices.tolist()),
        views.take((len(matrices), width), 1, there),
      )
      out.append(Bias(leaf, view, views.simplify(steps, (layer.stack, width))))
  return tuple(out)
