"""From uses to layers: which parameters are layers, with which bias, and why the others are not."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from fop_optax import views
from fop_optax.capture.values import BiasUse, Key, Use
from fop_optax.capture.walk import Found
from fop_optax.layers import Layer

ONE_HOT = frozenset(("lookup", "table"))  # kinds whose rows have one entry: diagonal factors


class Place(NamedTuple):
  """A layer, and whether its weight is used transposed (a tied weight)."""

  layer: int
  flipped: bool


class Block(NamedTuple):
  """The uses of one layer, the transposed ones apart."""

  straight: list[Use]
  flipped: list[Use]


@dataclasses.dataclass(frozen=True)
class Resolved:
  """Layers, and how each use of a weight belongs to one.

  Attributes:
    layers: the layers, in the order of the parameters.
    places: which layer each accepted use belongs to, in which orientation.
    rows: how many rows a layer's weight is applied to, in each orientation it is used in.
    fallbacks: index of a parameter in no layer -> reason.
  """

  layers: tuple[Layer, ...]
  places: Mapping[Key, Place]
  rows: Mapping[Place, int]
  fallbacks: Mapping[int, str]


def resolve(
  found: Found,
  uses: Mapping[Key, Use],
  shapes: Sequence[tuple[int, ...]],
  paths: Sequence[str],
  max_dim: int,
) -> Resolved:
  """Makes layers of the parameters all of whose uses are understood.

  Args:
    found: what the walk left behind.
    uses: those of `found.uses` that hold up at another batch size too.
    shapes: of the parameters.
    paths: of the parameters.
    max_dim: factors with a longer side are kept as their diagonals.
  """
  refused = dict(found.refused)
  for use in found.uses.values():
    if use.key not in uses:
      why = "the rows it is applied to do not grow with the batch"
      if not use.batch:
        looked_up = use.product.kind == "lookup"
        verb = "looked up by indices" if looked_up else "multiplied with something"
        why = f"it is {verb} that {'do' if looked_up else 'does'} not depend on the batch"
      refused.setdefault(use.leaf, f"{why} at {use.source}" if use.source else why)
  biases = {bias.leaf for bias in found.biases}
  for use in found.uses.values():
    if use.leaf in biases:
      refused.setdefault(use.leaf, "it is a weight in one place and a bias in another")

  blocks: list[Block] = []
  for leaf in sorted({use.leaf for use in found.uses.values()} - set(refused)):
    parts = _blocks([use for use in found.uses.values() if use.leaf == leaf], shapes[leaf])
    if isinstance(parts, str):
      refused[leaf] = parts
    else:
      blocks += parts
  joined = _join_biases(blocks, found.biases, shapes, refused)

  layers: list[Layer] = []
  places: dict[Key, Place] = {}
  rows: dict[Place, int] = {}
  for index, (block, bias) in enumerate(zip(blocks, joined, strict=True)):
    layers.append(_layer(block, bias, shapes, _path(blocks, index, paths), max_dim))
    for flipped, uses_of_it in enumerate(block):
      place = Place(index, bool(flipped))
      places |= {use.key: place for use in uses_of_it}
      if uses_of_it:
        rows[place] = sum(use.rows for use in uses_of_it)
  covered = {leaf for layer in layers for leaf in layer.leaves}
  unused = "no gradient of the loss reaches it"
  fallbacks = {
    leaf: refused.get(leaf, unused) for leaf in range(len(shapes)) if leaf not in covered
  }
  return Resolved(tuple(layers), places, rows, fallbacks)


def _path(blocks: list[Block], index: int, paths: Sequence[str]) -> str:
  """Printable path of a layer; its parameter may have several parts that are layers."""
  leaf = blocks[index].straight[0].leaf
  siblings = [i for i, block in enumerate(blocks) if block.straight[0].leaf == leaf]
  return paths[leaf] if len(siblings) == 1 else f"{paths[leaf]} part {siblings.index(index)}"


def _blocks(uses: list[Use], shape: tuple[int, ...]) -> list[Block] | str:
  """Groups the uses of one parameter by the entries they read, or says why that cannot be.

  The same entries in the same places, or in those of the transposed matrix (a tied weight): one
  layer. Disjoint entries: layers of their own. Anything else is refused.
  """
  by_view: dict[tuple[Any, ...], list[Use]] = {}
  for use in uses:
    by_view.setdefault((use.view, use.stack), []).append(use)
  if len(by_view) == 1:
    return [Block(uses, [])]
  merged: list[tuple[np.ndarray, Block]] = []
  owner = np.full(math.prod(shape), -1)
  for same in by_view.values():
    index = views.index_map(same[0].view, shape)
    owners = np.unique(owner[index])
    if owners.size == 1 and owners[0] == -1:
      owner[index] = len(merged)
      merged.append((index, Block(same, [])))
      continue
    first, block = merged[owners[-1]]
    where = f"at {block.straight[0].source} and {same[0].source}"
    if owners.size > 1 or first.size != index.size:
      return f"overlapping parts of it are used, {where}"
    if np.array_equal(first, index):
      block.straight.extend(same)
    elif np.array_equal(first, index.swapaxes(1, 2)):
      block.flipped.extend(same)
    else:
      return f"it is used in two orders of its entries, {where}"
  return [block for _, block in merged]


def _join_biases(
  blocks: list[Block],
  biases: list[BiasUse],
  shapes: Sequence[tuple[int, ...]],
  refused: dict[int, str],
) -> list[BiasUse | None]:
  """For each block the bias that is added in all of its uses; refuses the biases that fit nowhere.

  A bias belongs to one block, or, in disjoint parts, to several; nothing else may read it.
  """
  at: dict[Key, list[BiasUse]] = {}
  for bias in biases:
    at.setdefault(bias.use, []).append(bias)
  placed = {use.key for block in blocks for uses in block for use in uses}
  for bias in biases:
    if bias.use not in placed:
      refused.setdefault(bias.leaf, "it is the bias of a weight that is in no layer")

  joined: list[BiasUse | None] = []
  for block in blocks:
    ours = [at.get(use.key, []) for use in (*block.straight, *block.flipped)]
    entries = {  # two spellings of one view read the same entries
      (bias.leaf, views.index_map(bias.view, shapes[bias.leaf]).tobytes())
      for found in ours
      for bias in found
    }
    if block.flipped:  # a bias of one orientation has no place in the other
      for leaf, _ in entries:
        refused.setdefault(
          leaf, "it is the bias of a tied weight, which is used transposed as well"
        )
      joined.append(None)
    elif len(entries) > 1 or (entries and not all(ours)):
      for leaf, _ in entries:
        refused.setdefault(leaf, "its weight is used several times, not always with this bias")
      joined.append(None)
    else:
      joined.append(ours[0][0] if entries else None)

  taken: dict[int, np.ndarray] = {}
  for bias in joined:
    if bias:
      count = taken.setdefault(bias.leaf, np.zeros(math.prod(shapes[bias.leaf]), int))
      np.add.at(count, views.index_map(bias.view, shapes[bias.leaf]), 1)
  for leaf, count in taken.items():
    if count.max(initial=0) > 1:
      refused.setdefault(leaf, "it is the bias of two layers")
  return [None if bias is None or bias.leaf in refused else bias for bias in joined]


def _layer(
  block: Block, bias: BiasUse | None, shapes: Sequence[tuple[int, ...]], path: str, max_dim: int
) -> Layer:
  use = block.straight[0]
  inputs = [use.product.kind for use in block.straight]
  outputs = [use.product.kind for use in block.flipped]  # whose inputs are the layer's outputs
  return Layer(
    path=path,
    kind=" + ".join(dict.fromkeys(inputs + outputs)),
    weight=use.leaf,
    view=views.simplify(use.view, shapes[use.leaf]),
    stack=use.stack,
    inputs=use.inputs,
    outputs=use.outputs,
    bias=bias.leaf if bias else None,
    bias_view=views.simplify(bias.view, shapes[bias.leaf]) if bias else None,
    uses=len(inputs + outputs),
    diagonal=(
      not ONE_HOT.isdisjoint(inputs) or use.inputs + (bias is not None) > max_dim,
      not ONE_HOT.isdisjoint(outputs) or use.outputs > max_dim,
    ),
  )
