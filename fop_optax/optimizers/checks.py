"""Checks of hyperparameters, layers and statistics: what is wrong, and what to write instead."""

from collections.abc import Callable, Iterator, Sequence
import functools
import inspect
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax.curvature.stacks import dtype_of
from fop_optax.layers import Layers, Stats, is_masked
from fop_optax.sharding import Sharding


def check_layers(layers: Any) -> Layers:
  """Checks that `layers` are what `capture` found, and some."""
  if not isinstance(layers, Layers):
    raise TypeError(
      f"`layers` is a {type(layers).__name__}, not a `Layers`. Pass `captured.layers` of"
      " `captured = fop_optax.capture(loss, params, ...)`."
    )
  if not layers:
    raise ValueError("`layers` is empty: the loss has no layer to precondition.")
  return layers


def check_optimizer(name: str, value: Any) -> None:
  """Checks that an optimizer that is given as an argument is one."""
  if not all(callable(getattr(value, part, None)) for part in ("init", "update")):
    shown = f"the function {value.__name__}" if inspect.isfunction(value) else repr(value)
    raise TypeError(
      f"`{name}` should be an `optax.GradientTransformation`, as `optax.adam(1e-3)` makes it, not"
      f" {shown if len(shown) < 80 else f'a {type(value).__name__}'}."
    )


def check(name: str, value: Any, valid: Callable[[Any], bool], wanted: str) -> None:
  """Checks a hyperparameter: one number, in range where that is known before the step is run."""
  if value is None or callable(value):
    return
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    if not valid(value):
      raise ValueError(f"`{name}={value}` should be {wanted}.")
  elif isinstance(value, Layers):
    raise ValueError(
      f"`{name}` is the layers: the rate comes first, as in `fop_optax.kfac(0.1, captured.layers)`."
    )
  elif not hasattr(value, "dtype") or jnp.ndim(value) > 0:
    shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
    got = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else shown
    raise ValueError(
      f"`{name}` should be one number (a Python number, an array without axes or a schedule), not"
      f" {got}. For parameters that need values of their own give each group an optimizer, with"
      " `optax.partition`."
    )


def check_given(name: str, value: Any) -> None:
  """Checks that a hyperparameter which has no default is there."""
  if value is None:
    raise ValueError(f"`{name}=None`: it takes a number, an array without axes or a schedule.")


def check_period(name: str, value: Any) -> None:
  """Checks a period."""
  whole = lambda x: x >= 1 and x == int(x)
  check(name, value, whole, "a whole number of steps, at least 1")


def check_static(name: str, value: Any, least: int = 1, among: Sequence[str] = ()) -> None:
  """Checks a hyperparameter that shapes depend on, alone or `among` some that all are static."""
  if not isinstance(value, int) or value < least:
    which, how = (
      (f"the integers among {', '.join(among)}", "(...)") if among else ("it", f'"{name}"')
    )
    raise ValueError(
      f"`{name}={value}` should be a Python integer, at least {least}."
      f" `optax.inject_hyperparams` makes arrays of numbers: declare {which} with"
      f" `optax.inject_hyperparams(..., static_args={how})`."
    )


