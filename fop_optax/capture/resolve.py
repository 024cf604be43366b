"""From uses to layers: which parameters are layers, with which bias, and why the others are not."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from fop_optax import views
from fop_optax.capture.values import BiasUse, Path, Use
from fop_optax.capture.walk import Found
from fop_optax.layers import Layer


@dataclasses.dataclass(frozen=True)
class Resolved:
  """Layers, and how each use of a weight belongs to one.

  Attributes:
    layers: the layers, in the order of the parameters.
    layer_of: index of the layer of each accepted use.
    rows: for each layer, how many rows its weight is applied to in one evaluation of the loss.
    fallbacks: index of a parameter in no layer -> reason.
  """

  layers: tuple[Layer, ...]
  layer_of: Mapping[Path, int]
  rows: tuple[int, ...]
  fallbacks: Mapping[int, str]


def resolve(
  found: Found,
  uses: Mapping[Path, Use],
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
    if use.path not in uses:
      why = "the rows it is applied to do not grow with the batch"
      if not use.batch:
        why = "it is multiplied with something that does not depend on the batch"
      refused.setdefault(use.leaf, f"{why} at {use.source}")
  biases = {bias.leaf for bias in found.biases}
  for use in found.uses.values():
    if use.leaf in biases:
      refused.setdefault(use.leaf, "it is a weight in one place and a bias in another")

  blocks: list[list[Use]] = []
  for leaf in sorted({use.leaf for use in found.uses.values()} - set(refused)):
    parts = _blocks([use for use in found.uses.values() if use.leaf == leaf], shapes[leaf])
    if isinstance(parts, str):
      refused[leaf] = parts
    else:
      blocks += parts
  joined = _join_biases(blocks, found.biases, shapes, refused)

  layers, layer_of, rows = [], {}, []
  for index, (block, bias) in enumerate(zip(blocks, joined, strict=True)):
    layer = _layer(block, bias, shapes, paths, max_dim)
    siblings = sum(other[0].leaf == layer.weight for other in blocks)
    if siblings > 1:
      part = sum(other[0].leaf == layer.weight for other in blocks[:index])
      layer = dataclasses.replace(layer, path=f"{layer.path} part {part}")
    layers.append(layer)
    rows.append(sum(use.rows for use in block))
    layer_of |= {use.path: index for use in block}
  covered = {leaf for layer in layers for leaf in layer.leaves}
  unused = "no gradient of the loss reaches it"
  fallbacks = {
    leaf: refused.get(leaf, unused) for leaf in range(len(shapes)) if leaf not in covered
  }
  return Resolved(tuple(layers), layer_of, tuple(rows), fallbacks)


def _blocks(uses: list[Use], shape: tuple[int, ...]) -> list[list[Use]] | str:
  """Groups the uses of one parameter by the entries they read, or says why that cannot be.

  The same entries in the same places: one layer, its statistics summed. Disjoint entries: layers
  of their own. Anything else is refused.
  """
  by_view: dict[tuple[Any, ...], list[Use]] = {}
  for use in uses:
    by_view.setdefault((use.view, use.stack), []).append(use)
  blocks = list(by_view.values())
  if len(blocks) == 1:
    return blocks
  merged: list[tuple[np.ndarray, list[Use]]] = []
  owner = np.full(int(np.prod(shape)), -1)
  for block in blocks:
    index = views.index_map(block[0].view, shape)
    owners = np.unique(owner[index])
    if owners.size == 1 and owners[0] == -1:
      owner[index] = len(merged)
      merged.append((index, block))
      continue
    first = merged[owners[-1]]
    if owners.size > 1 or first[0].size != index.size:
      return f"overlapping parts of it are used, at {first[1][0].source} and {block[0].source}"
    if first[0].shape != index.shape or not np.array_equal(first[0], index):
      return (
        "it is used in two orders of its entries (as a tied weight is), at"
        f" {first[1][0].source} and {block[0].source}"
      )
    first[1].extend(block)
  return [block for _, block in merged]


def _join_biases(
  blocks: list[list[Use]],
  biases: list[BiasUse],
  shapes: Sequence[tuple[int, ...]],
  refused: dict[int, str],
) -> list[BiasUse | None]:
  """For each block the bias that is added in all of its uses; refuses the biases that fit nowhere.

  A bias belongs to one block, or, in disjoint parts, to several; nothing else may read it.
  """
  at: dict[Path, list[BiasUse]] = {}
  for bias in biases:
    at.setdefault(bias.use, []).append(bias)
  placed = {use.path for block in blocks for use in block}
  for bias in biases:
    if bias.use not in placed:
      refused.setdefault(bias.leaf, "it is the bias of a weight that is in no layer")

  joined: list[BiasUse | None] = []
  for block in blocks:
    ours = [at.get(use.path, []) for use in block]
    entries = {  # two spellings of one view read the same entries
      (bias.leaf, views.index_map(bias.view, shapes[bias.leaf]).tobytes())
      for found in ours
      for bias in found
    }
    if len(entries) > 1 or (entries and not all(ours)):
      for leaf, _ in entries:
        refused.setdefault(leaf, "its weight is used several times, not always with this bias")
      joined.append(None)
    else:
      joined.append(ours[0][0] if entries else None)

  taken: dict[int, np.ndarray] = {}
  for bias in joined:
    if bias:
      count = taken.setdefault(bias.leaf, np.zeros(int(np.prod(shapes[bias.leaf])), int))
      np.add.at(count, views.index_map(bias.view, shapes[bias.leaf]), 1)
  for leaf, count in taken.items():
    if count.max(initial=0) > 1:
      refused.setdefault(leaf, "it is the bias of two layers")
  return [None if bias is None or bias.leaf in refused else bias for bias in joined]


def _layer(
  block: list[Use],
  bias: BiasUse | None,
  shapes: Sequence[tuple[int, ...]],
  paths: Sequence[str],
  max_dim: int,
) -> Layer:
  use = block[0]
  return Layer(
    path=paths[use.leaf],
    kind=use.product.kind,
    weight=use.leaf,
    view=views.simplify(use.view, shapes[use.leaf]),
    stack=use.stack,
    inputs=use.inputs,
    outputs=use.outputs,
    bias=bias.leaf if bias else None,
    bias_view=views.simplify(bias.view, shapes[bias.leaf]) if bias else None,
    uses=len(block),
    diagonal=(
      use.product.kind == "lookup" or use.inputs + (bias is not None) > max_dim,
      use.outputs > max_dim,
    ),
  )
