"""Two analyses of a jaxpr: where a gradient flows, and what depends on the batch."""

from collections.abc import Sequence
import functools
from typing import Any

from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat

# Their derivative is zero wherever there is one, as AD has it. Integers and bools have none either.
FLAT = (
  primitives.stop_gradient_p,
  primitives.sign_p,
  primitives.round_p,
  primitives.floor_p,
  primitives.ceil_p,
  primitives.bitcast_convert_type_p,
)
INLINED = (primitives.jit_p, primitives.remat_p, primitives.closed_call_p)


def inner_jaxpr(equation: Any) -> Any:
  """The (possibly closed) jaxpr of a `jit`, `checkpoint`, `closed_call` or `scan` equation."""
  params = equation.params
  return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def differentiable(variable: Any) -> bool:
  return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def carries(equation: Any) -> bool:
  """Whether a gradient can come through an equation."""
  return equation.primitive not in FLAT and any(map(differentiable, equation.outvars))


def relevant(jaxpr: Any, needed: Sequence[bool]) -> tuple[set[int], set[Any]]:
  """The equations through which a gradient of the `needed` outputs flows.

  What a loss computes beside its value (metrics, what goes into a `stop_gradient`, a `round` or a
  comparison) takes no part in the gradient, so that a parameter's use there says nothing of its
  curvature.

  Returns:
    The indices of the equations, and the variables that a gradient reaches.
  """
  wanted = {v for v, need in zip(jaxpr.outvars, needed, strict=True) if need and _is_variable(v)}
  wanted = set(filter(differentiable, wanted))
  live = set()
  for index, equation in reversed(list(enumerate(jaxpr.eqns))):
    outputs = [v in wanted for v in equation.outvars]
    if not any(outputs) or equation.primitive in FLAT:
      continue
    live.add(index)
    for v, need in zip(equation.invars, _relevant_operands(equation, outputs), strict=True):
      if need and _is_variable(v) and differentiable(v):
        wanted.add(v)
  return live, wanted


def _relevant_inputs(jaxpr: Any, needed: Sequence[bool]) -> list[bool]:
  wanted = relevant(jaxpr, needed)[1]
  return [v in wanted for v in jaxpr.invars]


def _relevant_operands(equation: Any, needed: Sequence[bool]) -> Sequence[bool]:
  if equation.primitive in INLINED:
    return _relevant_inputs(_compat.open_jaxpr(inner_jaxpr(equation))[0], needed)
  if equation.primitive is primitives.scan_p:
    return scan_relevant(equation, needed)[1]
  return [True] * len(equation.invars)


def scan_relevant(equation: Any, needed: Sequence[bool]) -> tuple[list[bool], list[bool]]:
  """`relevant` for a scan: which outputs of its body, and which of its operands."""
  body, _ = _compat.open_jaxpr(equation.params["jaxpr"])
  consts, carry = _compat.scan_split(equation.params, len(equation.invars))
  outputs = list(needed)
  while True:  # a carry is needed if the next step needs it
    inputs = _relevant_inputs(body, outputs)
    carried = [
      a or b for a, b in zip(outputs[:carry], inputs[consts : consts + carry], strict=True)
    ]
    if carried == outputs[:carry]:
      return outputs, inputs
    outputs[:carry] = carried


