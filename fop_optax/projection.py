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

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.factorizations import eigh

Product = Callable[[jax.Array], jax.Array]

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
  k = 2.0 if total_gradient == "sum" else 1.0
  resolution = jnp.finfo(average.dtype).eps if resolution is None else resolution
  dtype = jnp.promote_types(average.dtype, jnp.float32)
  eps = jnp.finfo(dtype).eps

  # A power of two near the largest entry of g_avg: divides exactly, and lets no square underflow.
  scale = _power_of_two(average.astype(dtype))
  ga = average.astype(dtype) / scale
  c = contrasts.astype(dtype) / scale

  # (4), (5). Formed entry by entry: differences of the scalars below would cancel.
  u = solve(ga)
  f_ga = u if multiply is None else multiply(ga)
  q = _ip(ga, f_ga)
  projected = q > 8 * eps * jnp.asarray(fisher_norm, dtype) * _ip(ga, ga)
  s = jnp.where(projected, _ips(c, f_ga) / jnp.where(projected, q, 1), 0)
  gp = c - _along(s, ga) * ga
  v = jax.vmap(solve)(gp)

  N = _ip(ga, u)
  D = _ips(v, ga)
  E = jax.vmap(lambda v_i: _ips(gp, v_i))(v)
  c2 = jnp.trace(E) + 2 * _ip(s, D) + _ip(s, s) * N  # = sum_i <c_i, c_i>

  tiny = jnp.maximum(1e3 * eps, 4 * jnp.asarray(resolution, dtype))
  finite = jnp.all(jnp.isfinite(D)) & jnp.all(jnp.isfinite(E))
  sizeable = finite & (N > 0) & (jnp.sum(c * c) > tiny**2 * _ip(ga, ga))
  best = _solve_semidefinite(E, D, REL_EPS * c2, sizeable)  # (16)
  rho2 = jnp.where(sizeable, _ip(D, best) / jnp.where(sizeable, N, 1), 0)
  b = best if beta is None else jnp.where(finite, jnp.asarray(beta, dtype), 0)[None]

  num = N + _ip(b, D)  # <g_avg, g_comb>
  den = N + 2 * _ip(b, D) + _ip(b, _ips(E, b))  # <g_comb, g_comb>
  eta = jnp.full_like(N, 1.0)
  if adaptive_step:
    eta = jnp.where(den > 0, k * num / jnp.where(den > 0, den, 1), k)  # (17)
    if beta is None:
      eta = jnp.clip(eta, k / 2, k)  # its range, up to rounding
  direction = eta * scale * (u + jnp.sum(_along(b, u) * v, axis=0))  # (18)
  return FopDirection(
    direction=direction,
    beta=b,
    eta=eta,
    rho2=jnp.clip(rho2, 0, 1),
    residual=jnp.max(jnp.where(projected, _residual(ga, c, gp, s, f_ga), 0)),
    s=s,
    norm2=eta**2 * den * scale**2,
  )


def check_total_gradient(total_gradient: str) -> None:
  if total_gradient not in ("mean", "sum"):
    raise ValueError(f'`total_gradient` is "mean" or "sum", not {total_gradient!r}.')


def _solve_semidefinite(E, D, floor, valid):
  """`E^-1 D` over the eigenvectors of `E` with eigenvalues above `floor`; zero if not `valid`."""
  E, D = jnp.where(valid, E, 0), jnp.where(valid, D, 0)
  if len(D) == 1:  # two groups: D / E
    values, vectors = E[0], jnp.ones_like(E)
  else:
    values, vectors = eigh(E)
  kept = valid & (values > floor)
  shares = jnp.where(kept, _ips(vectors.T, D) / jnp.where(kept, values, 1), 0)
  return _ips(vectors, shares)


def _residual(ga, c, gp, s, f_ga):
  """`|g_perp,i' F g_avg|` over `(|c_i| + |s_i| |g_avg|) |F g_avg|`, which bounds its rounding."""
  bound = (jax.vmap(_norm)(c) + jnp.abs(s) * _norm(ga)) * _norm(f_ga)
  return jnp.where(bound > 0, jnp.abs(_ips(gp, f_ga)) / jnp.where(bound > 0, bound, 1), 0)


def _power_of_two(x):
  largest = jnp.max(jnp.abs(x), initial=0)
  _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 0))
  limit = -1 - jnp.finfo(x.dtype).minexp  # XLA multiplies by the reciprocal: it may not underflow
  return jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(exponent - 1, -limit, limit))


def _ip(x, y):
  return jnp.sum(x * y)


def _ips(xs, y):
  """Inner products of each `xs[i]` with `y`."""
  return jnp.sum(xs * y, axis=tuple(range(1, xs.ndim)))


def _norm(x):
  return jnp.sqrt(_ip(x, x))


def _along(weights, x):
  """`weights` as a leading axis beside the axes of `x`."""
  return weights.reshape(-1, *[1] * x.ndim)
