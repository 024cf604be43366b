"""What methods that need gradients alone share: from gradients to stacks of tensors and back."""

from collections.abc import Callable, Sequence
import functools
import numbers
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from fop_optax.curvature.layouts import Layout, laid_like, plan_layout
from fop_optax.curvature.precondition import Side
from fop_optax.curvature.stacks import Stack, dtype_of, plan_stacks, stack_matrices, unstack
from fop_optax.curvature.steps import Finite, no_steps
from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers, Stats, is_masked
from fop_optax.optimizers import checks, common
from fop_optax.optimizers.common import Scalar, ScalarOrSchedule
from fop_optax.optimizers.owned_tensors import OwnedStack, rows_of, start_owned, step_owned
from fop_optax.optimizers.whole_steps import all_finite
from fop_optax.sharding import Sharding
from fop_optax.tensors import Tensors


class TensorState(Protocol):
  """State of a stack of tensors."""

  @property
  def dims(self) -> tuple[int, ...]:
    """`[blocks, *dims]`."""
    ...

  @property
  def dtype(self) -> Any:
    """Of the arithmetic."""
    ...


class TensorOptions(Protocol):
  """Hyperparameters of a method, a dataclass."""

  @property
  def contrast(self) -> bool:
    """Whether it needs the contrasts of the groups' gradients, in `stats`."""
    ...

  @property
  def sharding(self) -> Sharding | None:
    """Over which devices blocks have owners."""
    ...

  def tensors(self, tree: Any) -> Tensors:
    """The tensors of a tree."""
    ...


class OfContrast(NamedTuple):
  """What FOP found of each block at the last step: see `fop_optax.projection`."""

  eta: jax.Array  # shape=(blocks,)
  rho2: jax.Array  # shape=(blocks,)
  residual: jax.Array  # shape=(blocks,)


def of_no_contrast(blocks: int, dtype: Any) -> OfContrast:
  """Before the first step."""
  return OfContrast(*(jnp.zeros(blocks, dtype) for _ in OfContrast._fields))


# options, count, state of each stack, its gradients [blocks, *dims] and, where they are asked for,
# `contrasts` [blocks, k, *dims], `sides` [blocks, d, d] (Kronecker factors along the modes with a
# basis) and `refresh` (whether these are of this batch; else zeros); of one device its `share`
# -> directions of each stack, its state after the step
Step = Callable[..., tuple[list[jax.Array], tuple[Any, ...]]]


