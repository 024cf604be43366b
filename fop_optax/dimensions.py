"""Dimension numbers: which axes of a parameter are the rows and the columns of its matrix."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.contrib

from fop_optax import views
from fop_optax.layers import Layer, Layers, is_masked

PyTree = Any


class DimensionNumbers(NamedTuple):
  """The axes of a parameter that make the rows and the columns of its matrix.

  Axes in neither are a batch of matrices, each a block of its own. Rows and columns are numbered
  in the order the axes are given in; negative axes count from the last.

  Attributes:
    reduction_axis: axis or axes of the rows: what a product `x W` sums over.
    output_axis: axis or axes of the columns: the outputs.

  Example:
    >>> import fop_optax
    >>> heads = fop_optax.DimensionNumbers(reduction_axis=0, output_axis=(1, 2))  # [in, head, out]
  """

  reduction_axis: Sequence[int] | int = 0
  output_axis: Sequence[int] | int = 1


Dimensions = PyTree | Callable[[PyTree], PyTree]


class Limits(NamedTuple):
  """Sides of factors above which only the diagonal is kept."""

  matrix: int
  vector: int


def blocks(tree: PyTree, dimensions: Dimensions, limits: Limits, groups: int) -> Layers:
  """Each leaf of a tree like params as a layer of its own; masked and empty leaves in none.

  A leaf with two or more axes is a matrix by its dimension numbers, by default the last axis out
  and the others in. One with fewer is a vector, as is a matrix of one row or one column: a matrix
  of one row here.

  Raises:
    ValueError: for dimension numbers that do not fit.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
  numbers = dimension_numbers_of(tree, flat, dimensions)
  entries, shapes = [], []
  for index, ((path, leaf), own) in enumerate(zip(flat, numbers, strict=True)):
    shapes.append(() if is_masked(leaf) else tuple(jnp.shape(leaf)))
    if math.prod(shapes[-1]) and not is_masked(leaf):
      name = jax.tree_util.keystr(path)
      entries.append(_block(name, index, shapes[-1], own, limits))
  paths = tuple(jax.tree_util.keystr(path) for path, _ in flat)
  return Layers(tuple(entries), tuple(shapes), paths, groups)


def _block(
  path: str, index: int, shape: tuple[int, ...], numbers: DimensionNumbers | None, limits: Limits
) -> Layer:
  rest, reduction, output = (), (), tuple(range(len(shape)))
  if len(shape) > 1:
    rest, reduction, output = matrix_axes(path, shape, numbers)
  stack, rows, columns = (math.prod(shape[a] for a in axes) for axes in (rest, reduction, output))
  if vector := min(rows, columns) == 1:
    rows, columns = 1, rows * columns
  limit = limits.vector if vector else limits.matrix
  view = (("transpose", rest + reduction + output), ("reshape", (stack, rows, columns)))
  diagonal = (rows > limit, columns > limit)
  kind = "vector" if vector else "matrix"
  return Layer(path, kind, index, view, stack, rows, columns, diagonal=diagonal)


