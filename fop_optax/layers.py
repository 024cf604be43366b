"""Layers: what capture finds in a loss, and all that an optimizer needs to know of it.

A layer is a product `y = x W (+ b)` in which `W` is a view of one parameter. `Layers` is static:
plain, hashable data, no arrays. Statistics of a captured loss travel in `Stats`.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import optax

from fop_optax import views

PyTree = Any


class Bias(NamedTuple):
  """A parameter in the homogeneous coordinate of a layer: of all of its outputs, or of a slice.

  Attributes:
    leaf: index of the bias among the leaves of `params`.
    view: takes that leaf to `[stack, outputs]`, or to the slice of it that the bias is added to.
    place: takes `[stack, outputs]` to that slice.
  """

  leaf: int
  view: views.View
  place: views.View = ()


@dataclasses.dataclass(frozen=True)
class Layer:
  """One block of curvature: a weight, with its biases if it has some.

  Attributes:
    path: printable path of the weight, with the part of it where it has several.
    kind: `"dense"`, `"conv"`, `"lookup"` or `"table"`, joined by ` + ` where a weight is several;
      of per-example gradients `"matrix"` or `"vector"`.
    weight: index of the weight among the leaves of `params`.
    view: takes that leaf to `[stack, inputs, outputs]`.
    stack: number of independent matrices: slices of a scan, experts of a batched product.
    inputs: rows of each matrix, without the bias.
    outputs: columns of each matrix.
    biases: none, the bias, or several of slices of the outputs (of q, k and v).
    uses: in how many products of the loss the weight stands (a scan's body counts once).
    diagonal: whether the input and the output factor are kept as their diagonals.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2)
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    >>> (layer,) = fop_optax.capture(loss, params, jnp.ones((8, 3))).layers
    >>> print(layer.path, layer.kind, layer.dims, layer.factor_shapes)  # a row more: the bias
    ['w'] dense (4, 2) ((1, 4, 4), (1, 2, 2))
  """

  path: str
  kind: str
  weight: int
  view: views.View
  stack: int
  inputs: int
  outputs: int
  biases: tuple[Bias, ...] = ()
  uses: int = 1
  diagonal: tuple[bool, bool] = (False, False)

  @property
  def leaves(self) -> tuple[int, ...]:
    """Indices of the layer's parameters among the leaves of `params`."""
    return tuple(dict.fromkeys((self.weight, *(bias.leaf for bias in self.biases))))

  @property
  def rows(self) -> int:
    """Rows of the layer's matrix, its inputs and, where it has biases, the homogeneous one."""
    return self.inputs + bool(self.biases)

  @property
  def dims(self) -> tuple[int, int]:
    """Shape of the layer's matrix."""
    return self.rows, self.outputs

  @property
  def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shapes of the stacked factors `A` and `G`."""
    return side_shapes(self.stack, self.dims, self.diagonal)

  def gather(self, leaves: Sequence[Any] | Mapping[int, Any]) -> jax.Array:
    """The layer's parameters (or gradients) as matrices `[stack, rows, outputs]`, bias last."""
    return with_biases(views.replay(self.view, leaves[self.weight]), self.biases, leaves)

  def spread(self, matrix: jax.Array, shapes: Sequence[tuple[int, ...]]) -> dict[int, jax.Array]:
    """The transpose of `gather`: what each leaf of the layer receives, by leaf index.

    Several layers can share a leaf (parts of one weight): their shares add up.
    """
    weight = matrix[:, : self.inputs]
    out = {self.weight: views.transpose(self.view, weight, shapes[self.weight])}
    return spread_biases(matrix[:, self.inputs :], self.biases, shapes, out)


