"""First pass: a pure walk over the loss's jaxpr that finds uses of parameters, and reasons.

One loop, an environment and a rule for each primitive. Every variable has a `Value`: whether it
depends on the batch, whether it is a view of a parameter, whether it is the output of a product.
The walk evaluates nothing. Nested jaxprs of `jit`, `checkpoint` and `scan` are walked like the
outer one; every other equation is taken whole.
"""

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import flow, rules
from fop_optax.capture.kinds import convolution, dense, lookup, table
from fop_optax.capture.values import (
  BiasUse,
  Key,
  Linear,
  Mark,
  Matching,
  ParamView,
  Part,
  Path,
  Use,
  Value,
)
from fop_optax.losses import NORMAL, SOFTMAX

_WHOLE = {
  primitives.cond_p: "it is used inside a branch (`cond`)",
  primitives.while_p: "it is used inside a loop of unknown length (`while`)",
  primitives.custom_jvp_call_p: "it goes into a function with a rule of its own (`custom_jvp`)",
  primitives.custom_vjp_call_p: "it goes into a function with a rule of its own (`custom_vjp`)",
  primitives.dynamic_slice_p: "it is sliced at a traced index; scan over the slices instead",
  primitives.concatenate_p: "it is joined with other arrays before it is used (`concatenate`)",
  primitives.mul_p: "it is multiplied entry by entry (`mul`)",
  primitives.add_p: "it is added to something that is not the output of one layer (`add`)",
  primitives.select_n_p: "it is masked or chosen entry by entry (`select_n`)",
}


@dataclasses.dataclass
class Found:
  """What a walk leaves behind.

  Attributes:
    uses: products in which a parameter is the weight, by key.
    biases: additions of a parameter to the output of such a product.
    refused: for each parameter with a use that is not understood, the first reason.
    marks: the marked losses.
  """

  uses: dict[Key, Use] = dataclasses.field(default_factory=dict)
  biases: list[BiasUse] = dataclasses.field(default_factory=list)
  refused: dict[int, str] = dataclasses.field(default_factory=dict)
  marks: list[Mark] = dataclasses.field(default_factory=list)


def walk(jaxpr: Any, shapes: Sequence[tuple[int, ...]], batch: Sequence[bool]) -> Found:
  """Walks the jaxpr of `loss(*parameters, *arguments)`, whose first output is the loss.

  Args:
    jaxpr: of the loss, open.
    shapes: of the parameters.
    batch: for each further argument, whether it differs between examples.
  """
  found = Found()
  inputs = [Value(view=ParamView(leaf, (), shape)) for leaf, shape in enumerate(shapes)]
  inputs += [Value(batch=flag) for flag in batch]
  needed = [True] + [False] * (len(jaxpr.outvars) - 1)
  _Frame(jaxpr, needed, (), (), found).run(inputs)
  return found


