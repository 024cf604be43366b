"""Rules of the walk for products, lookups and sums: where a parameter is used, and its bias."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import views
from fop_optax.capture import biases, entries, steps, view_rules
from fop_optax.capture.frame import Frame
from fop_optax.capture.kinds import convolution, dense, lookup, table
from fop_optax.capture.values import (
  ONE_HOT,
  BiasUse,
  Key,
  Linear,
  Matching,
  ParamView,
  Part,
  Shifted,
  Use,
  Value,
  Window,
)
from fop_optax.layers import Bias


def dot(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """The product of a weight with anything else is a use of a layer."""
  dtypes = [equation.invars[i].aval.dtype for i in (0, 1)]
  if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
    why = f"it is used in a product of {dtypes[0]} and {dtypes[1]}"
    return frame.refuse(equation, operands, why)
  refuse_gathered(frame, equation, operands)
  return product(frame, equation, operands, dense.match)


def refuse_gathered(frame: Frame, equation: Any, operands: Sequence[Value]) -> None:
  """Refuses weights whose matrices are looked up, each to be the weight of some rows.

  As a lookup such a weight has one output factor over all entries of a matrix.
  """
  for side, operand in enumerate(operands):
    contract, stacked = (axes[side] for axes in equation.params["dimension_numbers"])
    for linear in operand.linears if operands[1 - side].batch else ():
      outputs = [i for i, axis in enumerate(linear.axes) if any(a.kind == "out" for a in axis)]
      kept = [axis for axis in outputs if axis not in (*contract, *stacked)]
      use = frame.found.uses.get(linear.use)
      if use and use.product.kind == "lookup" and kept and set(outputs) & set(contract):
        why = (
          "matrices of it are looked up by index and multiplied with rows of the batch"
          f"{frame.source(equation)}. Write, with `m = one_hot(index, len(w))`,"
          " `x = einsum('ne,nd->end', m, x)`, `y = einsum('end,edf->enf', x, w)` and"
          " `einsum('ne,enf->nf', m, y)`"
        )
        frame.found.refused.setdefault(use.leaf, why)


def convolve(frame: Frame, equation: Any, operands: Sequence[Value]):
  """A convolution with a weight as its kernel is a use of a layer."""
  return product(frame, equation, operands, convolution.match)


def gather(frame: Frame, equation: Any, operands: Sequence[Value]):
  """Looking up rows of a weight is a use of a layer; at fixed indices it is a view."""
  view, indices = operands[0].view, operands[1].constant
  # the same indices in every example are a lookup
  taken = steps.gathered(equation, indices.value) if view and indices and frame.free else None
  if view and taken:
    return [Value(view=steps.moved(view, taken, tuple(equation.invars[0].aval.shape)))]
  return product(frame, equation, operands, lookup.match)


def dynamic_slice(frame: Frame, equation: Any, operands: Sequence[Value]):
  """A window of a weight: looked up at an index that depends on the batch, else a view."""
  source, *starts = operands
  if any(start.batch for start in starts):
    return product(frame, equation, [source, Value(batch=True)], lookup.match_slice)
  view, known = source.view, [start.constant for start in starts if start.constant]
  if view is None or len(known) < len(starts) or view_rules.is_repeated(equation.invars[0], view):
    return view_rules.whole(frame, equation, operands)
  sizes = tuple(equation.outvars[0].aval.shape)
  step = views.window(view.shape, [int(start.value) for start in known], sizes)
  return [Value(view=steps.viewed(view, (step,), sizes))]


def product(
  frame: Frame, equation: Any, operands: Sequence[Value], match: Callable
) -> list[Value] | None:
  weights = [side for side in (0, 1) if operands[side].views]
  if match is not dense.match and weights and view_rules.is_complex(equation.outvars[0]):
    return frame.refuse(equation, operands, f"it is complex in a `{equation.primitive}`")
  if not weights:
    return shifted_product(frame, equation, operands) if match is dense.match else None
  if len(weights) == 2:
    why = "it is multiplied with another parameter"
    weights = [side for side in weights if equation.invars[side] not in frame.grows]
    if len(weights) != 1:
      return frame.refuse(equation, operands, why)
    # a token that is repeated over the batch: an input
    frame.refuse(equation, [operands[1 - weights[0]]], why)
  (side,) = weights
  view = operands[side].view
  if operands[side].parts:
    if match is not dense.match:
      return view_rules.whole(frame, equation, operands)
    if any(
      view_rules.is_repeated(equation.invars[side], *part[:2]) for part in operands[side].parts
    ):
      return frame.refuse(equation, operands, view_rules.REPEATED)
    uses = []
    for number, part in enumerate(operands[side].parts):
      use = note_use(frame, equation, match(equation, side, part), part.view, number)
      if use is None:
        return frame.refuse(equation, operands, view_rules.WHOLE[primitives.concatenate_p])
      uses.append(use)
    beside = tuple(linear for linear in uses if linear.window)
    return [Value(linears=beside or (min(uses, key=_order),))]
  assert view
  shape = tuple(equation.invars[side].aval.shape)
  if match is dense.match:  # repeated along the stack it has rows there
    view = steps.written_out(view, shape, keep=dense.stacked(equation, side))
    matching = dense.match(equation, side, own=view.shape)
  else:
    view = steps.written_out(view, shape)
    matching = match(equation, side)
  if isinstance(matching, str):
    return frame.refuse(equation, operands, matching)
  linear = note_use(frame, equation, matching, view)
  return [Value(linears=(linear,))] if linear else None


def shifted_product(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
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
  moved = view.steps != frame.found.uses[key].view[: len(view.steps)]
  if not repeated <= set(stacked) or not (own or not (moved or columns in contract)):
    return None
  frame.found.as_weight.setdefault(key, set()).add(frame.here)
  linear = note_use(frame, equation, dense.match(equation, side, own=view.shape), view)
  return [Value(linears=(linear,))] if linear else None


def note_use(
  frame: Frame, equation: Any, matching: Matching, view: ParamView, part: int = 0
) -> Linear | None:
  """Notes a use of a weight; what its output is to a bias that may follow."""
  if matching.product.kind == "dense" and view_rules.is_complex(equation.outvars[0]):
    matching = dense.of_complex(matching, frame.parts_read(equation.outvars[0]))
  key = Key(frame.here, part)
  within = math.prod(frame.scans[depth] for depth in view.levels)
  shape, taken = frame.found.shapes[view.leaf], view.steps + matching.steps
  try:
    taken, fold, times = entries.distinct(taken + _ends(view), shape, within)
    if matching.product.kind in ONE_HOT and fold and -1 in (fold.inputs or ()):
      raise ValueError("it is padded with zeros before rows of it are looked up")
  except ValueError as why:
    return frame.refuse(equation, [Value(view=view)], str(why))
  stack, inputs, outputs = views.shape_of(taken, shape)
  frame.found.uses[key] = Use(
    key=key,
    leaf=view.leaf,
    view=taken,
    levels=view.levels,
    product=matching.product,
    stack=stack,
    inputs=inputs,
    outputs=outputs,
    rows=times * matching.rows * math.prod(frame.scans) // within,
    batch=not frame.free,
    loop=frame.loop,
    each=frame.each,
    where=functools.partial(frame.line, equation),
    scale=view.scale,
    fold=fold,
  )
  if frame.free:
    frame.new_products.add(key)
  return Linear(key, view.leaf, matching.axes, window=matching.window)


def join(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """Parameters joined along an axis: each is a part of the weight, or a token of the batch."""
  variables, axis = equation.invars, int(equation.params["dimension"])
  if not frame.free:
    return tokens(frame, equation, operands, axis)
  pieces = [
    steps.written_out(operand.view, tuple(variable.aval.shape))
    for operand, variable in zip(operands, variables, strict=True)
    if operand.view
  ]
  if len(pieces) < len(operands) or len({view.levels for view in pieces}) > 1:
    return view_rules.whole(frame, equation, operands)
  if one := steps.joined(pieces, axis):
    return [Value(view=one)]
  parts, start = [], 0
  for view in pieces:
    parts.append(Part(view, axis, start, view.shape[axis]))
    start += view.shape[axis]
  return [Value(parts=tuple(parts))]


def stack(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """Tokens joined to the batch along a new axis."""
  if not frame.free:
    return tokens(frame, equation, operands, int(equation.params["axis"]))
  return view_rules.whole(frame, equation, operands)


def tokens(frame: Frame, equation: Any, operands: Sequence[Value], axis: int) -> list[Value] | None:
  """Parameters joined to what depends on the batch: tables, each a part of the whole."""
  start, rank = 0, len(equation.outvars[0].aval.shape)
  for i, (operand, variable) in enumerate(zip(operands, equation.invars, strict=True)):
    shape, view, found = tuple(variable.aval.shape), operand.view, None
    if len(shape) < rank:  # a stack
      shape = (*shape[:axis], 1, *shape[axis:])
      core_shape = (*view.shape[:axis], 1, *view.shape[axis:]) if view else ()
      view = steps.viewed(view, (("reshape", core_shape),), core_shape) if view else None
    if view and not view_rules.is_complex(variable):
      cut = Window(axis, start, shape[axis])
      found = table.match(shape, i, view, frame.found.shapes[view.leaf], cut)
    if found:
      note_use(frame, equation, *found, i)
    else:
      frame.refuse(equation, [operand], view_rules.WHOLE[primitives.concatenate_p])
    start += shape[axis]
  return None


def add(frame: Frame, equation: Any, operands: Sequence[Value]) -> list[Value] | None:
  """A sum: of a product's output and its bias, of a table and anything, or of anything else."""
  if equation.primitive is primitives.sub_p:
    operands = [operands[0], view_rules.times(operands[1], -1.0)]
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
  imaginary = view_rules.is_complex(equation.outvars[0])
  if len(holders) == 2:
    form = view_rules.pair if imaginary else view_rules.whole
    return form(frame, equation, operands)
  (holder,) = holders
  (other,) = [operand for operand in operands if not operand.views]
  view = holder.view
  if view and len(view.shape) == len(shape) and not (other.batch or other.tainted):
    return [Value(view=view)]  # x (w + c) has the gradient of x w: none goes through c
  if imaginary:
    return frame.refuse(equation, operands, "it is added to complex numbers")
  why = bias(frame, holder, sums[0], shape) if sums else view_rules.WHOLE[equation.primitive]
  if why:
    side, use = int(bool(operands[1].views)), None
    if view and not frame.free:
      found = table.match(shape, side, view, frame.found.shapes[view.leaf], None)
      use = note_use(frame, equation, *found) if found else None
    if view is None or use is None:
      return frame.refuse(equation, operands, why)
    own = view.leaf in operands[1 - side].leaves
    return [Value(shifted=Shifted(use.use, view, own))]
  return [Value()]


