"""The equations of FOP on one layer's arrays: pure mathematics, no state.

Notation, for one layer with Fisher block `F` and damped Fisher `M`:

    g_avg       mean gradient                       c_i   contrasts of the groups' gradients
    <a, b>      a' M^-1 b                           two groups: c_1 = g_1 - g_2

FOP (Lu and Armour, equations 3 to 6) removes from each contrast its part along `g_avg`, in the
metric of the Fisher block, and adds a multiple of what is left:

    s_i      = c_i' F g_avg / g_avg' F g_avg                                              (4)
    g_perp,i = c_i - s_i g_avg            so that  g_avg' F g_perp,i = 0                  (5)
    g_comb   = g_avg + sum_i beta_i g_perp,i                                              (6)

`beta` minimises the quadratic model of the loss along the step (12 to 16). With

    N = <g_avg, g_avg>     D_i = <g_avg, g_perp,i>     E_ij = <g_perp,i, g_perp,j>

it solves `E beta = D`; for two groups `beta = D / E`. Directions in which `E` vanishes (a group
that repeats another) add nothing. The step is then scaled for its layer (17, 18); for the mean
gradient

    eta       = <g_avg, g_comb> / <g_comb, g_comb>
              = (N + beta' D) / (N + 2 beta' D + beta' E beta)
    direction = eta M^-1 g_comb

`rho^2 = D' beta / N` in [0, 1] says how much of `g_avg` lies in the span of the `g_perp,i` (in the
metric `M^-1`); at `beta = E^-1 D` it fixes `eta = (1 + rho^2) / (1 + 3 rho^2)`, within [1/2, 1].

For more than two groups the contrasts are `c_i = sqrt(2) sum_j H_ij g_j` with `H` any matrix of
orthonormal rows that sum to zero; the direction is the same for each such `H`. The paper has two
groups; this form is its extension here.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax.block_gradients import (
  Gradients,
  Product,
  along,
  constants_of,
  dot,
  joining,
  largest_entries,
  of_each,
  power_of_two,
)
from fop_optax.factorizations import eigh

# A direction of `E` counts if its share of the contrasts' size is above this; in float32 as well.
REL_EPS = 1e-6


class FopDirection(NamedTuple):
  """What FOP makes of one layer's gradients; `k` is the number of contrasts."""

  direction: jax.Array  # like the gradient: eta M^-1 g_comb
  beta: jax.Array  # shape=(k,)
  eta: jax.Array  # shape=()
  rho2: jax.Array  # shape=(), in [0, 1]
  residual: jax.Array  # shape=(): |g_avg' F g_perp| relative to its terms, the largest over i
  s: jax.Array  # shape=(k,)
  norm2: jax.Array  # shape=(): direction' M direction


class FopNumbers(NamedTuple):
  """The numbers of a `FopDirection`, of each of many blocks."""

  beta: jax.Array  # shape=(blocks, k)
  eta: jax.Array  # shape=(blocks,)
  rho2: jax.Array  # shape=(blocks,)
  residual: jax.Array  # shape=(blocks,)
  s: jax.Array  # shape=(blocks, k)
  norm2: jax.Array  # shape=(blocks,)