@dataclasses.dataclass(frozen=True)
class Layers(Sequence[Layer]):
  """The layers of a loss: static, hashable; the only thing an optimizer needs.

  Attributes:
    entries: the layers.
    shapes: shape of every leaf of `params`, in the order of `jax.tree.leaves`.
    paths: printable path of every leaf.
    groups: number of groups of examples the gradient is taken over; contrasts are one fewer.
    frozen: indices of the leaves that no gradient of the loss reaches: they are left as they are.
    fisher: whose labels the output factors are of, as `fop_optax.capture` takes it.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["u"]) @ params["w"]) ** 2)
    >>> params = {"u": jnp.ones((3, 5)), "w": jnp.ones((5, 2))}
    >>> layers = fop_optax.capture(loss, params, jnp.ones((8, 3)), groups=2).layers
    >>> print(len(layers), layers.groups, [layer.dims for layer in layers])
    2 2 [(3, 5), (5, 2)]
  """

  entries: tuple[Layer, ...]
  shapes: tuple[tuple[int, ...], ...]
  paths: tuple[str, ...]
  groups: int
  frozen: frozenset[int] = frozenset()
  fisher: str = "empirical"

  @overload
  def __getitem__(self, index: int) -> Layer: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[Layer, ...]: ...
  def __getitem__(self, index):
    return self.entries[index]

  def __len__(self) -> int:
    return len(self.entries)

  def __iter__(self) -> Iterator[Layer]:
    return iter(self.entries)

  @property
  def covered(self) -> frozenset[int]:
    """Indices of the leaves that are in a layer."""
    return frozenset(leaf for layer in self for leaf in layer.leaves)

  def leaves(self, tree: PyTree, what: str) -> list[Any]:
    """Flattens `tree` and checks its leaves against these layers.

    Trees are matched by number and shapes of leaves, never by keys: Flax NNX hands an optimizer
    the same parameters in two containers. A leaf masked by optax comes back as `optax.MaskedNode`,
    also where one of them stands for a whole subtree.

    Raises:
      ValueError: if the leaves are not those of the captured `params`; `what` names the tree.
    """
    nodes = jax.tree.leaves(tree, is_leaf=is_masked)
    spans = self._spans(tree)
    leaves = [node for node, span in zip(nodes, spans, strict=True) for _ in range(span)]
    if len(leaves) != len(self.shapes):
      raise ValueError(
        f"{what} has {len(leaves)} leaves, but these layers were captured from params with"
        f" {len(self.shapes)}: {', '.join(self.paths[:4])}{', ...' if len(self.paths) > 4 else ''}."
        " Pass the tree that went into `fop_optax.capture(loss, params, ...)`, or capture anew."
      )
    for leaf, shape, path in zip(leaves, self.shapes, self.paths, strict=True):
      if not is_masked(leaf) and tuple(jnp.shape(leaf)) != shape:
        raise ValueError(
          f"{what} has shape {tuple(jnp.shape(leaf))} at {path}, but these layers were captured"
          f" from params with {shape} there. Pass the tree that went into"
          " `fop_optax.capture(loss, params, ...)`, or capture anew."
        )
    return leaves

  def places(self, tree: PyTree) -> list[int]:
    """Which leaf of `tree` each parameter is: the same one for those masked as one subtree."""
    return [place for place, span in enumerate(self._spans(tree)) for _ in range(span)]

  def tree(self, like: PyTree, leaves: Sequence[Any]) -> PyTree:
    """The inverse of `leaves`: a list of one leaf a parameter in the structure of `like`."""
    starts = itertools.accumulate(self._spans(like)[:-1], initial=0)
    structure = jax.tree.structure(like, is_leaf=is_masked)
    return jax.tree.unflatten(structure, [leaves[start] for start in starts])

  def _spans(self, tree: PyTree) -> list[int]:
    """How many parameters each leaf of `tree` stands for: one, or a subtree masked as one."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
    if len(flat) == len(self.shapes):
      return [1] * len(flat)
    spans: list[int] = []
    for path, leaf in flat:
      prefix, below = jax.tree_util.keystr(path), self.paths[sum(spans) :]
      inside = [own.startswith(prefix) for own in below] + [False]
      spans.append(max(inside.index(False), 1) if is_masked(leaf) else 1)
    return spans


def with_biases(
  matrix: jax.Array, biases: Sequence[Bias], leaves: Sequence[Any] | Mapping[int, Any]
) -> jax.Array:
  """Matrices `[stack, inputs, outputs]` with their biases as the last row."""
  if not biases:
    return matrix
  bias = bias_row(biases, leaves, (len(matrix), matrix.shape[2]))
  return jnp.concatenate([matrix, bias[:, None].astype(matrix.dtype)], axis=1)


def bias_row(
  biases: Sequence[Bias], leaves: Sequence[Any] | Mapping[int, Any], shape: tuple[int, int]
) -> jax.Array:
  """The biases of a layer, each in its place, `[stack, outputs]`."""
  parts = [
    views.transpose(bias.place, views.replay(bias.view, leaves[bias.leaf]), shape)
    for bias in biases
  ]
  return functools.reduce(jnp.add, parts)


def spread_biases(
  row: jax.Array,
  biases: Sequence[Bias],
  shapes: Sequence[tuple[int, ...]],
  out: dict[int, jax.Array],
  shardings: Mapping[int, Any] | None = None,
) -> dict[int, jax.Array]:
  """`out` with what each bias receives of that row, `[stack, 1, outputs]`, added to it.

  Leaves have `shardings` by their types, under explicit mesh axes.
  """
  for leaf, view, place in biases:
    sharding = shardings[leaf] if shardings else None
    share = views.transpose(view, views.replay(place, row[:, 0]), shapes[leaf], sharding)
    out[leaf] = out[leaf] + share if leaf in out else share
  return out


def side_shapes(
  stack: int, dims: Sequence[int], diagonal: Sequence[bool]
) -> tuple[tuple[int, ...], ...]:
  """Shapes of stacked factors, one an axis: `[stack, d, d]`, or diagonals `[stack, d]`."""
  sides = zip(dims, diagonal, strict=True)
  return tuple((stack, d) if diagonal else (stack, d, d) for d, diagonal in sides)


def is_masked(leaf: Any) -> bool:
  """Whether optax has masked this leaf."""
  return isinstance(leaf, optax.MaskedNode)


class Factors(NamedTuple):
  """Kronecker statistics of one layer: `A (x) G` estimates its block of the Fisher matrix."""

  A: jax.Array  # [stack, rows, rows], or [stack, rows] where diagonal
  G: jax.Array  # [stack, outputs, outputs], or [stack, outputs] where diagonal


class Stats(NamedTuple):
  """What `Captured.value_and_grad` hands to an optimizer beside the mean gradient.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> captured = fop_optax.capture(loss, params, x, groups=2)
    >>> value, grads, stats = captured.value_and_grad(params, x)
    >>> print(stats.factors[0].A, stats.contrasts[0]["w"].ravel())  # mean of x x'; grad_1 - grad_2
    [[[2.  0. ]
      [0.  0.5]]] [ 8. -2.]
    >>> print(stats.inputs_only().factors[0].G)
    [[[1.]]]
  """

  refresh: jax.Array  # bool, shape=(): whether `factors` hold statistics of this batch
  factors: tuple[Factors, ...]  # one a layer, in the order of `Captured.layers`
  contrasts: tuple[PyTree, ...]  # groups - 1 trees like the gradient; two groups: grad_1 - grad_2
  loss: jax.typing.ArrayLike = 0.0  # shape=(): where it is not finite, no step is taken
  second_moments: tuple[jax.Array, ...] = ()  # one a layer, [stack, rows, outputs]; none unasked

  def inputs_only(self) -> "Stats":
    """With the identity for each output factor: of K-FAC's direction `(A + l I)^-1 V` is left.

    But for a number, and with `relative_damping=r` alone `l` is sqrt(r) times the mean eigenvalue
    of `A`. This is the preconditioner of Newton-Muon, to be followed by
    :func:`fop_optax.orthogonalize`.
    """

    def identity(G: jax.Array) -> jax.Array:
      one = jnp.eye(G.shape[-1], dtype=G.dtype) if G.ndim == 3 else jnp.ones((), G.dtype)
      return jnp.broadcast_to(one, G.shape)

    factors = tuple(own._replace(G=identity(own.G)) for own in self.factors)
    return self._replace(factors=factors, second_moments=())


class Basis(NamedTuple):
  """The eigenbases of blocks of one shape: eigenvectors of their factors, in the columns.

  Where the blocks have owners both sides have their slots, and `place` says where each block is.
  """

  A: jax.Array | None  # [blocks, rows, rows]; None of a diagonal factor: the identity
  G: jax.Array | None  # [blocks, outputs, outputs]
  layer: jax.Array  # int32, shape=(blocks,): the layer of each, those of a layer side by side
  place: jax.Array | None = None  # int32, shape=(blocks,); None: in order
