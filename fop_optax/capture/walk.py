"""First pass: a pure walk over the loss's jaxpr that finds uses of parameters, and reasons.

One loop, an environment and a rule for each primitive. Every variable has a `Value`: whether it
depends on the batch, whether it is a view of a parameter, whether it is the output of a product.
The walk evaluates nothing but constants. Nested jaxprs of `jit`, `checkpoint` and `scan` are walked
like the outer one; every other equation is taken whole.

What parameters do where there is no batch (penalties, the network at fixed points) refuses nothing,
as long as it is a term of the loss. Where it meets the batch, the output of a product with a
constant counts as if the constant were repeated in every example (`_Frame._meet`).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat, views
from fop_optax.capture import biases, entries, flow, repeated, rules
from fop_optax.capture.growth import Growth
from fop_optax.capture.kinds import convolution, dense, lookup, table
from fop_optax.capture.marks import Mark, read_mark
from fop_optax.capture.values import (
  ONE_HOT,
  BiasUse,
  Constant,
  Key,
  Linear,
  Matching,
  ParamView,
  Part,
  Path,
  Shifted,
  Use,
  Value,
  Window,
)
from fop_optax.layers import Bias

_WHOLE = {
  primitives.cond_p: "it is used inside a branch (`cond`)",
  primitives.while_p: "it is used inside a loop of unknown length (`while`)",
  primitives.custom_jvp_call_p: "it goes into a function with a rule of its own (`custom_jvp`)",
  primitives.custom_vjp_call_p: "it goes into a function with a rule of its own (`custom_vjp`)",
  primitives.dynamic_slice_p: "it is sliced at a traced index; scan over the slices instead",
  primitives.concatenate_p: "it is joined with other arrays before it is used (`concatenate`)",
  primitives.convert_element_type_p: "it is cast to a type that is not real floating",
  primitives.complex_p: "it becomes a part of complex numbers",
  primitives.mul_p: "it is multiplied entry by entry, or by a number that is not fixed (`mul`)",
  primitives.div_p: "it is divided entry by entry, or by a number that is not fixed (`div`)",
  primitives.add_p: "it is added to something that is not the output of one layer (`add`)",
  primitives.sub_p: "it is added to something that is not the output of one layer (`sub`)",
  primitives.select_n_p: "it is masked or chosen entry by entry (`select_n`)",
}
_REPEATED = "its entries are repeated before it is used"
# Equations of several operands of one shape, or of 1 where that is longer: entry by entry.
_ENTRYWISE = frozenset((
  primitives.add_p, primitives.add_jaxvals_p, primitives.sub_p, primitives.mul_p,
  primitives.div_p, primitives.max_p, primitives.min_p, primitives.pow_p, primitives.rem_p,
  primitives.atan2_p, primitives.nextafter_p, primitives.select_n_p, primitives.clamp_p,
))  # fmt: skip


@dataclasses.dataclass
class Found:
  """What a walk leaves behind.

  Attributes:
    shapes: of the parameters.
    uses: products in which a parameter is the weight, by key.
    biases: additions of a parameter to the output of such a product.
    refused: for each parameter with a use that is not understood, the first reason.
    apart: for each parameter that is used in other ways where there is no batch, the first of them.
    marks: the marked losses.
    meetings: where a product with a constant meets the batch: the equation, the operand, and along
      which axis of the output it is repeated. None: nowhere, one row of it is as good as another.
    as_weight: for sums of a parameter and what depends on the batch, which are tables if they are
      rows, the products of which they are the weight;
    as_rows: and the other equations that they enter.
  """

  shapes: Sequence[tuple[int, ...]]
  uses: dict[Key, Use] = dataclasses.field(default_factory=dict)
  biases: list[BiasUse] = dataclasses.field(default_factory=list)
  refused: dict[int, str] = dataclasses.field(default_factory=dict)
  apart: dict[int, str] = dataclasses.field(default_factory=dict)
  marks: list[Mark] = dataclasses.field(default_factory=list)
  meetings: dict[Path, dict[int, int | None]] = dataclasses.field(default_factory=dict)
  as_weight: dict[Key, set[Path]] = dataclasses.field(default_factory=dict)
  as_rows: dict[Key, set[Path]] = dataclasses.field(default_factory=dict)


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
    why = rules.unsuited(variable.aval.dtype)
    if why:
      found.refused[leaf], inputs[leaf] = why, Value(tainted=True)
  inputs += [Value(batch=flag) for flag in batch]
  aux = len(jaxpr.outvars) - 1
  needed, affine = [True] + [False] * aux, [True] + [None] * aux
  frame = _Frame(jaxpr, needed, affine, (), (), (), False, found, growth)
  frame.run(inputs, consts)
  for leaf, why in frame.pending:
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


@dataclasses.dataclass
class _Frame:
  """The walk of one jaxpr: at `path`, within scans of lengths `scans`, the innermost at `loop`.

  `each` says whether one of these scans goes over examples, `needed` which outputs a gradient comes
  back to, `affine` which of them the loss is a sum of.
  """

  jaxpr: Any
  needed: Sequence[bool]
  affine: Sequence[bool | None]
  path: Path
  scans: tuple[int, ...]
  loop: Path
  each: bool
  found: Found
  growth: Growth | None

  def __post_init__(self):
    self.live, self.wanted = flow.relevant(self.jaxpr, self.needed)
    self.grows = self.growth.of(self.jaxpr, self.path) if self.growth else {}
    self.pending: set[tuple[int, str]] = set()  # all that there were
    readers: dict[Any, list[Any]] = {}
    for index in self.live:
      equation = self.jaxpr.eqns[index]
      for atom in equation.invars:
        if not isinstance(atom, core.Literal):
          readers.setdefault(atom, []).append(equation)
    for atom, need in zip(self.jaxpr.outvars, self.needed, strict=True):
      if need and not isinstance(atom, core.Literal):
        readers.setdefault(atom, []).append(None)
    # the cotangent of a variable is that of the one place that reads it, or of disjoint slices
    self.shared = {v for v, by in readers.items() if len(by) > 1 and not rules.disjoint(by)}

  def run(self, inputs: Sequence[Value], consts: Sequence[Any]) -> list[Value]:
    env = dict(zip(self.jaxpr.invars, inputs, strict=True))
    for variable, const in zip(self.jaxpr.constvars, consts, strict=True):
      known = None if isinstance(const, jax.core.Tracer) else Constant(lambda const=const: const)
      env[variable] = Value(constant=known)
    tainted = [value.tainted for value in inputs]
    self.terms, _ = flow.terms(self.jaxpr, self.affine, tainted)

    def read(atom: Any) -> Value:
      if isinstance(atom, core.Literal):
        return Value(constant=Constant(lambda: atom.val))
      value = env[atom]
      if value.linears and atom in self.shared:
        value = dataclasses.replace(value, linears=())
      if value.shifted and not value.shifted.own and atom in self.shared:
        value = dataclasses.replace(value, shifted=None)  # activations are read more than once
      return value

    for index, equation in enumerate(self.jaxpr.eqns):
      operands = [read(atom) for atom in equation.invars]
      env.update(zip(equation.outvars, self._outputs(index, equation, operands), strict=True))
    return [read(atom) for atom in self.jaxpr.outvars]

  def _outputs(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """The values of an equation's outputs."""
    nested = equation.primitive in (*flow.INLINED, primitives.scan_p)
    grows = [
      v in self.grows and (v not in self.terms or not _apart(operands)) for v in equation.outvars
    ]
    self.free = not any(operand.batch for operand in operands) and not any(grows)
    self.new: set[tuple[int, str]] = set()
    self.new_products: set[Key] = set()
    if not self.free and not nested:
      self._meet(index, equation, operands)
    outputs = None
    if index in self.live:
      outputs = _rules().get(equation.primitive, _Frame._whole)(self, index, equation, operands)
    if equation.primitive not in flow.INLINED or outputs is None:
      self._read_sums(index, operands, outputs or ())
    if nested and outputs is not None:
      self.pending |= self.new
      return outputs
    plain = self._plain(equation, operands)
    self.pending |= plain.pending
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
        pending=plain.pending if variable in self.wanted and not grown else frozenset(),
      )
      for value, variable, grown in zip(outputs, equation.outvars, grows, strict=True)
    ]

  def _read_sums(self, index: int, operands: Sequence[Value], outputs: Sequence[Value]) -> None:
    """Notes where sums of a parameter and what depends on the batch are no weights."""
    kept = {output.shifted.table for output in outputs if output.shifted}
    here = (*self.path, index)
    for operand in operands if index in self.live else ():
      key = operand.shifted.table if operand.shifted else None
      if key and key not in kept and here not in self.found.as_weight.get(key, ()):
        self.found.as_rows.setdefault(key, set()).add(here)

  def _plain(self, equation: Any, operands: Sequence[Value]) -> Value:
    """What is known of an output by its operands alone."""
    batch = any(operand.batch for operand in operands)
    tainted = flow.carries(equation) and any(operand.tainted for operand in operands)
    value = Value(batch, tainted=tainted)
    if batch:
      return value
    known = [operand.constant for operand in operands if operand.constant]
    if len(equation.outvars) == 1 and len(known) == len(operands):
      evaluate = functools.partial(_evaluate, self.jaxpr, equation, known)
      return dataclasses.replace(value, constant=Constant(evaluate))
    return dataclasses.replace(
      value,
      products=frozenset(self.new_products).union(*(operand.products for operand in operands)),
      pending=frozenset(self.new).union(*(operand.pending for operand in operands)),
    )

  def _meet(self, index: int, equation: Any, operands: Sequence[Value]) -> None:
    """What is made of parameters alone meets the batch.

    A product with a constant is then repeated along the axis that grows, as if the constant were
    the same in every example; the parameters of everything else are refused. Neither is so where
    two terms of the loss are added.
    """
    for number, (variable, operand) in enumerate(zip(equation.invars, operands, strict=True)):
      if not _apart([operand]):
        continue
      term = variable in self.terms or index not in self.live
      if not term:
        for leaf, why in operand.pending:
          self.found.refused.setdefault(leaf, why)
      if operand.products:
        axis = None if term else self._repeated_axis(equation, variable)
        self.found.meetings.setdefault((*self.path, index), {})[number] = axis
        if not term:
          self._repeat(equation, operand.products, axis)

  def _repeated_axis(self, equation: Any, variable: Any) -> int | None:
    """The axis of an equation's output along which an operand is repeated for the batch."""
    out = equation.outvars[0]
    if equation.primitive is primitives.broadcast_in_dim_p:
      dims = equation.params["broadcast_dimensions"]
    elif equation.primitive in _ENTRYWISE:
      dims = range(len(variable.aval.shape))
    elif equation.primitive is primitives.dot_general_p:
      free = repeated.free_axes(equation, 1 - equation.invars.index(variable))
      axes = [axis for axis in self.grows.get(out, ()) if axis in free]
      return axes[0] if len(axes) == 1 else None
    else:
      return None
    own = dict(zip(dims, variable.aval.shape, strict=True))
    axes = [axis for axis in self.grows.get(out, ()) if own.get(axis, 1) == 1]
    return axes[0] if len(axes) == 1 else None

  def _repeat(self, equation: Any, keys: frozenset[Key], axis: int | None) -> None:
    """Notes how often the rows of products with a constant are repeated."""
    for key in keys:
      use = self.found.uses[key]
      if use.each:  # a scan over the examples repeats it
        self.found.uses[key] = dataclasses.replace(use, batch=True)
        continue
      times = 0 if axis is None else equation.outvars[0].aval.shape[axis]
      possible = times and use.product.kind == "dense" and use.loop == self.loop[: len(use.loop)]
      if not possible or use.repeats not in (0, times):
        where = f"`{equation.primitive}`" + self._source(equation)
        why = f"its product with a constant meets the batch in {where}, where it cannot be repeated"
        self.found.refused.setdefault(use.leaf, why)
      elif not use.repeats:
        self.found.uses[key] = dataclasses.replace(use, repeats=times, rows=use.rows * times)

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
    """Parameters joined along an axis: each is a part of the weight, or a token of the batch."""
    variables, axis = equation.invars, int(equation.params["dimension"])
    if not self.free:
      return self._tokens(index, equation, operands, axis)
    pieces = [
      rules.written_out(operand.view, tuple(variable.aval.shape))
      for operand, variable in zip(operands, variables, strict=True)
      if operand.view
    ]
    if len(pieces) < len(operands) or len({view.levels for view in pieces}) > 1:
      return self._whole(index, equation, operands)
    if one := rules.joined(pieces, axis):
      return [Value(view=one)]
    parts, start = [], 0
    for view in pieces:
      parts.append(Part(view, axis, start, view.shape[axis]))
      start += view.shape[axis]
    return [Value(parts=tuple(parts))]

  def _stack(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Tokens joined to the batch along a new axis."""
    if not self.free:
      return self._tokens(index, equation, operands, int(equation.params["axis"]))
    return self._whole(index, equation, operands)

  def _tokens(
    self, index: int, equation: Any, operands: Sequence[Value], axis: int
  ) -> list[Value] | None:
    """Parameters joined to what depends on the batch: tables, each a part of the whole."""
    start, rank = 0, len(equation.outvars[0].aval.shape)
    for i, (operand, variable) in enumerate(zip(operands, equation.invars, strict=True)):
      shape, view, found = tuple(variable.aval.shape), operand.view, None
      if len(shape) < rank:  # a stack
        shape = (*shape[:axis], 1, *shape[axis:])
        core_shape = (*view.shape[:axis], 1, *view.shape[axis:]) if view else ()
        view = rules.viewed(view, (("reshape", core_shape),), core_shape) if view else None
      if view:
        cut = Window(axis, start, shape[axis])
        found = table.match(shape, i, view, self.found.shapes[view.leaf], cut)
      if found:
        self._use(index, equation, *found, i)
      else:
        self._refuse(equation, [operand], _WHOLE[primitives.concatenate_p])
      start += shape[axis]
    return None

  def _move(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Casts, reshapes, transposes, slices: views stay views."""
    value = operands[0]
    taken = rules.steps()[equation.primitive](equation)
    if taken is None:
      return self._whole(index, equation, operands)
    if value.parts:
      shape = tuple(equation.outvars[0].aval.shape)
      parts = rules.parts_after(value.parts, taken[0], shape) if len(taken) == 1 else None
      if parts:
        return [Value(parts=parts)]
      return self._refuse(equation, operands, _WHOLE[primitives.concatenate_p])
    before = tuple(equation.invars[0].aval.shape)
    return [
      Value(
        view=rules.moved(value.view, step, before) if value.view else None,
        linears=_each(value.linears, lambda linear, step=step: biases.after(linear, step, before)),
        shifted=rules.shifted_after(value.shifted, step, before) if value.shifted else None,
      )
      for step in taken
    ]

  def _pad(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Padding with zeros keeps a view."""
    padding = operands[1].constant
    if padding is None or padding.number() != 0:
      return self._whole(index, equation, operands)
    return self._move(index, equation, operands)

  def _tile(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Repetition of the whole, along new axes too."""
    view = operands[0].view
    if not view:
      return self._whole(index, equation, operands)
    shape = tuple(equation.invars[0].aval.shape)
    return [Value(view=rules.tiled(view, shape, equation.params["reps"]))]

  def _broadcast(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """New axes of size one, or repetition, which only a bias may undergo."""
    value = operands[0]
    if len(operands) > 1:
      return self._whole(index, equation, operands)
    if value.parts:
      ones = rules.broadcast_core(equation, tuple(equation.invars[0].aval.shape))
      parts = rules.parts_after(value.parts, (("reshape", ones),), ones)
      return [Value(parts=parts)] if parts else self._whole(index, equation, operands)
    view, linears = value.view, value.linears
    if view:
      core_shape = rules.broadcast_core(equation, view.shape)
      view = rules.viewed(view, (("reshape", core_shape),), core_shape)
    if linears:
      before, shape = (tuple(v.aval.shape) for v in (equation.invars[0], equation.outvars[0]))
      step = (("reshape", shape),) if math.prod(shape) == math.prod(before) else (("repeat",),)
      linears = _each(linears, lambda linear: biases.after(linear, step, before))
    return [Value(view=view, linears=linears)]

  def _scale(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """A view, or a product's output, times a number or divided by one."""
    if equation.primitive is primitives.neg_p:
      return [_times(operands[0], -1.0)]
    shape = tuple(equation.outvars[0].aval.shape)
    whole = [tuple(variable.aval.shape) == shape for variable in equation.invars]
    for side in (0, 1) if equation.primitive is primitives.mul_p else (0,):
      value, constant = operands[side], operands[1 - side].constant
      if not (value.views or value.linears) or constant is None or not whole[side]:
        continue
      if math.prod(equation.invars[1 - side].aval.shape) > _SMALL and not value.views:
        continue
      number = constant.number()
      if number and equation.primitive is primitives.div_p:
        number = 1 / number
      if number:
        return [_times(value, number)]
    masks = any(
      not operand.tainted and variable.aval.size > 1
      for operand, variable in zip(operands, equation.invars, strict=True)
    )
    if masks and equation.primitive is primitives.mul_p:
      return self._refuse(equation, operands, "it is masked or scaled entry by entry (`mul`)")
    return self._whole(index, equation, operands)

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
    """Looking up rows of a weight is a use of a layer; at fixed indices it is a view."""
    view, indices = operands[0].view, operands[1].constant
    # the same indices in every example are a lookup
    steps = rules.gathered(equation, indices.value) if view and indices and self.free else None
    if view and steps:
      return [Value(view=rules.moved(view, steps, tuple(equation.invars[0].aval.shape)))]
    return self._product(index, equation, operands, lookup.match)

  def _dynamic_slice(self, index: int, equation: Any, operands: Sequence[Value]):
    """A window of a weight: looked up at an index that depends on the batch, else a view."""
    source, *starts = operands
    if any(start.batch for start in starts):
      return self._product(index, equation, [source, Value(batch=True)], lookup.match_slice)
    view, known = source.view, [start.constant for start in starts if start.constant]
    if view is None or len(known) < len(starts) or self._repeated(equation.invars[0], view):
      return self._whole(index, equation, operands)
    sizes = tuple(equation.outvars[0].aval.shape)
    step = views.window(view.shape, [int(start.value) for start in known], sizes)
    return [Value(view=rules.viewed(view, (step,), sizes))]

  def _product(
    self, index: int, equation: Any, operands: Sequence[Value], match: Callable
  ) -> list[Value] | None:
    weights = [side for side in (0, 1) if operands[side].views]
    if not weights:
      return self._shifted(index, equation, operands) if match is dense.match else None
    if len(weights) == 2:
      return self._refuse(equation, operands, "it is multiplied with another parameter")
    (side,) = weights
    view = operands[side].view
    if operands[side].parts:
      if match is not dense.match:
        return self._whole(index, equation, operands)
      if any(self._repeated(equation.invars[side], *part[:2]) for part in operands[side].parts):
        return self._refuse(equation, operands, _REPEATED)
      uses = []
      for number, part in enumerate(operands[side].parts):
        use = self._use(index, equation, match(equation, side, part), part.view, number)
        if use is None:
          return self._refuse(equation, operands, _WHOLE[primitives.concatenate_p])
        uses.append(use)
      beside = tuple(linear for linear in uses if linear.window)
      return [Value(linears=beside or (min(uses, key=_order),))]
    assert view
    shape = tuple(equation.invars[side].aval.shape)
    if match is dense.match:  # repeated along the stack it has rows there
      view = rules.written_out(view, shape, keep=dense.stacked(equation, side))
      matching = dense.match(equation, side, own=view.shape)
    else:
      view = rules.written_out(view, shape)
      matching = match(equation, side)
    if isinstance(matching, str):
      return self._refuse(equation, operands, matching)
    linear = self._use(index, equation, matching, view)
    return [Value(linears=(linear,))] if linear else None

  def _shifted(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """A product with a parameter plus something that depends on the batch: `x (w + u)`.

    If both are activations, the sum is one of a table: of `u` that has nothing to do with `w` that
    is assumed, unless the rows of the sum are contracted, which makes them inputs.
    """
    sums = [(side, sum_) for side in (0, 1) if (sum_ := operands[side].shifted)]
    if len(sums) != 1 or not operands[1 - sums[0][0]].batch:
      return None
    ((side, (key, view, own)),) = sums
    shape = tuple(equation.invars[side].aval.shape)
    contract, stacked = (axes[side] for axes in equation.params["dimension_numbers"])
    repeated = {axis for axis, size in enumerate(view.shape) if size != shape[axis]}
    columns = max(axis for axis, size in enumerate(view.shape) if size > 1)
    moved = view.steps != self.found.uses[key].view[: len(view.steps)]
    if not repeated <= set(stacked) or not (own or not (moved or columns in contract)):
      return None
    self.found.as_weight.setdefault(key, set()).add((*self.path, index))
    linear = self._use(index, equation, dense.match(equation, side, own=view.shape), view)
    return [Value(linears=(linear,))] if linear else None

  def _use(
    self, index: int, equation: Any, matching: Matching, view: ParamView, part: int = 0
  ) -> Linear | None:
    """Notes a use of a weight; what its output is to a bias that may follow."""
    key = Key((*self.path, index), part)
    within = math.prod(self.scans[depth] for depth in view.levels)
    shape, steps = self.found.shapes[view.leaf], view.steps + matching.steps
    try:
      steps, fold, times = entries.distinct(steps + _ends(view), shape, within)
      if matching.product.kind in ONE_HOT and fold and -1 in (fold.inputs or ()):
        raise ValueError("it is padded with zeros before rows of it are looked up")
    except ValueError as why:
      return self._refuse(equation, [Value(view=view)], str(why))
    stack, inputs, outputs = views.shape_of(steps, shape)
    self.found.uses[key] = Use(
      key=key,
      leaf=view.leaf,
      view=steps,
      levels=view.levels,
      product=matching.product,
      stack=stack,
      inputs=inputs,
      outputs=outputs,
      rows=times * matching.rows * math.prod(self.scans) // within,
      batch=not self.free,
      loop=self.loop,
      each=self.each,
      where=functools.partial(_compat.source_of, self.jaxpr, equation),
      scale=view.scale,
      fold=fold,
    )
    if self.free:
      self.new_products.add(key)
    return Linear(key, view.leaf, matching.axes, window=matching.window)

  def _add(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """A sum: of a product's output and its bias, of a table and anything, or of anything else."""
    if equation.primitive is primitives.sub_p:
      operands = [operands[0], _times(operands[1], -1.0)]
    shape = tuple(equation.outvars[0].aval.shape)
    sums = [
      operand.linears
      for operand, variable in zip(operands, equation.invars, strict=True)
      if operand.linears and tuple(variable.aval.shape) == shape
    ]
    holders = [operand for operand in operands if operand.views]
    if not holders:  # of two products' outputs, the choice must not depend on the spelling
      linears = min(sums, key=lambda linears: _order(linears[0])) if sums else ()
      shifted = [operand.shifted for operand in operands if operand.shifted]
      return [Value(linears=linears, shifted=shifted[0] if len(shifted) == 1 else None)]
    if len(holders) == 2:
      return self._whole(index, equation, operands)
    (holder,) = holders
    (other,) = [operand for operand in operands if not operand.views]
    view = holder.view
    if view and len(view.shape) == len(shape) and not (other.batch or other.tainted):
      return [Value(view=view)]  # x (w + c) has the gradient of x w: none goes through c
    why = self._bias(holder, sums[0], shape) if sums else _WHOLE[equation.primitive]
    if why:
      side, use = int(bool(operands[1].views)), None
      if view and not self.free:
        found = table.match(shape, side, view, self.found.shapes[view.leaf], None)
        use = self._use(index, equation, *found) if found else None
      if view is None or use is None:
        return self._refuse(equation, operands, why)
      own = view.leaf in operands[1 - side].leaves
      return [Value(shifted=Shifted(use.use, view, own))]
    return [Value()]

  def _bias(self, holder: Value, linears: Sequence[Linear], shape: tuple[int, ...]) -> str:
    """Joins what is added to a product's output of `shape` to its layer, or says why not."""
    pieces = holder.parts or holder.views
    if any(len(view.shape) != len(shape) for view in holder.views):
      return _WHOLE[primitives.add_p]
    if any(entries.repeats(view.steps) for view in holder.views):
      return "its entries are repeated or padded with zeros before they are added to a product"
    found = biases.joints(linears, pieces, shape)
    if isinstance(found, str):
      return found
    uses = self.found.uses
    if any(joint.view.levels != uses[joint.linear.use].levels for joint in found):
      return "it is added to a product within a `scan`, of which only one is scanned over"
    folds = [uses[joint.linear.use].fold for joint in found]
    if any(fold and (fold.stack or fold.outputs) for fold in folds):
      return "it is added to a product whose output features are repeated or padded with zeros"
    for linear, view, steps, place in found:
      steps = view.steps + steps + _ends(view)
      if view.levels and place:
        place = biases.stacked(place, math.prod(self.scans[depth] for depth in view.levels))
      bias = Bias(view.leaf, steps, place)
      self.found.biases.append(BiasUse(bias, linear.use, view.scale / linear.factor))
    return ""

  def _same(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """Values that pass unchanged, as through `optimization_barrier`."""
    if any(device is not None for device in equation.params.get("devices", ())):
      return self._whole(index, equation, operands)
    return list(operands)

  def _inline(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """`jit`, `checkpoint`: walked as if they were written out."""
    inner, consts = _compat.open_jaxpr(flow.inner_jaxpr(equation))
    why = ""
    if equation.params.get("differentiated"):
      why = "it is used in a gradient inside the loss"
    elif not _unsharded(equation):
      why = "it goes into a `jit` with shardings of its own"
    if why:
      if not self.free:
        self._meet(index, equation, operands)
      return self._refuse(equation, operands, why)
    mark = read_mark(equation, (*self.path, index), self.scans)
    if mark is not None:
      self.found.marks.append(mark)
    frame = _Frame(
      inner,
      self._needed(equation),
      self._affine(equation),
      (*self.path, index),
      self.scans,
      self.loop,
      self.each,
      self.found,
      self.growth,
    )
    return self._descend(frame, operands, consts)

  def _descend(self, frame: "_Frame", inputs: Sequence[Value], consts: Sequence[Any]):
    outputs = frame.run(inputs, consts)
    self.pending |= frame.pending
    return outputs

  def _scan(self, index: int, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
    """A scan: weights it goes over are stacked, constant ones are used several times."""
    body, constants = _compat.open_jaxpr(equation.params["jaxpr"])
    consts, carry = _compat.scan_split(equation.params, len(operands))
    length, depth = int(equation.params["length"]), len(self.scans)
    flags, batch = flow.scan_depends(equation, [operand.batch for operand in operands])
    batch = [flag or v in self.grows for flag, v in zip(batch, equation.outvars, strict=True)]
    tainted, _ = flow.scan_depends(equation, [operand.tainted for operand in operands])
    needed, _ = flow.scan_relevant(equation, self._needed(equation))
    self._refuse(
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
        self._whole(index, equation, [operand])
      elif operand.view and i >= consts + carry:
        view = rules.scanned(operand.view, length, depth)
        value = dataclasses.replace(value, view=view)
      inputs.append(value)
    self._leave(equation, equation.invars[consts:], operands[consts:], flags)
    affine, _ = flow.scan_terms(equation, self._affine(equation), [o.tainted for o in operands])
    path, scans = (*self.path, index), (*self.scans, length)
    over = (*equation.invars[consts + carry :], *equation.outvars[carry:])
    each = self.each or any(0 in self.grows.get(v, ()) for v in over)
    frame = _Frame(body, needed, affine, path, scans, path, each, self.found, self.growth)
    outputs = self._descend(frame, inputs, constants)
    leaving = [out for out, need in zip(outputs, needed, strict=True) if need]
    self._refuse(equation, leaving, "it leaves a `scan` as an output")
    self._leave(equation, equation.outvars, outputs, flags)
    plain = self._plain(equation, [*operands, *outputs])
    leaves = frozenset().union(*(value.leaves for value in (*operands, *outputs)))
    return [
      Value(flag, tainted=plain.tainted, leaves=leaves)
      if flag
      else Value(
        tainted=plain.tainted,
        leaves=leaves,
        products=out.products,
        pending=out.pending | self.new,
      )
      for flag, out in zip(batch, outputs, strict=True)
    ]

  def _leave(self, equation: Any, variables: Sequence[Any], values: Any, flags: Any) -> None:
    """What goes in or out of a scan over the batch in another way than as a constant meets it."""
    if not any(flags):
      return
    for variable, value in zip(variables, values, strict=True):
      if _apart([value]) and variable not in self.terms and variable in self.wanted:
        for leaf, why in value.pending:
          self.found.refused.setdefault(leaf, why)
        self._repeat(equation, value.products, None)

  def _needed(self, equation: Any) -> list[bool]:
    """Which outputs of an equation a gradient comes back to."""
    return [variable in self.wanted for variable in equation.outvars]

  def _affine(self, equation: Any) -> list[bool | None]:
    """Which outputs of an equation the loss is a sum of; None for those no gradient comes to."""
    return [v in self.terms if v in self.wanted else None for v in equation.outvars]

  def _repeated(self, variable: Any, view: ParamView, joined: int | None = None) -> bool:
    """Whether a variable repeats the entries of a view; along the `joined` axis it is a part."""
    pairs = enumerate(zip(view.shape, variable.aval.shape, strict=True))
    return any(ours != size for axis, (ours, size) in pairs if axis != joined)

  def _refuse(self, equation: Any, operands: Sequence[Value], why: str) -> None:
    """Notes for the parameters among the operands that they are in no layer, unless apart."""
    for view in (view for operand in operands for view in operand.views):
      if view.leaf not in self.found.refused:
        reason = why + self._source(equation)
        if self.free:
          self.new.add((view.leaf, reason))
        else:
          self.found.refused[view.leaf] = reason

  def _source(self, equation: Any) -> str:
    source = _compat.source_of(self.jaxpr, equation)
    return f" at {source}" if source else ""


_SMALL = 64  # constants up to this size are worked out to see whether they are one number


def _evaluate(jaxpr: Any, equation: Any, operands: Sequence[Constant]) -> Any:
  with jax.ensure_compile_time_eval():
    values = [jnp.asarray(operand.value) for operand in operands]
    return _compat.evaluate_equation(jaxpr, equation, values)[0]


def _apart(operands: Sequence[Value]) -> bool:
  """Whether some are made of parameters, without the batch, in other ways than as a view."""
  return any(operand.products or operand.pending for operand in operands)


def _order(linear: Linear) -> tuple[bool, int, Key]:
  """Of several products' outputs that are added, the first is the one that a bias joins."""
  return linear.factor != 1, linear.leaf, linear.use


def _each(linears: Sequence[Linear], function: Callable[[Linear], Linear | None]):
  """`function` of each, as far as it is not None."""
  return tuple(after for linear in linears if (after := function(linear)) is not None)


def _ends(view: ParamView) -> views.View:
  """The step that ends the scans which go over a parameter, if some do."""
  return (("stack",),) if view.levels else ()


def _times(value: Value, number: float) -> Value:
  """What is known of a value times a number."""
  scale = lambda view: dataclasses.replace(view, scale=number * view.scale)
  return dataclasses.replace(
    value,
    view=scale(value.view) if value.view else None,
    parts=tuple(part._replace(view=scale(part.view)) for part in value.parts),
    linears=_each(value.linears, lambda linear: biases.scaled(linear, number)),
  )


def _unsharded(equation: Any) -> bool:
  shardings = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
  return all(type(sharding).__name__ == "UnspecifiedValue" for sharding in shardings)


@functools.cache
def _rules() -> dict[Any, Callable[..., list[Value] | None]]:
  unexported = _compat.unexported()
  return {
    **dict.fromkeys(rules.steps(), _Frame._move),
    primitives.pad_p: _Frame._pad,
    **({unexported["tile"]: _Frame._tile} if "tile" in unexported else {}),
    unexported["optimization_barrier"]: _Frame._same,
    primitives.device_put_p: _Frame._same,
    primitives.broadcast_in_dim_p: _Frame._broadcast,
    primitives.concatenate_p: _Frame._join,
    primitives.dot_general_p: _Frame._dot,
    primitives.conv_general_dilated_p: _Frame._convolution,
    primitives.gather_p: _Frame._gather,
    primitives.dynamic_slice_p: _Frame._dynamic_slice,
    **{p: _Frame._stack for name, p in _compat.unexported().items() if name == "stack"},
    **dict.fromkeys((primitives.add_p, primitives.sub_p), _Frame._add),
    **dict.fromkeys((primitives.mul_p, primitives.div_p, primitives.neg_p), _Frame._scale),
    **dict.fromkeys(flow.INLINED, _Frame._inline),
    primitives.scan_p: _Frame._scan,
  }
