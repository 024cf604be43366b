"""Second moments of the gradients of single examples in given bases: the diagonal of EKFAC.

For the gradients `V_n` of N examples with respect to a layer's matrix and orthogonal `U_A`, `U_G`

    S = N R sum_n (U_A' V_n U_G)^2        V_n = sum_t [c x_nt; h] dy_nt'

entry by entry, `dy` being gradients of the mean loss and R its terms an example, as in `G`. So `S`
is the diagonal in that basis of what `A (x) G` estimates, and for independent `|x|` and `|dy|` near
the outer product of their eigenvalues (George et al., 2018). Rows of an example, be they tokens or
places of an image, are added up before they are squared. Uses of a weight, and steps of a scan over
which it is constant, are not: each gives a sum of its own, as AD adds up what comes back.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from fop_optax import _compat, moments
from fop_optax.capture.examples.values import Piece
from fop_optax.capture.kinds.convolution import Convolution
from fop_optax.capture.kinds.dense import Dense
from fop_optax.capture.kinds.lookup import Lookup
from fop_optax.capture.resolve import Resolved
from fop_optax.capture.values import Key, Use
from fop_optax.layers import Basis, Factors, Layers
from fop_optax.sharding import whole


class Statistics(NamedTuple):
  """What a product forms for its layer, or zeros in that form."""

  factors: Factors
  S: jax.Array | None = None  # [stack, shards, rows, outputs]; None where it is not formed


class Rotation(NamedTuple):
  """The basis of one layer."""

  A: jax.Array | None  # [stack, rows, rows], None for the identity
  G: jax.Array | None  # [stack, outputs, outputs]


def rotations(
  layers: Layers,
  basis: Sequence[Basis],
  dtypes: Sequence[jax.typing.DTypeLike],
  refresh: jax.Array | None = None,
) -> tuple[Rotation, ...]:
  """The basis of each layer, found by the numbers that blocks have of their layers.

  A layer that optax has masked has none: it gets any of its shape, or zeros. Bases that have owners
  are gathered, if `refresh`; else they are zeros.

  Raises:
    ValueError: if there is no basis of the shape of a layer.
  """
  make = lambda: _rotations(layers, [_in_order(own) for own in basis], dtypes)
  if refresh is None or all(own.place is None for own in basis):
    return make()
  like = jax.eval_shape(make)
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  skip = lambda: jax.tree.map(_compat.sharded_like, zeros(), like)
  return lax.cond(refresh, make, skip)


def _in_order(own: Basis) -> Basis:
  if own.place is None:
    return own
  ordered = lambda side: None if side is None else whole(side)[own.place]
  return Basis(ordered(own.A), ordered(own.G), own.layer)


def _rotations(layers, basis, dtypes):
  shape = lambda side: None if side is None else tuple(side.shape[1:])
  out = []
  for index, (layer, dtype) in enumerate(zip(layers, dtypes, strict=True)):
    wanted = [
      None if diagonal else (d, d) for d, diagonal in zip(layer.dims, layer.diagonal, strict=True)
    ]
    fitting = [own for own in basis if [shape(own.A), shape(own.G)] == wanted]
    if not fitting and not any(map(_is_placeholder, basis)):
      raise ValueError(
        f"`basis` has no block of the shape of {layer.path}, {' x '.join(map(str, layer.dims))}:"
        " it is of another model. Pass `value_and_grad(..., basis=fop_optax.bases(opt_state))`, of"
        " the state that `tx.init(params)` made for these layers."
      )
    out.append(_of_layer(index, layer.stack, wanted, fitting, dtype))
  return tuple(out)


def _is_placeholder(basis: Basis) -> bool:
  """Whether it may stand for layers that are all masked."""
  return all(side is None or side.shape == (1, 1, 1) for side in (basis.A, basis.G))


def _of_layer(index, stack, shapes, fitting, dtype) -> Rotation:
  if not fitting:
    return Rotation(*(shape and jnp.zeros((stack, *shape), dtype) for shape in shapes))
  number = jnp.concatenate([own.layer for own in fitting])
  first = jnp.argmax(number == index)

  def side(shape, parts):
    if shape is None:
      return None
    return lax.dynamic_slice_in_dim(jnp.concatenate(parts), first, stack).astype(dtype)

  columns = zip(*(own[:2] for own in fitting), strict=True)
  return Rotation(*map(side, shapes, columns))


def measurable(
  resolved: Resolved, uses: Mapping[Key, Use], rows: Mapping[Key, tuple[Piece, Piece]], size: int
) -> frozenset[int]:
  """Layers all of whose uses show which rows are of which example.

  Not those of tied weights, whose gradient is the sum of two outer products that are turned
  differently, of tables, of complex numbers and of repeated slices of a stack.

  Args:
    resolved: the layers.
    uses: the accepted uses.
    rows: where the examples lie in x and y of the uses.
    size: number of examples.
  """

  def shows(key):
    use = uses[key]
    if isinstance(use.product, Lookup):
      known = use.fold is None
    else:
      known = isinstance(use.product, Convolution) or (
        isinstance(use.product, Dense) and not use.product.parts
      )
      known = known and not (use.fold and use.fold.stack)
    if use.fixed or not known:
      return known
    seen = size == 1 or (key in rows and rows[key][0].axis >= 0 and rows[key][0].size == size)
    return seen and not (use.repeats or use.each)

  hidden = {
    place.layer for key, place in resolved.places.items() if place.flipped or not shows(key)
  }
  return frozenset(range(len(resolved.layers))) - hidden


def of_rows(X: jax.Array, Y: jax.Array, U: Rotation) -> jax.Array:
  """`sum_n (U_A' X_n' Y_n U_G)^2` for rows `[n, stack, t, d]` of each example."""
  (*_, t, i), o = X.shape, Y.shape[-1]
  if t == 1:  # the square of a product is the product of squares
    X, Y = _turned(X, U.A), _turned(Y, U.G)
    roles = (((0, 2), (0, 2)), ((1,), (1,)))
    return lax.dot_general(
      X * X, Y * Y, roles, precision=lax.Precision.HIGHEST, out_sharding=moments.replicated(X)
    )
  rows_first = t * (i * i + o * o) <= i * o * (i + o)  # fewer FLOPs than to turn the product
  if rows_first:
    X, Y = _turned(X, U.A), _turned(Y, U.G)
  V = jnp.einsum("nsti,nsto->nsio", X, Y, precision=lax.Precision.HIGHEST)
  if not rows_first:
    V = _turned(_turned(V, U.G).swapaxes(2, 3), U.A).swapaxes(2, 3)
  return jnp.sum(V * V, axis=0)


def of_lookups(index: jax.Array, Y: jax.Array, U: Rotation, inputs: int) -> jax.Array:
  """`of_rows` for one-hot rows `index`, `[n, stack, t]`; an index of `inputs` is left out.

  Rows of an example that read the same entry are added up where the first of them stands.
  """
  Y = _turned(Y, U.G)
  same = index[..., :, None] == index[..., None, :]
  sums = jnp.einsum("nstu,nsuo->nsto", same.astype(Y.dtype), Y, precision=lax.Precision.HIGHEST)
  first = jnp.argmax(same, axis=-1) == jnp.arange(index.shape[-1])
  add = lambda index, squares: (
    jnp.zeros((inputs, Y.shape[-1]), Y.dtype).at[index].add(squares, mode="drop")
  )
  squares = jnp.where(first[..., None], sums * sums, 0)
  return jax.vmap(add, 1)(index, squares)


def of_sums(sums: Factors, U: Rotation) -> jax.Array:
  """`of_rows` for one row an example, `[stack, n, d]`; with an axis of one shard."""
  X, Y = (jnp.swapaxes(v, 0, 1)[:, :, None] for v in sums)
  return of_rows(X, Y, U)[:, None]


def example_bytes(X: Sequence[int], Y: Sequence[int], dtype: jax.typing.DTypeLike) -> int:
  """What `of_rows` or, without `d`, `of_lookups` makes of an example with rows of these shapes."""
  (stack, t, *inputs), o = X, Y[-1]
  made = t * (sum(inputs) or t) + t * o + (sum(inputs) * o if t > 1 else 0)
  return stack * made * jnp.dtype(dtype).itemsize


def of_factors(factors: Factors, U: Rotation) -> jax.Array:
  """The diagonal of `A (x) G` in a basis: K-FAC's `S`, for layers that are not measured."""
  along = lambda factor, U: (
    factor if U is None else jnp.einsum("sij,sik,skj->sj", U, factor, U, precision="highest")
  )
  return along(factors.A, U.A)[:, :, None] * along(factors.G, U.G)[:, None, :]


def _turned(rows: jax.Array, U: jax.Array | None) -> jax.Array:
  """`x_r U` of rows `[n, stack, t, d]`."""
  if U is None:
    return rows
  return jnp.einsum("nsti,sij->nstj", rows, U, precision=lax.Precision.HIGHEST)