def fop_direction(
  average: jax.Array,
  contrasts: jax.Array,
  solve: Product,
  multiply: Product | None,
  *,
  fisher_norm: jax.typing.ArrayLike = 0.0,
  total_gradient: str = "mean",
  adaptive_step: bool = True,
  beta: jax.typing.ArrayLike | None = None,
  resolution: jax.typing.ArrayLike | None = None,
) -> FopDirection:
  r"""Fisher-orthogonal projection of one layer's gradients.

  .. math::
    \eta M^{-1} \Big(g_{avg} + \sum_i \beta_i (c_i - s_i g_{avg})\Big)

  Computed in at least float32. Every guard is relative, none depends on the scale of the loss:

  - `s` is zero where `g_avg' F g_avg` is rounding, i.e. `g_avg` is in the null space of `F`;
  - `beta` is zero where the contrasts are rounding next to `g_avg`, or what is left of them after
    the projection is rounding next to the contrasts. FOP is then K-FAC.

  Args:
    average: `g_avg`, an array of any shape.
    contrasts: `c_i`, stacked along a leading axis; for two groups `(g_1 - g_2)[None]`.
    solve: `V -> M^-1 V`, linear, symmetric and positive.
    multiply: `V -> F V` for the projection (4); None takes `M^-1`, which gives `beta = 0` to
      rounding and costs no product: a control.
    fisher_norm: a bound of the norm of `F` that does not grow with its size, `|A|_F |G|_F` for
      Kronecker factors; 0 where `multiply` is positive definite.
    total_gradient: `"mean"`: eta weighs the step with `g_avg`, the range is [1/2, 1];
      `"sum"`: with `g_1 + g_2`, the literal (8), twice as long.
    adaptive_step: whether to scale by eta; else it is 1, whatever `total_gradient`.
    beta: None for (16), or a number that takes its place (one contrast only).
    resolution: spacing of floating point numbers next to 1 in which the gradients were made; by
      default that of `average.dtype`.

  Returns:
    A `FopDirection`.

  Raises:
    ValueError: for an unknown `total_gradient`, or a given `beta` with more than one contrast.

  Example:
    With `F` a multiple of the identity FOP is K-FAC:

    >>> import jax.numpy as jnp
    >>> from fop_optax.projection import fop_direction
    >>> g1, g2 = jnp.array([1.0, 2.0]), jnp.array([3.0, -2.0])
    >>> out = fop_direction((g1 + g2) / 2, (g1 - g2)[None], lambda v: v / 2, lambda v: v)
    >>> print(out.beta, out.eta, out.direction)
    [0.] 1.0 [1. 0.]

  References:
    Lu and Armour, `Fisher-Orthogonal Projection Methods for Natural Gradient Descent with Large
    Batches <https://arxiv.org/abs/2508.13898>`_, 2025
  """
  check_total_gradient(total_gradient)
  if beta is not None and len(contrasts) > 1:
    raise ValueError(
      f"`beta={beta}` was given with {len(contrasts)} contrasts. A number would depend on the basis"
      " of the contrasts: give it with two groups only, or leave `beta=None`."
    )
  one = lambda function: lambda V: function(V[0])[None]
  layer = Gradients(
    average[None],
    contrasts[None],
    one(solve),
    None if multiply is None else one(multiply),
    jnp.asarray(fisher_norm)[None],
    resolution,
  )
  (direction,), numbers = fop_directions(
    [layer], total_gradient=total_gradient, adaptive_step=adaptive_step, beta=beta
  )
  return FopDirection(direction[0], *(number[0] for number in numbers))


def fop_directions(
  stacks: Sequence[Gradients],
  *,
  total_gradient: str = "mean",
  adaptive_step: bool = True,
  beta: jax.typing.ArrayLike | None = None,
  tree: Sequence[np.ndarray] | None = None,
) -> tuple[list[jax.Array], FopNumbers]:
  """`fop_direction` of each block of several stacks, and the numbers of all blocks together.

  With a `tree`, of `group_gradients.tree_of`, contrasts are folded level by level: `eta g_comb` of
  one is `g_avg` of the next. Numbers that arrays are multiplied by end in a division: XLA would
  work out others anew in each product. There is one stack at least.
  """
  join, split = joining(stacks)
  constants = constants_of(stacks)

  # A power of two near the largest entry of g_avg: divides exactly, and lets no square underflow.
  (largest,) = join([(largest_entries(own.average.astype(own.dtype)),) for own in stacks])
  scale = power_of_two(largest, constants.limit)
  times = lambda x, own, size: x.astype(own.dtype) * along(size, x)
  sizes = list(zip(stacks, split(1 / scale), strict=True))
  g = [times(own.average, own, size) for own, size in sizes]
  c = [times(own.contrasts, own, size) for own, size in sizes]
  u = [own.solve(average) for own, average in zip(stacks, g, strict=True)]

  k = 2.0 if total_gradient == "sum" else 1.0
  levels = []
  for turn in [None] if tree is None else tree:
    part = (
      c if turn is None else [jnp.einsum("ij,nj...->ni...", turn.astype(x.dtype), x) for x in c]
    )
    g, u, numbers = _fold(stacks, constants, g, u, part, k, adaptive_step, beta)
    k = 1.0
    levels.append(numbers)
  directions = [along(size, x) * x for size, x in zip(split(scale), u, strict=True)]
  return directions, _together(levels, scale)


