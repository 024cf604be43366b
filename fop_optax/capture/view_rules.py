"""Rules of the walk for equations that move, join or scale what they are given: views stay views.

A rule takes the frame, the number of an equation, the equation and the values of its operands, and
gives the values of its outputs, or None for plain ones.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax.capture import biases, steps
from fop_optax.capture.frame import Frame
from fop_optax.capture.values import Linear, ParamView, Part, Value

ADDED = (
  "it is added to something that is not the output of one layer, as where its weight is in none"
  " (`{}`)"
)
WHOLE = {
  primitives.cond_p: "it is used inside a branch (`cond`)",
  primitives.while_p: "it is used inside a loop of unknown length (`while`)",
  primitives.custom_jvp_call_p: "it goes into a function with a rule of its own (`custom_jvp`)",
  primitives.custom_vjp_call_p: "it goes into a function with a rule of its own (`custom_vjp`)",
  primitives.dynamic_slice_p: "it is sliced at a traced index; scan over the slices instead",
  primitives.concatenate_p: "it is joined with other arrays before it is used (`concatenate`)",
  primitives.convert_element_type_p: "it is cast to a type that is not floating",
  primitives.complex_p: "it becomes a part of complex numbers, but not of a weight",
  primitives.mul_p: "it is multiplied entry by entry (`mul`)",
  primitives.div_p: "it is divided entry by entry (`div`)",
  primitives.add_p: ADDED.format("add"),
  primitives.sub_p: ADDED.format("sub"),
  primitives.select_n_p: "it is masked or chosen entry by entry (`select_n`)",
}
REPEATED = "its entries are repeated before it is used"


def whole(frame: Frame, equation: Any, operands: Sequence[Value]) -> None:
  """An equation that is not looked into: parameters that enter it are refused."""
  why = WHOLE.get(
    equation.primitive,
    f"it is used in `{equation.primitive}`, which is neither a product nor a view",
  )
  frame.refuse(equation, operands, why)


def move(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """Casts, reshapes, transposes, slices: views stay views."""
  value = operands[0]
  taken = steps.steps()[equation.primitive](equation)
  if taken is None:
    return whole(frame, equation, operands)
  before = tuple(equation.invars[0].aval.shape)
  if value.parts and all(part.size == before[part.axis] for part in value.parts):  # a sum
    if not all(variable.aval.shape for variable in equation.outvars):
      return whole(frame, equation, operands)
    moved = [[steps.moved(part.view, step, before) for part in value.parts] for step in taken]
    return [_sum(views) for views in moved]
  if value.parts:
    shape = tuple(equation.outvars[0].aval.shape)
    parts = steps.parts_after(value.parts, taken[0], shape) if len(taken) == 1 else None
    if parts:
      return [Value(parts=parts)]
    return frame.refuse(equation, operands, WHOLE[primitives.concatenate_p])
  return [
    Value(
      view=steps.moved(value.view, step, before) if value.view else None,
      linears=_each(value.linears, lambda linear, step=step: biases.after(linear, step, before)),
      shifted=steps.shifted_after(value.shifted, step, before) if value.shifted else None,
    )
    for step in taken
  ]


def pad(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """Padding with zeros keeps a view."""
  padding = operands[1].constant
  if padding is None or padding.number() != 0:
    return whole(frame, equation, operands)
  return move(frame, equation, operands)


def tile(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """Repetition of the whole, along new axes too."""
  view = operands[0].view
  if not view:
    return whole(frame, equation, operands)
  shape = tuple(equation.invars[0].aval.shape)
  return [Value(view=steps.tiled(view, shape, equation.params["reps"]))]


def broadcast(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """New axes of size one, or repetition, which only a bias may undergo."""
  value = operands[0]
  if len(operands) > 1:
    return whole(frame, equation, operands)
  if value.parts:
    ones = steps.broadcast_core(equation, tuple(equation.invars[0].aval.shape))
    parts = steps.parts_after(value.parts, (("reshape", ones),), ones)
    return [Value(parts=parts)] if parts else whole(frame, equation, operands)
  view, linears = value.view, value.linears
  if view:
    core_shape = steps.broadcast_core(equation, view.shape)
    view = steps.viewed(view, (("reshape", core_shape),), core_shape)
  if linears:
    before, shape = (tuple(v.aval.shape) for v in (equation.invars[0], equation.outvars[0]))
    step = (("reshape", shape),) if math.prod(shape) == math.prod(before) else (("repeat",),)
    linears = _each(linears, lambda linear: biases.after(linear, step, before))
  return [Value(view=view, linears=linears)]


def scale(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """A view, or a product's output, times a number or divided by one."""
  if equation.primitive is primitives.neg_p:
    return [times(operands[0], -1.0)]
  name = f"`{equation.primitive}`"
  shape = tuple(equation.outvars[0].aval.shape)
  same = [tuple(variable.aval.shape) == shape for variable in equation.invars]
  for side in (0, 1) if equation.primitive is primitives.mul_p else (0,):
    value, constant = operands[side], operands[1 - side].constant
    if not (value.views or value.linears) or constant is None or not same[side]:
      continue
    if math.prod(equation.invars[1 - side].aval.shape) > _SMALL and not value.views:
      continue
    number = constant.number()
    if number and equation.primitive is primitives.div_p:
      number = 1 / number
    if number:
      return [times(value, number)]
  others = [
    (operand, variable.aval.size)
    for operand, variable in zip(operands, equation.invars, strict=True)
    if not operand.views
  ]
  if any(size == 1 for _, size in others):
    return frame.refuse(equation, operands, f"it is times a number that is not fixed ({name})")
  if any(not (operand.batch or operand.tainted) for operand, _ in others):
    return frame.refuse(equation, operands, f"it is masked or scaled entry by entry ({name})")
  return whole(frame, equation, operands)


