"""Layers whose weight meets several rows of an example: tokens, time steps, places of an image.

*Expand* takes each row for itself, as if it were an example's only one. *Reduce* adds up an
example's rows before the second moment is formed (Eschenhagen et al., 2023): for N examples of T
rows `x_nt` each, R terms of the loss each, and `dy` the gradients of the mean loss

    A = 1/N sum_n a_n a_n'     a_n = 1/T sum_t x_nt
    G = N R sum_n g_n g_n'     g_n = sum_t dy_nt

For linear layers followed by a sum or mean over the rows, of which there is one term of the loss,
reduce is the Gauss-Newton matrix and expand is not; where each row has a term of its own and rows
do not mix, expand is. The backward pass returns `T a_n` and `g_n` as cotangents of probes
`[stack, examples, d]`: AD adds up all uses of a weight and all steps of a scan before they are
squared.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fop_optax import _compat, moments
from fop_optax.capture.batch import Chunks
from fop_optax.capture.examples.values import Piece
from fop_optax.capture.kinds.convolution import Convolution
from fop_optax.capture.kinds.dense import Dense
from fop_optax.capture.resolve import Place, Resolved
from fop_optax.capture.values import Key, Use
from fop_optax.layers import Factors, Layer

SHARINGS = ("expand", "reduce")


def reducible(
  resolved: Resolved, uses: Mapping[Key, Use], rows: Mapping[Key, tuple[Piece, Piece]], size: int
) -> frozenset[Place]:
  """Places with several rows an example, all of whose uses are products that show the examples.

  Args:
    resolved: the layers.
    uses: the accepted uses.
    rows: where the examples lie in x and y of the uses.
    size: number of examples.
  """
  of_place: dict[Place, list[Key]] = {}
  for key, place in resolved.places.items():
    of_place.setdefault(place, []).append(key)
  shows = lambda key: (
    _is_product(uses[key]) and key in rows and rows[key][0].axis >= 0 and rows[key][0].size == size
  )
  whole = {place for place, keys in of_place.items() if all(map(shows, keys))}
  several = {place for place in whole if resolved.rows[place][0] > size}
  # of a tied weight both places or none
  layers = {place.layer for place in of_place if place not in whole}
  return frozenset(place for place in several if place.layer not in layers)


def rows_of(resolved: Resolved, reduced: frozenset[Place], chunks: Chunks) -> tuple[int, ...]:
  """For each layer, how many rows its second moments are of, of a batch cut into these chunks."""
  out = [0] * len(resolved.layers)
  for place, rows in resolved.rows.items():
    batch = chunks.size if place in reduced else rows.batch
    out[place.layer] += chunks.count * (batch // chunks.every + rows.fixed)
  return tuple(out)


def _is_product(use: Use) -> bool:
  product = use.product
  if use.fixed or use.repeats or use.each:
    return False
  return isinstance(product, Convolution) or (isinstance(product, Dense) and not product.parts)


def probe(layer: Layer, place: Place, examples: int, like: Factors) -> Factors:
  """Zeros for the sums of each example, in the dtype of the factors."""
  zeros = lambda d: jnp.zeros((layer.stack, examples, d), like.A.dtype)
  inputs, outputs = layer.rows, layer.outputs
  sums = Factors(*map(zeros, (outputs, inputs) if place.flipped else (inputs, outputs)))
  return _compat.vary(sums, _compat.varying(like))


def by_example(form: Callable[[jax.Array], jax.Array], array: jax.Array, piece: Piece) -> jax.Array:
  """`form` of each example's part of an array: `[stack, examples, ...]`."""
  return jax.vmap(form, out_axes=1)(examples_first(array, piece))


def examples_first(array: jax.Array, piece: Piece) -> jax.Array:
  """Each example's part of an array, along a leading axis."""
  axis = piece.axis
  before, after = array.shape[:axis], array.shape[axis + 1 :]
  split = array.reshape(*before, piece.outer, piece.size, piece.inner, *after)
  split = jnp.moveaxis(split, axis + 1, 0)
  return split.reshape(piece.size, *before, piece.outer * piece.inner, *after)


def factors(sums: Factors, diagonal: tuple[bool, bool], scale: tuple[float, float]) -> Factors:
  """`A` and `G` times what normalises them, of the sums of each example: `[stack, 1, d, d]`."""
  roles = moments.Roles(rows=(1,), stack=(0,), features=(2,))
  A, G = (
    number * moments.second_moment(v, roles, along, v.dtype)[:, None]
    for v, along, number in zip(sums, diagonal, scale, strict=True)
  )
  return Factors(A, G)
