"""Which biases become the homogeneous coordinate of which layer.

A block has the coordinate of the biases of its first use that has some. In the rows of its other
uses it is the same, or 0 where nothing is added. A weight that is used transposed as well (tied) is
turned so that the uses with a bias are the straight ones.
"""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np

from fop_optax import views
from fop_optax.capture.values import BiasUse, Key, Use
from fop_optax.layers import Bias

Shapes = Sequence[tuple[int, ...]]


class Block(NamedTuple):
  """The uses of one layer, the transposed ones apart."""

  straight: list[Use]
  flipped: list[Use]


class Homogeneous(NamedTuple):
  """A block, turned if need be, and the homogeneous coordinate in the rows of its uses."""

  straight: list[Use]
  flipped: list[Use]
  biases: tuple[Bias, ...]
  coordinates: Mapping[Key, float]


def join_biases(
  blocks: Sequence[Block], found: Sequence[BiasUse], shapes: Shapes, refused: dict[int, str]
) -> list[Homogeneous]:
  """Each block with its biases; refuses the biases that fit nowhere.

  A bias belongs to one block, or, in disjoint parts, to several; nothing else may read it.
  """
  at: dict[Key, list[BiasUse]] = {}
  for bias in found:
    at.setdefault(bias.use, []).append(bias)
  placed = {use.key for block in blocks for uses in block for use in uses}
  for bias in found:
    if bias.use not in placed:
      refused.setdefault(bias.bias.leaf, "it is the bias of a weight that is in no layer")
  joined = [_join(block, at, shapes, refused) for block in blocks]
  _refuse_shared(joined, shapes, refused)
  while True:  # of biases side by side, all or none
    split = {
      bias.leaf: "it is added beside a bias that is in no layer"
      for block in joined
      if any(bias.leaf in refused for bias in block.biases)
      for bias in block.biases
      if bias.leaf not in refused
    }
    if not split:
      break
    refused |= split
  none = lambda block: any(bias.leaf in refused for bias in block.biases)
  return [block._replace(biases=(), coordinates={}) if none(block) else block for block in joined]


def _join(
  block: Block, at: Mapping[Key, list[BiasUse]], shapes: Shapes, refused: dict[int, str]
) -> Homogeneous:
  straight, flipped = block
  biased = [[use for use in uses if use.key in at] for uses in block]
  if biased[1] and not biased[0]:
    straight, flipped, biased = flipped, straight, biased[::-1]
  for bias in (bias for use in biased[1] for bias in at[use.key]):
    refused.setdefault(
      bias.bias.leaf, "it is the bias of a tied weight, which is used transposed with another one"
    )
  chosen: dict[tuple[int, bytes, bytes], Bias] = {}
  coordinates: dict[Key, float] = {}
  for use in biased[0]:
    own = {_identity(bias.bias, use, shapes): bias for bias in at[use.key]}
    numbers = {bias.coordinate for bias in own.values()}
    why = ""
    if not chosen:
      chosen = {identity: bias.bias for identity, bias in own.items()}
      why = _incomplete(list(chosen.values()), use)
    elif own.keys() != chosen.keys():
      why = "its weight is used several times, with another bias elsewhere"
      for identity, bias in own.items():
        if identity not in chosen:
          refused.setdefault(bias.bias.leaf, why)
      if own.keys().isdisjoint(chosen):  # nothing of ours is added here
        continue
    if len(numbers) > 1:
      why = "it is added beside another bias, times another number"
    if why:
      for bias in chosen.values():
        refused.setdefault(bias.leaf, why)
    (coordinates[use.key], *_) = numbers
  return Homogeneous(straight, flipped, tuple(chosen.values()), coordinates)


def _identity(bias: Bias, use: Use, shapes: Shapes) -> tuple[int, bytes, bytes]:
  """Two spellings of one view read the same entries."""
  place = views.index_map(bias.place, (use.stack, use.outputs)).tobytes() if bias.place else b""
  return bias.leaf, views.index_map(bias.view, shapes[bias.leaf]).tobytes(), place


def _incomplete(biases: Sequence[Bias], use: Use) -> str:
  """Why some biases are not one for each output; empty if they are."""
  shape = (use.stack, use.outputs)
  count = np.zeros(math.prod(shape), int)
  for bias in biases:
    if not bias.place and len(biases) == 1:
      return ""
    np.add.at(count, views.index_map(bias.place, shape), 1)
  if count.max() > 1:
    return "it is added to outputs that have another bias"
  return (
    "it is added to some outputs of a product, of which others have no bias" if 0 in count else ""
  )


def _refuse_shared(blocks: Sequence[Homogeneous], shapes: Shapes, refused: dict[int, str]) -> None:
  taken: dict[int, np.ndarray] = {}
  for bias in (bias for block in blocks for bias in block.biases):
    count = taken.setdefault(bias.leaf, np.zeros(math.prod(shapes[bias.leaf]), int))
    np.add.at(count, views.index_map(bias.view, shapes[bias.leaf]), 1)
  for leaf, count in taken.items():
    if count.max(initial=0) > 1:
      refused.setdefault(leaf, "it is the bias of two layers")