def depends(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
  """Which outputs of a jaxpr depend on the inputs that are flagged."""
  flagged = dependents(jaxpr, flags)
  return [_is_variable(v) and v in flagged for v in jaxpr.outvars]


def dependents(jaxpr: Any, flags: Sequence[bool]) -> set[Any]:
  """The variables of a jaxpr that depend on the inputs that are flagged."""
  flagged = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
  for equation in jaxpr.eqns:
    operands = [_is_variable(v) and v in flagged for v in equation.invars]
    for v, flag in zip(equation.outvars, _equation_depends(equation, operands), strict=True):
      if flag:
        flagged.add(v)
  return flagged


def _equation_depends(equation: Any, flags: Sequence[bool]) -> list[bool]:
  if equation.primitive in INLINED:
    return depends(_compat.open_jaxpr(inner_jaxpr(equation))[0], flags)
  if equation.primitive is primitives.scan_p:
    return scan_depends(equation, flags)[1]
  return [any(flags)] * len(equation.outvars)


def scan_depends(equation: Any, flags: Sequence[bool]) -> tuple[list[bool], list[bool]]:
  """`depends` for a scan: which inputs of its body, and which of its outputs."""
  body, _ = _compat.open_jaxpr(equation.params["jaxpr"])
  consts, carry = _compat.scan_split(equation.params, len(equation.invars))
  inputs = list(flags)
  while True:  # what enters the carry later counts as well
    outputs = depends(body, inputs)
    carried = [
      a or b for a, b in zip(inputs[consts : consts + carry], outputs[:carry], strict=True)
    ]
    if carried == inputs[consts : consts + carry]:
      return inputs, outputs
    inputs[consts : consts + carry] = carried


# Primitives that are linear in all of their operands together, and in one if the others are fixed.
_LINEAR = frozenset((
  primitives.add_p, primitives.sub_p, primitives.neg_p, primitives.convert_element_type_p,
  primitives.reduce_sum_p, primitives.reshape_p, primitives.broadcast_in_dim_p,
  primitives.squeeze_p, primitives.transpose_p, primitives.concatenate_p, primitives.slice_p,
  primitives.rev_p, primitives.copy_p, primitives.reduce_precision_p, primitives.cumsum_p,
  primitives.add_jaxvals_p, primitives.pad_p,
))  # fmt: skip
_MULTILINEAR = (primitives.mul_p, primitives.dot_general_p)


@functools.cache
def _linear_unexported() -> frozenset[Any]:
  names = ("split", "unstack", "stack", "tile", "optimization_barrier", "reshard")
  return frozenset(p for name, p in _compat.unexported().items() if name in names)


def terms(
  jaxpr: Any, affine: Sequence[bool | None], tainted: Sequence[bool]
) -> tuple[set[Any], set[Any]]:
  """The variables that the loss is the sum of, up to factors in which there is no parameter.

  Args:
    jaxpr: of the loss, or of a part of it.
    affine: which of its outputs are such variables; None for those that take no part in the loss.
    tainted: which of its inputs depend on parameters.

  Returns:
    These variables, and the others that take part in the loss.
  """
  dependent = dependents(jaxpr, tainted)
  good: set[Any] = set()
  bad: set[Any] = set()

  def note(variables, flags):
    for v, flag in zip(variables, flags, strict=True):
      if flag is not None and _is_variable(v) and differentiable(v):
        (good if flag else bad).add(v)

  note(jaxpr.outvars, affine)
  for equation in reversed(jaxpr.eqns):
    outputs = [False if v in bad else True if v in good else None for v in equation.outvars]
    if any(flag is not None for flag in outputs):
      flags = [_is_variable(v) and v in dependent for v in equation.invars]
      note(equation.invars, _affine_operands(equation, outputs, flags))
  return good - bad, bad


def _affine_operands(
  equation: Any, outputs: Sequence[bool | None], tainted: Sequence[bool]
) -> Sequence[bool | None]:
  """For each operand, whether the outputs that are flagged are affine in it."""
  primitive = equation.primitive
  if primitive is primitives.stop_gradient_p:
    return [None]
  if primitive in INLINED:
    inner, _ = _compat.open_jaxpr(inner_jaxpr(equation))
    return _affine_inputs(inner, outputs, tainted)
  if primitive is primitives.scan_p:
    return scan_terms(equation, outputs, tainted)[1]
  if False not in outputs:
    if primitive in _LINEAR or primitive in _linear_unexported():
      return [True] * len(tainted)
    if primitive in _MULTILINEAR:
      return [not other for other in reversed(tainted)]
    if primitive is primitives.div_p:
      return [not tainted[1], False]
    if primitive is primitives.select_n_p:
      return [False, *[not tainted[0]] * (len(tainted) - 1)]
  return [False] * len(tainted)


def _affine_inputs(jaxpr, affine, tainted):
  good, bad = terms(jaxpr, affine, tainted)
  return [False if v in bad else True if v in good else None for v in jaxpr.invars]


def scan_terms(
  equation: Any, affine: Sequence[bool | None], tainted: Sequence[bool]
) -> tuple[list[bool | None], Sequence[bool | None]]:
  """`terms` for a scan: which outputs of its body are such variables, and which of its operands."""
  body, _ = _compat.open_jaxpr(equation.params["jaxpr"])
  consts, carry = _compat.scan_split(equation.params, len(equation.invars))
  inside, _ = scan_depends(equation, tainted)
  outputs = list(affine)
  while True:  # a carry is a term if the next step leaves it one
    inputs = _affine_inputs(body, outputs, inside)
    carried = [
      out if into is None else into and out is not False
      for out, into in zip(outputs[:carry], inputs[consts : consts + carry], strict=True)
    ]
    if carried == outputs[:carry]:
      return outputs, inputs
    outputs[:carry] = carried


def reaches(jaxpr: Any, flags: Sequence[bool], primitive: Any) -> bool:
  """Whether what depends on the inputs that are flagged is an operand of `primitive`."""
  flagged = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
  for equation in jaxpr.eqns:
    operands = [_is_variable(v) and v in flagged for v in equation.invars]
    if any(operands) and _equation_reaches(equation, operands, primitive):
      return True
    for v, flag in zip(equation.outvars, _equation_depends(equation, operands), strict=True):
      if flag:
        flagged.add(v)
  return False


def _equation_reaches(equation: Any, flags: Sequence[bool], primitive: Any) -> bool:
  if equation.primitive in INLINED:
    return reaches(_compat.open_jaxpr(inner_jaxpr(equation))[0], flags, primitive)
  if equation.primitive is primitives.scan_p:
    body, _ = _compat.open_jaxpr(equation.params["jaxpr"])
    return reaches(body, scan_depends(equation, flags)[0], primitive)
  inside = core.jaxprs_in_params(equation.params)  # of other equations, any of their operands may
  return equation.primitive is primitive or any(contains(inner, primitive) for inner in inside)


def contains(jaxpr: Any, primitive: Any) -> bool:
  """Whether `primitive` stands anywhere in a jaxpr."""
  return any(
    equation.primitive is primitive
    or any(contains(inner, primitive) for inner in core.jaxprs_in_params(equation.params))
    for equation in jaxpr.eqns
  )


def _is_variable(atom: Any) -> bool:
  return not isinstance(atom, core.Literal)
