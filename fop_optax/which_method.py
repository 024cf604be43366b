"""Which method of `fop_optax.costs` an optimizer is, told by the state that it would make."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import optax

from fop_optax import costs
from fop_optax.curvature.eigenvalue_inverse import EigenvalueInverse
from fop_optax.curvature.factored_inverse import FactoredInverse
from fop_optax.curvature.state import StackState
from fop_optax.layers import Layers
from fop_optax.optimizers import checks
from fop_optax.optimizers.fop import ScaleByFopState
from fop_optax.optimizers.kfac import ScaleByKfacState
from fop_optax.optimizers.owned_tensors import OwnedStack
from fop_optax.optimizers.ownership import state_shardings
from fop_optax.optimizers.shampoo import ScaleByShampooState
from fop_optax.optimizers.soap import ScaleBySoapState
from fop_optax.optimizers.soap_step import SoapStack
from fop_optax.sharding import Sharding, noted

# The state of an optimizer, and the inverses in it -> its name.
NAMES: dict[tuple[type, type | None], str] = {
  (ScaleByKfacState, FactoredInverse): "kfac",
  (ScaleByKfacState, EigenvalueInverse): "ekfac",
  (ScaleByFopState, FactoredInverse): "fop",
  (ScaleBySoapState, None): "soap",
  (ScaleByShampooState, None): "shampoo",
}
STATES = (ScaleByKfacState, ScaleByFopState, ScaleBySoapState, ScaleByShampooState)
KNOWN = ", ".join(map(repr, costs.METHODS))


class Made(NamedTuple):
  """An optimizer that was made."""

  name: str  # of its method
  devices: int  # over which its curvature is shared out
  itemsize: int | None  # bytes of a number of its factors; None: that of the arithmetic
  state_bytes: int  # on one device


def check_optimizer(optimizer: Any) -> None:
  """Checks that it is the name of a method, or an optimizer that was made."""
  if isinstance(optimizer, optax.GradientTransformation):
    return
  if isinstance(optimizer, str):
    checks.one_of("optimizer", optimizer, tuple(costs.METHODS))
  elif _is_function(optimizer):
    raise TypeError(
      f"`optimizer` is {what(optimizer)}, which makes one: call it, as"
      f" `fop_optax.kfac(0.1, captured.layers)`, or pass a name, one of {KNOWN}."
    )
  else:
    raise TypeError(
      f"`optimizer` is {what(optimizer)}: pass a name, one of {KNOWN}, or an optimizer, as"
      " `fop_optax.kfac(0.1, captured.layers)` makes it."
    )


def what(value: Any) -> str:
  """What was passed where something else belongs."""
  if value is None:
    return "None"
  if isinstance(value, optax.GradientTransformation):
    return "an optimizer"
  if _is_function(value):
    return f"the function `{value.__name__}`"
  if checks.states_in(value, STATES):
    return "an optimizer's state"
  arrays = sum(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))
  kind = type(value).__name__
  article = "an" if kind[0] in "AEIOUaeiou" else "a"
  return f"{article} {kind}" + (f" with {arrays} arrays" if arrays else "")


def _is_function(value: Any) -> bool:
  return callable(value) and hasattr(value, "__name__")


def made(
  tx: optax.GradientTransformation, layers: Layers, leaves: Sequence[Any], params: Any
) -> Made:
  """What is reckoned with of an optimizer of these layers; `params` are None or a tree of `leaves`.

  Raises:
    ValueError: if it keeps no curvature, or other than one of the methods does by default.
  """
  try:
    state, shardings = noted(tx.init, leaves if params is None else params)
  except Exception as error:
    if params is None:
      error.add_note(_NO_TREE)
    raise
  params = leaves if params is None else params
  found = checks.states_in(state, STATES)
  if len(found) != 1:
    had = f"{len(found)} curvatures" if found else "no curvature that `estimate` knows"
    raise ValueError(
      f"`optimizer` keeps {had}: pass one that keeps one, as `fop_optax.kfac(0.1, captured.layers)`"
      f" does, or a name, one of {KNOWN}. {_ANY}"
    )
  sharding, stacks = next(iter(shardings), None), _stacks(found[0])
  kind = type(stacks[0].inverse) if stacks and isinstance(stacks[0], StackState) else None
  name = NAMES.get((type(found[0]), kind))
  usual = [] if name is None else _usual(name, layers, params, sharding)
  if name is None or _shapes(stacks) != _shapes(usual):
    raise ValueError(
      f"`optimizer` keeps other curvature than any of {KNOWN} by default of these layers: pass one"
      " that was made with them, whatever its `sharding`, `factor_dtype`, rates, momentum and"
      f" fallback. {_ANY}"
    )
  pairs = list(zip(_factors(stacks), _factors(usual), strict=True))
  return Made(
    name,
    sharding.devices if sharding else 1,
    None if all(a.dtype == b.dtype for a, b in pairs) else pairs[0][0].dtype.itemsize,
    _bytes_of_one(state, state_shardings(tx, params) if sharding else None),
  )


_NO_TREE = (
  "`tx.init` had the leaves of the parameters as a list. An optimizer that knows their tree, as by"
  " a mask, needs `fop_optax.estimate(captured, tx, params=params)`."
)
_ANY = "Of any optimizer `jax.eval_shape(tx.init, params)` has the shapes of the state."


def _usual(name: str, layers: Layers, params: Any, sharding: Sharding | None) -> Sequence[Any]:
  """Stacks of the method by default."""
  tx = costs.METHODS[name].make(layers, sharding=sharding)
  (state,) = checks.states_in(jax.eval_shape(tx.init, params), STATES)
  return _stacks(state)


def _stacks(state: Any) -> Sequence[Any]:
  by_layer = isinstance(state, ScaleByKfacState | ScaleByFopState)
  return state.curvature.stacks if by_layer else state.stacks


def _shapes(stacks: Sequence[Any]) -> Any:
  return jax.tree.structure(stacks), [x.shape for x in jax.tree.leaves(stacks)]


def _factors(stacks: Sequence[Any]) -> list[Any]:
  own = [x.slots if isinstance(x, OwnedStack) else x for x in stacks]
  return jax.tree.leaves(
    [x.bases.statistics if isinstance(x, SoapStack) else x.factors for x in own]
  )


def _bytes_of_one(state: Any, shardings: Any) -> int:
  """What one device has of a state."""
  leaves = jax.tree.leaves(state)
  shapes = [x.shape for x in leaves]
  if shardings is not None:
    own = zip(jax.tree.leaves(shardings), shapes, strict=True)
    shapes = [sharding.shard_shape(shape) for sharding, shape in own]
  return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))
