"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., 2025)."""

from typing import Any, NamedTuple

import optax

from fop_optax.curvature.steps import Steps
from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers
from fop_optax.optimizers import by_tensor, checks, completion
from fop_optax.optimizers import soap_step as step
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.optimizers.owned_tensors import OwnedStack
from fop_optax.optimizers.soap_options import SoapOptions
from fop_optax.optimizers.whole_steps import whole_steps
from fop_optax.sharding import Sharding


class ScaleBySoapState(NamedTuple):
  """State of `scale_by_soap`."""

  steps: Steps
  stacks: tuple[step.SoapStack | OwnedStack, ...]


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

  See :func:`fop_optax.soap` for more details: all arguments, and errors, are as there.

  Example:
    The first gradient makes the bases; the step after it is Adam's in them.

    >>> import fop_optax, jax.numpy as jnp
    >>> params, grads = jnp.zeros((2, 2)), jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> tx = fop_optax.scale_by_soap()
    >>> _, state = tx.update(grads, tx.init(params), params)
    >>> direction, _ = tx.update(grads, state, params)
    >>> print(direction.round(3))
    [[1. 0.]
     [0. 1.]]
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
  return whole_steps(_soap(options), ScaleBySoapState)


def _soap(options: SoapOptions) -> optax.GradientTransformationExtraArgs:
  fisher = options.layers if options.fisher else None
  return by_tensor.by_tensor(options, step.start, step.step, ScaleBySoapState, fisher)


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
      a step, or where parameters are sharded go piece by piece, as in :func:`fop_optax.kfac`.
      Updates are equal to rounding. None: every device has all of it.

  Returns:
    A transformation; its `update` needs params where there is weight decay.

  Raises:
    ValueError: for hyperparameters out of range; in `init` and `update` for dimension numbers that
      do not fit, gradients that are not real floating point, and states of another model.
    TypeError: if `layers`, `stats` or `sharding` are of another type.

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
  checks.check_given("learning_rate", learning_rate)
  checks.check("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
  checks.check("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
  after = by_tensor.decay_after_step(learning_rate, weight_decay, mask, skip_first)
  rate = optax.scale_by_learning_rate(learning_rate)
  return whole_steps(
    completion.keep_dtypes(optax.chain(_soap(options), rate, after)), ScaleBySoapState
  )