def by_tensor(
  options: TensorOptions,
  start: Callable[[Any, Stack, Any], TensorState],
  step: Step,
  state_of: Callable[..., Any],
  fisher: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
  """A method that makes of each tensor of the gradient its direction.

  Args:
    options: hyperparameters, for `start` and `step`.
    start: state of a stack before the first step, for arithmetic in a dtype.
    step: one step of all stacks.
    state_of: counters of steps and state of the stacks -> state.
    fisher: the layers of which it needs the Kronecker factors in `stats`, if it does.
  """
  begin = functools.partial(start, options)

  def init(params: optax.Params) -> Any:
    if not jax.tree.leaves(params, is_leaf=is_masked):
      # optax.tree.map_params asks for the outline of a state: one leaf for what depends on params.
      return state_of(no_steps(), jnp.zeros(()))
    found, leaves = options.tensors(params), jax.tree.leaves(params, is_leaf=is_masked)
    stacks = plan_stacks(found)
    dtypes = [arithmetic(stack, found, leaves) for stack in stacks]
    if options.sharding is None:
      return state_of(no_steps(), tuple(map(begin, stacks, dtypes)))
    return state_of(no_steps(), start_owned(begin, stacks, dtypes, options.sharding))

  @jax.jit  # so that an update outside of a user's jit does not compile its branches every time
  def apply(updates, state, trees, stats):
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_masked)
    found, sharding = options.tensors(updates), options.sharding
    stacks = plan_stacks(found)
    _check_state(stacks, state.stacks, sharding)
    others = [jax.tree.leaves(tree, is_leaf=is_masked) for tree in trees]
    dtypes, count, layout = [s.dtype for s in state.stacks], state.steps.count, None
    if sharding is not None and stacks:
      if sharding.params is not None:
        leaves, *others = (laid_like(sharding, found, tree) for tree in [leaves, *others])
      layout = plan_layout(sharding, found, stacks, leaves)
    gradients, more, finite = _gathered(stacks, found, dtypes, layout, leaves, others)
    if stats is not None:
      more["refresh"] = stats.refresh
      more["sides"] = [_sides(*each, found, stats) for each in zip(stacks, dtypes, strict=True)]
    if sharding is None or not stacks:
      directions, after = step(options, count, state.stacks, gradients, **more)
    else:
      owned = options, stacks, count, state.stacks
      directions, after = step_owned(step, *owned, gradients, more, layout)
    steps = state.steps.counted(Finite(jnp.asarray(True), finite))
    if layout is None:
      leaves = unstack(stacks, found, directions, leaves)
    else:
      leaves = layout.join(directions, leaves)
    return jax.tree.unflatten(treedef, leaves), state_of(steps, after)

  def update(updates, state, params=None, *, stats: Any = None, **extra_args):
    del params, extra_args
    if not jax.tree.leaves(updates):
      return updates, state
    check_floating(updates)
    trees = _contrasts(updates, stats) if options.contrast else ()
    return apply(updates, state, trees, None if fisher is None else _statistics(fisher, stats))

  return optax.GradientTransformationExtraArgs(init, update)


def _gathered(
  stacks: Sequence[Stack],
  found: Tensors,
  dtypes: Sequence[Any],
  layout: Layout | None,
  leaves: Sequence[Any],
  others: Sequence[Sequence[Any]],
) -> tuple[list[Any], dict[str, Any], jax.Array]:
  """The gradient stack by stack, contrasts if there are some, and whether all of it is finite.

  With a layout as pieces, contrasts beside the gradient. Of a tensor whose square overflows the
  second moments would: it counts as not finite.
  """
  if layout is not None:
    beside = lambda *x: jnp.stack(x, axis=1)
    pieces = jax.tree.map(beside, *map(layout.split, [leaves, *others]))
    return pieces, {}, all_finite(layout.squares(pieces))
  gather = lambda leaves: [
    stack_matrices(stack, found, leaves, dtype) for stack, dtype in zip(stacks, dtypes, strict=True)
  ]
  gradients = gather(leaves)
  contrasts = [jnp.stack(parts, axis=1) for parts in zip(*map(gather, others), strict=True)]
  finite = all_finite([jnp.sum(g**2) for g in [*gradients, *contrasts]])
  return gradients, {"contrasts": contrasts} if others else {}, finite


def _sides(stack: Stack, dtype: Any, found: Tensors, stats: Stats) -> tuple[Side, ...]:
  """The factors of the layers of a stack, side by side."""

  def along(mode):
    # without the coordinate of a bias that is masked
    d = stack.dims[mode]
    if not stack.layers:
      return jnp.zeros((stack.blocks, d, d), dtype)
    factors = [stats.factors[found[i].layer][mode][:, :d, :d] for i in stack.layers]
    return jnp.concatenate(factors).astype(dtype)

  return tuple(None if diagonal else along(mode) for mode, diagonal in enumerate(stack.diagonal))


def _statistics(layers: Layers, stats: Any) -> Stats:
  if stats is None:
    raise ValueError(
      "`fisher=True` needs statistics: `loss, grads, stats = captured.value_and_grad(params, ...)`"
      " and `tx.update(grads, opt_state, params, stats=stats)`."
    )
  checks.check_factors(layers, stats)
  return stats._replace(refresh=jnp.asarray(stats.refresh, bool))


