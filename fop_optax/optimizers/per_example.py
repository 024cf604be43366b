"""What the per-example optimizers share: from gradients `[B, *param]` to a direction `[*param]`."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fop_optax import group_gradients
from fop_optax.curvature import gram, per_example_factors
from fop_optax.curvature.gram import Gram
from fop_optax.curvature.stacks import dtype_of
from fop_optax.curvature.state import CurvatureState, empty_curvature
from fop_optax.curvature.steps import Finite
from fop_optax.dimensions import Dimensions, Limits, blocks
from fop_optax.layers import Factors, Layers, Stats, is_masked
from fop_optax.optimizers import checks
from fop_optax.optimizers.bounded_steps import constrain
from fop_optax.optimizers.common import Options

CURVATURES = ("kronecker", "exact")
STATIC = ("groups", "max_dim", "max_vector")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Hyperparameters that only per-example optimizers have; all of them static."""

  curvature: str
  dimension_numbers: Dimensions
  max_dim: int
  max_vector: int
  groups: int = 1

  def __post_init__(self):
    checks.one_of("curvature", self.curvature, CURVATURES)
    for name in STATIC:
      checks.check_static(name, getattr(self, name), 1 if name == "groups" else 0, STATIC)

  def blocks(self, tree: Any) -> Layers:
    """The leaves of a tree like params, each a block of curvature."""
    limits = Limits(self.max_dim, self.max_vector)
    return blocks(tree, self.dimension_numbers, limits, self.groups)

  def check(self, updates: Any, params: Any) -> None:
    """Checks that `updates` are per-example gradients at `params`."""
    check_batch(updates, params, self.groups)


def check_batch(updates: Any, params: Any, groups: int) -> None:
  """Checks that `updates` are per-example gradients at `params`, of examples that make groups."""
  if params is None:
    raise ValueError(
      "No `params`: they tell the examples' axis from those of parameters. Write"
      " `tx.update(per_example_grads, opt_state, params)`."
    )
  sizes = {}
  for name, leaf, param in checks.leaves_at(updates, params, "jax.vmap(jax.grad(loss), (None, 0))"):
    if not is_masked(leaf):
      shape = tuple(jnp.shape(leaf))
      _check_shape(name, shape, None if is_masked(param) else tuple(jnp.shape(param)))
      if not jnp.issubdtype(dtype_of(leaf), jnp.floating):
        raise ValueError(
          f"The gradient is {dtype_of(leaf)} at {name}, where it should be floating point. Keep a"
          " parameter that is not trained out with `optax.masked`."
        )
      sizes[name] = shape[0]
  if len(set(sizes.values())) > 1:
    listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    raise ValueError(
      f"The leading axes of the per-example gradients differ ({listed}), so they cannot all be the"
      " examples. Pass the gradients of one batch, every leaf `[B, *param]`."
    )
  for size in set(sizes.values()):
    if size == 0 or size % groups:
      raise ValueError(
        f"Gradients of {size} examples cannot be divided into groups={groups}. Drop the last"
        f" examples, to a multiple of {groups}, or use another number of groups."
      )


def _check_shape(name: str, shape: tuple[int, ...], param: tuple[int, ...] | None) -> None:
  if param is None or shape[1:] == param and shape:
    return
  what = f"has shape {shape} at {name or 'its root'}, where params have {param}"
  if shape == param:
    raise ValueError(
      f"The gradient {what}: this is a plain gradient, without an axis of examples. Pass"
      " `jax.vmap(jax.grad(loss), (None, 0))(params, batch)`, with `loss` that of one example."
    )
  raise ValueError(
    f"The gradient {what}. A per-example gradient there is [B, {', '.join(map(str, param))}]: pass"
    " `jax.vmap(jax.grad(loss), (None, 0))(params, batch)`."
  )


