"""Words about what was captured: the table of parameters, the error when it is too little."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax

from fop_optax.layers import Layer, Layers

LARGE = 0.2  # share of parameters in no layer from which capture and its table warn


def printable(path: tuple[Any, ...]) -> str:
  """A leaf's path, without the `.value` by which Flax NNX wraps it."""
  text = jax.tree_util.keystr(path)
  return text.removesuffix(".value") or "(the array itself)"


def table(layers: Layers, fallbacks: Mapping[str, str], notes: Sequence[str] = ()) -> str:
  """One row a parameter: its layer, factor sizes and uses, or why it is in none; then `notes`."""
  rows = [("parameter", "shape", "layer", "factors", "uses")]
  owners: dict[int, list[str]] = {}  # of a bias: several layers where it has a part of each
  for layer in layers:
    for leaf in layer.leaves[1:]:
      owners.setdefault(leaf, []).append(layer.path)
  for layer in layers:
    shape = _shape(layers.shapes[layer.weight])
    rows.append((layer.path, shape, layer.kind, _factors(layer), str(layer.uses)))
    for leaf in layer.leaves[1:]:
      if owners[leaf][0] == layer.path:
        shape = _shape(layers.shapes[leaf])
        rows.append((layers.paths[leaf], shape, f"bias of {', '.join(owners[leaf])}", "", ""))
  first: dict[str, str] = {}  # of each reason the parameter that it is written out for
  for path, shape in zip(layers.paths, layers.shapes, strict=True):
    if path in fallbacks:
      why = fallbacks[path]
      same = first.setdefault(why, path)
      rows.append(
        (path, _shape(shape), f"fallback: {why if same == path else f'as {same}'}", "", "")
      )
  # the reasons of fallbacks are long and stand last in their rows: they widen no column
  widths = [
    max(len(row[i]) for row in rows if i < 2 or not row[2].startswith("fallback"))
    for i in range(len(rows[0]))
  ]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
  total = sum(map(math.prod, layers.shapes))
  inside = sum(math.prod(layers.shapes[leaf]) for leaf in layers.covered)
  lines.append(f"{inside:,} of {total:,} parameters ({inside / max(total, 1):.1%}) are in layers.")
  if left_out(layers, fallbacks):
    lines.append("Warning: many are left to the fallback optimizer; the reasons stand above.")
  unreached = sum(math.prod(layers.shapes[leaf]) for leaf in layers.frozen)
  if unreached >= LARGE * total:
    lines.append(
      f"Warning: {unreached:,} parameters are reached by no gradient: the loss stops it, or takes"
      " them from elsewhere than its first argument."
    )
  return "\n".join([*lines, *notes])


def left_out(layers: Layers, fallbacks: Mapping[str, str]) -> str | None:
  """What to warn of where a large share of the trained parameters is in no layer."""
  sizes = dict(zip(layers.paths, map(math.prod, layers.shapes), strict=True))
  frozen = {layers.paths[leaf] for leaf in layers.frozen}
  left = [path for path in fallbacks if path not in frozen]
  trained = sum(sizes.values()) - sum(sizes[path] for path in frozen)
  share = sum(sizes[path] for path in left) / max(trained, 1)
  if share < LARGE:
    return None
  largest = sorted(left, key=sizes.__getitem__, reverse=True)[:3]
  reasons = "\n".join(f"  {path} ({sizes[path]:,}): {fallbacks[path]}" for path in largest)
  return (
    f"`fop_optax.capture`: {share:.0%} of the parameters are in no layer, and are left to the"
    f" fallback optimizer. The largest:\n{reasons}\nWrite the loss so that they are found, or give"
    " the optimizer a `fallback=` that suits them; `print(captured)` lists all."
  )


def refusal(layers: Layers, fallbacks: Mapping[str, str]) -> str:
  """The message of the error when no parameter, or with `strict` not every one, is in a layer."""
  reasons = "\n".join(f"  {path}: {why}" for path, why in fallbacks.items())
  if not len(layers):
    closed = (
      " The loss does not seem to use its first argument: it should not close over the parameters."
    )
    return (
      "`fop_optax.capture` found no layer: every parameter would be left to the fallback optimizer."
      " A layer is a product of a parameter with something that depends on the batch."
      f"{closed if len(layers.frozen) == len(layers.shapes) else ''}\n{reasons}"
    )
  return f"`fop_optax.capture(strict=True)`: these parameters are in no layer.\n{reasons}"


def sharing_note(paths: Sequence[str]) -> str:
  """Which layers add up the rows of each example."""
  which = ", ".join(paths) or "no layer: none has several rows of an example that capture can tell"
  return f"Rows of each example added up (`sharing='reduce'`): {which}."


def unmeasured_note(paths: Sequence[str]) -> list[str]:
  """Which layers have no second moments of their own."""
  if not paths:
    return []
  which = ", ".join(paths)
  return [f"EKFAC is K-FAC for {which}, whose rows are not told apart by example."]


def _shape(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape)) or "scalar"


def _factors(layer: Layer) -> str:
  """Sizes of the two factors, with the number of stacked matrices, `d` marking a diagonal."""
  sides = zip((layer.rows, layer.outputs), layer.diagonal, strict=True)
  text = " x ".join(f"{size}{'d' if diagonal else ''}" for size, diagonal in sides)
  return text if layer.stack == 1 else f"{layer.stack} * {text}"
