"""First pass: a pure walk over the loss's jaxpr that finds uses of parameters, and reasons.

One loop, an environment and a rule for each primitive. Every variable has a `Value`: whether it
depends on the batch, whether it is a view of a parameter, whether it is the output of a product.
The walk evaluates nothing but constants. Nested jaxprs of `jit`, `checkpoint` and `scan` are walked
like the outer one; every other equation is taken whole.

What parameters do where there is no batch (penalties, the network at fixed points) refuses nothing,
as long as it is a term of the loss. Where it meets the batch, the output of a product with a
constant counts as if the constant were repeated in every example (`fop_optax.capture.meetings`).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import flow, meetings, steps, use_rules, view_rules
from fop_optax.capture.frame import Found, Frame, is_apart
from fop_optax.capture.growth import Growth
from fop_optax.capture.marks import has_mark, read_mark
from fop_optax.capture.values import Constant, Key, ParamView, Value


def walk(
  jaxpr: Any,
  consts: Sequence[Any],
  shapes: Sequence[tuple[int, ...]],
  batch: Sequence[bool],
  growth: Growth | None,
) -> Found:
  """Walks the jaxpr of `loss(*parameters, *arguments)`, whose first output is the loss.

  Args:
    jaxpr: of the loss, open.
    consts: its constants.
    shapes: of the parameters.
    batch: for each further argument, whether it differs between examples.
    growth: which axes of its variables grow with the batch, if that is known.
  """
  found = Found(shapes)
  inputs = [
    Value(view=ParamView(leaf, (), shape), tainted=True, leaves=frozenset((leaf,)))
    for leaf, shape in enumerate(shapes)
  ]
  for leaf, variable in enumerate(jaxpr.invars[: len(shapes)]):
    why = steps.unsuited(variable.aval.dtype)
    if why:
      found.refused[leaf], inputs[leaf] = why, Value(tainted=True)
  inputs += [Value(batch=flag) for flag in batch]
  aux = len(jaxpr.outvars) - 1
  needed, affine = [True] + [False] * aux, [True] + [None] * aux
  frame = Frame(jaxpr, needed, affine, (), (), (), False, found, growth)
  _run(frame, inputs, consts)
  for _, leaf, why in sorted(frame.pending):
    found.apart.setdefault(leaf, why)
  _settle_sums(found)
  return found


def _settle_sums(found: Found) -> None:
  """Leaves of each sum of a parameter and what depends on the batch the use that it is.

  The weight of products, unless another sum of the same parameter is a table: then a table.
  """
  tables = {
    use.leaf
    for key, use in found.uses.items()
    if use.product.kind == "table" and key not in found.as_weight
  }
  for key, products in found.as_weight.items():
    use = found.uses[key]
    if key in found.as_rows:
      why = "it is added to what depends on the batch, and then both a weight and something else"
      found.refused.setdefault(use.leaf, f"{why} at {use.source}" if use.source else why)
    for unused in map(Key, products) if use.leaf in tables else [key]:
      del found.uses[unused]


def _run(frame: Frame, inputs: Sequence[Value], consts: Sequence[Any]) -> list[Value]:
  env = dict(zip(frame.jaxpr.invars, inputs, strict=True))
  for variable, const in zip(frame.jaxpr.constvars, consts, strict=True):
    known = None if isinstance(const, jax.core.Tracer) else Constant(lambda const=const: const)
    env[variable] = Value(constant=known)
  tainted = [value.tainted for value in inputs]
  frame.terms, _ = flow.terms(frame.jaxpr, frame.affine, tainted)

  def read(atom: Any) -> Value:
    if isinstance(atom, core.Literal):
      return Value(constant=Constant(lambda: atom.val))
    value = env[atom]
    if value.linears and atom in frame.shared:
      value = dataclasses.replace(value, linears=())
    if value.shifted and not value.shifted.own and atom in frame.shared:
      value = dataclasses.replace(value, shifted=None)  # activations are read more than once
    return value

  for index, equation in enumerate(frame.jaxpr.eqns):
    operands = [read(atom) for atom in equation.invars]
    outputs = _outputs(frame, index, equation, operands)
    env.update(zip(equation.outvars, outputs, strict=True))
  return [read(atom) for atom in frame.jaxpr.outvars]


def _outputs(frame: Frame, index: int, equation: Any, operands: Sequence[Value]) -> list[Value]:
  """The values of an equation's outputs."""
  nested = equation.primitive in (*flow.INLINED, primitives.scan_p)
  grows = [
    v in frame.grows and (v not in frame.terms or not is_apart(operands)) for v in equation.outvars
  ]
  frame.at(index, not any(operand.batch for operand in operands) and not any(grows))
  if not frame.free and not nested:
    meetings.meet(frame, equation, operands)
  outputs = None
  if frame.is_live:
    rule = _rules().get(equation.primitive, view_rules.whole)
    outputs = rule(frame, equation, operands)
    if outputs is None and has_mark(equation):
      frame.found.hidden.append(f"`{equation.primitive}`{frame.source(equation)}")
  if equation.primitive not in flow.INLINED or outputs is None:
    _read_sums(frame, operands, outputs or ())
  if nested and outputs is not None:
    frame.pending |= frame.new_pending
    return outputs
  plain = _plain(frame, equation, operands)
  frame.pending |= plain.pending
  outputs = outputs or [Value()] * len(equation.outvars)
  leaves = frozenset().union(*(operand.leaves for operand in operands))
  return [
    dataclasses.replace(
      value,
      batch=plain.batch or grown,
      tainted=plain.tainted,
      constant=plain.constant,
      leaves=leaves,
      products=frozenset() if grown else plain.products,
      pending=plain.pending if variable in frame.wanted and not grown else frozenset(),
    )
    for value, variable, grown in zip(outputs, equation.outvars, grows, strict=True)
  ]