def check_dtype(name: str, value: Any) -> None:
  """Checks the dtype that something is held in; None stands for that of the arithmetic."""
  if value is None:
    return
  try:
    floating = not isinstance(value, jax.Array) and jnp.issubdtype(jnp.dtype(value), jnp.floating)
  except TypeError:
    floating = False
  if not floating:
    raise ValueError(
      f"`{name}={value!r}` should be a floating dtype, as jnp.bfloat16, or None."
      " `optax.inject_hyperparams` takes a dtype for a schedule: declare it with"
      f' `optax.inject_hyperparams(..., static_args="{name}")`.'
    )


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
  """Checks a hyperparameter that names a choice."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"`{name}={value!r}` should be one of {', '.join(map(repr, choices))}.")


def check_gradient(updates: Any, params: Any) -> None:
  """Checks that a gradient is one at `params`: their tree, their shapes and kinds of numbers.

  Without `params` there is nothing to tell it by.
  """
  if params is None:
    return
  for path, leaf, param in leaves_at(updates, params):
    if is_masked(leaf) or is_masked(param) or not jnp.issubdtype(dtype_of(param), jnp.inexact):
      continue
    own, wanted = (f"{dtype_of(x)}{list(jnp.shape(x))}" for x in (leaf, param))
    kinds = [jnp.issubdtype(dtype_of(x), jnp.complexfloating) for x in (leaf, param)]
    sound = jnp.issubdtype(dtype_of(leaf), jnp.inexact) and kinds[0] == kinds[1]
    if not sound or jnp.shape(leaf) != jnp.shape(param):
      raise ValueError(
        f"The gradient is {own} at {path or 'its root'}, where params are {wanted}. Pass the"
        " gradient at these params, as `jax.grad(loss)(params, batch)` gives it."
      )


def leaves_at(
  updates: Any, params: Any, grad: str = "jax.grad(loss)"
) -> Iterator[tuple[str, Any, Any]]:
  """Path, leaf and parameter for each leaf of a gradient, of the same tree as `params`.

  Raises:
    ValueError: if it is of another tree; `grad` is what to write instead.
  """
  flatten = functools.partial(jax.tree_util.tree_flatten_with_path, is_leaf=is_masked)
  (own, structure), (others, wanted) = flatten(updates), flatten(params)
  if structure != wanted:
    raise ValueError(
      f"The gradient {_other_tree(own, others, structure, wanted)}. Pass the gradient at these"
      f" params, as `{grad}(params, batch)` gives it."
    )
  for (path, leaf), (_, param) in zip(own, others, strict=True):
    yield jax.tree_util.keystr(path), leaf, param


def _other_tree(own: Any, others: Any, structure: Any, wanted: Any) -> str:
  """What of a tree is other than in params: the leaves it has, or else their containers."""
  paths = [[jax.tree_util.keystr(path) for path, _ in leaves] for leaves in (own, others)]
  lacks = [path for path in paths[1] if path not in paths[0]]
  more = [path for path in paths[0] if path not in paths[1]]
  few = lambda found: ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
  if not lacks and not more:
    return f"is in other containers than params ({structure}, not {wanted})"
  parts = [f"lacks {few(lacks)} of params"] if lacks else []
  return " and ".join(parts + ([f"has {few(more)}, which params do not have"] if more else []))


def check_trace(trace: Any, gradient: Any) -> None:
  """Checks that a trace of momentum is of the parameters that a gradient is of."""
  shapes = lambda tree: [tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]
  if shapes(trace) != shapes(gradient):
    raise ValueError(
      "The optimizer's state is of another model or another mask: its momentum has shapes"
      f" {shapes(trace)}, but the gradient {shapes(gradient)}. Make a state with `tx.init(params)`."
    )


def states_in(tree: Any, kinds: type | tuple[type, ...]) -> list[Any]:
  """The states of some kinds in a tree, however deep."""
  is_kind = lambda x: isinstance(x, kinds)
  return [x for x in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(x)]


def check_kind(state: Any, kind: type) -> None:
  """Checks that a state is one of the optimizer that it is handed to."""
  if not states_in(state, kind):
    raise ValueError(
      f"The optimizer's state has no `{kind.__name__}` in it: it is a {type(state).__name__} of"
      " another optimizer, or no state. Write `opt_state = tx.init(params)` and"
      " `tx.update(grads, opt_state, params)`."
    )


def check_factors(layers: Layers, stats: Any) -> None:
  """Checks that `stats` are of a loss with these layers."""
  if not isinstance(stats, Stats):
    raise TypeError(
      f"`stats` is a {type(stats).__name__}: pass the third of what"
      " `captured.value_and_grad` returned."
    )
  shapes = [tuple(tuple(x.shape) for x in f) for f in stats.factors]
  if shapes != [layer.factor_shapes for layer in layers]:
    raise ValueError(
      f"`stats` are of another loss: their factors have shapes {shapes}, but these layers have"
      f" {[layer.factor_shapes for layer in layers]}. `layers` and `stats` should come from the"
      " same `captured`."
    )


def of_owners(owned: bool, sharding: Sharding | None) -> str:
  """What more to say of a state that does not fit, where it or the optimizer has owners."""
  if not owned and sharding is None:
    return ""
  return (
    f" It is {'dealt to owners' if owned else 'in the order of blocks'}, and this optimizer has"
    f" {f'{sharding.devices} owners' if sharding else 'no `sharding`'}: of other devices take"
    " `fop_optax.to_owners(fop_optax.to_blocks(opt_state), sharding)`."
  )


def check_sharding(sharding: Any) -> None:
  """Checks over which devices curvature is dealt."""
  if sharding is not None and not isinstance(sharding, Sharding):
    raise TypeError(
      f"`sharding` is a {type(sharding).__name__}: pass `fop_optax.Sharding(mesh)`, or None for"
      " curvature that every device has."
    )
