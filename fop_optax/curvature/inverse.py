"""Damped inverses of all blocks, and when they are made anew.

A *scaling* says what `M`, the damped Fisher block, is and how its inverse is kept:

- "factored": `M = (A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)`, the inverses of both;
- "exact": `M = A (x) G + lambda I`, the eigenvectors and eigenvalues of both;
- "eigenvalue": `M = (U_A (x) U_G) diag(S + lambda) (U_A (x) U_G)'`, the eigenvectors of both, and
  `S`, a running average of second moments of gradients in that basis (EKFAC).

Damping below the rounding of `F` in its precision is raised to it, block by block: inverted as they
are, eigenvalues that ought to be zero would blow up what rounding left of the gradient there.

Each is one row of `SCALINGS`, handed on as it is. A block without an inverse has zeros for it: its
direction is zero. Factors of one side, or nearly, are inverted together, whether `A` or `G` and of
whichever stack, and numbers of all blocks are worked out as one vector: XLA compiles each operation
once for each shape that it has.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import (
  Damping,
  Size,
  add_damping,
  block_rounding,
  resolution_of,
  size,
  split_damping,
  traces,
)
from fop_optax.curvature.positive import positive_inverse
from fop_optax.curvature.precondition import (
  Side,
  in_basis,
  matmul,
  multiply,
  norm,
  sandwich,
  transposed,
)
from fop_optax.curvature.stacks import by_block, by_shape, padded, per_stack
from fop_optax.factorizations import eigh, in_turn
from fop_optax.layers import Factors

Split = Callable[[Size, Size, jax.Array], tuple[jax.Array, jax.Array]]


class SplitDamping(NamedTuple):
  """Damping of the factors of each block, when its inverse was made."""

  damping_A: jax.Array  # shape=(blocks,): pi sqrt(lambda), or its rounding
  damping_G: jax.Array  # shape=(blocks,): sqrt(lambda) / pi
  added_A: jax.Array  # shape=(blocks,): what of it was added because less would be rounding
  added_G: jax.Array  # shape=(blocks,)


class WholeDamping(NamedTuple):
  """Damping of each block, when its inverse was made."""

  damping: jax.Array  # shape=(blocks,): lambda, or its rounding
  added: jax.Array  # shape=(blocks,): what of it was added because less would be rounding


class FactoredInverse(NamedTuple):
  """Inverses of both damped factors."""

  A: jax.Array  # like the factor
  G: jax.Array


class ExactInverse(NamedTuple):
  """Eigenvectors (None for a diagonal factor) and eigenvalues of both factors."""

  basis_A: Side
  basis_G: Side
  values_A: jax.Array
  values_G: jax.Array


class EigenvalueInverse(NamedTuple):
  """Eigenvectors of both factors (None for a diagonal one), second moments of gradients in them."""

  basis_A: Side
  basis_G: Side
  S: jax.Array  # [rows, outputs], of now


Inverse = FactoredInverse | ExactInverse | EigenvalueInverse
UsedDamping = SplitDamping | WholeDamping


class Inversions(NamedTuple):
  """Numbers of all blocks' inversions, those of one stack after those of another."""

  made: jax.Array  # int32, shape=(blocks,): inverses stored
  failed: jax.Array  # int32, shape=(blocks,): inverses refused because they were not finite
  damping: UsedDamping


class Scaling(NamedTuple):
  """How one kind of inverse is made, for all stacks, and used, for one block."""

  empty: Callable[[Factors], Any]  # factors of a block -> an inverse that takes all to zero
  damping: type[UsedDamping]  # what is told of the damping
  # Factors of each stack, damping, which blocks are due (None: all), inverses so far, how many of
  # each block -> inverses of each stack; of all blocks their damping, and whether they are sound.
  invert: Callable[..., tuple[list[Any], UsedDamping, jax.Array]]
  solve: Callable[[Any, Any, jax.Array], jax.Array]  # inverse, its damping, V -> M^-1 V
  damped: Callable[[Any, Any, Factors, jax.Array], jax.Array]  # inverse, its damping, .., V -> M V
  fisher: Callable[[Any, Factors, jax.Array], jax.Array]  # V -> F V
  norm: Callable[[Any, Factors], jax.Array]  # |F|_F
  squares: bool = False  # whether its inverses have an `S`


