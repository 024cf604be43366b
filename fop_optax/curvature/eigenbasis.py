"""Eigenbases of running second moments along the modes of tensors, made once and then followed.

Following a basis takes one step of the power method and a QR factorisation (SOAP, algorithm 4):

    l = diag(Q' S Q),   columns of Q sorted by falling l,   Q <- qr(S Q)

which is a step of orthogonal iteration: columns turn to the eigenvectors of the largest eigenvalues
first, and those of a basis that is right already stay.

What is of one tensor has no leading axis; of a stack of them every array has the blocks first.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.modes import along, second_moment
from fop_optax.curvature.precondition import Side, matmul
from fop_optax.curvature.stacks import Stack, by_block, by_side, per_stack, stored
from fop_optax.factorizations import eigh, orthonormal

KL_START = 0.1  # of the eigenvalues, in the authors' code


class Eigenbases(NamedTuple):
  """Second moments along the modes of a tensor, or of a stack of them, and their bases."""

  statistics: tuple[Side, ...]  # one a mode: [d, d], None where a mode has no basis
  bases: tuple[Side, ...]  # one a mode: in the columns
  values: tuple[jax.Array, ...] | None  # KL: estimates of the eigenvalues, one a mode: [d]
  made: jax.Array  # int32, shape=(): bases stored
  failed: jax.Array  # int32, shape=(): bases refused because they were not finite


class Followed(NamedTuple):
  """The basis of one side, made anew."""

  basis: jax.Array  # [d, d]
  order: jax.Array  # int32 [d]: which column of the old basis each comes from
  sound: jax.Array  # bool, shape=(): whether it is finite


def init_eigenbases(
  stack: Stack, dtype: Any, statistics_dtype: Any = None, identity: bool = False, kl: bool = False
) -> Eigenbases:
  """A stack before the first gradient: bases are zeros, or the identity."""
  square = lambda d, dtype: jnp.zeros((stack.blocks, d, d), dtype)
  basis = lambda d: square(d, dtype) + (jnp.eye(d, dtype=dtype) if identity else 0)
  sides = lambda make: tuple(
    None if without else make(d) for d, without in zip(stack.dims, stack.diagonal, strict=True)
  )
  values = tuple(jnp.full((stack.blocks, d), KL_START, dtype) for d in stack.dims)
  return Eigenbases(
    statistics=sides(lambda d: square(d, statistics_dtype or dtype)),
    bases=sides(basis),
    values=values if kl and not all(stack.diagonal) else None,
    made=jnp.zeros(stack.blocks, jnp.int32),
    failed=jnp.zeros(stack.blocks, jnp.int32),
  )


def fold(
  own: Eigenbases, gradient: jax.Array, rotated: jax.Array, beta: jax.Array, first: jax.Array
) -> Eigenbases:
  """Running second moments of one tensor after a gradient, from its unfoldings `U_i`:

      S_i = beta S_i + (1 - beta) U_i U_i'

  from zero: a scale makes no difference to eigenvectors. With `values` the gradient is whitened
  along the other modes first (Lin et al., 2025); of a matrix

      S_0 = beta S_0 + (1 - beta) / n  G S_1^-1 G'        S_1^-1 = Q_1 diag(1 / l_1) Q_1'
      l_0 = beta l_0 + (1 - beta) mean_j [g_ij^2 / l_1j]          with g = Q_0' G Q_1, `rotated`

  both by the old `l`, which are taken for one at the first step and start to be averaged after it.
  """
  statistics, values = list(own.statistics), list(own.values or ())
  for mode, (old, basis) in enumerate(zip(own.statistics, own.bases, strict=True)):
    moments = gradient
    if own.values is not None:
      white = _whitened(own.values, rotated, mode, first)
      others = tuple(axis for axis in range(white.ndim) if axis != mode)
      new = beta * own.values[mode] + (1 - beta) * jnp.mean(white**2, axis=others)
      values[mode] = jnp.where(first, own.values[mode], new)
      moments = white if basis is None else along(basis, white, mode)
      moments /= (gradient.size / gradient.shape[mode]) ** 0.5
    if old is not None:
      statistics[mode] = _averaged(old, second_moment(moments, mode), beta)
  return own._replace(statistics=tuple(statistics), values=tuple(values) or None)


def _whitened(values, rotated, mode, first):
  """A gradient in the bases, over the square roots of the eigenvalues of all modes but one."""
  for other, own in enumerate(values):
    if other != mode:
      limit = max(10, min(len(own), 4000))  # as the authors' code
      root = jnp.minimum(jax.lax.rsqrt(jnp.where(first, 1, own)), limit)
      rotated = rotated * root.reshape(-1, *[1] * (rotated.ndim - 1 - other))
  return rotated


def fold_given(own: Eigenbases, sides: Sequence[Side], beta: jax.Array) -> Eigenbases:
  """`S_i = beta S_i + (1 - beta) F_i` of one tensor with second moments `F_i` that are given."""
  pairs = zip(own.statistics, sides, strict=True)
  averaged = (None if old is None else _averaged(old, new, beta) for old, new in pairs)
  return own._replace(statistics=tuple(averaged))


def _averaged(old, new, beta):
  """A running average after a new term, or as it was where that is not finite."""
  new = beta * old.astype(beta.dtype) + (1 - beta) * new
  return jnp.where(jnp.isfinite(jnp.trace(new)), new, old).astype(old.dtype)


def of_gradients(own: Eigenbases, gradients: jax.Array) -> tuple[Side, ...]:
  """Second moments of one gradient of a stack, along the modes that have a basis."""
  return tuple(
    None if old is None else jax.vmap(lambda g, mode=mode: second_moment(g, mode))(gradients)
    for mode, old in enumerate(own.statistics)
  )


def first_bases(
  stacks: Sequence[Eigenbases], moments: Sequence[tuple[Side, ...]], due: jax.Array | None = None
) -> tuple[Eigenbases, ...]:
  """Eigenvectors, by falling eigenvalue, of second moments; of blocks that are `due`, or of all."""
  columns, turns = _with_turns([moments], stacks, due)
  found = by_side(lambda S, due=None: by_block(_eigenvectors, _unmoved, S, due=due), *columns)
  rows = zip(stacks, found, turns, strict=True)
  return tuple(_stored(own, sides, turn) for own, sides, turn in rows)


def follow(
  stacks: Sequence[Eigenbases], due: jax.Array | None = None, sort: bool = True
) -> list[tuple[Eigenbases, tuple[jax.Array | None, ...]]]:
  """All bases one step nearer to the eigenvectors, or those of the blocks that are `due`.

  Returns of each stack, beside its bases, for each mode which column of the old basis each comes
  from, `[blocks, d]`.
  """
  step = lambda S, Q: _follow(S.astype(Q.dtype), Q, sort)
  stay = lambda S, Q: _unmoved(Q)
  both = [[own.statistics for own in stacks], [own.bases for own in stacks]]
  columns, turns = _with_turns(both, stacks, due)
  found = by_side(lambda S, Q, due=None: by_block(step, stay, S, Q, due=due), *columns)
  out = []
  for own, sides, turn in zip(stacks, found, turns, strict=True):
    after = _stored(own, sides, turn)
    kept = (after.failed > own.failed)[:, None]
    orders = tuple(s and jnp.where(kept, jnp.arange(s.order.shape[1]), s.order) for s in sides)
    out.append((after, orders))
  return out


def _with_turns(
  columns: Sequence[Any], stacks: Sequence[Eigenbases], due: jax.Array | None
) -> tuple[list[Any], list[Any]]:
  """Columns for `by_side` with what is `due` of each side beside them, and of each stack."""
  turns = per_stack(due, [len(own.made) for own in stacks])
  sides = [(turn,) * len(own.bases) for turn, own in zip(turns, stacks, strict=True)]
  return [*columns, *([] if due is None else [sides])], turns


def _eigenvectors(S: jax.Array) -> Followed:
  _, basis = eigh(S + 1e-30 * jnp.eye(len(S), dtype=S.dtype))
  return _followed(basis[:, ::-1], jnp.arange(len(S), dtype=jnp.int32))


def _follow(S: jax.Array, basis: jax.Array, sort: bool) -> Followed:
  product = matmul(S, basis)
  order = jnp.arange(len(S), dtype=jnp.int32)
  if sort:
    order = jnp.argsort(-jnp.sum(basis * product, axis=0), stable=True).astype(jnp.int32)
  return _followed(orthonormal(product[:, order]), order)


def _unmoved(basis: jax.Array) -> Followed:
  return Followed(basis, jnp.arange(len(basis), dtype=jnp.int32), jnp.asarray(True))


def _followed(basis, order):
  return Followed(basis, order, jnp.isfinite(jnp.sum(basis)))


def _stored(own: Eigenbases, found: Sequence[Followed | None], due: Any) -> Eigenbases:
  """With the bases that were `found`, where those of all modes of a block are finite."""
  sides = [side for side in found if side is not None]
  if not sides:
    return own
  sound = functools.reduce(jnp.logical_and, [side.sound for side in sides])
  bases, made, failed = stored(own.bases, [side and side.basis for side in found], sound, due)
  return own._replace(bases=bases, made=own.made + made, failed=own.failed + failed)