def pair(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """Complex numbers of real parameters, `re + 1j im` or `complex(re, im)`: two parts, all of it."""
  if equation.primitive is primitives.complex_p:
    operands = [operands[0], times(operands[1], 1j)]
  shape = tuple(equation.outvars[0].aval.shape)
  fixed = [o for o in operands if not (o.view or o.batch or o.tainted)]
  found = [o.view for o in operands if o.view and o.view.shape == shape]
  if not shape or len(found) + len(fixed) < len(operands):
    return whole(frame, equation, operands)
  if len(found) == 1:
    return [Value(view=found[0])]
  return [_sum(found)]


def _sum(found: Sequence[ParamView]) -> Value:
  """A variable that is the sum of views: each is all of it."""
  return Value(parts=tuple(Part(view, 0, 0, view.shape[0]) for view in found))


def conjugate(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """The conjugate of a number times real entries is its conjugate times them."""
  rescaled = lambda view: dataclasses.replace(view, scale=view.scale.conjugate())
  value = operands[0]
  return [
    Value(
      view=rescaled(value.view) if value.view else None,
      parts=tuple(part._replace(view=rescaled(part.view)) for part in value.parts),
    )
  ]


def is_complex(variable: Any) -> bool:
  return jnp.issubdtype(variable.aval.dtype, jnp.complexfloating)


def same(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """Values that pass unchanged, as through `optimization_barrier`."""
  if any(device is not None for device in equation.params.get("devices", ())):
    return whole(frame, equation, operands)
  return list(operands)


def is_repeated(variable: Any, view: ParamView, joined: int | None = None) -> bool:
  """Whether a variable repeats the entries of a view; along the `joined` axis it is a part."""
  pairs = enumerate(zip(view.shape, variable.aval.shape, strict=True))
  return any(ours != size for axis, (ours, size) in pairs if axis != joined)


_SMALL = 64  # constants up to this size are worked out to see whether they are one number


def _each(linears: Sequence[Linear], function: Callable[[Linear], Linear | None]):
  """`function` of each, as far as it is not None."""
  return tuple(after for linear in linears if (after := function(linear)) is not None)


def times(value: Value, number: complex) -> Value:
  """What is known of a value times a number."""
  scale = lambda view: dataclasses.replace(view, scale=number * view.scale)
  return dataclasses.replace(
    value,
    view=scale(value.view) if value.view else None,
    parts=tuple(part._replace(view=scale(part.view)) for part in value.parts),
    linears=_each(value.linears, lambda linear: biases.scaled(linear, number)),
  )