def factored_invert(
  stacks: Sequence[Factors],
  damping: Damping,
  due: jax.Array | None,
  kept: Sequence[Inverse],
  made: jax.Array,
  split: Split = split_damping,
) -> tuple[list[Inverse], SplitDamping, jax.Array]:
  """Both damped factors of each block inverted; `split` shares the damping out."""
  del kept, made
  A, G = _sizes(stacks)
  asked = damping.of(A, G)
  asked_A, asked_G = split(A, G, asked)
  damping_A, damping_G = split(A, G, jnp.maximum(asked, block_rounding(A, G)))
  damping_A, damping_G = jnp.maximum(damping_A, A.rounding), jnp.maximum(damping_G, G.rounding)
  of_A, of_G = _each_side(_damped_inverse, stacks, (damping_A, damping_G), due, pad=True)
  used = SplitDamping(damping_A, damping_G, damping_A - asked_A, damping_G - asked_G)
  cut = lambda inverse, like: jax.lax.slice(inverse, [0] * like.ndim, like.shape)
  inverses = [
    FactoredInverse(cut(a, own.A), cut(g, own.G))
    for a, g, own in zip(of_A, of_G, stacks, strict=True)
  ]
  # Positive matrices: no entry is larger than the trace.
  found = [traces([own.A for own in inverses]), traces([own.G for own in inverses])]
  return [*inverses], used, jnp.all(jnp.isfinite(jnp.stack([*found, *used])), axis=0)


def _damped_inverse(factor, dim, damping):
  """NaN, or an infinity on a diagonal, if it is not positive definite.

  Of a factor of side `dim` with rows and columns of zeros behind it: of the identity there.
  """
  damping = damping.astype(factor.dtype)
  if factor.ndim == 2:
    # Behind the barrier it is one array; without it each use is one more kernel.
    identity = jax.lax.optimization_barrier(jnp.eye(len(factor), dtype=factor.dtype))
    return _damped_matrix_inverse(factor, dim, damping, identity)
  damped = add_damping(factor, damping)
  return jnp.where(damped > 0, 1 / damped, jnp.nan)


@in_turn  # not only the inverse: all damped matrices are never held
def _damped_matrix_inverse(factor, dim, damping, identity):
  diagonal = jnp.where(jnp.arange(len(factor)) < dim, damping, 1)
  return positive_inverse(factor + diagonal * identity, identity)


def _factored_empty(factors):
  return FactoredInverse(jnp.zeros_like(factors.A), jnp.zeros_like(factors.G))


def _factored_solve(inverse, used, V):
  del used
  return sandwich(inverse.A, V, inverse.G)


def _factored_damped(inverse, used, factors, V):
  del inverse
  A = add_damping(factors.A, used.damping_A)
  G = add_damping(factors.G, used.damping_G)
  return sandwich(A, V, G)


def _exact_invert(stacks, damping, due, kept, made):
  del kept, made
  A, G = _sizes(stacks)
  asked = damping.of(A, G)
  raised = jnp.maximum(asked, block_rounding(A, G))
  of_A, of_G = _each_side(_eigen, stacks, (raised, raised), due)
  # The smallest eigenvalue of M is all there is to fear: at lambda = 0 it may be zero.
  low_A, low_G = (jnp.concatenate([low for *_, low in side]) for side in (of_A, of_G))
  used = WholeDamping(raised, raised - asked)
  sound = jnp.all(jnp.isfinite(jnp.stack([1 / (low_A * low_G + raised), *used])), axis=0)
  inverses = [
    ExactInverse(a, g, values_a, values_g)
    for (a, values_a, _), (g, values_g, _) in zip(of_A, of_G, strict=True)
  ]
  return inverses, used, sound


def _eigen(factor, dim, damping):
  """Eigenvectors (None: it is a diagonal), eigenvalues and the smallest; NaN if none are found."""
  del dim, damping
  if factor.ndim == 1:
    values = jnp.maximum(factor, 0)
    return None, values, jnp.min(values)
  values, basis = eigh(factor)
  values = jnp.maximum(values, 0)  # rounding may make them negative
  found = jnp.isfinite(jnp.sum(values) + jnp.sum(basis))
  return basis, values, jnp.where(found, jnp.min(values), jnp.nan)


