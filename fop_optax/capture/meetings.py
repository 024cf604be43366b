"""Where what is made of parameters without the batch meets it."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from jax.extend.core import primitives

from fop_optax.capture import repeated
from fop_optax.capture.frame import Frame, is_apart
from fop_optax.capture.values import Key, Value

# Equations of several operands of one shape, or of 1 where that is longer: entry by entry.
_ENTRYWISE = frozenset((
  primitives.add_p, primitives.add_jaxvals_p, primitives.sub_p, primitives.mul_p,
  primitives.div_p, primitives.max_p, primitives.min_p, primitives.pow_p, primitives.rem_p,
  primitives.atan2_p, primitives.nextafter_p, primitives.select_n_p, primitives.clamp_p,
))  # fmt: skip


def meet(frame: Frame, equation: Any, operands: Sequence[Value]) -> None:
  """What is made of parameters alone meets the batch.

  A product with a constant is then repeated along the axis that grows, as if the constant were
  the same in every example; the parameters of everything else are refused. Neither is so where
  two terms of the loss are added.
  """
  for number, (variable, operand) in enumerate(zip(equation.invars, operands, strict=True)):
    if not is_apart([operand]):
      continue
    term = variable in frame.terms or not frame.is_live
    if not term:
      frame.refuse_pending(operand.pending)
    if operand.products:
      axis = None if term else _repeated_axis(frame, equation, variable)
      frame.found.meetings.setdefault(frame.here, {})[number] = axis
      if not term:
        repeat(frame, equation, operand.products, axis)


def _repeated_axis(frame: Frame, equation: Any, variable: Any) -> int | None:
  """The axis of an equation's output along which an operand is repeated for the batch."""
  out = equation.outvars[0]
  if equation.primitive is primitives.broadcast_in_dim_p:
    dims = equation.params["broadcast_dimensions"]
  elif equation.primitive in _ENTRYWISE:
    dims = range(len(variable.aval.shape))
  elif equation.primitive is primitives.dot_general_p:
    free = repeated.free_axes(equation, 1 - equation.invars.index(variable))
    axes = [axis for axis in frame.grows.get(out, ()) if axis in free]
    return axes[0] if len(axes) == 1 else None
  else:
    return None
  own = dict(zip(dims, variable.aval.shape, strict=True))
  axes = [axis for axis in frame.grows.get(out, ()) if own.get(axis, 1) == 1]
  return axes[0] if len(axes) == 1 else None


def repeat(frame: Frame, equation: Any, keys: frozenset[Key], axis: int | None) -> None:
  """Notes how often the rows of products with a constant are repeated."""
  for key in keys:
    use = frame.found.uses[key]
    if use.each:  # a scan over the examples repeats it
      frame.found.uses[key] = dataclasses.replace(use, batch=True)
      continue
    times = 0 if axis is None else equation.outvars[0].aval.shape[axis]
    possible = times and use.product.kind == "dense" and use.loop == frame.loop[: len(use.loop)]
    if not possible or use.repeats not in (0, times):
      where = f"`{equation.primitive}`" + frame.source(equation)
      why = f"its product with a constant meets the batch in {where}, where it cannot be repeated"
      frame.found.refused.setdefault(use.leaf, why)
    elif not use.repeats:
      frame.found.uses[key] = dataclasses.replace(use, repeats=times, rows=use.rows * times)