def _read_sums(frame: Frame, operands: Sequence[Value], outputs: Sequence[Value]) -> None:
  """Notes where sums of a parameter and what depends on the batch are no weights."""
  kept = {output.shifted.table for output in outputs if output.shifted}
  for operand in operands if frame.is_live else ():
    key = operand.shifted.table if operand.shifted else None
    if key and key not in kept and frame.here not in frame.found.as_weight.get(key, ()):
      frame.found.as_rows.setdefault(key, set()).add(frame.here)


def _plain(frame: Frame, equation: Any, operands: Sequence[Value]) -> Value:
  """What is known of an output by its operands alone."""
  batch = any(operand.batch for operand in operands)
  tainted = flow.carries(equation) and any(operand.tainted for operand in operands)
  value = Value(batch, tainted=tainted)
  if batch:
    return value
  known = [operand.constant for operand in operands if operand.constant]
  if len(equation.outvars) == 1 and len(known) == len(operands):
    evaluate = functools.partial(_evaluate, frame.jaxpr, equation, known)
    return dataclasses.replace(value, constant=Constant(evaluate))
  return dataclasses.replace(
    value,
    products=frozenset(frame.new_products).union(*(operand.products for operand in operands)),
    pending=frozenset(frame.new_pending).union(*(operand.pending for operand in operands)),
  )