def matrix_axes(
  path: str, shape: tuple[int, ...], numbers: DimensionNumbers | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
  """Axes of the batch, the rows and the columns."""
  n = len(shape)
  if numbers is None:
    return (), tuple(range(n - 1)), (n - 1,)
  given = [(axes,) if isinstance(axes, int) else tuple(axes) for axes in numbers]
  inside = all(-n <= axis < n for axes in given for axis in axes)
  reduction, output = (tuple(axis % n for axis in axes) for axes in given)
  both = reduction + output
  if not inside or not reduction or not output or len(set(both)) < len(both):
    raise ValueError(
      f"`dimension_numbers` has {tuple(numbers)} for {path}, a parameter of shape {shape}:"
      f" reduction and output axes should be axes of it, at least one each and none twice, such as"
      f" `fop_optax.DimensionNumbers(reduction_axis={tuple(range(n - 1))}, output_axis={n - 1})`."
    )
  return tuple(axis for axis in range(n) if axis not in both), reduction, output


def dimension_numbers_of(
  tree: PyTree, flat: Sequence[tuple[Any, Any]], dimensions: Dimensions
) -> list[DimensionNumbers | None]:
  """The dimension numbers of each leaf; an entry stands for all leaves below its place."""
  if not flat:  # the placeholder of optax.tree.map_params
    return []
  given = dimensions(tree) if callable(dimensions) else dimensions
  leaf_like = lambda x: x is None or _is_numbers(x) or is_masked(x)
  entries, _ = jax.tree_util.tree_flatten_with_path(given, is_leaf=leaf_like)
  out: list[DimensionNumbers | None] = [None] * len(flat)
  for place, entry in entries:
    name = jax.tree_util.keystr(place)
    if not leaf_like(entry):
      raise ValueError(
        f"`dimension_numbers` has {entry!r} at {name or 'its root'}, where it needs a"
        " `fop_optax.DimensionNumbers` or None: it is a tree of them like params (or part of one),"
        " or a callable of params that makes one. `optax.inject_hyperparams` takes any callable for"
        ' a schedule: declare it with `static_args="dimension_numbers"`.'
      )
    below = [i for i, (path, _) in enumerate(flat) if path[: len(place)] == place]
    hidden = [path for path, leaf in flat if is_masked(leaf) and place[: len(path)] == path]
    if not below and not hidden:
      raise ValueError(
        f"`dimension_numbers` has an entry at {name}, where params have nothing: their leaves are"
        f" {', '.join(jax.tree_util.keystr(path) for path, _ in flat[:6])}."
      )
    if _is_numbers(entry):
      for i in below:
        out[i] = entry
  return out


def _is_numbers(x: Any) -> bool:
  """Whether `x` has the fields of dimension numbers: ours, or those of `optax.contrib.muon`."""
  return isinstance(x, tuple) and getattr(x, "_fields", ()) == DimensionNumbers._fields


@dataclasses.dataclass(frozen=True)
class LayerDimensionNumbers:
  """Dimension numbers of captured layers; call it with params for a tree of them.

  Attributes:
    layers: the layers.
    numbers: of each parameter, None where it is no matrix, or not by its axes alone.
    reasons: printable path of each of those, and why.
  """

  layers: Layers
  numbers: tuple[optax.contrib.MuonDimensionNumbers | None, ...]
  reasons: dict[str, str]

  def __call__(self, params: PyTree) -> PyTree:
    """A tree like params."""
    self.layers.leaves(params, "params")  # checks it
    return self.layers.tree(params, self.numbers)


def dimension_numbers(layers: Layers) -> LayerDimensionNumbers:
  """The dimension numbers of captured layers, as `optax.contrib.muon` takes them.

  A weight has them where the matrix that :func:`fop_optax.capture` found permutes and groups its
  axes: dense and attention kernels, also stored with the outputs first, convolutions, experts and
  scanned layers. Parts of a fused weight have none, nor have lookup tables and weights with a side
  beyond `max_dim` of `capture`: Muon leaves those to Adam. To :func:`fop_optax.orthogonalize` and
  :func:`fop_optax.soap` pass `layers=` itself, with which parts are matrices too.

  Args:
    layers: `captured.layers`.

  Returns:
    A callable of params that returns a tree like them, of `optax.contrib.MuonDimensionNumbers` or
    None, with `reasons` for each None.

  Raises:
    TypeError: if `layers` are of another type.
    ValueError: when called, for params that are not of these layers.

  Example:
    >>> import fop_optax, jax.numpy as jnp, optax
    >>> def loss(params, x):
    ...   q = jnp.einsum("bi,ihd->bhd", x, params["q"])
    ...   return jnp.mean((jnp.sum(q, 1) + params["bias"]) ** 2)
    >>> params = {"q": jnp.ones((4, 2, 3)), "bias": jnp.zeros(3)}
    >>> captured = fop_optax.capture(loss, params, jnp.ones((8, 4)))
    >>> numbers = fop_optax.dimension_numbers(captured.layers)
    >>> print(numbers(params)["q"])
    MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
    >>> print(numbers.reasons)
    {"['bias']": 'in no layer: see `captured.fallbacks`'}
    >>> tx = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
  """
  if not isinstance(layers, Layers):
    raise TypeError(
      f"`dimension_numbers(layers)` has a {type(layers).__name__} for layers: pass"
      " `captured.layers`."
    )
  numbers, reasons = [], {}
  for leaf, (path, shape) in enumerate(zip(layers.paths, layers.shapes, strict=True)):
    own, reason = _numbers_of(layers, leaf, shape)
    numbers.append(own)
    if reason is not None:
      reasons[path] = reason
  return LayerDimensionNumbers(layers, tuple(numbers), reasons)


def _numbers_of(layers: Layers, leaf: int, shape: tuple[int, ...]):
  """Dimension numbers of a parameter, or None; and why it has none, or None."""
  own = [layer for layer in layers if layer.weight == leaf]
  if not own:
    biased = [x.path for x in layers if any(bias.leaf == leaf for bias in x.biases)]
    why = f"bias of {', '.join(biased)}" if biased else "in no layer: see `captured.fallbacks`"
    return None, why
  if len(own) > 1:
    return None, f"{len(own)} matrices: {', '.join(layer.path for layer in own)}"
  (layer,) = own
  if any(layer.diagonal):
    side = "rows" if layer.diagonal[0] else "columns"
    return None, f"its {side} are treated one by one: a lookup table, or more than `max_dim`"
  if (axes := views.grouped_axes(layer.view, shape)) is None:
    return None, "not a matrix by its axes: capture takes entries of it"
  _, rows, columns = axes
  spare = iter([axis for axis, n in enumerate(shape) if n == 1])  # for a side of one entry
  sides = [side or tuple(itertools.islice(spare, 1)) for side in (rows, columns)]
  if not all(sides):
    return None, "a vector: it has no axis of one entry for the other side of a matrix"
  return optax.contrib.MuonDimensionNumbers(*sides), None
