"""Shampoo: gradients preconditioned along every axis (Gupta et al., 2018), as Meta has it."""

from typing import Any, NamedTuple

import optax

from fop_optax.curvature.steps import Steps
from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers
from fop_optax.optimizers import by_tensor, checks, completion
from fop_optax.optimizers import shampoo_step as step
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.optimizers.grafting import grafted
from fop_optax.optimizers.owned_tensors import OwnedStack
from fop_optax.optimizers.shampoo_options import Exponents, ShampooOptions
from fop_optax.optimizers.whole_steps import whole_steps
from fop_optax.sharding import Sharding


class ScaleByShampooState(NamedTuple):
  """State of `scale_by_shampoo`."""

  steps: Steps
  stacks: tuple[step.ShampooStack | OwnedStack, ...]


def scale_by_shampoo(
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-12,
  *,
  b3: Scalar | None = None,
  exponents: Exponents = None,
  grafting: str | None = "adam",
  graft_b2: Scalar | None = None,
  graft_eps: Scalar | None = None,
  inverse_update_period: ScalarOrSchedule = 10,
  start_step: Scalar | None = None,
  stagger: bool = False,
  correct_bias: bool = True,
  root: str = "eigh",
  eigenvalue_correction: bool = False,
  kl: bool = False,
  contrast: bool = False,
  block_size: int | None = None,
  merge_to: int | None = None,
  dimension_numbers: Dimensions = None,
  layers: Layers | None = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Turns gradients into Shampoo's direction; no rate, no sign and no decay.

  See :func:`fop_optax.shampoo` for more details: all arguments, and errors, are as there.

  Example:
    The first direction of a matrix `G = U S V'` is `U V'`:

    >>> import fop_optax, jax.numpy as jnp
    >>> params, grads = jnp.zeros((2, 2)), jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> tx = fop_optax.scale_by_shampoo()
    >>> direction, _ = tx.update(grads, tx.init(params), params)
    >>> print(direction.round(3))
    [[1. 0.]
     [0. 1.]]
  """
  options = ShampooOptions(
    b1=b1,
    b2=b2,
    b3=b3,
    eps=eps,
    exponents=exponents,
    graft=grafted(grafting, graft_b2, graft_eps),
    inverse_update_period=inverse_update_period,
    start_step=start_step,
    stagger=stagger,
    correct_bias=correct_bias,
    root=root,
    eigenvalue_correction=eigenvalue_correction,
    kl=kl,
    contrast=contrast,
    block_size=block_size,
    merge_to=merge_to,
    dimension_numbers=dimension_numbers,
    layers=layers,
    sharding=sharding,
  )
  return whole_steps(_shampoo(options), ScaleByShampooState)


def _shampoo(options: ShampooOptions) -> optax.GradientTransformationExtraArgs:
  return by_tensor.by_tensor(options, step.start, step.step, ScaleByShampooState)


def shampoo(
  learning_rate: ScalarOrSchedule,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-12,
  *,
  weight_decay: Scalar = 0.0,
  mask: Any = None,
  decoupled_decay: bool = True,
  b3: Scalar | None = None,
  exponents: Exponents = None,
  grafting: str | None = "adam",
  graft_b2: Scalar | None = None,
  graft_eps: Scalar | None = None,
  inverse_update_period: ScalarOrSchedule = 10,
  start_step: Scalar | None = None,
  stagger: bool = False,
  correct_bias: bool = True,
  root: str = "eigh",
  eigenvalue_correction: bool = False,
  kl: bool = False,
  contrast: bool = False,
  block_size: int | None = None,
  merge_to: int | None = None,
  dimension_numbers: Dimensions = None,
  layers: Layers | None = None,
  sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Shampoo: gradients preconditioned along every axis, as Meta distribute it.

  Of a tensor with k axes it keeps the second moments :math:`F_i` of the unfoldings along each, and
  multiplies each axis of the momentum by an inverse root of its own; of a weight with gradient `G`

  .. math::
    \Delta = (L + \epsilon I)^{-1/4} \, M \, (R + \epsilon I)^{-1/4}, \quad
    L = \mathrm{E}[G G^\top], \; R = \mathrm{E}[G^\top G]

  scaled to the length of the step of another optimizer (grafting). The order of operations is that
  of Distributed Shampoo: the gradient enters the factors, then roots are remade if they are due,
  then the momentum is preconditioned.

  Its defaults are not all ours: there `b2` is 1 (factors are sums, as in the paper), nothing is
  grafted, roots are made at every step, and small axes are merged, so that a parameter of at most
  1,024 entries is one vector with one matrix. Here axes are kept (`merge_to` merges), averages
  decay, and Adam is grafted, for which a rate that suits Adam suits.

  All blocks of one shape, over all parameters, go through one batched operation. A step whose
  gradient, its square, or update are not finite is skipped for all parameters, and counted; of a
  block whose root is not finite the last good one stays. See :func:`fop_optax.diagnostics`.

  Args:
    learning_rate: a number, an array or a schedule.
    b1: decay of the momentum.
    b2: decay of the factors; 1: they are sums.
    eps: added to the factors; at least the rounding of each, machine epsilon times its trace.
    weight_decay: decay, times the learning rate.
    mask: which leaves decay, a tree of bools or a callable of params, as in `optax.adamw`.
    decoupled_decay: whether decay is added to the direction. If not, to the gradient.
    b3: weight of the momentum in the direction, as `b1` for Nesterov's; None: b1.
    exponents: the power of each axis, a positive number: one for all, or a mapping from the number
      of axes to one, or to a mapping from an axis to one, as `{2: {0: 0.5, 1: 0.0}}`. 0: an axis is
      not preconditioned. None: 1/2k, with k the number of axes that are.
    grafting: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"` (the momentum), or None: the direction
      keeps its length, and before `start_step` is the momentum.
    graft_b2: decay of the grafted optimizer's second moment; None: .999, .99, 1 in that order.
    graft_eps: its eps; None: 1e-10.
    inverse_update_period: roots are remade every that many steps (the authors'
      `precondition_frequency`), a number or a schedule.
    start_step: the step, from one, at which roots are first made; None: the period.
    stagger: whether blocks take turns to remake theirs after that.
    correct_bias: whether averages are corrected for their start from zero.
    root: `"eigh"`, or `"newton"`: coupled Newton iterations, for exponents 1/r.
    eigenvalue_correction: whether roots are eigenvectors, and the second moment of the gradient in
      them divides it, as in SOAP: but the present gradient enters both.
    kl: KL-Shampoo (Lin et al., 2025): each factor is of the gradient preconditioned along the other
      axes. The paper's with `exponents={2: 0.5}`.
    contrast: FOP in Shampoo's metric, which is ours: `update` takes the `stats` of
      `fop_optax.capture(..., groups=2)`, and the momentum of each block takes, in place of its
      gradient, what :func:`fop_optax.fop_direction` makes of it and the contrasts. The inverses of
      the roots are kept beside them.
    block_size: axes longer than this are cut, and each block is preconditioned by itself; None:
      1,024.
    merge_to: neighbouring axes are merged while their product is at most `block_size` and at least
      that many are left; None: never.
    dimension_numbers: how leaves with two or more axes are matrices, as in :func:`fop_optax.soap`.
    layers: `captured.layers`: every weight is the matrix that :func:`fop_optax.capture` found, as
      in :func:`fop_optax.soap`.
    sharding: :class:`fop_optax.Sharding`: each block has one owner among the devices of its mesh,
      which keeps its state, remakes its roots and finds its direction; directions are gathered once
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
    >>> tx = fop_optax.shampoo(optax.cosine_decay_schedule(0.5, 200))
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
    Gupta, Koren and Singer, `Shampoo: Preconditioned Stochastic Tensor Optimization
    <https://arxiv.org/abs/1802.09568>`_, 2018; Shi et al., `A Distributed Data-Parallel PyTorch
    Implementation of the Distributed Shampoo Optimizer <https://arxiv.org/abs/2309.06497>`_, 2023;
    Lin et al., `Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization
    <https://arxiv.org/abs/2509.03378>`_, 2026
  """
  options = ShampooOptions(
    b1=b1,
    b2=b2,
    b3=b3,
    eps=eps,
    exponents=exponents,
    graft=grafted(grafting, graft_b2, graft_eps),
    inverse_update_period=inverse_update_period,
    start_step=start_step,
    stagger=stagger,
    correct_bias=correct_bias,
    root=root,
    eigenvalue_correction=eigenvalue_correction,
    kl=kl,
    contrast=contrast,
    block_size=block_size,
    merge_to=merge_to,
    dimension_numbers=dimension_numbers,
    layers=layers,
    sharding=sharding,
  )
  checks.check_given("learning_rate", learning_rate)
  checks.check("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
  checks.check("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
  decay = by_tensor.decay(weight_decay, mask)
  stages = [_shampoo(options), decay] if decoupled_decay else [decay, _shampoo(options)]
  rate = optax.scale_by_learning_rate(learning_rate)
  return whole_steps(completion.keep_dtypes(optax.chain(*stages, rate)), ScaleByShampooState)