def _exact_empty(factors):
  return ExactInverse(
    basis_A=jnp.zeros_like(factors.A) if factors.A.ndim == 2 else None,
    basis_G=jnp.zeros_like(factors.G) if factors.G.ndim == 2 else None,
    values_A=jnp.full(len(factors.A), jnp.inf, factors.A.dtype),
    values_G=jnp.full(len(factors.G), jnp.inf, factors.G.dtype),
  )


def _exact_solve(inverse, used, V):
  # vec(V) -> (U_A (x) U_G) (l_A (x) l_G + lambda)^-1 (U_A (x) U_G)' vec(V)
  values = jnp.outer(inverse.values_A, inverse.values_G) + used.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: rotated / values, V)


def _exact_damped(inverse, used, factors, V):
  del inverse
  return multiply(factors, V) + used.damping * V


def _eigenvalue_invert(stacks, damping, due, kept, made):
  A, G = _sizes(stacks)
  of_A, of_G = _each_side(_eigen, stacks, (A.trace, G.trace), due)
  turns, known = _per_stack(due, stacks), _per_stack(made > 0, stacks)
  columns = zip(turns, of_A, of_G, kept, known, strict=True)
  S = [_each(_carried, *own) for own in columns]
  of_S = [jax.vmap(size)(s.reshape(len(s), -1)) for s in S]
  asked = damping.at(jnp.concatenate([own.mean for own in of_S]))
  rounding = block_rounding(A, G, jnp.concatenate([own.norm for own in of_S]))
  raised = jnp.maximum(asked, rounding)
  low = jnp.concatenate([jnp.min(s, axis=(1, 2)) for s in S])
  low_A, low_G = (jnp.concatenate([low for *_, low in side]) for side in (of_A, of_G))
  used = WholeDamping(raised, raised - asked)
  found = jnp.stack([low_A, low_G, 1 / (low + raised), *used])
  inverses = [EigenvalueInverse(a, g, s) for (a, *_), (g, *_), s in zip(of_A, of_G, S, strict=True)]
  return inverses, used, jnp.all(jnp.isfinite(found), axis=0)


def _carried(of_A, of_G, old, known):
  """`S` in a new basis."""
  # Statistics are measured in the basis that the state holds: S is in the old one. What has the
  # diagonal S there, F = U_old diag(S) U_old', has in the new one the diagonal P_A S P_G' with the
  # squared overlaps P = (U_new' U_old)^2. Their rows and columns add up to one: S stays positive
  # and keeps its trace. The first statistics find no basis: theirs is that of A (x) G, which
  # counts as theirs in the average and fades with them.
  (basis_A, values_A, _), (basis_G, values_G, _) = of_A, of_G
  overlap = lambda new, old: None if new is None else matmul(new.T, old) ** 2
  P_A, P_G = overlap(basis_A, old.basis_A), overlap(basis_G, old.basis_G)
  carried = sandwich(P_A, old.S, transposed(P_G))
  return jnp.where(known, carried, jnp.outer(values_A, values_G))


def _eigenvalue_empty(factors):
  empty, ones = _exact_empty(factors), jnp.ones((len(factors.A), len(factors.G)), factors.A.dtype)
  return EigenvalueInverse(empty.basis_A, empty.basis_G, ones)


def _eigenvalue_solve(inverse, used, V):
  # vec(V) -> (U_A (x) U_G) diag(S + lambda)^-1 (U_A (x) U_G)' vec(V)
  values = inverse.S + used.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: rotated / values, V)


def _eigenvalue_damped(inverse, used, factors, V):
  del factors
  values = inverse.S + used.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: values * rotated, V)


def _eigenvalue_fisher(inverse, factors, V):
  del factors
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: inverse.S * rotated, V)


def _eigenvalue_norm(inverse, factors):
  del factors
  return jnp.linalg.norm(inverse.S)


def _kronecker_fisher(inverse, factors, V):
  del inverse
  return multiply(factors, V)


def _kronecker_norm(inverse, factors):
  del inverse
  return norm(factors)


SCALINGS = {
  "factored": Scaling(
    empty=_factored_empty,
    damping=SplitDamping,
    invert=factored_invert,
    solve=_factored_solve,
    damped=_factored_damped,
    fisher=_kronecker_fisher,
    norm=_kronecker_norm,
  ),
  "exact": Scaling(
    empty=_exact_empty,
    damping=WholeDamping,
    invert=_exact_invert,
    solve=_exact_solve,
    damped=_exact_damped,
    fisher=_kronecker_fisher,
    norm=_kronecker_norm,
  ),
  "eigenvalue": Scaling(
    empty=_eigenvalue_empty,
    damping=WholeDamping,
    invert=_eigenvalue_invert,
    solve=_eigenvalue_solve,
    damped=_eigenvalue_damped,
    fisher=_eigenvalue_fisher,
    norm=_eigenvalue_norm,
    squares=True,
  ),
}


