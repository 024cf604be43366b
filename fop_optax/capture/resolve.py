"""From uses to layers: which parameters are layers, with which bias, and why the others are not."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from fop_optax import views
from fop_optax.capture.entries import Entries
from fop_optax.capture.homogeneous import Block, join_biases
from fop_optax.capture.values import ONE_HOT, Key, Use
from fop_optax.capture.walk import Found
from fop_optax.layers import Bias, Layer


class Place(NamedTuple):
  """A layer, and whether its weight is used transposed (a tied weight)."""

  layer: int
  flipped: bool


class Rows(NamedTuple):
  """How many rows a weight is applied to, in one orientation."""

  batch: int
  fixed: int


@dataclasses.dataclass(frozen=True)
class Resolved:
  """Layers, and how each use of a weight belongs to one.

  Attributes:
    layers: the layers, in the order of the parameters.
    places: which layer each accepted use belongs to, in which orientation.
    rows: how many rows a layer's weight is applied to, in each orientation it is used in.
    coordinates: the homogeneous coordinate in the rows of each use to which a bias is added.
    fallbacks: index of a parameter in no layer -> reason.
    frozen: those of them that no gradient reaches.
    notes: what else is worth knowing of the layers, in sentences.
  """

  layers: tuple[Layer, ...]
  places: Mapping[Key, Place]
  rows: Mapping[Place, Rows]
  coordinates: Mapping[Key, float]
  fallbacks: Mapping[int, str]
  frozen: frozenset[int]
  notes: tuple[str, ...]


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
    max_dim: factors with a longer side are kept as their diagonals, the bias not counted.
  """
  refused = dict(found.refused)
  _refuse_without_batch(found, uses, refused)
  biases = {found_bias.bias.leaf for found_bias in found.biases}
  for use in found.uses.values():
    if use.leaf in biases:
      refused.setdefault(use.leaf, "it is a weight in one place and a bias in another")

  blocks: list[Block] = []
  apart = dict(found.apart)
  for leaf in sorted({use.leaf for use in found.uses.values()} - set(refused)):
    own = [use for use in found.uses.values() if use.leaf == leaf]
    parts = _blocks(own, shapes[leaf])
    if isinstance(parts, str) and any(use.fixed for use in own):  # then no rows, but a penalty
      apart.setdefault(leaf, parts)
      parts = _blocks(_without_penalties(own, shapes[leaf]), shapes[leaf])
    if isinstance(parts, str):
      refused[leaf] = parts
    else:
      blocks += parts
  placed = {use.key for block in blocks for uses_of_it in block for use in uses_of_it}
  biases_of = []
  for bias in found.biases:
    if bias.use not in placed and found.uses[bias.use].fixed:  # that product is a penalty
      apart.setdefault(bias.bias.leaf, "it is added to a product without the batch")
    else:
      biases_of.append(bias)
  homogeneous = join_biases(blocks, biases_of, shapes, refused)

  layers: list[Layer] = []
  places: dict[Key, Place] = {}
  rows: dict[Place, Rows] = {}
  coordinates: dict[Key, float] = {}
  for index, (straight, flipped, joined, own) in enumerate(homogeneous):
    path = _path(blocks, index, paths)
    layers.append(_layer(Block(straight, flipped), joined, shapes, path, max_dim))
    coordinates |= own
    for turned, uses_of_it in enumerate((straight, flipped)):
      place = Place(index, bool(turned))
      places |= {use.key: place for use in uses_of_it}
      if uses_of_it:
        rows[place] = Rows(
          *(sum(use.rows for use in uses_of_it if use.fixed == fixed) for fixed in (False, True))
        )
  covered = {leaf for layer in layers for leaf in layer.leaves}
  unused = "no gradient of the loss reaches it"
  fallbacks = {
    leaf: refused.get(leaf) or apart.get(leaf, unused)
    for leaf in range(len(shapes))
    if leaf not in covered
  }
  notes = _notes(found, apart, layers, places, paths)
  frozen = frozenset(fallbacks) - frozenset(refused) - frozenset(apart)
  return Resolved(tuple(layers), places, rows, coordinates, fallbacks, frozen, notes)


def _refuse_without_batch(found: Found, uses: Mapping[Key, Use], refused: dict[int, str]) -> None:
  """Refuses weights with a use that did not hold up, and those that only see fixed rows."""
  reached = {use.leaf for use in uses.values() if not use.fixed}
  for use in found.uses.values():
    if use.key not in uses:
      why = "the rows it is applied to do not grow with the batch"
    elif use.leaf not in reached:
      looked_up = use.product.kind == "lookup"
      verb = "looked up by indices" if looked_up else "multiplied with something"
      why = f"it is {verb} that {'do' if looked_up else 'does'} not depend on the batch"
    else:
      continue
    refused.setdefault(use.leaf, f"{why} at {use.source}" if use.source else why)


def _notes(
  found: Found,
  apart: Mapping[int, str],
  layers: Sequence[Layer],
  places: Mapping[Key, Place],
  paths: Sequence[str],
) -> tuple[str, ...]:
  """Sentences on terms of the loss that have no batch."""
  notes: dict[str, list[str]] = {}
  covered = {leaf for layer in layers for leaf in layer.leaves}
  for leaf, why in apart.items():
    if leaf in covered:
      note = f"penalty left out of the curvature ({why})"
      notes.setdefault(note, []).append(paths[leaf])
  for index, layer in enumerate(layers):
    ours = [found.uses[key] for key, place in places.items() if place.layer == index]
    fixed = sum(use.rows for use in ours if use.fixed)
    if fixed:
      note = f"{fixed} fixed rows beside those of the batch"
      notes.setdefault(note, []).append(layer.path)
  return tuple(f"{', '.join(names)}: {note}." for note, names in notes.items())


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
  merged: list[tuple[Entries, Block]] = []
  for same in by_view.values():
    own = Entries(same[0].view, shape)
    for first, block in merged:
      if first.equal(own):
        block.straight.extend(same)
        break
      if first.equal(own, flipped=True):
        block.flipped.extend(same)
        break
      if not first.disjoint(own):
        where = f"at {block.straight[0].source} and {same[0].source}"
        if first.same_set(own):
          return f"it is used in two orders of its entries, {where}"
        return f"overlapping parts of it are used, {where}"
    else:
      merged.append((own, Block(same, [])))
  return [block for _, block in merged]


def _without_penalties(uses: list[Use], shape: tuple[int, ...]) -> list[Use]:
  """The uses without those of fixed rows that do not fit the others: no layers, but penalties."""
  kept = [use for use in uses if not use.fixed]
  for use in uses:
    if use.fixed and not isinstance(_blocks([*kept, use], shape), str):
      kept.append(use)
  return kept


def _layer(
  block: Block,
  biases: Sequence[Bias],
  shapes: Sequence[tuple[int, ...]],
  path: str,
  max_dim: int,
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
    biases=tuple(
      Bias(leaf, views.simplify(view, shapes[leaf]), place) for leaf, view, place in biases
    ),
    uses=len(inputs + outputs),
    diagonal=(
      not ONE_HOT.isdisjoint(inputs) or use.inputs > max_dim,
      not ONE_HOT.isdisjoint(outputs) or use.outputs > max_dim,
    ),
  )
