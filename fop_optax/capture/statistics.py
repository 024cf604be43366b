"""Kronecker statistics formed in the backward pass of a product.

For `y = x W` with rows `x_r` and cotangents `dy_r` (gradients of the mean loss), the backward rule
of an identity on `y` returns, as the cotangent of a probe of zeros,

    A = a sum_r [c x_r; h] [c x_r; h]'     G = g sum_r dy_r dy_r'

with the numbers `a` and `g` that normalise them, formed from `x` and `dy` where they are at hand;
`c` is the number that the loss multiplies `W` by, `h` the homogeneous coordinate of its bias. AD
adds cotangents: a weight that is used twice, or constant over a scan, gets the sum, and one that a
scan goes over gets a stack. Where they are asked for, those of `fop_optax.capture.second_moments`
are formed beside them.

Where the examples are sharded the sums are over those of each device, along an axis of their own
behind the stack: they are added up once all uses, groups and micro-batches are, outside of branches
and loops, where one all-reduce does for them and the gradient.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import second_moments
from fop_optax.capture.entries import Fold, Indices
from fop_optax.capture.examples.values import Piece
from fop_optax.capture.kinds.convolution import Convolution
from fop_optax.capture.kinds.dense import Dense
from fop_optax.capture.kinds.lookup import Lookup
from fop_optax.capture.kinds.table import Table
from fop_optax.capture.second_moments import Rotation, Statistics
from fop_optax.capture.sharing import by_example, examples_first
from fop_optax.capture.values import ONE_HOT, Product
from fop_optax.layers import Factors
from fop_optax.moments import added_up, sum_in_chunks


@dataclasses.dataclass(frozen=True)
class Moments:
  """Which statistics a product is to form: as diagonals or not, times what.

  With a `homogeneous` layer its bias stands in the inputs, and so in the outputs of uses that are
  `flipped`. Of entries that repeat by `fold` the distinct ones count. Of the examples of a chunk
  every `every`-th counts, `every` times, where `rows` says at which axes of x and y they lie; those
  that are `fixed` are of none. With `reduced` the rows of each example are only added up: see
  `fop_optax.capture.sharing`.
  """

  product: Product
  coefficient: complex
  coordinate: float
  homogeneous: bool
  flipped: bool
  diagonal: tuple[bool, bool]
  scale: tuple[float, float]
  rows: tuple[Piece, Piece] | None
  examples: int
  every: int
  fold: Fold | None = None
  reduced: bool = False
  fixed: bool = False

  def __call__(
    self, x: jax.Array, dy: jax.Array, like: Statistics, U: Rotation | None
  ) -> Statistics:
    """The sums over the rows of each shard, scaled, in the shapes and dtypes of `like`."""
    x, dy, count = self._thin(x, dy)
    if self.reduced:
      return Statistics(self._sums(x, dy, like.factors))
    factors = self._factors(x, dy, count, like.factors)
    if like.S is None:
      return Statistics(factors)
    assert U is not None
    return Statistics(factors, count * self.scale[1] * self._squares(x, dy, like.S, U))

  def _factors(self, x: jax.Array, dy: jax.Array, count: int, like: Factors) -> Factors:
    """Of the examples that are left, each of which is to count so often."""
    if jnp.iscomplexobj(dy):
      assert isinstance(self.product, Dense)
      product, x, dy = self.product.as_real(self.coefficient * x, dy)
      scale, examples = (count * self.scale[0], count * self.scale[1]), self.examples // self.every
      real = dataclasses.replace(self, product=product, coefficient=1.0, scale=scale)
      return dataclasses.replace(real, examples=examples, every=1)._factors(x, dy, 1, like)
    scale_a, scale_g = (count * scale for scale in self.scale)
    x_axis, y_axis = self._examples_at(x, dy) if like.A.shape[1] > 1 else (None, None)
    shape_a, shape_g = ((f.shape[0], *f.shape[2:]) for f in like)

    def inputs(x):
      return scale_a * self._inputs(x, like.A.dtype).reshape(shape_a)

    def outputs(x, dy):
      return scale_g * self._outputs(x, dy, like.G.dtype).reshape(shape_g)

    A = _by_shard(inputs, (x,), (x_axis,), like.A)
    if x_axis is None:  # of a table: x plays no part in G
      return Factors(A, _by_shard(functools.partial(outputs, x), (dy,), (y_axis,), like.G))
    return Factors(A, _by_shard(outputs, (x, dy), (x_axis, y_axis), like.G))

  def _inputs(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    biased, product = self.coordinate != 0, self.product
    rows = self.fold.inputs if self.fold else None
    if rows and biased:
      rows = (*rows, max(rows) + 1)
    form = lambda diagonal: product.input_moment(x, biased, diagonal, dtype)
    a = self._scaled(self._folded(form, self.diagonal[0], rows, product.kind in ONE_HOT))
    return _padded(a) if self.homogeneous and not self.flipped and not biased else a

  def _outputs(self, x: jax.Array, dy: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    form = lambda diagonal: self.product.output_moment(x, dy, diagonal, dtype)
    g = self._folded(form, self.diagonal[1], self.fold.outputs if self.fold else None)
    return _padded(g) if self.homogeneous and self.flipped else g

  def _sums(self, x: jax.Array, dy: jax.Array, like: Factors) -> Factors:
    """Sums over the rows of each example, `[stack, examples, d]`."""
    assert self.rows is not None
    assert isinstance(self.product, Dense | Convolution)
    product, fold, biased = self.product, self.fold, self.coordinate != 0
    at_x, at_y = (piece._replace(size=piece.size // self.every) for piece in self.rows)
    a = by_example(lambda x: product.input_sum(x, biased, like.A.dtype), x, at_x)
    g = by_example(lambda dy: product.output_sum(dy, like.G.dtype), dy, at_y)
    if fold and fold.stack:
      a, g = added_up(a, 0, fold.stack), added_up(g, 0, fold.stack)
    if fold and fold.inputs:
      a = added_up(a, 2, (*fold.inputs, max(fold.inputs) + 1) if biased else fold.inputs)
    if fold and fold.outputs:
      g = added_up(g, 2, fold.outputs)
    inputs = a.shape[2] - biased
    a *= jnp.asarray([self.coefficient] * inputs + [self.coordinate] * biased, a.dtype)
    if self.homogeneous and self.flipped:
      g = _padded(g, 1)
    elif self.homogeneous and not biased:
      a = _padded(a, 1)
    return Factors(a, g)

  def _squares(self, x: jax.Array, dy: jax.Array, like: jax.Array, U: Rotation) -> jax.Array:
    """`sum_n (U_A' V_n U_G)^2` over the examples of each shard, like `like`."""
    looked_up = isinstance(self.product, Lookup)
    of_rows = functools.partial(self._of_lookups if looked_up else second_moments.of_rows, U=U)
    rows = jax.vmap(functools.partial(self._rows, dtype=like.dtype))

    def form(x, dy):
      if self.fixed:  # each row is of its own
        return of_rows(*(jnp.swapaxes(v, 0, 2) for v in rows(x, dy)))
      X, Y = jax.eval_shape(rows, x, dy)
      one = second_moments.example_bytes(X.shape[1:], Y.shape[1:], like.dtype)
      whole = like.size // like.shape[1] * like.dtype.itemsize if looked_up else 0
      return sum_in_chunks(lambda x, dy: of_rows(*rows(x, dy)), (x, dy), one, whole)

    if self.rows:
      at_x, at_y = (piece._replace(size=piece.size // self.every) for piece in self.rows)
      arrays, axis = (examples_first(x, at_x), examples_first(dy, at_y)), 0
    else:  # all of it is of one example, or of none
      arrays, axis = (x[None], dy[None]), None
    return _by_shard(form, arrays, (axis, axis), like)

  def _rows(self, x: jax.Array, dy: jax.Array, dtype: jax.typing.DTypeLike):
    """`[c x_r; h]` and `dy_r`, `[stack, rows, d]`; of a lookup the index instead of the former."""
    product, fold = self.product, self.fold
    assert isinstance(product, Dense | Convolution | Lookup)
    Y = product.output_rows(dy, dtype)
    if fold and fold.outputs:
      Y = added_up(Y, 2, fold.outputs)
    if isinstance(product, Lookup):
      return product.input_rows(x), Y
    X = product.input_rows(x, dtype)
    if fold and fold.inputs:
      X = added_up(X, 2, fold.inputs)
    X *= jnp.asarray(self.coefficient, dtype)
    if self.homogeneous:
      X = jnp.concatenate([X, jnp.full((*X.shape[:2], 1), self.coordinate, dtype)], axis=2)
    return X, Y

  def _of_lookups(self, index: jax.Array, Y: jax.Array, U: Rotation) -> jax.Array:
    assert isinstance(self.product, Lookup)
    S = second_moments.of_lookups(index, Y, U, self.product.inputs)
    S *= jnp.asarray(self.coefficient, Y.dtype) ** 2
    if not self.homogeneous:
      return S
    bias = jnp.full((*Y.shape[:3], 1), self.coordinate, Y.dtype)
    return jnp.concatenate([S, second_moments.of_rows(bias, Y, U)], axis=1)

  def _examples_at(self, x: jax.Array, dy: jax.Array) -> tuple[int | None, int | None]:
    """Axes of x and of y along which shards of the examples are taken, None where there is none.

    Any share of the rows gives the same sum: by examples each device has its own.
    """
    examples = self.examples // self.every
    pairs = [p for p in self.product.row_axes if x.shape[p[0]] % examples == 0]
    if pairs:
      return min(pairs, key=lambda p: x.shape[p[0]])
    if isinstance(self.product, Table):
      rows = [axis for axis in self.product.y_rows if dy.shape[axis] % examples == 0]
      return None, min(rows, key=lambda axis: dy.shape[axis], default=None)
    return None, None

  def _folded(
    self,
    form: Callable[[bool], jax.Array],
    diagonal: bool,
    indices: Indices | None,
    one_hot: bool = False,
  ) -> jax.Array:
    """`S' M S` of a moment `M`: what belongs to equal rows, columns or slices added up."""
    distinct = [i for i in indices or () if i >= 0]
    # of a diagonal entries that mix are missing, unless a row has one entry alone
    whole = diagonal and not one_hot and len(set(distinct)) < len(distinct)
    moment = form(diagonal and not whole)
    if self.fold and self.fold.stack:
      moment = added_up(moment, 0, self.fold.stack)
    if indices:
      for axis in range(1, moment.ndim):
        moment = added_up(moment, axis, indices)
    return jnp.diagonal(moment, axis1=1, axis2=2) if whole else moment

  def repeated(self, times: int, x_too: bool) -> "Moments":
    """Those of a product whose rows are repeated along a leading axis."""
    assert isinstance(self.product, Dense)
    return dataclasses.replace(self, product=self.product.repeated(times, x_too))

  def _scaled(self, a: jax.Array) -> jax.Array:
    """The moment of `[c x; h]` from that of `[x; 1]`, or of `c x` from that of `x`."""
    if self.coefficient == 1 and self.coordinate in (0, 1):
      return a
    last = [self.coordinate] if self.coordinate else []
    inputs = a.shape[-1] - len(last)
    numbers = jnp.asarray([self.coefficient] * inputs + last, a.dtype)
    return a * (numbers**2 if a.ndim == 2 else jnp.outer(numbers, numbers))

  def _thin(self, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """`x` and `dy` of some of the examples, and how often each is to count."""
    if self.every == 1 or self.rows is None:
      return x, dy, 1
    return self._some(x, self.rows[0]), self._some(dy, self.rows[1]), self.every

  def _some(self, array: jax.Array, piece: Piece) -> jax.Array:
    """Every `every`-th example along an axis of examples, or of examples times something."""
    # a reshape leaves a sharded axis sharded, which a stride would not
    axis = piece.axis
    before, after, size = array.shape[:axis], array.shape[axis + 1 :], array.shape[axis]
    split = (piece.outer, piece.size // self.every, self.every, piece.inner)
    part = jax.lax.index_in_dim(array.reshape(*before, *split, *after), 0, axis + 2, keepdims=False)
    return part.reshape(*before, size // self.every, *after)


def form_moments(
  moments: Sequence[Moments],
  x: jax.Array,
  y: jax.Array,
  probes: Sequence[Statistics],
  rotations: Sequence[Rotation | None],
  refresh: jax.Array | None,
) -> jax.Array:
  """`y`, in the backward pass of which the statistics become the cotangent of `probes`.

  Args:
    moments: what to form, for each part of the weight.
    x: the other operand of the product.
    y: its output.
    probes: zeros of the statistics' shapes, with an axis of shards behind the stack.
    rotations: for each of them the basis of its second moments, where it has some.
    refresh: a traced bool, or None for always.
  """
  types = jax.tree.map(jax.typeof, list(probes))
  like = jax.tree.map(_compat.shape_of, types)

  def form(x, dy, rotations):
    each = zip(moments, like, rotations, strict=True)
    return [own(x, dy, shapes, rotation) for own, shapes, rotation in each]

  @jax.custom_vjp
  def identity(y, x, probes, rotations, refresh):
    del x, probes, rotations, refresh
    return y

  def forward(y, x, probes, rotations, refresh):
    del probes
    return y, (x, rotations, refresh)

  def backward(residuals, dy):
    x, rotations, refresh = residuals
    placed = lambda sums: jax.tree.map(_compat.sharded_like, sums, types)
    with _compat.mesh_of((x, dy)) as on_it:
      if refresh is None:
        return dy, None, placed(form(x, dy, on_it(rotations))), None, None
      rotations, refresh = on_it((rotations, refresh))
      skip = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), like)
      skip = _compat.vary(placed(skip), _compat.varying((x, dy)))
      # products only inside the branch: gradients of convolutions would be slow there on CPU
      statistics = lax.cond(refresh, lambda: placed(form(x, dy, rotations)), lambda: skip)
    return dy, None, statistics, None, None

  identity.defvjp(forward, backward)
  return identity(y, x, list(probes), list(rotations), refresh)


def _by_shard(
  form: Callable[..., jax.Array],
  arrays: Sequence[jax.Array],
  axes: Sequence[int | None],
  like: jax.Array | jax.ShapeDtypeStruct,
) -> jax.Array:
  """`form` of each shard of the arrays along these axes, `[stack, shards, ...]` as `like` is.

  What has no such axis is formed as a whole, and counts for the first.
  """
  shards = like.shape[1]
  if shards == 1 or None in axes:
    whole = form(*arrays)[:, None]
    first = jnp.arange(shards) == 0
    return whole if shards == 1 else jnp.where(first.reshape(-1, *[1] * (whole.ndim - 2)), whole, 0)
  split = [_split(a, i, like) for a, i in zip(arrays, axes, strict=True) if i is not None]
  return jax.vmap(form, out_axes=1)(*split)


def _split(array: jax.Array, axis: int, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
  """An axis cut into shards, which come first, each whole on the device that `like` has it on.

  Axes of a mesh along which features were sharded are taken by the shards: an all-to-all.
  """
  shards, before, after = like.shape[1], array.shape[:axis], array.shape[axis + 1 :]
  parts = array.reshape(*before, shards, array.shape[axis] // shards, *after)
  return _compat.leading_like(jnp.moveaxis(parts, axis, 0), like)


def _padded(array: jax.Array, sides: int | None = None) -> jax.Array:
  """A stack of factors with zeros for one more coordinate, along so many of their last axes."""
  last = array.ndim - 1 if sides is None else sides
  return jnp.pad(array, [(0, 0)] * (array.ndim - last) + [(0, 1)] * last)
