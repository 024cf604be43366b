"""One step of SOAP on stacks of tensors: the equations of :func:`fop_optax.soap`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax.curvature.eigenbasis import (
  Eigenbases,
  first_bases,
  fold,
  fold_given,
  follow,
  init_eigenbases,
  of_gradients,
)
from fop_optax.curvature.modes import rotate, unrotate
from fop_optax.curvature.stacks import Stack
from fop_optax.curvature.steps import whole_period
from fop_optax.optimizers import by_tensor
from fop_optax.optimizers.by_tensor import OfContrast
from fop_optax.optimizers.owned_tensors import numbers_of, of_blocks
from fop_optax.optimizers.soap_options import SoapOptions
from fop_optax.projection import fop_direction
from fop_optax.sharding import Share


class SoapStack(NamedTuple):
  """State of a stack of tensors of equal shape `[blocks, *dims]`."""

  mu: jax.Array  # first moment, in the bases
  nu: tuple[jax.Array, ...]  # second moment, in the bases; factorized: of its rows, of its columns
  bases: Eigenbases
  projection: OfContrast | None  # of FOP in this metric, where it has `contrast`

  @property
  def dims(self):
    return self.mu.shape

  @property
  def diagonal(self):
    return tuple(basis is None for basis in self.bases.bases)

  @property
  def dtype(self):
    return self.nu[0].dtype

  @property
  def made(self):
    return self.bases.made

  @property
  def failed(self):
    return self.bases.failed


def start(options: SoapOptions, stack: Stack, dtype: Any) -> SoapStack:
  """State of a stack before the first step."""
  shape = (stack.blocks, *stack.dims)
  nu = (shape,)
  if options.factorized and len(stack.dims) == 2:
    nu = (shape[:2], (shape[0], shape[2]))
  bases = init_eigenbases(
    stack, dtype, options.statistics_dtype, options.start == "identity", options.kl
  )
  mu = jnp.zeros(shape, options.mu_dtype or dtype)
  projection = by_tensor.of_no_contrast(stack.blocks, dtype) if options.contrast else None
  return SoapStack(mu, tuple(jnp.zeros(own, dtype) for own in nu), bases, projection)


def step(
  options: SoapOptions,
  count: jax.Array,
  stacks,
  gradients,
  contrasts=None,
  sides=None,
  refresh=None,
  share: Share | None = None,
):
  """One step of all stacks: directions, states.

  The gradient of a step, or its statistics, enter the bases after it, but for the first.
  """
  first = count == 0
  bases = tuple(s.bases for s in stacks)
  if options.start == "eigh":

    def start(bases):
      of = zip(bases, gradients, strict=True)
      moments = [of_gradients(*own) for own in of] if sides is None else sides
      return first_bases(bases, moments, None if share is None else share.filled)

    bases = jax.lax.cond(first, start, lambda bases: bases, bases)
  beta = options.b2 if options.shampoo_beta is None else options.shampoo_beta
  if refresh is not None:
    beta = jnp.where(refresh, beta, 1)
  adam = jax.vmap(functools.partial(_adam, options, count, beta))
  stacks = [s._replace(bases=own) for s, own in zip(stacks, bases, strict=True)]
  none = [None] * len(stacks)
  rows = zip(stacks, gradients, contrasts or none, sides or none, strict=True)
  results = [adam(*row) for row in rows]
  directions, stacks = [r[0] for r in results], tuple(r[1] for r in results)

  step = count + (0 if options.skip_first else 1)
  period = whole_period(options.inverse_update_period, count)
  due = step % period == 0
  if options.stagger:
    due = step % period == numbers_of(sum(len(s.mu) for s in stacks), share) % period
  due = due | first if options.start == "identity" else due & (step > 0)
  due = of_blocks(due, share)
  remake = lambda stacks: _remake(options, stacks, due if due.ndim else None)
  return directions, jax.lax.cond(jnp.any(due), remake, lambda stacks: stacks, stacks)


def _adam(options: SoapOptions, count, beta, s: SoapStack, gradient, contrasts, sides):
  """One step of one tensor: its direction, and its state but for new bases.

  Of a matrix, with `g = Q_0' G Q_1`, products elementwise, and t counting steps from one:

      m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
      direction = sqrt(1 - b2^t) / (1 - b1^t)  Q_0 [m / (sqrt(v) + eps)] Q_1'

  Next to moments that are corrected for their start eps is `eps / sqrt(1 - b2^t)`.

  With contrasts of groups of examples, m takes in place of g FOP's combination of both in the
  metric of this step, `sqrt(v) + eps`; v and the statistics take g.
  """
  b1, b2, eps = (jnp.asarray(x, s.dtype) for x in (options.b1, options.b2, options.eps))
  skipped = (count == 0) & options.skip_first
  t = jnp.maximum(count + (0 if options.skip_first else 1), 1).astype(s.dtype)
  rotated = rotate(s.bases.bases, gradient)
  square = (rotated**2,)
  if len(s.nu) == 2:
    square = jnp.sum(rotated**2, axis=1), jnp.sum(rotated**2, axis=0)
  nu = tuple(b2 * old + (1 - b2) * new for old, new in zip(s.nu, square, strict=True))
  root2 = jnp.sqrt(1 - b2**t)
  if options.eps_after_correction:
    eps = eps * root2
  root = jnp.sqrt(_product(nu)) + eps
  combined, projection = rotated, None
  if contrasts is not None:
    turned = jax.vmap(lambda c: rotate(s.bases.bases, c))(contrasts)
    found = fop_direction(rotated, turned, lambda V: V / root, lambda V: V * root)
    combined, projection = found.direction * root, OfContrast(found.eta, found.rho2, found.residual)
  mu = b1 * s.mu.astype(s.dtype) + (1 - b1) * combined
  direction = unrotate(s.bases.bases, mu / root)
  if options.normalize_grads:
    direction /= 1e-30 + jnp.sqrt(jnp.mean(direction**2))
  if options.correct_bias:
    direction *= root2 / (1 - b1**t)
  beta = jnp.asarray(beta, s.dtype)
  if sides is None:
    bases = fold(s.bases, gradient, rotated, beta, count == 0)
  else:
    bases = fold_given(s.bases, sides, beta)
  keep = lambda new, old: jnp.where(skipped, old, new.astype(old.dtype))
  after = SoapStack(keep(mu, s.mu), jax.tree.map(keep, nu, s.nu), bases, projection)
  return jnp.where(skipped, 0, direction), after


def _product(nu: tuple[jax.Array, ...]) -> jax.Array:
  """The second moment of each entry; factorized it is `a c' / sum(a)`, as Adafactor's."""
  if len(nu) == 1:
    return nu[0]
  rows, columns = nu
  total = jnp.sum(rows)
  return jnp.outer(rows, columns) / jnp.where(total > 0, total, 1)


def _remake(options: SoapOptions, stacks, due):
  """All stacks in bases made anew."""
  # The authors' code of KL-SOAP does not sort.
  found = follow([s.bases for s in stacks], due, sort=not options.kl)
  return tuple(jax.vmap(_moved)(s, *own) for s, own in zip(stacks, found, strict=True))


def _moved(s: SoapStack, bases: Eigenbases, orders: tuple[jax.Array | None, ...]) -> SoapStack:
  """One tensor in new bases: the first moment is rotated, a second one goes with its column."""
  if all(order is None for order in orders):
    return s
  nu = list(s.nu)
  for mode, order in enumerate(orders):
    if order is not None:
      which, axis = (mode, 0) if len(nu) == 2 else (0, mode)
      nu[which] = jnp.take(nu[which], order, axis)
  mu = rotate(bases.bases, unrotate(s.bases.bases, s.mu.astype(s.dtype)))
  return SoapStack(mu.astype(s.mu.dtype), tuple(nu), bases, s.projection)
