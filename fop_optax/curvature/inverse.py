"""Damped inverses of all blocks, and when they are made anew.

A *scaling* says what `M`, the damped Fisher block, is and how its inverse is kept:

- "factored": `M = (A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)`, the inverses of both;
- "exact": `M = A (x) G + lambda I`, the eigenvectors and eigenvalues of both;
- "eigenvalue": `M = (U_A (x) U_G) diag(S + lambda) (U_A (x) U_G)'`, the eigenvectors of both, and
  `S`, a running average of second moments of gradients in that basis (EKFAC).

Damping below the rounding of `F` in its precision is raised to it, block by block: inverted as they
are, eigenvalues that ought to be zero would blow up what rounding left of the gradient there.

Each is one row of `SCALINGS`, handed on as it is. A block without an inverse has zeros for it: its
direction is zero. Factors of one shape are inverted together, whether `A` or `G` and of whichever
stack, and numbers of all blocks are worked out as one vector: the program has one inversion for
each side that occurs, and compiles quickly.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.damping import (
  Damping,
  Size,
  add_damping,
  block_rounding,
  size,
  split_damping,
  trace_of,
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
from fop_optax.curvature.stacks import by_block, by_shape, per_stack
from fop_optax.factorizations import eigh
from fop_optax.layers import Factors

Split = Callable[[Size, Size, jax.Array], tuple[jax.Array, jax.Array]]


class FactoredInverse(NamedTuple):
  """Inverses of both damped factors."""

  A: jax.Array  # like the factor
  G: jax.Array
  damping_A: jax.Array  # shape=(): pi sqrt(lambda) when the inverse was made, or its rounding
  damping_G: jax.Array  # shape=(): sqrt(lambda) / pi
  added_A: jax.Array  # shape=(): what of it was added because less would be rounding
  added_G: jax.Array  # shape=()


class ExactInverse(NamedTuple):
  """Eigenvectors (None for a diagonal factor) and eigenvalues of both factors."""

  basis_A: Side
  basis_G: Side
  values_A: jax.Array
  values_G: jax.Array
  damping: jax.Array  # shape=(): lambda when the inverse was made, or its rounding
  added: jax.Array  # shape=(): what of it was added because less would be rounding


class EigenvalueInverse(NamedTuple):
  """Eigenvectors of both factors (None for a diagonal one), second moments of gradients in them."""

  basis_A: Side
  basis_G: Side
  S: jax.Array  # [rows, outputs], of now
  damping: jax.Array  # shape=(): lambda when the basis was made, or its rounding
  added: jax.Array  # shape=(): what of it was added because less would be rounding


class Scaling(NamedTuple):
  """How one kind of inverse is made, for all stacks, and used, for one block."""

  empty: Callable[[Factors], Any]  # factors of a block -> an inverse that takes all to zero
  # Factors of each stack, damping, which blocks are due (None: all), inverses so far -> inverses of
  # each stack, and for each block whether it is sound.
  invert: Callable[..., tuple[list[Any], jax.Array]]
  solve: Callable[[Any, jax.Array], jax.Array]  # V -> M^-1 V
  damped: Callable[[Any, Factors, jax.Array], jax.Array]  # V -> M V
  fisher: Callable[[Any, Factors, jax.Array], jax.Array]  # V -> F V
  norm: Callable[[Any, Factors], jax.Array]  # |F|_F
  squares: bool = False  # whether its inverses have an `S`


def factored_invert(
  stacks: Sequence[Factors],
  damping: Damping,
  due: jax.Array | None,
  kept: Sequence["Inverse"],
  split: Split = split_damping,
) -> tuple[list[FactoredInverse], jax.Array]:
  """Both damped factors of each block inverted; `split` shares the damping out."""
  del kept
  A, G = _sizes(stacks)
  asked = damping.of(A, G)
  asked_A, asked_G = split(A, G, asked)
  damping_A, damping_G = split(A, G, jnp.maximum(asked, block_rounding(A, G)))
  damping_A, damping_G = jnp.maximum(damping_A, A.rounding), jnp.maximum(damping_G, G.rounding)
  of_A, of_G = _each_side(_damped_inverse, stacks, (damping_A, damping_G), due)
  numbers = damping_A, damping_G, damping_A - asked_A, damping_G - asked_G
  # Positive matrices: no entry is larger than the trace.
  traces = [jnp.concatenate([trace for _, trace in side]) for side in (of_A, of_G)]
  sound = jnp.all(jnp.isfinite(jnp.stack([*traces, *numbers])), axis=0)
  inverses = [
    FactoredInverse(a, g, *(x.astype(a.dtype) for x in own))
    for (a, _), (g, _), own in zip(of_A, of_G, _per_stack(numbers, stacks), strict=True)
  ]
  return inverses, sound


def _damped_inverse(factor, damping):
  """Inverse and its trace: NaN (or an infinity, on a diagonal) if it is not positive definite."""
  damped = add_damping(factor, damping.astype(factor.dtype))
  if damped.ndim == 1:
    inverse = jnp.where(damped > 0, 1 / damped, jnp.nan)
  else:
    inverse = positive_inverse(damped)
  return inverse, trace_of(inverse)


def _factored_empty(factors):
  zeros = (jnp.zeros((), factors.A.dtype) for _ in range(4))
  return FactoredInverse(jnp.zeros_like(factors.A), jnp.zeros_like(factors.G), *zeros)


def _factored_solve(inverse, V):
  return sandwich(inverse.A, V, inverse.G)


def _factored_damped(inverse, factors, V):
  A = add_damping(factors.A, inverse.damping_A)
  G = add_damping(factors.G, inverse.damping_G)
  return sandwich(A, V, G)


def _exact_invert(stacks, damping, due, kept):
  del kept
  A, G = _sizes(stacks)
  asked = damping.of(A, G)
  raised = jnp.maximum(asked, block_rounding(A, G))
  of_A, of_G = _each_side(_eigen, stacks, (raised, raised), due)
  # The smallest eigenvalue of M is all there is to fear: at lambda = 0 it may be zero.
  low_A, low_G = (jnp.concatenate([low for *_, low in side]) for side in (of_A, of_G))
  numbers = raised, raised - asked
  sound = jnp.all(jnp.isfinite(jnp.stack([1 / (low_A * low_G + raised), *numbers])), axis=0)
  inverses = [
    ExactInverse(a, g, values_a, values_g, *(x.astype(values_a.dtype) for x in own))
    for (a, values_a, _), (g, values_g, _), own in zip(
      of_A, of_G, _per_stack(numbers, stacks), strict=True
    )
  ]
  return inverses, sound


def _eigen(factor, damping):
  """Eigenvectors (None: it is a diagonal), eigenvalues and the smallest; NaN if none are found."""
  del damping
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
    damping=jnp.zeros((), factors.A.dtype),
    added=jnp.zeros((), factors.A.dtype),
  )


def _exact_solve(inverse, V):
  # vec(V) -> (U_A (x) U_G) (l_A (x) l_G + lambda)^-1 (U_A (x) U_G)' vec(V)
  values = jnp.outer(inverse.values_A, inverse.values_G) + inverse.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: rotated / values, V)


def _exact_damped(inverse, factors, V):
  return multiply(factors, V) + inverse.damping * V


def _eigenvalue_invert(stacks, damping, due, kept):
  A, G = _sizes(stacks)
  of_A, of_G = _each_side(_eigen, stacks, (A.trace, G.trace), due)
  turns = _per_stack(due, stacks)
  sides = zip(of_A, of_G, strict=True)
  S = [_each(_carried, *own) for own in zip(sides, kept, turns, strict=True)]
  of_S = [jax.vmap(size)(s.reshape(len(s), -1)) for s in S]
  asked = damping.at(jnp.concatenate([own.mean for own in of_S]))
  rounding = block_rounding(A, G, jnp.concatenate([own.norm for own in of_S]))
  raised = jnp.maximum(asked, rounding)
  low = jnp.concatenate([jnp.min(s, axis=(1, 2)) for s in S])
  low_A, low_G = (jnp.concatenate([low for *_, low in side]) for side in (of_A, of_G))
  numbers = raised, raised - asked
  found = jnp.stack([low_A, low_G, 1 / (low + raised), *numbers])
  inverses = [
    EigenvalueInverse(a, g, s, *(x.astype(s.dtype) for x in own))
    for (a, *_), (g, *_), s, own in zip(of_A, of_G, S, _per_stack(numbers, stacks), strict=True)
  ]
  return inverses, jnp.all(jnp.isfinite(found), axis=0)


def _carried(sides, old):
  """`S` in a new basis."""
  # Statistics are measured in the basis that the state holds: S is in the old one. What has the
  # diagonal S there, F = U_old diag(S) U_old', has in the new one the diagonal P_A S P_G' with the
  # squared overlaps P = (U_new' U_old)^2. Their rows and columns add up to one: S stays positive
  # and keeps its trace. The first statistics find no basis: theirs is that of A (x) G, which
  # counts as theirs in the average and fades with them.
  (basis_A, values_A, _), (basis_G, values_G, _) = sides
  overlap = lambda new, old: None if new is None else matmul(new.T, old) ** 2
  P_A, P_G = overlap(basis_A, old.value.basis_A), overlap(basis_G, old.value.basis_G)
  carried = sandwich(P_A, old.value.S, transposed(P_G))
  return jnp.where(old.made > 0, carried, jnp.outer(values_A, values_G))


def _eigenvalue_empty(factors):
  empty, ones = _exact_empty(factors), jnp.ones((len(factors.A), len(factors.G)), factors.A.dtype)
  return EigenvalueInverse(empty.basis_A, empty.basis_G, ones, empty.damping, empty.added)


def _eigenvalue_solve(inverse, V):
  # vec(V) -> (U_A (x) U_G) diag(S + lambda)^-1 (U_A (x) U_G)' vec(V)
  values = inverse.S + inverse.damping
  return in_basis(inverse.basis_A, inverse.basis_G, lambda rotated: rotated / values, V)


def _eigenvalue_damped(inverse, factors, V):
  del factors
  values = inverse.S + inverse.damping
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
    invert=factored_invert,
    solve=_factored_solve,
    damped=_factored_damped,
    fisher=_kronecker_fisher,
    norm=_kronecker_norm,
  ),
  "exact": Scaling(
    empty=_exact_empty,
    invert=_exact_invert,
    solve=_exact_solve,
    damped=_exact_damped,
    fisher=_kronecker_fisher,
    norm=_kronecker_norm,
  ),
  "eigenvalue": Scaling(
    empty=_eigenvalue_empty,
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
  found = by_shape(jax.vmap(size), _sides([f.A for f in stacks], [f.G for f in stacks]))
  flat = lambda sizes: Size(*map(jnp.concatenate, zip(*sizes, strict=True)))
  return flat(found[::2]), flat(found[1::2])


def _each_side(function, stacks, dampings, due):
  """`function(factor, damping)` of both factors of each block that is due, stack by stack."""
  by_stack = lambda A, G: _sides(_per_stack(A, stacks), _per_stack(G, stacks))
  columns = [_sides([f.A for f in stacks], [f.G for f in stacks]), by_stack(*dampings)]
  if due is not None:
    columns.append(by_stack(due, due))
  found = by_shape(functools.partial(_each, function), *columns)
  return found[::2], found[1::2]


def _sides(A: Sequence[Any], G: Sequence[Any]) -> list[Any]:
  return [side for pair in zip(A, G, strict=True) for side in pair]


def _each(function, first, second, due=None):
  """`function` of each block, along the leading axes; zeros for those that are not due."""
  shapes = jax.eval_shape(jax.vmap(function), first, second)
  nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), shapes)
  return by_block(function, nothing, first, second, due=due)


def _per_stack(flat: Any, stacks: Sequence[Factors]) -> list[Any]:
  return per_stack(flat, [len(factors.A) for factors in stacks])


class Inverse(NamedTuple):
  """A block's inverse, or those of a stack of blocks with a leading axis everywhere."""

  value: FactoredInverse | ExactInverse | EigenvalueInverse
  made: jax.Array  # int32, shape=(): inverses stored
  failed: jax.Array  # int32, shape=(): inverses refused because they were not finite

  def with_S(self, S: jax.Array) -> "Inverse":
    """EKFAC's with other second moments."""
    assert isinstance(self.value, EigenvalueInverse)
    return self._replace(value=self.value._replace(S=S))


def init_inverse(factors: Factors, scaling: Scaling) -> Inverse:
  """Inverses of a stack before any statistics."""
  made, failed = (jnp.zeros(len(factors.A), jnp.int32) for _ in range(2))
  return Inverse(jax.vmap(scaling.empty)(factors), made, failed)


def remake(
  inverses: Sequence[Inverse],
  stacks: Sequence[Factors],
  known: jax.Array,
  damping: Damping,
  scaling: Scaling,
  due: jax.Array | None = None,
) -> tuple[Inverse, ...]:
  """Inverses made anew; of a block where that fails the last good one stays, which is counted.

  Blocks that are not `known`, without statistics, are left without an inverse; those that are not
  `due` (None: all are) with the one they have.
  """
  values, sound = scaling.invert(stacks, damping, due, inverses)
  tried = known if due is None else known & due
  counted = _per_stack((tried & sound, tried & ~sound), stacks)

  def keep(stored):
    return lambda new, old: jnp.where(stored.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  return tuple(
    Inverse(jax.tree.map(keep(made), value, old.value), old.made + made, old.failed + failed)
    for old, value, (made, failed) in zip(inverses, values, counted, strict=True)
  )