def bias(frame: Frame, holder: Value, linears: Sequence[Linear], shape: tuple[int, ...]) -> str:
  """Joins what is added to a product's output of `shape` to its layer, or says why not."""
  pieces = holder.parts or holder.views
  if any(len(view.shape) != len(shape) for view in holder.views):
    return view_rules.WHOLE[primitives.add_p]
  if any(entries.repeats(view.steps) for view in holder.views):
    return "its entries are repeated or padded with zeros before they are added to a product"
  found = biases.joints(linears, pieces, shape)
  if isinstance(found, str):
    return found
  uses = frame.found.uses
  if any(joint.view.levels != uses[joint.linear.use].levels for joint in found):
    return "it is added to a product within a `scan`, of which only one is scanned over"
  folds = [uses[joint.linear.use].fold for joint in found]
  if any(fold and (fold.stack or fold.outputs) for fold in folds):
    return "it is added to a product whose output features are repeated or padded with zeros"
  for linear, view, taken, place in found:
    if view.levels and place:
      place = biases.stacked(place, math.prod(frame.scans[depth] for depth in view.levels))
    bias = Bias(view.leaf, view.steps + taken + _ends(view), place)
    frame.found.biases.append(BiasUse(bias, linear.use, view.scale.real / linear.factor))
  return ""


def _order(linear: Linear) -> tuple[bool, int, Key]:
  """Of several products' outputs that are added, the first is the one that a bias joins."""
  return linear.factor != 1, linear.leaf, linear.use


def _ends(view: ParamView) -> views.View:
  """The step that ends the scans which go over a parameter, if some do."""
  return (("stack",),) if view.levels else ()
