"""Shampoo: gradients preconditioned along every axis (Gupta et al., 2018), as Meta has it."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.modes import rotate, second_moment, unrotate
from fop_optax.curvature.precondition import Side
from fop_optax.curvature.roots import eigh_root, newton_root
from fop_optax.curvature.stacks import Stack, by_block, by_side, per_stack, stored
from fop_optax.curvature.steps import Steps, whole_period
from fop_optax.dimensions import Dimensions
from fop_optax.factorizations import eigh
from fop_optax.layers import Layers
from fop_optax.optimizers import by_tensor, checks, common
from fop_optax.optimizers.by_tensor import OfContrast
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.optimizers.grafting import correction, folded, grafted
from fop_optax.optimizers.owned_tensors import OwnedStack, numbers_of, of_blocks
from fop_optax.optimizers.shampoo_options import Exponents, ShampooOptions
from fop_optax.optimizers.whole_steps import whole_steps
from fop_optax.projection import fop_direction
from fop_optax.sharding import Sharding, Share


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


class ScaleByShampooState(NamedTuple):
  """State of `scale_by_shampoo`."""

  steps: Steps
  stacks: tuple[ShampooStack | OwnedStack, ...]


def _start(options: ShampooOptions, stack: Stack, dtype: Any) -> ShampooStack:
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


def _step(
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

  See :func:`fop_optax.shampoo` for more details.
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
  return whole_steps(_shampoo(options))


def _shampoo(options: ShampooOptions) -> optax.GradientTransformationExtraArgs:
  return by_tensor.by_tensor(options, _start, _step, ScaleByShampooState)


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
  checks.check("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
  checks.check("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
  decay = by_tensor.decay(weight_decay, mask)
  stages = [_shampoo(options), decay] if decoupled_decay else [decay, _shampoo(options)]
  rate = optax.scale_by_learning_rate(learning_rate)
  return whole_steps(common.keep_dtypes(optax.chain(*stages, rate)))