def check_views(dimension_numbers: Dimensions, layers: Any) -> None:
  """Checks that parameters are made matrices in one way."""
  if layers is None:
    return
  checks.check_layers(layers)
  if dimension_numbers is not None:
    raise ValueError(
      "`layers` and `dimension_numbers` both say how parameters are matrices: give one of them."
    )


def decay(weight_decay: Scalar, mask: Any) -> optax.GradientTransformation:
  """`optax.add_decayed_weights`; without need of params, and in the same place, if it is 0."""
  if isinstance(weight_decay, numbers.Real) and weight_decay == 0:
    return optax.identity()
  return optax.add_decayed_weights(weight_decay, mask)


def decay_after_step(
  learning_rate: ScalarOrSchedule, weight_decay: Scalar, mask: Any, skip_first: bool
) -> optax.GradientTransformation:
  """Decoupled decay of the parameters as the step leaves them, by the rate at that step.

  `p <- (1 - rate weight_decay) (p + u)`, where AdamW decays `p` before: a difference of second
  order. A first step that is skipped has none.
  """

  def init(params):
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    after = optax.ScaleByScheduleState(count=optax.safe_increment(state.count))
    if isinstance(weight_decay, numbers.Real) and weight_decay == 0:
      return updates, after
    if params is None:
      raise ValueError(
        "Weight decay needs `params`: write `tx.update(grads, opt_state, params)`, or use"
        " `weight_decay=0.0`."
      )
    share = common.value_at(learning_rate, state.count) * jnp.asarray(weight_decay)
    if skip_first:
      share = jnp.where(state.count == 0, 0, share)
    return jax.tree.map(lambda u, p: u - share * (p + u), updates, params), after

  transformation = optax.GradientTransformation(init, update)
  return transformation if mask is None else optax.masked(transformation, mask)


def _contrasts(updates: Any, stats: Any) -> tuple[Any, ...]:
  """The contrasts in `stats`, trees like the gradient: masked where optax has masked that."""
  if not isinstance(stats, Stats) or not stats.contrasts:
    raise ValueError(
      "`contrast=True` needs the gradients of at least two groups of examples. Write `captured ="
      " fop_optax.capture(loss, params, ..., groups=2)`, `loss, grads, stats ="
      " captured.value_and_grad(params, ..., refresh=False)` and `tx.update(grads, opt_state,"
      " params, stats=stats)`."
    )
  if not any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
    return stats.contrasts
  own = lambda update, contrast: update if is_masked(update) else contrast
  return tuple(jax.tree.map(own, updates, c, is_leaf=is_masked) for c in stats.contrasts)


def arithmetic(stack: Stack, found: Tensors, leaves: Sequence[Any]) -> Any:
  """The widest dtype of a stack's parameters, and float32 at least."""
  members = [leaf for i in stack.layers for leaf in found[i].leaves]
  return jnp.result_type(jnp.float32, *(dtype_of(leaves[leaf]) for leaf in members))


def _check_state(
  stacks: Sequence[Stack], states: Sequence[TensorState], sharding: Sharding | None
) -> None:
  had = [tuple(s.dims) for s in states]
  need = [(stack.blocks, *stack.dims) for stack in rows_of(stacks, sharding)]
  owned = any(isinstance(s, OwnedStack) for s in states)
  if had != need or owned != (sharding is not None and bool(stacks)):
    raise ValueError(
      f"The optimizer's state is of another model or another mask: its tensors have shapes {had},"
      f" but this gradient has {need}. Make a state with `tx.init(params)`."
      f"{checks.of_owners(owned, sharding)}"
    )


def check_floating(updates: Any) -> None:
  for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
    if not jnp.issubdtype(dtype_of(leaf), jnp.floating):
      raise ValueError(
        f"The gradient is {dtype_of(leaf)} at {jax.tree_util.keystr(path)}, where it should be real"
        " floating point. Keep that parameter out with `optax.masked` or `optax.partition`; split a"
        " complex one with `optax.contrib.split_real_and_imaginary`."
      )