def _fold(stacks, constants, ga, u, c, k, adaptive_step, beta):
  """`eta g_comb` of `g_avg` and contrasts, `M^-1` of it, and their numbers; `u = M^-1 g_avg`."""
  join, split = joining(stacks)
  # (4), (5). Formed entry by entry: differences of the scalars below would cancel.
  f_ga = [
    v if own.multiply is None else own.multiply(g) for own, g, v in zip(stacks, ga, u, strict=True)
  ]
  q, c_f, ga2, c2, f2 = join(
    of_each(
      lambda g, f, ci: (
        dot(g, f),
        dot(ci, f[:, None], 2),
        dot(g, g),
        dot(ci, ci, 2),
        dot(f, f),
      ),
      (1, 1, 2),
      *(ga, f_ga, c),
    )
  )
  projected = q > 8 * constants.eps * jnp.asarray(constants.norm, q.dtype) * ga2
  s = jnp.where(projected[:, None], c_f, 0) / jnp.where(projected, q, 1)[:, None]
  gp = [ci - along(own, ci) * g[:, None] for ci, own, g in zip(c, split(s), ga, strict=True)]
  # One contrast after the other: `vmap` over the second axis would copy it to the front.
  v = [
    jnp.stack([own.solve(perp[:, i]) for i in range(perp.shape[1])], axis=1)
    for own, perp in zip(stacks, gp, strict=True)
  ]

  N, D, E, left = join(
    of_each(
      lambda g, f, ug, vi, perp: (
        dot(g, ug),
        dot(vi, g[:, None], 2),
        _gram(vi, perp),
        dot(perp, f[:, None], 2),
      ),
      (1, 1, 1, 2, 2),
      *(ga, f_ga, u, v, gp),
    )
  )
  size2 = jnp.trace(E, axis1=1, axis2=2) + 2 * dot(s, D) + dot(s, s) * N  # = sum_i <c_i, c_i>
  sizeable = (N > 0) & (jnp.sum(c2, axis=1) > constants.tiny**2 * ga2)
  b, rho2 = _mixture(N, D, E, REL_EPS * size2, sizeable, beta)
  num = N + dot(b, D)  # <g_avg, g_comb>
  den = N + 2 * dot(b, D) + dot(b, dot(E, b[:, None], 2))  # <g_comb, g_comb>
  eta = jnp.ones_like(N)
  if adaptive_step:
    if beta is None:
      num = jnp.clip(num, den / 2, den)  # the range of eta, up to rounding
    eta = jnp.where(den > 0, k * num, k) / jnp.where(den > 0, den, 1)  # (17)

  def comb(x, parts):
    """(6), (18)"""
    rows = zip(split(eta), split(b), x, parts, strict=True)
    return [along(e, x) * (x + jnp.sum(along(own, p) * p, axis=1)) for e, own, x, p in rows]

  residual = jnp.where(projected, _residual(left, c2, s, ga2, f2), 0)
  return comb(ga, gp), comb(u, v), FopNumbers(b, eta, rho2, residual, s, eta**2 * den)


def _together(levels: Sequence[FopNumbers], scale: jax.Array) -> FopNumbers:
  """The numbers of all levels: etas multiply, of rho2 and residuals the largest counts."""
  beside = lambda field: jnp.concatenate([getattr(own, field) for own in levels], axis=1)
  largest = lambda field: functools.reduce(jnp.maximum, [getattr(own, field) for own in levels])
  return FopNumbers(
    beta=beside("beta"),
    eta=functools.reduce(jnp.multiply, [own.eta for own in levels]),
    rho2=largest("rho2"),
    residual=largest("residual"),
    s=beside("s"),
    norm2=levels[-1].norm2 * scale**2,
  )


def check_total_gradient(total_gradient: str) -> None:
  if total_gradient not in ("mean", "sum"):
    raise ValueError(f'`total_gradient` is "mean" or "sum", not {total_gradient!r}.')


def _mixture(N, D, E, floor, sizeable, beta):
  """`beta` of each block, the best (16) or a given one, and `rho^2` of the best."""
  finite = jnp.all(jnp.isfinite(D), axis=1) & jnp.all(jnp.isfinite(E), axis=(1, 2))
  sizeable &= finite
  best = jax.vmap(_solve_semidefinite)(E, D, floor, sizeable)
  rho2 = jnp.where(sizeable, dot(D, best) / jnp.where(sizeable, N, 1), 0)
  if beta is not None:
    best = jnp.where(finite, jnp.asarray(beta, N.dtype), 0)[:, None]
  return best, jnp.clip(rho2, 0, 1)


def _residual(left, c2, s, ga2, f2):
  """`|g_perp,i' F g_avg|` over `(|c_i| + |s_i| |g_avg|) |F g_avg|`, which bounds its rounding."""
  bound = (jnp.sqrt(c2) + jnp.abs(s) * jnp.sqrt(ga2)[:, None]) * jnp.sqrt(f2)[:, None]
  return jnp.max(jnp.where(bound > 0, jnp.abs(left) / jnp.where(bound > 0, bound, 1), 0), axis=1)


def _solve_semidefinite(E, D, floor, valid):
  """`E^-1 D` over the eigenvectors of `E` with eigenvalues above `floor`; zero if not `valid`."""
  E, D = jnp.where(valid, E, 0), jnp.where(valid, D, 0)
  if len(D) == 1:  # two groups: D / E
    values, vectors = E[0], jnp.ones_like(E)
  else:
    values, vectors = eigh(E)
  kept = valid & (values > floor)
  shares = jnp.where(kept, dot(vectors.T, D), 0) / jnp.where(kept, values, 1)
  return dot(vectors, shares)


def _gram(v, gp):
  """`<v_i, gp_j>` of each block: `[blocks, k, k]`."""
  return dot(v[:, :, None], gp[:, None], 3)