def _inline(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """`jit`, `checkpoint`: walked as if they were written out."""
  inner, consts = _compat.open_jaxpr(flow.inner_jaxpr(equation))
  why = ""
  if equation.params.get("differentiated"):
    why = "it is used in a gradient inside the loss"
  elif not _unsharded(equation):
    why = "it goes into a `jit` with shardings of its own"
  if why:
    if not frame.free:
      meetings.meet(frame, equation, operands)
    return frame.refuse(equation, operands, why)
  mark = read_mark(equation, frame.here, frame.scans)
  if mark is not None:
    frame.found.marks.append(mark)
  inside = frame.inside(inner, frame.gradient_to(equation), frame.affine_at(equation))
  return _descend(frame, inside, operands, consts)


def _descend(
  frame: Frame, inside: Frame, inputs: Sequence[Value], consts: Sequence[Any]
) -> list[Value]:
  outputs = _run(inside, inputs, consts)
  frame.pending |= inside.pending
  return outputs


def _scan(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """A scan: weights it goes over are stacked, constant ones are used several times."""
  body, constants = _compat.open_jaxpr(equation.params["jaxpr"])
  consts, carry = _compat.scan_split(equation.params, len(operands))
  length, depth = int(equation.params["length"]), len(frame.scans)
  flags, batch = flow.scan_depends(equation, [operand.batch for operand in operands])
  batch = [flag or v in frame.grows for flag, v in zip(batch, equation.outvars, strict=True)]
  tainted, _ = flow.scan_depends(equation, [operand.tainted for operand in operands])
  needed, _ = flow.scan_relevant(equation, frame.gradient_to(equation))
  frame.refuse(
    equation,
    operands[consts : consts + carry],
    "it is carried through a `scan` that may change it",
  )
  inputs = []
  for i, operand in enumerate(operands):
    value = Value(flags[i], tainted=tainted[i], leaves=operand.leaves)
    if not flags[i]:
      value = dataclasses.replace(value, products=operand.products, pending=operand.pending)
    if i < consts:
      value = dataclasses.replace(
        value, view=operand.view, parts=operand.parts, constant=operand.constant
      )
    elif operand.parts:
      view_rules.whole(frame, equation, [operand])
    elif operand.view and i >= consts + carry:
      view = steps.scanned(operand.view, length, depth)
      value = dataclasses.replace(value, view=view)
    inputs.append(value)
  _leave(frame, equation, equation.invars[consts:], operands[consts:], flags)
  affine, _ = flow.scan_terms(equation, frame.affine_at(equation), [o.tainted for o in operands])
  over = (*equation.invars[consts + carry :], *equation.outvars[carry:])
  each = frame.each or any(0 in frame.grows.get(v, ()) for v in over)
  inside = dataclasses.replace(
    frame.inside(body, needed, affine), scans=(*frame.scans, length), loop=frame.here, each=each
  )
  outputs = _descend(frame, inside, inputs, constants)
  leaving = [out for out, need in zip(outputs, needed, strict=True) if need]
  frame.refuse(equation, leaving, "it leaves a `scan` as an output")
  _leave(frame, equation, equation.outvars, outputs, flags)
  plain = _plain(frame, equation, [*operands, *outputs])
  leaves = frozenset().union(*(value.leaves for value in (*operands, *outputs)))
  return [
    Value(flag, tainted=plain.tainted, leaves=leaves)
    if flag
    else Value(
      tainted=plain.tainted,
      leaves=leaves,
      products=out.products,
      pending=out.pending | frame.new_pending,
    )
    for flag, out in zip(batch, outputs, strict=True)
  ]


def _leave(frame: Frame, equation: Any, variables: Sequence[Any], values: Any, flags: Any) -> None:
  """What goes in or out of a scan over the batch in another way than as a constant meets it."""
  if not any(flags):
    return
  for variable, value in zip(variables, values, strict=True):
    if is_apart([value]) and variable not in frame.terms and variable in frame.wanted:
      frame.refuse_pending(value.pending)
      meetings.repeat(frame, equation, value.products, None)


def _evaluate(jaxpr: Any, equation: Any, operands: Sequence[Constant]) -> Any:
  with jax.ensure_compile_time_eval():
    values = [jnp.asarray(operand.value) for operand in operands]
    return _compat.evaluate_equation(jaxpr, equation, values)[0]


def _unsharded(equation: Any) -> bool:
  shardings = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
  return all(type(sharding).__name__ == "UnspecifiedValue" for sharding in shardings)


@functools.cache
def _rules() -> dict[Any, Callable[..., list[Value] | None]]:
  unexported = _compat.unexported()
  return {
    **dict.fromkeys(steps.steps(), view_rules.move),
    primitives.pad_p: view_rules.pad,
    **({unexported["tile"]: view_rules.tile} if "tile" in unexported else {}),
    unexported["optimization_barrier"]: view_rules.same,
    primitives.device_put_p: view_rules.same,
    primitives.broadcast_in_dim_p: view_rules.broadcast,
    primitives.concatenate_p: use_rules.join,
    primitives.dot_general_p: use_rules.dot,
    primitives.conv_general_dilated_p: use_rules.convolve,
    primitives.gather_p: use_rules.gather,
    primitives.dynamic_slice_p: use_rules.dynamic_slice,
    **{p: use_rules.stack for name, p in unexported.items() if name == "stack"},
    **dict.fromkeys((primitives.add_p, primitives.sub_p), use_rules.add),
    primitives.complex_p: view_rules.pair,
    primitives.conj_p: view_rules.conjugate,
    **dict.fromkeys((primitives.mul_p, primitives.div_p, primitives.neg_p), view_rules.scale),
    **dict.fromkeys(flow.INLINED, _inline),
    primitives.scan_p: _scan,
  }
