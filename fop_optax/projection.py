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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


class Gradients(NamedTuple):
  """Gradients of blocks of one shape, along the leading axis of every array, and their metric."""

  average: jax.Array  # [blocks, ...]
  contrasts: jax.Array  # [blocks, k, ...]
  solve: Product  # V -> M^-1 V of all blocks: [blocks, ...]
  multiply: Product | None
  fisher_norm: jax.typing.ArrayLike  # shape=(blocks,), or a number
  resolution: jax.typing.ArrayLike | None = None

  @property
  def dtype(self) -> Any:
    return jnp.promote_types(self.average.dtype, jnp.float32)


def fop_directions(
  stacks: Sequence[Gradients],
  *,
  total_gradient: str = "mean",
  adaptive_step: bool = True,
  beta: jax.typing.ArrayLike | None = None,
) -> tuple[list[jax.Array], FopNumbers]:
  """`fop_direction` of each block of several stacks, and the numbers of all blocks together.

  Numbers are worked out as one vector over all blocks, however many stacks there are: the program
  has them once, and compiles quickly. There is one stack at least.
  """
  join, split = _joining(stacks)
  k = 2.0 if total_gradient == "sum" else 1.0
  eps, tiny, limit, norm = _constants(stacks)

  # A power of two near the largest entry of g_avg: divides exactly, and lets no square underflow.
  (largest,) = join([(_largest(own.average.astype(own.dtype)),) for own in stacks])
  scale = _power_of_two(largest, limit)
  ga, c = [], []
  for own, size in zip(stacks, split(scale), strict=True):
    ga.append(own.average.astype(own.dtype) / _along(size, own.average))
    c.append(own.contrasts.astype(own.dtype) / _along(size, own.contrasts))

  # (4), (5). Formed entry by entry: differences of the scalars below would cancel.
  u = [own.solve(g) for own, g in zip(stacks, ga, strict=True)]
  f_ga = [
    v if own.multiply is None else own.multiply(g) for own, g, v in zip(stacks, ga, u, strict=True)
  ]
  q, c_f, ga2, c2, f2 = join(
    [
      (_dot(g, f), _dot(ci, f[:, None], 2), _dot(g, g), _dot(ci, ci, 2), _dot(f, f))
      for g, f, ci in zip(ga, f_ga, c, strict=True)
    ]
  )
  projected = q > 8 * eps * jnp.asarray(norm, q.dtype) * ga2
  s = jnp.where(projected[:, None], c_f / jnp.where(projected, q, 1)[:, None], 0)
  gp = [ci - _along(own, ci) * g[:, None] for ci, own, g in zip(c, split(s), ga, strict=True)]
  v = [jax.vmap(own.solve, 1, 1)(perp) for own, perp in zip(stacks, gp, strict=True)]

  N, D, E, left = join(
    [
      (_dot(g, ug), _dot(vi, g[:, None], 2), _gram(vi, perp), _dot(perp, f[:, None], 2))
      for g, ug, vi, perp, f in zip(ga, u, v, gp, f_ga, strict=True)
    ]
  )
  trace = jnp.trace(E, axis1=1, axis2=2)
  size2 = trace + 2 * _dot(s, D) + _dot(s, s) * N  # = sum_i <c_i, c_i>
  finite = jnp.all(jnp.isfinite(D), axis=1) & jnp.all(jnp.isfinite(E), axis=(1, 2))
  sizeable = finite & (N > 0) & (jnp.sum(c2, axis=1) > tiny**2 * ga2)
  best = jax.vmap(_solve_semidefinite)(E, D, REL_EPS * size2, sizeable)  # (16)
  rho2 = jnp.where(sizeable, _dot(D, best) / jnp.where(sizeable, N, 1), 0)
  b = best
  if beta is not None:
    b = jnp.where(finite, jnp.asarray(beta, N.dtype), 0)[:, None]

  num = N + _dot(b, D)  # <g_avg, g_comb>
  den = N + 2 * _dot(b, D) + _dot(b, _dot(E, b[:, None], 2))  # <g_comb, g_comb>
  eta = jnp.ones_like(N)
  if adaptive_step:
    eta = jnp.where(den > 0, k * num / jnp.where(den > 0, den, 1), k)  # (17)
    if beta is None:
      eta = jnp.clip(eta, k / 2, k)  # its range, up to rounding
  bound = (jnp.sqrt(c2) + jnp.abs(s) * jnp.sqrt(ga2)[:, None]) * jnp.sqrt(f2)[:, None]
  residual = jnp.where(bound > 0, jnp.abs(left) / jnp.where(bound > 0, bound, 1), 0)
  directions = [
    _along(size, ug) * (ug + jnp.sum(_along(own, vi) * vi, axis=1))  # (18)
    for size, ug, own, vi in zip(split(eta * scale), u, split(b), v, strict=True)
  ]
  return directions, FopNumbers(
    beta=b,
    eta=eta,
    rho2=jnp.clip(rho2, 0, 1),
    residual=jnp.where(projected, jnp.max(residual, axis=1), 0),
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
  shares = jnp.where(kept, _dot(vectors.T, D) / jnp.where(kept, values, 1), 0)
  return _dot(vectors, shares)


def _joining(stacks):
  """How numbers of each stack become vectors over all blocks, and those parts of them again."""
  dtype = jnp.result_type(*(own.dtype for own in stacks))
  ends = np.cumsum([len(own.average) for own in stacks])
  starts = [0, *ends[:-1]]

  def join(numbers):
    if len(numbers) == 1:
      return numbers[0]
    return [
      jnp.concatenate([x.astype(dtype) for x in column]) for column in zip(*numbers, strict=True)
    ]

  def split(x):
    pieces = zip(stacks, starts, ends, strict=True)
    return [x[start:end].astype(own.dtype) for own, start, end in pieces]

  return join, split


def _constants(stacks):
  """For each block its machine epsilon, what is rounding of its gradients, and the rest it needs.

  Numbers where all stacks have the same, for the program's sake.
  """

  def each(number):
    values = [number(own) for own in stacks]
    if all(isinstance(x, float | int) for x in values) and len(set(values)) == 1:
      return values[0]
    return jnp.concatenate(
      [jnp.broadcast_to(x, len(own.average)) for x, own in zip(values, stacks, strict=True)]
    )

  eps = lambda own: float(jnp.finfo(own.dtype).eps)
  fine = lambda own: float(jnp.finfo(own.average.dtype).eps)
  spacing = lambda own: fine(own) if own.resolution is None else own.resolution

  def tiny(own):
    rounding = spacing(own)
    larger = max if isinstance(rounding, float) else jnp.maximum
    return larger(1e3 * eps(own), 4 * rounding)

  # XLA multiplies by the reciprocal of a scale: it may not underflow
  limit = lambda own: int(-1 - jnp.finfo(own.dtype).minexp)
  return each(eps), each(tiny), each(limit), each(lambda own: own.fisher_norm)


def _power_of_two(largest, limit):
  _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 0))
  return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent - 1, -limit, limit))


def _largest(x):
  return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)


def _dot(x, y, lead=1):
  """Inner products along all but so many leading axes."""
  return jnp.sum(x * y, axis=tuple(range(lead, x.ndim)))


def _gram(v, gp):
  """`<v_i, gp_j>` of each block: `[blocks, k, k]`."""
  return _dot(v[:, :, None], gp[:, None], 3)


def _along(numbers, x):
  """Numbers of the leading axes of `x`, with axes of one entry behind them."""
  return numbers.reshape(*numbers.shape, *[1] * (x.ndim - numbers.ndim))
