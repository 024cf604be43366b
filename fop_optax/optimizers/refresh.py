"""When statistics are due: how often, and at the next step, read from an optimizer's state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fop_optax.curvature.state import CurvatureState

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WarmupPeriod:
  """A period that is a schedule: every step at first, when the network changes most.

  Attributes:
    steps: how many steps have a period of one.
    period: the period after them.

  Raises:
    ValueError: if these are no whole numbers of at least 0 and 1.

  Example:
    >>> import fop_optax
    >>> period = fop_optax.WarmupPeriod(steps=20, period=10)
    >>> print(period(0), period(19), period(20))
    1 1 10
  """

  steps: int = 20
  period: int = 10

  def __post_init__(self):
    for name, least in (("steps", 0), ("period", 1)):
      value = getattr(self, name)
      if isinstance(value, jax.core.Tracer):
        continue
      if not (value >= least and value == int(value)):
        raise ValueError(
          f"`WarmupPeriod({name}={value})` should be a whole number of steps, at least {least}."
        )

  def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
    return jnp.where(jnp.asarray(count) < self.steps, 1, self.period)


def curvature_states(opt_state: Any) -> dict[str, dict[str, dict[Names, jax.Array]]]:
  """Curvature states in a tree: where each is -> its field -> names below it -> array.

  Found by the names of its fields and not by its type, which Flax NNX (a `State` of Variables) and
  checkpoints (nested dictionaries) do not keep.
  """
  found: dict[str, dict[str, dict[Names, jax.Array]]] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
    names = tuple(map(_name, path))
    for depth, name in reversed(list(enumerate(names))):
      if name in CurvatureState._fields:
        fields = found.setdefault(jax.tree_util.keystr(path[:depth]), {})
        fields.setdefault(name, {})[names[depth + 1 :]] = leaf
        break
  wanted = set(CurvatureState._fields)
  return {where: fields for where, fields in found.items() if set(fields) == wanted}


def _name(key: Any) -> str:
  """Of an attribute, a key or an index."""
  kinds = (kind for kind in ("name", "key", "idx") if hasattr(key, kind))
  return str(getattr(key, next(kinds, ""), None))


def curvature_state(opt_state: Any, who: str) -> dict[str, dict[Names, jax.Array]]:
  """The fields of the one curvature state in a tree.

  Raises:
    ValueError: if there is none, or more than one.
  """
  found = curvature_states(opt_state)
  if not found:
    raise ValueError(
      f"`{who}(opt_state)` found no curvature state. Pass the whole state that"
      " `tx.init(params)` made, with `tx` a `fop_optax` optimizer such as `kfac` or `fop`."
    )
  if len(found) > 1:
    raise ValueError(
      f"`{who}(opt_state)` found {len(found)} curvature states, at"
      f" {' and '.join(f'opt_state{where}' for where in found)}. Pass the part of one of them."
    )
  ((fields),) = found.values()
  return fields


def refresh_due(opt_state: Any) -> jax.Array:
  """Whether the step to come should take statistics: every `curvature_update_period` steps.

  Args:
    opt_state: state of an optimizer that holds one curvature state, however deep (in `optax.chain`,
      `inject_hyperparams`, `masked`, `partition`), or the `opt_state` of a `flax.nnx.Optimizer`.

  Returns:
    A boolean array, for `captured.value_and_grad(..., refresh=refresh_due(opt_state))`.

  Raises:
    ValueError: if there is no curvature state in it, or more than one.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> captured = fop_optax.capture(loss, params, x)
    >>> tx = fop_optax.kfac(0.1, captured.layers, curvature_update_period=10)
    >>> print(fop_optax.refresh_due(tx.init(params)))
    True
  """
  fields = curvature_state(opt_state, "refresh_due")
  (count, *_), (period,) = (fields[k].values() for k in ("steps", "curvature_update_period"))
  return count % period == 0
