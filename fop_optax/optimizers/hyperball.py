"""Hyperball: steps of fixed length relative to weights of fixed norm (Wen et al., 2026)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.polar import inner_axes, unit
from fop_optax.curvature.stacks import Stack, plan_stacks, stack_matrices, unstack
from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers, is_masked
from fop_optax.optimizers import by_tensor, checks, common
from fop_optax.optimizers.common import ScalarOrSchedule
from fop_optax.optimizers.whole_steps import placed_like
from fop_optax.tensors import Tensor, Tensors, tensors


class HyperballState(NamedTuple):
  """State of `hyperball`."""

  count: jax.Array  # int32, shape=(): steps
  norms: tuple[jax.Array, ...]  # one a stack: [blocks], of the weights when the state was made


def hyperball(
  learning_rate: ScalarOrSchedule,
  *,
  dimension_numbers: Dimensions = None,
  layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Steps of `learning_rate` times the weight's norm, on the sphere of the norm it started with.

  The last step of a chain, in place of `optax.scale_by_learning_rate`. Of a matrix `W` with
  direction `d`, and :math:`R = \|W_0\|` (Frobenius norms),

  .. math::
    W \leftarrow R \, \frac{W - \eta R \, d / \|d\|}{\|W - \eta R \, d / \|d\|\|}

  It takes the place of weight decay, for weights whose size the network does not feel (before a
  normalisation), and one rate, an angle, serves every direction: after `optax.scale_by_adam` it is
  AdamH, after Muon's MuonH, after :func:`fop_optax.scale_by_soap` SOAP-H. Everything else takes the
  plain step :math:`-\eta d`: vectors, and matrices that are zero at the start, as those have no
  sphere. Embeddings and heads are best given an optimizer of their own, as the authors do, with
  `optax.partition`.

  A direction of zero, as that of a skipped step, moves nothing.

  Args:
    learning_rate: eta, a number, an array or a schedule.
    dimension_numbers: which leaves are matrices, as in :func:`fop_optax.orthogonalize`; each of a
      batch of them has a norm of its own. Where neither this nor `layers` is given, every leaf of
      two or more axes has one.
    layers: `captured.layers`: every matrix that :func:`fop_optax.capture` found has one, without
      its bias; but for those with a diagonal side, lookup tables among them.

  Returns:
    A transformation; its `update` needs params, and no rate comes after it.

  Raises:
    ValueError: for a rate out of range; in `init` and `update` for dimension numbers that do not
      fit, and trees that are not of these layers; in `update` without params, and for directions
      that are not real floating point and states of another model.
    TypeError: if `layers` are of another type.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp, optax
    >>> params = {"w": jnp.array([[3.0, 4.0]])}
    >>> adam_h = optax.chain(optax.scale_by_adam(0.9, 0.95), fop_optax.hyperball(0.1))
    >>> state = adam_h.init(params)
    >>> for _ in range(3):
    ...   grads = {"w": jnp.array([[1.0, -1.0]])}
    ...   updates, state = adam_h.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params["w"].round(2), jnp.linalg.norm(params["w"]).round(3))
    [[1.76 4.68]] 5.0

  References:
    Wen et al., `Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization
    <https://arxiv.org/abs/2606.16899>`_, 2026
  """
  checks.check_given("learning_rate", learning_rate)
  checks.check("learning_rate", learning_rate, lambda x: x >= 0, "at least 0")
  by_tensor.check_views(dimension_numbers, layers)

  find = lambda tree: _matrices(tree, dimension_numbers, layers)

  def init(params: optax.Params) -> HyperballState:
    leaves = jax.tree.leaves(params, is_leaf=is_masked)
    norms: Any = jnp.zeros(())  # optax.tree.map_params asks for an outline, of no leaves
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
      norms = jax.eval_shape(lambda params: _norms(find(params), params), params)
    elif leaves:
      norms = _norms(find(params), params)
    return placed_like(params, HyperballState(jnp.zeros((), jnp.int32), norms))

  @jax.jit  # so that an update outside of a user's jit is not one small program for each array
  def apply(updates, state, params):
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_masked)
    found, rate = find(updates), common.value_at(learning_rate, state.count)
    stacks = plan_stacks(found)
    _check_state(stacks, state)
    weights = _stacked(stacks, found, jax.tree.leaves(params, is_leaf=is_masked))
    directions = _stacked(stacks, found, leaves)
    steps = [
      _on_sphere(W, d, R, rate.astype(W.dtype))
      for W, d, R in zip(weights, directions, state.norms, strict=True)
    ]
    plain = [d if is_masked(d) else (-rate * d).astype(d.dtype) for d in leaves]
    updates = jax.tree.unflatten(treedef, unstack(stacks, found, steps, plain))
    return updates, state._replace(count=optax.safe_increment(state.count))

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if not jax.tree.leaves(updates):
      return updates, state
    if params is None:
      raise ValueError(
        "No `params`: steps are relative to the norms of weights. Write"
        " `tx.update(grads, opt_state, params)`."
      )
    checks.check_kind(state, HyperballState)
    checks.check_gradient(updates, params)
    by_tensor.check_floating(updates)
    return apply(updates, state, params)

  return optax.GradientTransformationExtraArgs(init, update)


def _on_sphere(W: jax.Array, d: jax.Array, R: jax.Array, rate: jax.Array) -> jax.Array:
  """The step of each block: `R (W - rate R d / |d|) / |W - rate R d / |d|| - W`."""
  R = R.astype(W.dtype).reshape(-1, *[1] * (W.ndim - 1))
  step = R * unit(W - rate * R * unit(d)) - W
  step = jnp.where(R > 0, step, -rate * d)
  return jnp.where(jnp.any(d != 0, axis=inner_axes(d), keepdims=True), step, 0)


def _matrices(tree: Any, dimension_numbers: Dimensions, layers: Layers | None) -> Tensors:
  """The tensors of a tree that keep their norms."""
  given = layers is not None or dimension_numbers is not None

  def keep(tensor: Tensor) -> list[Tensor]:
    matrix = not tensor.natural or (not given and len(tensor.dims) > 1)
    return [tensor] if matrix and not any(tensor.diagonal) else []

  return tensors(tree, dimension_numbers, layers).map(keep)


def _norms(found: Tensors, params: optax.Params) -> tuple[jax.Array, ...]:
  """Frobenius norms of the matrices, by stack."""
  leaves = jax.tree.leaves(params, is_leaf=is_masked)
  norm = lambda W: jnp.sqrt(jnp.sum(W**2, axis=inner_axes(W)))
  return tuple(map(norm, _stacked(plan_stacks(found), found, leaves)))


def _stacked(stacks: Sequence[Stack], found: Tensors, leaves: Sequence[Any]) -> list[jax.Array]:
  """The stacks of a tree's leaves, in float32 or better."""
  dtypes = [by_tensor.arithmetic(stack, found, leaves) for stack in stacks]
  own = zip(stacks, dtypes, strict=True)
  return [stack_matrices(stack, found, leaves, dtype) for stack, dtype in own]


def _check_state(stacks: Sequence[Stack], state: HyperballState) -> None:
  had, need = [x.shape for x in state.norms], [(stack.blocks,) for stack in stacks]
  if had != need:
    raise ValueError(
      f"The optimizer's state is of another model or another mask: it has norms of {had} matrices,"
      f" but this direction has {need}. Make a state with `tx.init(params)`."
    )
