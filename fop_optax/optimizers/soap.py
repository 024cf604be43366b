"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., 2025)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
from fop_optax.curvature.steps import Steps, whole_period
from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers
from fop_optax.optimizers import by_tensor, checks, common
from fop_optax.optimizers.by_tensor import OfContrast
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.optimizers.owned_tensors import OwnedStack, numbers_of, of_blocks
from fop_optax.optimizers.soap_options import SoapOptions
from fop_optax.optimizers.whole_steps import whole_steps
from fop_optax.projection import fop_direction
from fop_optax.sharding import Sharding, Share


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


class ScaleBySoapState(NamedTuple):
  """State of `scale_by_soap`."""

  steps: Steps
  stacks: tuple[SoapStack | OwnedStack, ...]


def _start(options: SoapOptions, stack: Stack, dtype: Any) -> SoapStack:
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


def _step(
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


def scale_by_soap(
  b1: Scalar = 0.95,
  b2: Scalar = 0.95,
  eps: Scalar = 1e-8,
  *,
  shampoo_beta: Scalar | None = None,
  inverse_update_period: ScalarOrSchedule = 10,
  stagger: bool = False,
  max_precond_dim: int | None = None,
  merge_dims: bool = False,
  precondition_1d: bool = False,
  one_sided: bool = False,
  factorized: bool = False,
  normalize_grads: bool = False,
  correct_bias: bool = True,
  eps_after_correction: bool = False,
  skip_first: bool = True,
  start: str = "eigh",
  kl: bool = False,
  fisher: bool = False,
  contrast: bool = False,
  dimension_numbers: Dimensions = None,
  layers: Layers | None = None,
  mu_dtype: Any = None,
  statistics_dtype: Any = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Turns gradients into SOAP's direction; no rate, no sign and no decay.

  See :func:`fop_optax.soap` for more details.
  """
  options = SoapOptions(
    b1=b1,
    b2=b2,
    eps=eps,
    shampoo_beta=shampoo_beta,
    inverse_update_period=inverse_update_period,
    stagger=stagger,
    max_precond_dim=max_precond_dim,
    merge_dims=merge_dims,
    precondition_1d=precondition_1d,
    one_sided=one_sided,
    factorized=factorized,
    normalize_grads=normalize_grads,
    correct_bias=correct_bias,
    eps_after_correction=eps_after_correction,
    skip_first=skip_first,
    start=start,
    kl=kl,
    fisher=fisher,
    contrast=contrast,
    dimension_numbers=dimension_numbers,
    layers=layers,
    mu_dtype=mu_dtype,
    statistics_dtype=statistics_dtype,
    sharding=sharding,
  )
  return whole_steps(_soap(options))


def _soap(options: SoapOptions) -> optax.GradientTransformationExtraArgs:
  fisher = options.layers if options.fisher else None
  return by_tensor.by_tensor(options, _start, _step, ScaleBySoapState, fisher)


def soap(
  learning_rate: ScalarOrSchedule = 3e-3,
  b1: Scalar = 0.95,
  b2: Scalar = 0.95,
  eps: Scalar = 1e-8,
  *,
  weight_decay: Scalar = 0.01,
  mask: Any = None,
  shampoo_beta: Scalar | None = None,
  inverse_update_period: ScalarOrSchedule = 10,
  stagger: bool = False,
  max_precond_dim: int | None = None,
  merge_dims: bool = False,
  precondition_1d: bool = False,
  one_sided: bool = False,
  factorized: bool = False,
  normalize_grads: bool = False,
  correct_bias: bool = True,
  eps_after_correction: bool = False,
  skip_first: bool = True,
  start: str = "eigh",
  kl: bool = False,
  fisher: bool = False,
  contrast: bool = False,
  dimension_numbers: Dimensions = None,
  layers: Layers | None = None,
  mu_dtype: Any = None,
  statistics_dtype: Any = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

  For a weight with gradient `G` it keeps :math:`L = \mathrm{E}[G G^\top]` and
  :math:`R = \mathrm{E}[G^\top G]`, their eigenvectors :math:`Q_L, Q_R`, and runs Adam on

  .. math::
    G' = Q_L^\top G \, Q_R, \qquad \Delta = Q_L \, \mathrm{Adam}(G') \, Q_R^\top

  The defaults are the official code's, to the last digit: the first gradient only makes the bases
  (by `eigh`); then every `inverse_update_period` steps they take one step of the power method with
  a QR factorisation, columns sorted by eigenvalue and the second moments with them; the gradient of
  a step enters the statistics after it; eps is added before the correction of Adam's start; decay
  follows the step. Tensors of three and more axes have a basis for each axis, vectors none (plain
  Adam). All tensors of one shape, over all parameters, go through one batched operation.

  A step whose gradient, its square, or update are not finite is skipped for all parameters, and
  counted; bases that are not finite are not stored. See :func:`fop_optax.diagnostics`.

  Args:
    learning_rate: a number, an array or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, times the learning rate.
    mask: which leaves decay, a tree of bools or a callable of params, as in `optax.adamw`.
    shampoo_beta: decay of the statistics; None: b2.
    inverse_update_period: bases are remade every that many steps (the authors'
      `precondition_frequency`), a number or a schedule. 1 is a setting of large runs.
    stagger: whether tensors take turns to remake theirs, so that no step pays for all.
    max_precond_dim: an axis longer than this has no basis (is not rotated), as for vocabularies;
      None: 10,000.
    merge_dims: whether neighbouring axes are put together while their product is at most
      `max_precond_dim`, as in the official code: also both axes of a small matrix, which becomes a
      vector with one large basis. `dimension_numbers` or `layers` say it explicitly.
    precondition_1d: whether parameters of one axis have a basis.
    one_sided: whether only the shortest axis has one (the paper's section 7).
    factorized: whether the second moment of a matrix is that of its rows times that of its columns,
      as in Adafactor (the paper's section 7).
    normalize_grads: whether a tensor's direction is scaled to a root mean square of one, before the
      correction of Adam's start.
    correct_bias: whether moments are corrected for their start from zero.
    eps_after_correction: whether eps is added after it, as Adam does, and not before.
    skip_first: whether the first step only makes the bases. If not, it is taken in them.
    start: `"eigh"`: the first bases are eigenvectors. `"identity"`: they are one step of the power
      method from the identity, and no eigendecomposition is ever compiled.
    kl: KL-SOAP (Lin et al., 2025): each statistic is of the gradient whitened along the other axes.
      Their code has `correct_bias=False`, and does not sort columns; neither do we then.
    fisher: Adam's moments in the eigenbasis of the Fisher factors, which is ours: `update` takes
      the `stats` of `fop_optax.capture`, and its factors `A` and `G` go into the statistics in
      place of the gradient's second moments, at the steps that have some. A bias is the last row
      of its weight's matrix then, as K-FAC has it; what is in no layer goes without basis.
    contrast: FOP in SOAP's metric, which is ours: `update` takes the `stats` of
      `fop_optax.capture(..., groups=2)`, and the first moment of each tensor takes, in place of its
      gradient, what :func:`fop_optax.fop_direction` makes of it and the contrasts.
    dimension_numbers: how leaves with two or more axes are matrices: a tree of
      :class:`fop_optax.DimensionNumbers` (or of those of `optax.contrib.muon`) like params or part
      of one, or a callable that makes one. Axes in neither are a batch of matrices, as of layers
      that a scan goes over. Where there is none, every axis is a side.
    layers: `captured.layers`: every weight is the matrix that :func:`fop_optax.capture` found:
      experts, scanned layers and parts of a weight that are used apart are one each, the rows of a
      convolution's kernel are its patches, and a lookup table has no basis along its rows.
    mu_dtype: dtype of the first moment; None: that of the arithmetic, float32 or better.
    statistics_dtype: that of the statistics, likewise; bases are in that of the arithmetic.
    sharding: :class:`fop_optax.Sharding`: each tensor has one owner among the devices of its mesh,
      which keeps its state, remakes its bases and finds its direction; directions are gathered once
      a step. For replicated parameters and gradients; updates are equal to rounding. None: every
      device has all of it.

  Returns:
    A transformation; its `update` needs params where there is weight decay.

  Raises:
    ValueError: for hyperparameters out of range; in `init` and `update` for dimension numbers that
      do not fit, gradients that are not real floating point, and states of another model.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp, optax
    >>> target = jnp.arange(12.0).reshape(4, 3)
    >>> loss = lambda params: jnp.sum((params["w"] - target) ** 2)
    >>> params = {"w": jnp.zeros((4, 3))}
    >>> tx = fop_optax.soap(optax.cosine_decay_schedule(0.5, 200), weight_decay=0.0)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(200):
    ...   params, state = step(params, state)
    >>> print(loss(params) < 0.01)
    True

  References:
    Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
    <https://arxiv.org/abs/2409.11321>`_, 2025; Lin et al., `Understanding and Improving Shampoo and
    SOAP via Kullback-Leibler Minimization <https://arxiv.org/abs/2509.03378>`_, 2026
  """
  options = SoapOptions(
    b1=b1,
    b2=b2,
    eps=eps,
    shampoo_beta=shampoo_beta,
    inverse_update_period=inverse_update_period,
    stagger=stagger,
    max_precond_dim=max_precond_dim,
    merge_dims=merge_dims,
    precondition_1d=precondition_1d,
    one_sided=one_sided,
    factorized=factorized,
    normalize_grads=normalize_grads,
    correct_bias=correct_bias,
    eps_after_correction=eps_after_correction,
    skip_first=skip_first,
    start=start,
    kl=kl,
    fisher=fisher,
    contrast=contrast,
    dimension_numbers=dimension_numbers,
    layers=layers,
    mu_dtype=mu_dtype,
    statistics_dtype=statistics_dtype,
    sharding=sharding,
  )
  checks.check("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
  checks.check("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
  after = by_tensor.decay_after_step(learning_rate, weight_decay, mask, skip_first)
  rate = optax.scale_by_learning_rate(learning_rate)
  return whole_steps(common.keep_dtypes(optax.chain(_soap(options), rate, after)))