def _sizes(stacks: Sequence[Factors]) -> tuple[Size, Size]:
  """Sizes of `A` and of `G` of all blocks, stack after stack."""
  of_A, of_G = [f.A for f in stacks], [f.G for f in stacks]
  factors = [*of_A, *of_G]
  trace = jnp.concatenate([traces(of_A), traces(of_G)])
  unit = jnp.where(trace > 0, trace, 1)  # no entry is larger: no square overflows
  squares = by_shape(
    jax.vmap(lambda f, unit: jnp.sum((f / unit.astype(f.dtype)) ** 2)),
    padded(factors),
    per_stack(unit, list(map(len, factors))),
  )
  each = lambda number: jnp.concatenate([jnp.full(len(f), number(f), trace.dtype) for f in factors])
  both = Size(
    trace=trace,
    norm=unit * jnp.sqrt(jnp.concatenate(squares)),
    dim=each(lambda f: f.shape[1]),
    resolution=each(lambda f: resolution_of(f.shape[1:], f.dtype)),
  )
  blocks = len(trace) // 2
  return Size(*(x[:blocks] for x in both)), Size(*(x[blocks:] for x in both))


def _each_side(function, stacks, dampings, due, pad=False):
  """`function(factor, dim, damping)` of both factors of each block that is due, stack by stack."""
  by_stack = lambda A, G: _sides(_per_stack(A, stacks), _per_stack(G, stacks))
  factors = _sides([f.A for f in stacks], [f.G for f in stacks])
  dims = [jnp.full(len(f), f.shape[1], jnp.int32) for f in factors]
  columns = [padded(factors) if pad else factors, dims, by_stack(*dampings)]
  if due is not None:
    columns.append(by_stack(due, due))
  found = by_shape(
    lambda factor, dim, damping, due=None: _each(function, due, factor, dim, damping), *columns
  )
  return found[::2], found[1::2]


def _sides(A: Sequence[Any], G: Sequence[Any]) -> list[Any]:
  return [side for pair in zip(A, G, strict=True) for side in pair]


def _each(function, due, *columns):
  """`function` of each block, along the leading axes; zeros for those that are not due."""
  shapes = jax.eval_shape(jax.vmap(function), *columns)
  nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), shapes)
  return by_block(function, nothing, *columns, due=due)


def _per_stack(flat: Any, stacks: Sequence[Factors]) -> list[Any]:
  return per_stack(flat, [len(factors.A) for factors in stacks])


def init_inversions(blocks: int, scaling: Scaling, dtype: Any) -> Inversions:
  """Before any statistics. No two arrays are one buffer, so that a state can be donated."""
  made, failed = (jnp.zeros(blocks, jnp.int32) for _ in range(2))
  damping = scaling.damping(*(jnp.zeros(blocks, dtype) for _ in scaling.damping._fields))
  return Inversions(made, failed, damping)


def remake(
  kept: tuple[Inverse, ...],
  before: Inversions,
  stacks: Sequence[Factors],
  known: jax.Array,
  damping: Damping,
  scaling: Scaling,
  due: jax.Array | None = None,
) -> tuple[tuple[Inverse, ...], Inversions]:
  """Inverses made anew; of a block where that fails the last good one stays, which is counted.

  Blocks that are not `known`, without statistics, are left without an inverse; those that are not
  `due` (None: all are) with the one they have.
  """
  found, used, sound = scaling.invert(stacks, damping, due, kept, before.made)
  tried = known if due is None else known & due
  stored = tried & sound

  def keep(stored):
    return lambda new, old: jnp.where(stored.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  inverses = tuple(
    jax.tree.map(keep(own), new, old)
    for new, old, own in zip(found, kept, _per_stack(stored, stacks), strict=True)
  )
  cast = lambda new, old: jnp.where(stored, new.astype(old.dtype), old)
  return inverses, Inversions(
    made=before.made + stored,
    failed=before.failed + (tried & ~sound),
    damping=jax.tree.map(cast, used, before.damping),
  )
