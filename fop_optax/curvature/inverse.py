"""Damped inverses of all blocks, and when they are made anew.

A *scaling* says what `M`, the damped Fisher block, is and how its inverse is kept:

- "factored": `M = (A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)`, the inverses of both;
- "exact": `M = A (x) G + lambda I`, the eigenvectors and eigenvalues of both.

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
from fop_optax.curvature.precondition import Side, multiply, sandwich, transposed
from fop_optax.curvature.stacks import by_block, by_shape, per_stack
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


class Scaling(NamedTuple):
  """How one kind of inverse is made, for all stacks, and used, for one block."""

  empty: Callable[[Factors], Any]  # factors of a block -> inverse of zeros
  # Factors of each stack, damping, which blocks are due (None: all) -> inverses of each stack, and
  # for each block whether it is sound.
  invert: Callable[[Sequence[Factors], Damping, jax.Array | None], tuple[list[Any], jax.Array]]
  solve: Callable[[Any, jax.Array], jax.Array]  # V -> M^-1 V
  damped: Callable[[Any, Factors, jax.Array], jax.Array]  # V -> M V


def factored_invert(
  stacks: Sequence[Factors],
  damping: Damping,
  due: jax.Array | None = None,
  split: Split = split_damping,
) -> tuple[list[FactoredInverse], jax.Array]:
  """Both damped factors of each block inverted; `split` shares the damping out."""
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


def _exact_invert(stacks, damping, due=None):
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
  values, basis = jnp.linalg.eigh(factor)
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
  rotated = sandwich(transposed(inverse.basis_A), V, inverse.basis_G)
  rotated /= jnp.outer(inverse.values_A, inverse.values_G) + inverse.damping
  return sandwich(inverse.basis_A, rotated, transposed(inverse.basis_G))


def _exact_damped(inverse, factors, V):
  return multiply(factors, V) + inverse.damping * V


SCALINGS = {
  "factored": Scaling(_factored_empty, factored_invert, _factored_solve, _factored_damped),
  "exact": Scaling(_exact_empty, _exact_invert, _exact_solve, _exact_damped),
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


def _each(function, factors, dampings, due=None):
  """`function` of each block, along the leading axes; zeros for those that are not due."""
  shapes = jax.eval_shape(jax.vmap(function), factors, dampings)
  nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), shapes)
  return by_block(function, nothing, factors, dampings, due=due)


def _per_stack(flat: Any, stacks: Sequence[Factors]) -> list[Any]:
  return per_stack(flat, [len(factors.A) for factors in stacks])


class Inverse(NamedTuple):
  """A block's inverse, or those of a stack of blocks with a leading axis everywhere."""

  value: FactoredInverse | ExactInverse
  made: jax.Array  # int32, shape=(): inverses stored
  failed: jax.Array  # int32, shape=(): inverses refused because they were not finite


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
  values, sound = scaling.invert(stacks, damping, due)
  tried = known if due is None else known & due
  counted = _per_stack((tried & sound, tried & ~sound), stacks)

  def keep(stored):
    return lambda new, old: jnp.where(stored.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  return tuple(
    Inverse(jax.tree.map(keep(made), value, old.value), old.made + made, old.failed + failed)
    for old, value, (made, failed) in zip(inverses, values, counted, strict=True)
  )
