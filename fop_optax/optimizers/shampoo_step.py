"""One step of Shampoo on stacks of tensors: the equations of :func:`fop_optax.shampoo`."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.modes import rotate, second_moment, unrotate
from fop_optax.curvature.precondition import Side
from fop_optax.curvature.roots import eigh_root, newton_root
from fop_optax.curvature.stacks import Stack, by_block, by_side, per_stack, stored
from fop_optax.curvature.steps import whole_period
from fop_optax.factorizations import eigh
from fop_optax.optimizers import by_tensor
from fop_optax.optimizers.by_tensor import OfContrast
from fop_optax.optimizers.grafting import correction, folded
from fop_optax.optimizers.owned_tensors import numbers_of, of_blocks
from fop_optax.optimizers.shampoo_options import ShampooOptions
from fop_optax.projection import fop_direction
from fop_optax.sharding import Share


class ShampooStack(NamedTuple):
  """State of a stack of tensors of equal shape `[blocks, *dims]`."""

  mu: jax.Array  # momentum
  factors: tuple[Side, ...]  # one a mode: [blocks, d, d], None where it is not preconditioned
  roots: tuple[Side, ...]  # inverse roots of them; with `eigenvalue_correction` eigenvectors
  eigenvalues: jax.Array | None  # second moment in the eigenvectors, like mu
  graft: jax.Array | None  # second moment of the grafted optimizer, like mu
  powers: (
    tuple[Side, ...] | None
  )  # with `contrast`: the inverses of the roots, the metric's factors
  projection: OfContrast | None  # of FOP in this metric, where it has `contrast`
  made: jax.Array  # int32 [blocks]: roots stored
  failed: jax.Array  # int32 [blocks]: roots refused because they were not finite

  @property
  def dims(self):
    return self.mu.shape

  @property
  def diagonal(self):
    return tuple(root is None for root in self.roots)

  @property
  def dtype(self):
    return self.mu.dtype


class Root(NamedTuple):
  """The root of one side, or of a stack of them, made anew."""

  root: jax.Array
  power: jax.Array | None  # its inverse, where it is asked for


def start(options: ShampooOptions, stack: Stack, dtype: Any) -> ShampooStack:
  """State of a stack before the first step."""
  like = lambda: jnp.zeros((stack.blocks, *stack.dims), dtype)
  square = lambda d: jnp.zeros((stack.blocks, d, d), dtype)
  sides = lambda make: tuple(
    None if without else make(d) for d, without in zip(stack.dims, stack.diagonal, strict=True)
  )
  return ShampooStack(
    mu=like(),
    factors=sides(square),
    roots=sides(lambda d: square(d) + jnp.eye(d, dtype=dtype)),
    eigenvalues=like() if options.eigenvalue_correction else None,
    graft=like() if options.graft.b2 is not None else None,
    powers=sides(lambda d: square(d) + jnp.eye(d, dtype=dtype)) if options.has_powers else None,
    projection=by_tensor.of_no_contrast(stack.blocks, dtype) if options.contrast else None,
    made=jnp.zeros(stack.blocks, jnp.int32),
    failed=jnp.zeros(stack.blocks, jnp.int32),
  )


def step(
  options: ShampooOptions,
  count: jax.Array,
  stacks,
  gradients,
  contrasts=None,
  share: Share | None = None,
):
  """One step of all stacks: directions, states.

  The gradient of a step enters the factors and, where they are due, the roots that it is seen in.
  """
  t = count + 1
  fold = jax.vmap(functools.partial(_fold, options))
  stacks = tuple(s._replace(factors=fold(s, g)) for s, g in zip(stacks, gradients, strict=True))
  period = whole_period(options.inverse_update_period, count)
  start = period if options.start_step is None else jnp.asarray(options.start_step, jnp.int32)
  turn = numbers_of(sum(len(s.made) for s in stacks), share) if options.stagger else 0
  due = of_blocks(((t - turn) % period == 0) & (t > start) | (t == start), share)
  remake = lambda stacks: _remake(options, t, stacks, due if due.ndim else None)
  stacks = jax.lax.cond(jnp.any(due), remake, lambda stacks: stacks, stacks)
  direction = jax.vmap(functools.partial(_direction, options, t, start))
  others = contrasts or [None] * len(stacks)
  results = [direction(*row) for row in zip(stacks, gradients, others, strict=True)]
  return [r[0] for r in results], tuple(r[1] for r in results)


def _fold(options: ShampooOptions, s: ShampooStack, gradient: jax.Array) -> tuple[Side, ...]:
  """Factors of one tensor after a gradient, from its unfoldings `U_i`:

      F_i = b2 F_i + (1 - b2) U_i U_i'        or, with b2 = 1, their sum

  With `kl` the gradient is preconditioned along the other axes first (Lin et al., 2025), with the
  roots that are at hand; of a matrix `F_0 = b2 F_0 + (1 - b2) (G R_1) (G R_1)'`.
  """
  b2 = jnp.asarray(options.b2, s.dtype)
  out = []
  for mode, old in enumerate(s.factors):
    if old is None:
      out.append(None)
      continue
    if options.kl:
      others = [None if other == mode else root for other, root in enumerate(s.roots)]
      moment = second_moment(unrotate(others, gradient), mode)
    else:
      moment = second_moment(gradient, mode)
    new = folded(old, moment, b2)
    out.append(jnp.where(jnp.isfinite(jnp.trace(new)), new, old))
  return tuple(out)


def _remake(options: ShampooOptions, t: jax.Array, stacks, due):
  """All roots made anew, or those of the blocks that are `due`."""
  turns = per_stack(due, [len(s.made) for s in stacks])
  columns: list[Any] = [[s.factors for s in stacks], [s.roots for s in stacks]]
  if due is not None:
    columns.append([(turn,) * len(s.roots) for turn, s in zip(turns, stacks, strict=True)])
  sides = [(s.factors, range(len(s.factors))) for s in stacks]
  exponents = [tuple(options.exponent(f, mode) for mode in modes) for f, modes in sides]

  def roots(exponent, factors, roots, due=None):
    make = lambda F, _: _root(options, exponent, t, F)
    stay = lambda _, root: Root(root, root if options.has_powers else None)
    return by_block(make, stay, factors, roots, due=due)

  found = by_side(roots, *columns, static=exponents)
  return tuple(_stored(s, own, turn) for s, own, turn in zip(stacks, found, turns, strict=True))


def _root(options: ShampooOptions, exponent: float, t: jax.Array, F: jax.Array) -> "Root":
  """`(F / (1 - b2^t) + eps I)^-exponent` and its inverse, or the eigenvectors of that."""
  b2, eps = (jnp.asarray(x, F.dtype) for x in (options.b2, options.eps))
  F = F / correction(b2, t, options.correct_bias)
  # Ours: less than the rounding of F would not keep its zero eigenvalues from being anything.
  eps = jnp.maximum(eps, jnp.finfo(F.dtype).eps * jnp.trace(F))
  if options.eigenvalue_correction:
    return Root(eigh(F + eps * jnp.eye(len(F), dtype=F.dtype))[1], None)
  if options.root == "newton":
    root = newton_root(F, eps, round(1 / exponent))
  else:
    root = eigh_root(F, eps, exponent)
  return Root(root, eigh_root(F, eps, -exponent) if options.has_powers else None)


def _stored(s: ShampooStack, found: Sequence["Root | None"], due: Any) -> ShampooStack:
  """With the roots that were `found`, where those of all axes of a block are finite."""
  finite = [jnp.all(jnp.isfinite(x), axis=(1, 2)) for x in jax.tree.leaves(list(found))]
  if not finite:
    return s
  sound = functools.reduce(jnp.logical_and, finite)
  roots, made, failed = stored(s.roots, [new and new.root for new in found], sound, due)
  powers = s.powers
  if powers is not None:
    powers, *_ = stored(powers, [new and new.power for new in found], sound, due)
  return s._replace(roots=roots, powers=powers, made=s.made + made, failed=s.failed + failed)


def _direction(options: ShampooOptions, t, start, s: ShampooStack, gradient, contrasts):
  """The direction of one tensor, and its state but for factors and roots.

      m = b1 m + (1 - b1) g      h = (b3 m_old + (1 - b3) g) / (1 - b3 b1^(t-1))
      direction = R_0 H R_1                                   of a matrix, with its inverse roots

  grafted: times the length of `h / (sqrt(v) + eps)` over its own. Before the first roots are made
  it is that step itself, or without grafting `h`.

  With contrasts of groups of examples, m and h take in place of g FOP's combination of both in the
  metric of this step, the inverse of what `h` is multiplied by; v and the factors take g.
  """
  b1, b2, eps = (jnp.asarray(x, s.dtype) for x in (options.b1, options.b2, options.eps))
  b3 = b1 if options.b3 is None else jnp.asarray(options.b3, s.dtype)
  eigenvalues = s.eigenvalues
  if eigenvalues is None:
    solve, multiply = (functools.partial(unrotate, own) for own in (s.roots, s.powers or ()))
  else:
    eigenvalues = folded(eigenvalues, rotate(s.roots, gradient) ** 2, b2)
    root = jnp.sqrt(eigenvalues / correction(b2, t, options.correct_bias)) + eps
    solve = lambda V: unrotate(s.roots, rotate(s.roots, V) / root)
    multiply = lambda V: unrotate(s.roots, rotate(s.roots, V) * root)
  combined, projection = gradient, None
  if contrasts is not None:
    r = fop_direction(gradient, contrasts, solve, multiply)
    beta, along = (x.reshape(-1, *[1] * gradient.ndim) for x in (r.beta, r.s))
    combined = r.eta * (gradient + jnp.sum(beta * (contrasts - along * gradient), axis=0))
    projection = OfContrast(r.eta, r.rho2, r.residual)
  momentum = b3 * s.mu + (1 - b3) * combined
  if options.correct_bias:
    momentum /= 1 - b3 * b1 ** (t - 1)
  own = solve(momentum)
  step, graft = options.graft.step(t, s.graft, gradient, momentum)
  if options.graft.kind is not None:
    norm = lambda x: jnp.sqrt(jnp.sum(x**2))
    own = jnp.where(t < start, step, own * (norm(step) / (norm(own) + 1e-16)))
  mu = b1 * s.mu + (1 - b1) * combined
  return own, s._replace(mu=mu, eigenvalues=eigenvalues, graft=graft, projection=projection)