@dataclasses.dataclass
class _Frame:
  """The walk of one jaxpr: at `path`, within scans of lengths `scans`."""

  jaxpr: Any
  needed: Sequence[bool]
  path: Path
  scans: tuple[int, ...]
  found: Found

  def __post_init__(self):
    self.live, self.wanted = flow.relevant(self.jaxpr, self.needed)
    read = [atom for index in self.live for atom in self.jaxpr.eqns[index].invars]
    read += [atom for atom, need in zip(self.jaxpr.outvars, self.needed, strict=True) if need]
    self.consumers = Counter(atom for atom in read if not isinstance(atom, core.Literal))

  def run(self, inputs: Sequence[Value]) -> list[Value]:
    env = dict(zip(self.jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
      if isinstance(atom, core.Literal):
        return Value()
      value = env.get(atom, Value())  # a constant
      if value.linear and self.consumers[atom] != 1:  # its cotangent is not that of the sum alone
        return dataclasses.replace(value, linear=None)
      return value

    for index, equation in enumerate(self.jaxpr.eqns):
      operands = [read(atom) for atom in equation.invars]
      outputs = None
      if index in self.live:
        outputs = _rules().get(equation.primitive, _Frame._whole)(self, index, equation, operands)
      if outputs is None:
        batch = any(operand.batch for operand in operands)
        outputs = [Value(batch)] * len(equation.outvars)
      env.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in self.jaxpr.outvars]

  # Rules: (index, equation, operands) -> values of the outputs, or None for plain ones.

  def _whole(self, index: int, equation: Any, operands: Sequence[Value]) -> None:
    """An equation that is not looked into: parameters that enter it are refused."""
    del index
    why = _WHOLE.get(
      equation.primitive,
      f"it is used in `{equation.primitive}`, which is neither a product nor a view",
    )
    self._refuse(equation, operands, why)

  def _join(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Parameters joined along an axis: each is a part of the weight."""
    variables, axis = equation.invars, int(equation.params["dimension"])
    views = [operand.view for operand in operands if operand.view]
    if (
      len(views) < len(operands)
      or any(map(self._repeated, variables, views))
      or len({view.levels for view in views}) > 1
    ):
      return self._whole(index, equation, operands)
    parts, start = [], 0
    for view in views:
      parts.append(Part(view, axis, start, view.shape[axis]))
      start += view.shape[axis]
    return [Value(False, parts=tuple(parts))]

  def _move(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Casts, reshapes, transposes, slices: views stay views."""
    value = operands[0]
    taken = rules.steps()[equation.primitive](equation)
    if taken is not None and value.parts:
      parts = rules.parts_after(value.parts, taken)
      if parts:
        return [Value(value.batch, parts=parts)]
      return self._refuse(equation, operands, _WHOLE[primitives.concatenate_p])
    if taken is None:
      return self._whole(index, equation, operands)
    shapes = [tuple(variable.aval.shape) for variable in equation.outvars]
    if value.view and self._repeated(equation.invars[0], value.view):
      if any(taken):
        return self._refuse(equation, operands, "its entries are repeated before it is used")
      shapes = [value.view.shape]
    return [
      Value(
        value.batch,
        rules.viewed(value.view, step, shape) if value.view else None,
        linear=rules.linear_after(value.linear, step) if value.linear else None,
      )
      for step, shape in zip(taken, shapes, strict=True)
    ]

  def _broadcast(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """New axes of size one, or repetition, which only a bias may undergo."""
    value = operands[0]
    if len(operands) > 1 or value.parts:
      return self._whole(index, equation, operands)
    view, linear = value.view, value.linear
    if view:
      core_shape = rules.broadcast_core(equation, view.shape)
      view = rules.viewed(view, (("reshape", core_shape),), core_shape)
    if linear:
      shape = tuple(equation.outvars[0].aval.shape)
      same = math.prod(shape) == math.prod(equation.invars[0].aval.shape)
      linear = linear.reshaped(shape) if same else None
    return [Value(value.batch, view, linear=linear)]

  def _dot(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """The product of a weight with anything else is a use of a layer."""
    dtypes = [equation.invars[i].aval.dtype for i in (0, 1)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
      why = f"it is used in a product of {dtypes[0]} and {dtypes[1]}"
      return self._refuse(equation, operands, why)
    return self._product(index, equation, operands, dense.match)

  def _convolution(self, index: int, equation: Any, operands: Sequence[Value]):
    """A convolution with a weight as its kernel is a use of a layer."""
    return self._product(index, equation, operands, convolution.match)

  def _gather(self, index: int, equation: Any, operands: Sequence[Value]):
    """Looking up rows of a weight is a use of a layer."""
    return self._product(index, equation, operands, lookup.match)

  def _product(
    self, index: int, equation: Any, operands: Sequence[Value], match: Callable
  ) -> list[Value] | None:
    weights = [side for side in (0, 1) if operands[side].views]
    if not weights:
      return None
    if len(weights) == 2:
      return self._refuse(equation, operands, "it is multiplied with another parameter")
    (side,) = weights
    view, batch = operands[side].view, operands[1 - side].batch
    if operands[side].parts:
      if match is not dense.match:
        return self._whole(index, equation, operands)
      for number, part in enumerate(operands[side].parts):
        self._use(index, equation, match(equation, side, part), part.view, batch, number)
      return [Value(batch)]
    if view is None or self._repeated(equation.invars[side], view):
      return self._refuse(equation, operands, "its entries are repeated before it is used")
    matching = match(equation, side)
    if isinstance(matching, str):
      return self._refuse(equation, operands, matching)
    key = self._use(index, equation, matching, view, batch)
    return [Value(batch, linear=Linear(key, view.leaf, matching.axes))]

  def _use(
    self,
    index: int,
    equation: Any,
    matching: Matching,
    view: ParamView,
    batch: bool,
    part: int = 0,
  ) -> Key:
    key = Key((*self.path, index), part)
    within = math.prod(self.scans[depth] for depth in view.levels)
    self.found.uses[key] = Use(
      key=key,
      leaf=view.leaf,
      view=view.steps + matching.steps + ((("stack",),) if view.levels else ()),
      levels=view.levels,
      product=matching.product,
      stack=within * matching.stack,
      inputs=matching.inputs,
      outputs=matching.outputs,
      rows=matching.rows * math.prod(self.scans) // within,
      own_rows=matching.rows,
      batch=batch,
      source=_compat.source_of(self.jaxpr, equation),
    )
    return key

  def _add(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """A sum: of a product's output and its bias, of a table and anything, or of anything else."""
    shape = tuple(equation.outvars[0].aval.shape)
    sums = [
      operand.linear
      for operand, variable in zip(operands, equation.invars, strict=True)
      if operand.linear and tuple(variable.aval.shape) == shape
    ]
    views = [view for operand in operands for view in operand.views]
    batch = any(operand.batch for operand in operands)
    if not views:  # of two products' outputs, the choice must not depend on the spelling
      linear = min(sums, key=lambda s: (s.leaf, s.use)) if sums else None
      return [Value(batch, linear=linear)]
    if len(views) >= 2:
      return self._whole(index, equation, operands)
    (view,) = views
    why = self._bias(view, sums[0], shape) if sums else _WHOLE[primitives.add_p]
    if why:
      side = int(bool(operands[1].views))
      matching = table.match(equation, side, view) if batch else None
      if matching is None:
        return self._refuse(equation, operands, why)
      self._use(index, equation, matching, view, batch)
    return [Value(batch)]

  def _bias(self, view: ParamView, linear: Linear, shape: tuple[int, ...]) -> str:
    """Joins a view that is added to a product's output of `shape` to its layer, or says why not."""
    if len(view.shape) != len(shape):  # a scalar
      return _WHOLE[primitives.add_p]
    steps = rules.bias_steps(linear, view, shape)
    if isinstance(steps, str):
      return steps
    if view.levels != self.found.uses[linear.use].levels:
      return "it is added to a product within a `scan`, of which only one is scanned over"
    steps = view.steps + steps + ((("stack",),) if view.levels else ())
    self.found.biases.append(BiasUse(view.leaf, steps, linear.use))
    return ""

  def _same(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Values that pass unchanged, as through `optimization_barrier`."""
    if any(device is not None for device in equation.params.get("devices", ())):
      return self._whole(index, equation, operands)
    return list(operands)

  def _inline(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """`jit`, `checkpoint`: walked as if they were written out."""
    inner, _ = _compat.open_jaxpr(flow.inner_jaxpr(equation))
    if equation.params.get("differentiated"):
      return self._refuse(equation, operands, "it is used in a gradient inside the loss")
    if not _unsharded(equation):
      return self._refuse(equation, operands, "it goes into a `jit` with shardings of its own")
    if equation.params.get("name") in (SOFTMAX, NORMAL):
      terms = math.prod(equation.invars[0].aval.shape[:-1])
      mark = Mark((*self.path, index), equation.params["name"], terms, self.scans)
      self.found.marks.append(mark)
    frame = _Frame(inner, self._needed(equation), (*self.path, index), self.scans, self.found)
    return frame.run(operands)

  def _scan(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """A scan: weights it goes over are stacked, constant ones are used several times."""
    body, _ = _compat.open_jaxpr(equation.params["jaxpr"])
    consts, carry = _compat.scan_split(equation.params, len(operands))
    length, depth = int(equation.params["length"]), len(self.scans)
    flags, batch = flow.scan_depends(equation, [operand.batch for operand in operands])
    needed, _ = flow.scan_relevant(equation, self._needed(equation))
    carried = operands[consts : consts + carry]
    self._refuse(equation, carried, "it is carried through a `scan` that may change it")
    inputs = [Value(flag) for flag in flags]
    for i, operand in enumerate(operands):
      if operand.views and i < consts:
        inputs[i] = Value(flags[i], operand.view, operand.parts)
      elif operand.parts:
        self._whole(index, equation, [operand])
      elif operand.view and i >= consts + carry:
        if self._repeated(equation.invars[i], operand.view):
          self._refuse(equation, [operand], "its entries are repeated before it is used")
          continue
        view = rules.viewed(operand.view, (("scan", length),), operand.view.shape[1:])
        inputs[i] = Value(flags[i], dataclasses.replace(view, levels=(*view.levels, depth)))
    frame = _Frame(body, needed, (*self.path, index), (*self.scans, length), self.found)
    outputs = frame.run(inputs)
    leaving = [out for out, need in zip(outputs, needed, strict=True) if need]
    self._refuse(equation, leaving, "it leaves a `scan` as an output")
    return [Value(flag) for flag in batch]

  def _needed(self, equation: Any) -> list[bool]:
    """Which outputs of an equation a gradient comes back to."""
    return [variable in self.wanted for variable in equation.outvars]

  def _repeated(self, variable: Any, view: ParamView) -> bool:
    return view.shape != tuple(variable.aval.shape)

  def _refuse(self, equation: Any, operands: Sequence[Value], why: str) -> None:
    for view in (view for operand in operands for view in operand.views):
      if view.leaf not in self.found.refused:
        source = _compat.source_of(self.jaxpr, equation)
        self.found.refused[view.leaf] = f"{why} at {source}" if source else why


def _unsharded(equation: Any) -> bool:
  shardings = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
  return all(type(sharding).__name__ == "UnspecifiedValue" for sharding in shardings)


@functools.cache
def _rules() -> dict[Any, Callable[..., list[Value] | None]]:
  return {
    **dict.fromkeys(rules.steps(), _Frame._move),
    _compat.unexported()["optimization_barrier"]: _Frame._same,
    primitives.device_put_p: _Frame._same,
    primitives.broadcast_in_dim_p: _Frame._broadcast,
    primitives.concatenate_p: _Frame._join,
    primitives.dot_general_p: _Frame._dot,
    primitives.conv_general_dilated_p: _Frame._convolution,
    primitives.gather_p: _Frame._gather,
    primitives.add_p: _Frame._add,
    **dict.fromkeys(flow.INLINED, _Frame._inline),
    primitives.scan_p: _Frame._scan,
  }
