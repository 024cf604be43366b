"""Parameters as stacks of tensors, for methods that precondition a gradient along each mode.

A *mode* is an axis of a tensor; a matrix has two. Which tensors a parameter is made of can be said
in three ways: by `layers`, with which each weight is the matrix that capture found (experts, layers
that a scan goes over and parts of a weight that are used apart are matrices of their own, biases
are vectors, or the last row of theirs); by dimension numbers; or not at all: then its axes are the
modes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax import views
from fop_optax.dimensions import Dimensions, dimension_numbers_of, matrix_axes
from fop_optax.layers import Bias, Layers, is_masked, spread_biases, with_biases


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A parameter or a part of one, as a stack of tensors: each is preconditioned by itself.

  Attributes:
    path: printable path of the parameter.
    weight: its index among the leaves.
    view: how it becomes `[stack, *dims]`.
    stack: number of tensors.
    dims: size of each mode.
    diagonal: for each mode whether it is treated entry by entry, without a matrix.
    natural: whether the modes are the parameter's axes, as nobody said otherwise.
    biases: of a matrix: what its last row is made of, beside the parameter.
    layer: index of the layer that it is the weight of, where it is of one.
  """

  path: str
  weight: int
  view: views.View
  stack: int
  dims: tuple[int, ...]
  diagonal: tuple[bool, ...]
  natural: bool = False
  biases: tuple[Bias, ...] = ()
  layer: int | None = None

  @property
  def leaves(self) -> tuple[int, ...]:
    """The index of the parameter, and those of its biases."""
    return tuple(dict.fromkeys((self.weight, *(bias.leaf for bias in self.biases))))

  def gather(self, leaves: Sequence[Any] | Mapping[int, Any]) -> jax.Array:
    """The parameter (or its gradient) as tensors `[stack, *dims]`."""
    return with_biases(views.replay(self.view, leaves[self.weight]), self.biases, leaves)

  def spread(self, tensors: jax.Array, shapes: Sequence[tuple[int, ...]]) -> dict[int, jax.Array]:
    """The transpose of `gather`."""
    weight = tensors[:, : self.dims[0] - 1] if self.biases else tensors
    out = {self.weight: views.transpose(self.view, weight, shapes[self.weight])}
    return spread_biases(tensors[:, -1:], self.biases, shapes, out)

  def reshaped(self, dims: tuple[int, ...]) -> "Tensor":
    """The same entries in row-major order, under other modes."""
    view = (*self.view, ("reshape", (self.stack, *dims)))
    return dataclasses.replace(self, view=view, dims=dims, diagonal=(False,) * len(dims))

  def cut(self, size: int) -> Iterator["Tensor"]:
    """Pieces of at most `size` along each mode; those of equal shape are one stack."""
    edges = [_edges(n, size) for n in self.dims]
    for corner in itertools.product(*edges):
      yield self._piece(corner) if len(self.dims) else self

  def _piece(self, corner: Sequence[tuple[int, int, int]]) -> "Tensor":
    """The pieces of `width` each that go from `start`, so many along each mode."""
    starts, counts, widths = zip(*corner, strict=True)
    stops = tuple(s + c * w for s, c, w in zip(starts, counts, widths, strict=True))
    axes = range(len(self.dims))
    split = tuple(n for pair in zip(counts, widths, strict=True) for n in pair)
    order = (0, *(1 + 2 * axis for axis in axes), *(2 + 2 * axis for axis in axes))
    stack = self.stack * math.prod(counts)
    view = (
      *self.view,
      ("slice", (0, *starts), (self.stack, *stops), (1,) * (len(self.dims) + 1)),
      ("reshape", (self.stack, *split)),
      ("transpose", order),
      ("reshape", (stack, *widths)),
    )
    return dataclasses.replace(self, view=view, stack=stack, dims=widths)


@dataclasses.dataclass(frozen=True)
class Tensors(Sequence[Tensor]):
  """All tensors of a tree, and the shape and printable path of each of its leaves."""

  entries: tuple[Tensor, ...]
  shapes: tuple[tuple[int, ...], ...]
  paths: tuple[str, ...]

  def __getitem__(self, index):
    return self.entries[index]

  def __len__(self) -> int:
    return len(self.entries)

  def map(self, function: Callable[[Tensor], Iterable[Tensor]]) -> "Tensors":
    """With what `function` makes of each."""
    entries = tuple(part for tensor in self for part in function(tensor))
    return dataclasses.replace(self, entries=entries)


