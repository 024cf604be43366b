"""Counts of numbers and FLOPs of curvature, by shapes: the arithmetic of `fop_optax.estimate`."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fop_optax.curvature.owners import plan_owners
from fop_optax.curvature.positive import inverse_flops
from fop_optax.curvature.stacks import Stack, dtype_of, padded_lengths
from fop_optax.layers import Layer, Layers
from fop_optax.optimizers.fop import fop
from fop_optax.optimizers.kfac import kfac
from fop_optax.optimizers.shampoo import shampoo
from fop_optax.optimizers.shampoo_options import BLOCK_SIZE
from fop_optax.optimizers.soap import soap
from fop_optax.optimizers.soap_options import MAX_PRECOND_DIM
from fop_optax.tensors import Tensor, tensors

EIGH, QR = 9, 8 / 3  # times d^3: LAPACK's eigenvectors; a square QR, with its Q written out


class Block(NamedTuple):
  """Equal matrices, or tensors, of one parameter."""

  path: str
  count: int
  dims: tuple[int, ...]
  diagonal: tuple[bool, ...]  # for each side whether it has no matrix
  itemsize: int = 4  # bytes of a number

  @property
  def sides(self) -> list[int]:
    """Lengths of the sides that have a matrix."""
    return [d for d, diagonal in zip(self.dims, self.diagonal, strict=True) if not diagonal]

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def squares(self) -> int:
    return sum(d * d for d in self.sides)

  @property
  def with_diagonals(self) -> int:
    """Numbers of all sides, of some their diagonals."""
    return self.squares + sum(self.dims) - sum(self.sides)

  def one_sided(self) -> "Block":
    """Without the matrices of all sides but the shortest."""
    shortest = min(range(len(self.dims)), key=self.dims.__getitem__)
    kept = (own or side != shortest for side, own in enumerate(self.diagonal))
    return self if len(self.dims) < 2 else self._replace(diagonal=tuple(kept))


class LayerEstimate(NamedTuple):
  """What one layer takes, all its matrices (or tensors) together, on all devices.

  An entry of `Estimate.layers`, in the order of the layers (or tensors).
  """

  path: str  # printable path of the weight
  blocks: int  # number of matrices
  dims: tuple[int, ...]  # shape of each
  diagonal: tuple[bool, ...]  # for each side whether it has no matrix
  factor_bytes: int  # running factors, or second moments
  inverse_bytes: int  # inverses, eigenvectors or roots; of EKFAC with S
  moment_bytes: int  # of SOAP and Shampoo: moments and counts that are kept beside them
  ordinary_flops: float  # of each step
  statistics_flops: float  # of each refresh: second moments of rows
  inverse_flops: float  # of each refresh: inverses, bases or roots


class Sizes(NamedTuple):
  """Bytes on one device, of which temporaries are made up."""

  parameters: int
  curvature: int  # factors and inverses
  inverses: int
  statistics: int  # of a batch
  groups: int


Temporaries = Callable[[Sizes], tuple[int, int]]  # bytes, of an ordinary and of a refresh step


class Method(NamedTuple):
  """An optimizer, and what it keeps and does for each matrix or tensor."""

  make: Callable[..., optax.GradientTransformation]  # of layers, with options
  blocks: Callable[[Layers, Sequence[int], int], list[Block]]  # with sides up to a limit
  longest: int | None  # the limit by default
  limit: str  # the argument that sets it
  products: Callable[[Layers], int]  # with each side, each step, of the size of the layer
  remake: Callable[[int, int], float]  # side, size of the layer -> FLOPs
  factors: Callable[[Block], int]  # numbers in them
  inverses: Callable[[Block], int]
  temporaries: Temporaries
  of_rows: bool = False  # whether the factors are second moments of rows
  padded: bool = False  # whether matrices of nearly one side are inverted as one
  squares: bool = False  # whether there are second moments in their basis, too
  moments: bool = False  # whether two moments of each block, and two counts, are kept beside them
  bfloat16: str | None = "factor_dtype=jnp.bfloat16"  # what holds factors so, where there is a way
  one_sided: str | None = None  # what keeps the shorter side of each matrix alone


def _matrices(layers: Layers, sizes: Sequence[int], limit: int) -> list[Block]:
  """The matrices of layers; the limit does not count the bias."""
  long = lambda layer: (layer.inputs > limit, layer.outputs > limit)
  return [
    Block(
      layer.path,
      layer.stack,
      layer.dims,
      tuple(map(bool.__or__, layer.diagonal, long(layer))),
      max(sizes[leaf] for leaf in layer.leaves),
    )
    for layer in layers
  ]


def _tensors(layers: Layers, sizes: Sequence[int], split: Callable[[Tensor], Any]) -> list[Block]:
  """What methods of gradients alone make of all parameters."""
  like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in layers.shapes]
  return [
    Block(
      layers.paths[own.weight] if own.layer is None else own.path,
      own.stack,
      own.dims,
      own.diagonal,
      max(sizes[leaf] for leaf in own.leaves),
    )
    for own in tensors(like, None, layers).map(split)
  ]


def _soap_blocks(layers: Layers, sizes: Sequence[int], limit: int) -> list[Block]:
  """Sides beyond the limit have no basis, nor have vectors."""

  def without(block: Block) -> Block:
    vector = len(block.dims) < 2
    kept = (
      own or vector or d > limit or d == 1
      for d, own in zip(block.dims, block.diagonal, strict=True)
    )
    return block._replace(diagonal=tuple(kept))

  return [without(block) for block in _tensors(layers, sizes, lambda tensor: [tensor])]


def _shampoo_blocks(layers: Layers, sizes: Sequence[int], limit: int) -> list[Block]:
  """Sides beyond the limit are cut."""
  return _tensors(layers, sizes, lambda tensor: tensor.cut(limit))


def _by_layer(vectors: Callable[[int], int], kept: int = 3, copies: int = 2) -> Temporaries:
  """So many arrays like the parameters for so many groups; at a refresh what comes anew.

  That is for each group its statistics and `kept` arrays like the parameters, and `copies` of the
  inverses: themselves, and sides of nearly one length stacked.
  """

  def temporaries(own: Sizes) -> tuple[int, int]:
    ordinary = vectors(own.groups) * own.parameters
    anew = own.groups * (own.statistics + kept * own.parameters) + copies * own.inverses
    return ordinary, max(ordinary, anew)

  return temporaries


def _by_tensor(copies: int) -> Temporaries:
  """So many copies of the curvature, and arrays like the parameters: any step may refresh."""
  return lambda own: (copies * own.curvature + 3 * own.parameters,) * 2


_layer_method: dict[str, Any] = {
  "blocks": _matrices,
  "longest": None,
  "limit": "capture(max_dim={})",
  "factors": lambda block: block.with_diagonals,
  "of_rows": True,
}
METHODS = {
  "kfac": Method(
    make=lambda layers, **own: kfac(0.1, layers, **own),
    products=lambda layers: 1,
    temporaries=_by_layer(lambda groups: 3),  # gradient, direction, trace
    remake=lambda d, size: inverse_flops(d),
    padded=True,
    inverses=lambda block: block.with_diagonals,
    **_layer_method,
  ),
  "fop": Method(
    make=lambda layers, **own: fop(0.1, layers, **own),
    products=lambda layers: layers.groups + 1,  # M^-1 of each, F g_avg
    # each contrast, its g_perp, M^-1 of it; trace
    temporaries=_by_layer(lambda groups: 5 * groups - 2),
    remake=lambda d, size: inverse_flops(d),
    padded=True,
    inverses=lambda block: block.with_diagonals,
    **_layer_method,
  ),
  "ekfac": Method(
    make=lambda layers, **own: kfac(0.1, layers, scaling="eigenvalue", **own),
    products=lambda layers: 2,  # into the basis and back
    temporaries=_by_layer(lambda groups: 4, kept=2, copies=1),
    remake=lambda d, size: (EIGH + 2) * d**3 + 2 * size * d,  # S carried over
    inverses=lambda block: block.squares + block.size,
    squares=True,
    **_layer_method,
  ),
  "soap": Method(
    make=lambda layers, **own: soap(layers=layers, **own),
    blocks=_soap_blocks,
    longest=MAX_PRECOND_DIM,
    limit="soap(max_precond_dim={})",
    products=lambda layers: 3,  # statistics, rotation, and back
    temporaries=_by_tensor(3),
    remake=lambda d, size: (2 + QR) * d**3 + 4 * size * d,  # the first moment turned
    factors=lambda block: block.squares,
    inverses=lambda block: block.squares,
    moments=True,
    bfloat16="soap(statistics_dtype=jnp.bfloat16)",
    one_sided="soap(one_sided=True)",
  ),
  "shampoo": Method(
    make=lambda layers, **own: shampoo(0.1, layers=layers, **own),
    blocks=_shampoo_blocks,
    longest=BLOCK_SIZE,
    limit="shampoo(block_size={})",
    bfloat16=None,
    products=lambda layers: 2,  # statistics, roots
    temporaries=_by_tensor(2),
    remake=lambda d, size: (EIGH + 2) * d**3,
    factors=lambda block: block.squares,
    inverses=lambda block: block.squares,
    moments=True,
  ),
}


def blocks_of(
  method: Method, layers: Layers, leaves: Sequence[Any], limit: int | None = None
) -> list[Block]:
  """All matrices of the parameters `leaves`."""
  sizes = [jnp.result_type(jnp.float32, dtype_of(leaf)).itemsize for leaf in leaves]
  limit = limit or method.longest or max(map(math.prod, layers.shapes))
  return method.blocks(layers, sizes, limit)


def remade_as(method: Method, blocks: Sequence[Block]) -> dict[int, int]:
  """The length that each side has where its inverses are made."""
  sides = {d for block in blocks for d in block.sides}
  return padded_lengths(sides) if method.padded else {d: d for d in sides}


def cost(
  method: Method,
  products: int,
  block: Block,
  lengths: Mapping[int, int],
  itemsize: int | None = None,
) -> LayerEstimate:
  """What the matrices take, with so many products a step, such `lengths` and factors."""
  n, size = block.count, block.size
  return LayerEstimate(
    path=block.path,
    blocks=n,
    dims=block.dims,
    diagonal=block.diagonal,
    factor_bytes=n * method.factors(block) * (itemsize or block.itemsize),
    inverse_bytes=n * method.inverses(block) * block.itemsize,
    moment_bytes=n * (2 * size * block.itemsize + 8) if method.moments else 0,
    ordinary_flops=n * products * 2.0 * size * sum(block.sides),
    statistics_flops=0.0,
    inverse_flops=n * sum(method.remake(lengths[d], size) for d in block.sides),
  )


def statistics_bytes(method: Method, block: Block) -> int:
  """Of what `captured.value_and_grad` returns beside the gradient at a refresh."""
  if not method.of_rows:
    return 0
  squares = block.size if method.squares else 0
  return block.count * (method.factors(block) + squares) * block.itemsize


def statistics_flops(method: Method, layer: Layer, rows: int, examples: int | None) -> float:
  """FLOPs of second moments over so many rows of each matrix of a layer.

  Those in a basis (`fop_optax.capture.second_moments`) of rows that are no products are counted as
  their outputs turned. Where the examples are not known, rows are turned one by one.
  """
  block = Block(layer.path, 1, (layer.inputs, layer.outputs), layer.diagonal)
  flops = 2.0 * rows * block.squares
  if method.squares and layer.kind in ("dense", "conv"):
    r, o = layer.dims
    turned = rows * block.squares
    if examples and rows > examples:  # the rows of an example are added up
      turned = min(turned, examples * r * o * sum(block.sides))
    flops += 2.0 * (turned + rows * r * o)
  elif method.squares:
    flops += 2.0 * rows * block.squares
  return layer.stack * flops


class Share(NamedTuple):
  """What one device has of the curvature."""

  factor_bytes: int
  inverse_bytes: int
  moment_bytes: int
  ordinary_flops: float
  inverse_flops: float

  @property
  def bytes(self) -> int:
    return self.factor_bytes + self.inverse_bytes


def largest_share(costs: Sequence[LayerEstimate], devices: int) -> Share:
  """What each device has of the curvature, dealt as by `fop_optax.curvature.owners.plan_owners`.

  Memory and products are those of its slots, empty ones included; inverses those of its blocks, on
  the device with most.
  """
  totals: dict[Any, list[LayerEstimate]] = {}
  for own in costs:
    totals.setdefault((own.dims, own.diagonal), []).append(own)
  stacks = tuple(
    Stack((), sum(own.blocks for own in members), dims, diagonal)
    for (dims, diagonal), members in totals.items()
  )
  plan = plan_owners(stacks, devices)
  inverses, products = np.zeros(devices), 0.0
  factor_bytes = inverse_bytes = moment_bytes = 0
  rows = zip(stacks, plan.slots, plan.places, totals.values(), strict=True)
  for stack, slots, places, members in rows:
    total = lambda field, own=members: sum(getattr(x, field) for x in own)
    factor_bytes += total("factor_bytes") * slots // stack.blocks
    inverse_bytes += total("inverse_bytes") * slots // stack.blocks
    moment_bytes += total("moment_bytes") * slots // stack.blocks
    products += total("ordinary_flops") * slots / stack.blocks
    owned = np.bincount(np.array(places) // slots, minlength=devices)
    inverses += total("inverse_flops") / stack.blocks * owned
  flops = float(inverses.max(initial=0.0))
  return Share(factor_bytes, inverse_bytes, moment_bytes, products, flops)


class Saving(NamedTuple):
  """What would make the state smaller, and by how many bytes a device."""

  how: str
  bytes: int


def savings(
  method: Method, layers: Layers, leaves: Sequence[Any], itemsize: int | None, devices: int
) -> list[Saving]:
  """What would make the state smaller, where that is so.

  Of the powers of two that bound sides the largest that halves the curvature's bytes, or else the
  largest.
  """

  def held(blocks: Sequence[Block], itemsize: int | None = itemsize) -> int:
    lengths = remade_as(method, blocks)
    own = [cost(method, 0, block, lengths, itemsize) for block in blocks]
    return largest_share(own, devices).bytes

  blocks = blocks_of(method, layers, leaves)
  now = held(blocks)
  longest = max((d for block in blocks for d in block.sides), default=0)
  below = [2**k for k in range(5, 64) if 2**k < longest][::-1]
  limited = {m: held(blocks_of(method, layers, leaves, m)) for m in below}
  halving = [m for m in below if limited[m] <= now / 2]
  ways = {method.limit.format(m): limited[m] for m in (halving or below)[:1]}
  if method.bfloat16:
    ways[method.bfloat16] = held(blocks, min(itemsize or 2, 2))
  if method.one_sided:
    ways[method.one_sided] = held([block.one_sided() for block in blocks])
  return [Saving(how, now - then) for how, then in ways.items() if then < now]