def means(leaf: jax.Array, groups: int) -> list[jax.Array]:
  """The mean gradient of each group; example `i` belongs to group `i mod groups`."""
  wide = leaf.reshape(len(leaf) // groups, groups, *leaf.shape[1:])
  wide = jnp.mean(wide, axis=0, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
  return list(wide.astype(leaf.dtype))


def kronecker(
  settings: Settings,
  options: Options,
  inner: Callable[[Layers], optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
  """K-FAC or FOP of given layers, `inner`, fed with the products' statistics."""

  def init(params: optax.Params) -> Any:
    state: Any = inner(settings.blocks(params)).init(params)
    if jax.tree.leaves(params, is_leaf=is_masked):
      return state
    # optax.tree.map_params asks for the outline of a state: one leaf for what depends on params.
    outline = jnp.zeros(())
    if "projection" in state._fields:
      state = state._replace(projection=outline)
    return state._replace(curvature=state.curvature._replace(blocks=outline, stacks=outline))

  @jax.jit  # so that an update outside of a user's jit does not compile its branches every time
  def apply(updates, state, params, looseness):
    layers = settings.blocks(_one_example(updates))
    flat, treedef = jax.tree.flatten(updates)
    groups = [means(leaf, settings.groups) for leaf in flat]
    mean = jax.tree.unflatten(treedef, map(group_gradients.mean, groups))
    by_leaf = [group_gradients.contrasts(group) for group in groups]
    contrasts = tuple(jax.tree.unflatten(treedef, c) for c in zip(*by_leaf, strict=True))
    count = state.curvature.steps.count
    refresh = count % options.curvature.periods(count)[0] == 0
    factors = _factors(layers, jax.tree.leaves(updates, is_leaf=is_masked), refresh)
    stats = Stats(refresh, factors, contrasts)
    return inner(layers).update(mean, state, params, stats=stats, looseness=looseness)

  return _transformation(init, apply)


def _factors(layers: Layers, leaves: Sequence[Any], refresh: jax.Array) -> tuple[Factors, ...]:
  """Statistics of each block if `refresh`, else zeros."""

  def make():
    V = [jax.vmap(lambda leaf, own=own: own.gather({own.weight: leaf})) for own in layers]
    return tuple(
      per_example_factors.statistics(matrix(leaves[own.weight]), own.diagonal)
      for matrix, own in zip(V, layers, strict=True)
    )

  none = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
  return jax.lax.cond(refresh, make, none)


class Share(NamedTuple):
  """What a method makes of one batch, as weights of the examples."""

  weights: jax.Array  # [B]: the direction is X' weights
  norm2: jax.Array  # shape=(): direction' M direction
  projection: Any = None  # what FOP found


class Weights(NamedTuple):
  """Mean gradient and contrasts as weights of the examples."""

  mean: jax.Array  # [B]
  contrasts: jax.Array  # [groups - 1, B]


def exact(
  settings: Settings,
  options: Options,
  start: Callable[[CurvatureState, Any], Any],
  share: Callable[[Gram, Weights, jax.Array, jax.Array, float], Share],
) -> optax.GradientTransformationExtraArgs:
  """A method in the metric of the damped empirical Fisher of all leaves together.

  `start` makes its state, and `share` its direction out of the Gram matrix, the weights of mean and
  contrasts, damping, count, and the coarsest machine epsilon of the gradients.
  """

  def init(params: optax.Params) -> Any:
    one = jnp.ones((), jnp.int32)
    dtypes = [dtype_of(leaf) for leaf in jax.tree.leaves(params)]
    return start(empty_curvature((one, one)), jnp.result_type(jnp.float32, *dtypes))

  @jax.jit
  def apply(updates, state, params, looseness):
    del params
    leaves = jax.tree.leaves(updates)
    dtype = jnp.result_type(jnp.float32, *leaves)
    count = state.curvature.steps.count
    of = gram.gram(leaves, dtype)
    damping = of.damping(
      options.damping_at(count), sum(math.prod(leaf.shape[1:]) for leaf in leaves)
    )
    weights = _weights(len(leaves[0]), settings.groups, dtype)
    resolution = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    own = share(of, weights, damping, count, resolution)
    nu = constrain(options, own.norm2, count, looseness)
    given = nu * own.weights
    updates = jax.tree.map(lambda leaf: gram.combine(leaf, given).astype(leaf.dtype), updates)
    steps = state.curvature.steps.counted(Finite(jnp.asarray(True), of.finite))
    new = {"curvature": state.curvature._replace(steps=steps)}
    new["norm_scale"] = nu.astype(state.norm_scale.dtype)
    if own.projection is not None:
      new["projection"] = own.projection
    return updates, state._replace(**new)

  return _transformation(init, apply)


def _weights(size: int, groups: int, dtype: Any) -> Weights:
  by_group = list(jnp.tile(jnp.eye(groups, dtype=dtype), size // groups) * (groups / size))
  contrasts = jnp.asarray(group_gradients.contrasts(by_group), dtype).reshape(groups - 1, size)
  return Weights(group_gradients.mean(by_group), contrasts)


def _transformation(init, apply) -> optax.GradientTransformationExtraArgs:
  def update(updates, state, params=None, *, looseness=1.0, **extra_args):
    del extra_args
    if not jax.tree.leaves(updates):  # optax has masked everything
      return updates, state
    return apply(updates, state, params, looseness)

  return optax.GradientTransformationExtraArgs(init, update)


def _one_example(updates: Any) -> Any:
  """Shapes of the gradient of one example."""
  return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), updates)
