"""Second moments over the rows of an array: the arithmetic of Kronecker statistics."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat

Axes = tuple[int, ...]

# What is formed of many examples is formed for about so many bytes of it at a time.
CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20

# Sums over so few entries are compiled for each shape on CPU; those over more are library calls.
SMALL = 4096


class Roles(NamedTuple):
  """The axes of an array by their role; stack and features in the order of the weight's axes."""

  rows: Axes
  stack: Axes
  features: Axes


def second_moment(v: jax.Array, roles: Roles, diagonal: bool, dtype: Any) -> jax.Array:
  """`sum_r v_r v_r'` over the rows: `[stack, d, d]`, or its diagonal `[stack, d]`."""
  rows, stack, features = roles
  n_stack, n = math.prod(v.shape[i] for i in stack), math.prod(v.shape[i] for i in features)
  if v.dtype not in (
    jnp.bfloat16,
    jnp.float16,
  ):  # those are multiplied as they are, summed in dtype
    v = v.astype(dtype)
  if diagonal:
    moved = v.astype(dtype).transpose(*rows, *stack, *features)
    return whole(jnp.sum(moved * moved, axis=range(len(rows)))).reshape(n_stack, n)
  product = lax.dot_general(
    v,
    v,
    ((rows, rows), (stack, stack)),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=dtype,
    out_sharding=replicated(v),  # under explicit axes a sum over a sharded one has to say
  )
  # the features come out in the order of v's axes: bring the small result into the weight's order
  rank = [sorted(features).index(axis) for axis in features]
  s, f = len(stack), len(features)
  product = product.transpose(*range(s), *(s + i for i in rank), *(s + f + i for i in rank))
  # One group at a time: with an axis in front that is sharded (`vmap` over shards, explicit axes)
  # JAX reshapes no more at once.
  product = product.reshape(*product.shape[: s + f], n)
  product = product.reshape(*product.shape[:s], n, n)
  return product.reshape(n_stack, n, n)


def whole(a: jax.Array) -> jax.Array:
  """`a` on every device where its type says that it is sharded (under explicit mesh axes)."""
  sharded = any(axes is not None for axes in jax.typeof(a).sharding.spec)
  return jax.sharding.reshard(a, replicated(a)) if sharded else a


def replicated(v: jax.Array) -> jax.sharding.NamedSharding | None:
  """The sharding of a sum over an axis of `v` that may be sharded."""
  mesh = jax.typeof(v).sharding.mesh
  return None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def as_rows(v: jax.Array, roles: Roles, dtype: Any) -> jax.Array:
  """`v` as matrices of rows, `[stack, rows, d]`."""
  rows, stack, features = roles
  n_stack, n = math.prod(v.shape[i] for i in stack), math.prod(v.shape[i] for i in features)
  return v.transpose(*stack, *rows, *features).reshape(n_stack, -1, n).astype(dtype)


def sum_in_chunks(
  form: Callable[..., jax.Array],
  arrays: Sequence[jax.Array],
  example_bytes: int,
  sum_bytes: int = 0,
) -> jax.Array:
  """`form(*arrays)`, a sum over the leading axis of the arrays, chunk by chunk for less memory.

  Chunks are as long as `CHUNK_BYTES` allow, at so many bytes that `form` makes of an example; or
  as `sum_bytes` do, where the sum is of that size and to add it up often would take longer.
  """
  examples = len(arrays[0])
  limit = max(sum_bytes, CHUNK_BYTES.get(jax.default_backend(), CHUNK_BYTES_ELSEWHERE))
  at_once = max(1, limit // max(example_bytes, 1))
  chunks = next(n for n in range(1, examples + 1) if not examples % n and examples // n <= at_once)
  if chunks == 1:
    return form(*arrays)
  # example i to chunk i mod chunks: a sharded leading axis stays sharded
  split = [a.reshape(examples // chunks, chunks, *a.shape[1:]) for a in arrays]
  piece = lambda i: [lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in split]
  like = jax.eval_shape(lambda: form(*piece(0)))
  zeros = _compat.vary(jnp.zeros(like.shape, like.dtype), _compat.varying(arrays))
  return lax.scan(lambda sum, i: (sum + form(*piece(i)), None), zeros, jnp.arange(chunks))[0]


def row_sum(v: jax.Array, roles: Roles, dtype: Any) -> jax.Array:
  """`sum_r v_r`: `[stack, d]`."""
  rows, stack, features = roles
  n_stack = math.prod(v.shape[i] for i in stack)
  moved = v.transpose(*rows, *stack, *features)
  return whole(jnp.sum(moved, axis=range(len(rows)), dtype=dtype)).reshape(n_stack, -1)


def with_count(total: jax.Array, v: jax.Array, rows: Axes) -> jax.Array:
  """The sum over the rows of `v`, with their number as one more entry."""
  n = math.prod(v.shape[axis] for axis in rows)
  return jnp.concatenate([total, jnp.full((len(total), 1), n, total.dtype)], axis=1)


def added_up(a: jax.Array, axis: int, indices: Sequence[int]) -> jax.Array:
  """Sums of the entries of `a` along an axis that have the same index; -1 leaves an entry out."""
  count = max(indices) + 1
  to = np.where(np.array(indices) < 0, count, indices)
  zeros = jnp.zeros((*a.shape[:axis], count, *a.shape[axis + 1 :]), a.dtype)
  return zeros.at[(*(slice(None),) * axis, to)].add(a, mode="drop")


def with_ones(a: jax.Array, m: jax.Array, n: int) -> jax.Array:
  """`A` of `n` rows with a one appended, by blocks `[[A, m], [m', n]]`: x gets no column.

  A sum of blocks with zeros around them is one kernel where a concatenation is several.
  """
  d = m.shape[1]

  def place(x, *starts):
    edges = ((k, d + 1 - k - size) for k, size in zip(starts, x.shape[1:], strict=True))
    return jnp.pad(x, [(0, 0), *edges])

  corner = jnp.full((len(a), *[1] * (a.ndim - 1)), n, a.dtype)
  if a.ndim == 2:
    return place(a, 0) + place(corner, d)
  return place(a, 0, 0) + place(m[:, :, None], 0, d) + place(m[:, None], d, 0) + place(corner, d, d)