def tensors(
  tree: Any,
  dimension_numbers: Dimensions = None,
  layers: Layers | None = None,
  join_biases: bool = False,
) -> Tensors:
  """The tensors of a tree like params; masked and empty leaves have none.

  With `join_biases` those of a layer are the last row of its matrix, unless a side is diagonal.

  Raises:
    ValueError: if both are given, for dimension numbers that do not fit, and for trees that are not
      of these layers.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
  shapes = tuple(() if is_masked(leaf) else tuple(jnp.shape(leaf)) for _, leaf in flat)
  numbers = dimension_numbers_of(tree, flat, dimension_numbers)
  found = _of_layers(tree, layers, join_biases) if layers is not None and flat else {}
  joined = {leaf for own in found.values() for one in own for leaf in one.leaves}
  entries = []
  for index, (path, leaf) in enumerate(flat):
    if is_masked(leaf) or not math.prod(shapes[index]):
      continue
    name, shape = jax.tree_util.keystr(path), shapes[index]
    if index in found:
      entries += found[index]
    elif index in joined:
      continue
    elif numbers[index] is not None and len(shape) > 1:
      rest, rows, columns = matrix_axes(name, shape, numbers[index])
      stack, *dims = (math.prod(shape[axis] for axis in axes) for axes in (rest, rows, columns))
      view = (("transpose", rest + rows + columns), ("reshape", (stack, *dims)))
      entries.append(Tensor(name, index, view, stack, tuple(dims), (False, False)))
    else:
      dims = shape or (1,)
      view = (("reshape", (1, *dims)),)
      entries.append(Tensor(name, index, view, 1, dims, (False,) * len(dims), natural=True))
  paths = tuple(jax.tree_util.keystr(path) for path, _ in flat)
  return Tensors(tuple(entries), shapes, paths)


def merged_from_left(dims: tuple[int, ...], limit: int) -> tuple[int, ...]:
  """Neighbouring modes put together from the left while their product is at most `limit`."""
  out, size = [], 1
  for d in dims:
    if size * d <= limit:
      size *= d
    elif size > 1:
      out, size = [*out, size], d
    else:
      out = [*out, d]
  return (*out, size) if size > 1 or not out else tuple(out)


def merged_from_right(dims: tuple[int, ...], limit: int, target: int) -> tuple[int, ...]:
  """Neighbouring axes put together from the last on, while their product is at most `limit`.

  Axes of one entry go; no fewer than `target` axes are left.
  """
  wide = [d for d in dims if d > 1] or [1]
  out, left = [wide[-1]], len(wide)
  for d in wide[-2::-1]:
    if d * out[0] <= limit and left > target:
      out, left = [d * out[0], *out[1:]], left - 1
    else:
      out = [d, *out]
  return tuple(out)


def _of_layers(tree: Any, layers: Layers, join_biases: bool) -> dict[int, list[Tensor]]:
  """The weights of layers as matrices, by leaf; what is masked is left out."""
  leaves = layers.leaves(tree, "The tree of parameters or gradients")
  places = layers.places(tree)  # a masked subtree is one leaf of the tree
  found: dict[int, list[Tensor]] = {}
  for index, layer in enumerate(layers):
    if is_masked(leaves[layer.weight]):
      continue
    join = join_biases and not any(layer.diagonal)
    biases = tuple(
      bias._replace(leaf=places[bias.leaf])
      for bias in layer.biases
      if join and not is_masked(leaves[bias.leaf])
    )
    dims, weight = (layer.inputs + bool(biases), layer.outputs), places[layer.weight]
    one = Tensor(
      layer.path, weight, layer.view, layer.stack, dims, layer.diagonal, False, biases, index
    )
    found.setdefault(weight, []).append(one)
  return found


def _edges(n: int, size: int) -> list[tuple[int, int, int]]:
  """`(start, count, width)` of the whole pieces of a mode, and of the rest of it."""
  whole, rest = divmod(n, size)
  edges = [(0, whole, size)] if whole else []
  return edges + ([(whole * size, 1, rest)] if rest else [])
