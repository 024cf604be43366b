"""One equation without jaxprs inside: what its primitive does to the values of its operands.

Primitives go by name: most of them are exported nowhere, and one that is not known here, or renamed
by JAX, leaves a value of which nothing is said.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from jax.extend import core
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat
from fop_optax.capture.examples import axes, lookup, sums
from fop_optax.capture.examples.elementwise import Site, elementwise
from fop_optax.capture.examples.values import (
  Batch,
  Cause,
  Constant,
  Moment,
  Unknown,
  Value,
  causes_of,
)
from fop_optax.capture.values import Path

ROLES = {
  **dict.fromkeys(["add", "add_any"], "add"),
  **dict.fromkeys(["max", "min", "clamp"], "bound"),
  **dict.fromkeys(["eq", "ne", "ge", "gt", "le", "is_finite"], "compare"),
  **dict.fromkeys(
    ["convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient", "name"]
    + ["sharding_constraint", "reshard", "mesh_cast", "real", "pvary", "layout_constraint"],
    "same",
  ),
  **{name: name for name in ("sub", "mul", "div", "square")},
  "lt": "below",
  "neg": "negative",
  "select_n": "select",
}
PASSED = ("optimization_barrier", "device_put")
REDUCTIONS = {"reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"}
REDUCTIONS |= {"argmax", "argmin"}
CUMULATIVE = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}
LINEAR_ALGEBRA = {"cholesky", "eigh", "eig", "lu", "geqrf", "householder_product", "schur", "svd"}
LINEAR_ALGEBRA |= {"triangular_solve", "tridiagonal_solve", "tridiagonal"}


@dataclasses.dataclass(frozen=True)
class Step:
  """One equation.

  Attributes:
    jaxpr: where it stands.
    equation: it.
    twin: the same equation for twice the examples, or None.
    operands: values of its operands.
    path: indices of equations that lead to it.
    outer: source line of the equation around it.
    sources: source lines found, by path.
    examples: number of examples.
  """

  jaxpr: Any
  equation: Any
  twin: Any
  operands: list[Value]
  path: Path
  outer: Callable[[], str]
  sources: dict[Path, str]
  examples: int

  def source(self) -> str:
    if self.path not in self.sources:
      own = _compat.source_of(self.jaxpr, self.equation)
      self.sources[self.path] = own or self.outer()
    return self.sources[self.path]

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.equation.invars[0].aval.shape)

  @property
  def twice(self) -> tuple[int, ...] | None:
    return tuple(self.twin.invars[0].aval.shape) if self.twin is not None else None

  @property
  def grows(self) -> bool:
    """Whether the result is larger for twice the examples."""
    if self.twin is None:
      return False
    pairs = zip(self.equation.outvars, self.twin.outvars, strict=True)
    return any(a.aval.shape != b.aval.shape for a, b in pairs)

  def outputs(self) -> list[Value]:
    """The values of its results."""
    outputs = self._outputs()
    return [
      self._finished(value, variable, place)
      for place, (value, variable) in enumerate(zip(outputs, self.equation.outvars, strict=True))
    ]

  def _outputs(self) -> list[Value]:
    one = self._one(self.equation.primitive.name)
    return one if isinstance(one, list) else [one] * len(self.equation.outvars)

  def _finished(self, value: Value, variable: Any, place: int) -> Value:
    """Discrete values carry no gradient; a value of each example has a name of its own."""
    passive = not jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    passive |= self.equation.primitive.name == "stop_gradient"
    if isinstance(value, (Constant, Batch)) and value.active and passive:
      value = dataclasses.replace(value, active=False)
    return named(value, (self.path, place))

  def _site(self) -> Site:
    return Site((self.path, 0), self.source, self.examples)

  def _one(self, name: str) -> Value | list[Value]:
    operands, params = self.operands, self.equation.params
    first, shape = (operands[0], self.shape) if operands else (Constant(), ())
    out = tuple(self.equation.outvars[0].aval.shape) if self.equation.outvars else ()
    if name in PASSED and len(operands) == len(self.equation.outvars):
      return list(operands)
    if name == "iota":
      axis = int(params["dimension"])
      return Constant(frozenset(range(len(out))) - {axis}, iota=axis)
    if name == "reduce_sum":
      return sums.reduce_sum(first, params["axes"], shape, self.twice, self.source, self.path)
    if name in REDUCTIONS:
      return sums.reduced(first, params["axes"], len(shape), self.source)
    if name in ("psum", "pmax", "pmin"):
      return self._collective(name)
    if name.startswith("scatter"):
      return self._scatter()
    if name.startswith("reduce_window"):
      return self._pooled()
    if name == "dynamic_update_slice":
      return self._updated()
    if name in CUMULATIVE:
      return axes.ordered(self._nonlinear(out), [params["axis"]], self.source)
    if name == "sort":
      values = [axes.ordered(v, [params["dimension"]], self.source) for v in operands]
      causes = causes_of(values)
      return [
        v if isinstance(v, Constant) else dataclasses.replace(v, causes=causes) for v in values
      ]
    if name == "dot_general":
      return sums.dot(self.equation, operands, self.twin, self.source)
    if name == "conv_general_dilated":
      return sums.convolution(self.equation, operands, self.source)
    if name == "gather":
      return lookup.gather(self.equation, operands[0], operands[1], self.grows, self.source)
    moved = self._moved(name, first, shape, out)
    return moved if moved is not None else self._function(name, out)

  def _moved(self, name: str, first: Value, shape: Any, out: Any) -> Value | list[Value] | None:
    """Steps that move or select entries; None if it is none of them."""
    params = self.equation.params
    if name == "broadcast_in_dim" and len(self.operands) == 1:
      return axes.broadcast(first, shape, out, params["broadcast_dimensions"])
    if name == "reshape" and params.get("dimensions") is None and len(self.operands) == 1:
      return axes.reshape(first, shape, out)
    if name == "transpose":
      return axes.transpose(first, params["permutation"])
    if name == "squeeze":
      return axes.squeeze(first, [axis % len(shape) for axis in params["dimensions"]], len(shape))
    if name == "expand_dims":
      return axes.reshape(first, shape, out)
    if name == "rev":
      return axes.ordered(_uncounted(first), params["dimensions"], self.source)
    if name == "slice":
      strides = params["strides"] or (1,) * len(shape)
      windows = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
      return self._cut(first, enumerate(windows), shape)
    if name == "split":
      edges = np.cumsum([0, *params["sizes"]])
      windows = [(int(a), int(b), 1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
      return [self._cut(first, [(params["axis"], window)], shape) for window in windows]
    if name == "unstack":
      axis = int(params["axis"])
      pieces = [self._cut(first, [(axis, (i, i + 1, 1))], shape) for i in range(shape[axis])]
      return [axes.squeeze(piece, [axis], len(shape)) for piece in pieces]
    if name == "dynamic_slice":
      if isinstance(first, Constant) and any(isinstance(v, Batch) for v in self.operands[1:]):
        return lookup.window(first, self.operands[1:])
      sizes = params["slice_sizes"]
      windows = enumerate((0, n, 1) for n in sizes)
      return self._with(self._cut(_uncounted(first), windows, shape), self.operands[1:])
    if name in ("concatenate", "stack"):
      return self._joined(name)
    if name == "pad":
      return self._padded(first)
    return None

  def _collective(self, name: str) -> list[Value]:
    """A sum over axes that `vmap` had given a name; over those of a mesh nothing is known."""
    named = self.equation.params["axes"]
    if not all(isinstance(axis, int) for axis in named):
      return [Unknown(causes_of(self.operands))] * len(self.equation.outvars)
    out = []
    for place, value in enumerate(self.operands):
      shape = tuple(self.equation.invars[place].aval.shape)
      if name == "psum":
        twice = tuple(self.twin.invars[place].aval.shape) if self.twin is not None else None
        out.append(sums.reduce_sum(value, named, shape, twice, self.source))
      else:
        out.append(sums.reduced(value, named, len(shape), self.source))
    return out

  def _pooled(self) -> Value:
    """Windows that slide over axes: those of one entry leave the examples alone."""
    params = self.equation.params
    wide = [axis for axis, size in enumerate(params["window_dimensions"]) if size > 1]
    wide += [axis for axis, edges in enumerate(params.get("padding", ())) if any(edges)]
    wide += [axis for axis, size in enumerate(params.get("window_strides", ())) if size > 1]
    first = self.operands[0]
    if isinstance(first, Batch) and any(first.at(axis) for axis in wide):
      return Unknown(first.causes | {Cause("order", self.source())})
    if not causes_known(self.operands):
      return self._constant(tuple(self.equation.outvars[0].aval.shape))
    return elementwise(self._site(), "other", [first], [self.shape])

  def _updated(self) -> Value:
    """A slice written over: known if it holds all examples."""
    operand, update, *starts = self.operands
    inner = self.equation.invars[1].aval.shape
    pieces = [p for v in (operand, update) if isinstance(v, Batch) for p in v.pieces]
    cut = any(p.axis >= 0 and inner[p.axis] != self.shape[p.axis] for p in pieces)
    if cut or causes_known(starts):
      return Unknown(causes_of(self.operands))
    free = [
      dataclasses.replace(v, free=v.numbers is None) if isinstance(v, Constant) else v
      for v in (operand, update)
    ]
    return elementwise(self._site(), "select", [Constant(free=True), *free], [self.shape] * 3)

  def _scatter(self) -> Value:
    """Entries written to, or added at, indices: whole ones of each example, or not known."""
    operand, indices, updates = self.operands
    if not causes_known(self.operands):
      return self._constant(self.shape)
    places = lookup.scatter_axes(self.equation, indices)
    within = self.equation.invars[1].aval.ndim - 1
    window = self.equation.params["dimension_numbers"].update_window_dims
    order = [axis for axis in range(self.equation.invars[2].aval.ndim) if axis not in window]
    own = operand.pieces if isinstance(operand, Batch) else ()
    if any(piece.axis >= 0 and piece.axis not in places.values() for piece in own):
      return Unknown(causes_of(self.operands))
    written = axes.remapped(updates, places.get)
    where = axes.remapped(indices, lambda a: places.get(order[a]) if a < within else None)
    if isinstance(where, Constant):
      where = Constant(free=True)
    if isinstance(written, Constant):
      written = dataclasses.replace(written, free=written.numbers is None)
    return elementwise(self._site(), "select", [where, operand, written], [self.shape] * 3)

  def _cut(self, value: Value, windows: Any, shape: tuple[int, ...]) -> Value:
    for axis, window in windows:
      value = axes.cut(value, axis, window, shape[axis], self.grows, self.source)
    return value

  def _joined(self, name: str) -> Value:
    shapes = [tuple(v.aval.shape) for v in self.equation.invars]
    if name == "concatenate":
      axis = self.equation.params["dimension"]
      return axes.concatenate(self.operands, shapes, axis, self.source)
    axis = self.equation.params["axis"]
    opened = [(*shape[:axis], 1, *shape[axis:]) for shape in shapes]
    place = lambda a: a + (a >= axis)
    values = [axes.remapped(v, place, [axis]) for v in self.operands]
    return axes.concatenate(values, opened, axis, self.source)

  def _padded(self, first: Value) -> Value:
    config = [
      axis for axis, edges in enumerate(self.equation.params["padding_config"]) if any(edges)
    ]
    if isinstance(first, Batch) and any(first.at(axis) for axis in config):
      return Unknown(first.causes)
    if isinstance(first, Constant):
      return dataclasses.replace(
        first, uniform=first.uniform - set(config), iota=None, numbers=None, columns=()
      )
    return self._with(first, self.operands[1:])

  def _with(self, value: Value, others: Sequence[Value]) -> Value:
    """`value` where others have a part in it: not known if they are values of examples."""
    if all(isinstance(v, Constant) for v in others):
      return value
    causes = causes_of([value, *others])
    if isinstance(value, Batch) and not any(
      isinstance(v, Unknown) or (isinstance(v, Batch) and v.pieces) for v in others
    ):
      return dataclasses.replace(value, causes=causes)
    return Unknown(causes)

  def _function(self, name: str, out: tuple[int, ...]) -> Value:
    """Anything else: entry by entry if the shapes allow it, by matrices, or not known."""
    operands = self.operands
    if name.startswith(("random_", "rng_", "threefry")):
      return self._random()
    if name in LINEAR_ALGEBRA or name in ("fft", "top_k", "approx_top_k"):
      return self._last_axes(name)
    role = ROLES.get(name, "other")
    if name == "integer_pow" and self.equation.params.get("y") == 2:
      role = "square"
    if not any(isinstance(v, (Batch, Unknown)) for v in operands) and role == "other":
      return self._constant(out)
    shapes = [tuple(v.aval.shape) for v in self.equation.invars]
    inner = list(core.jaxprs_in_params(self.equation.params))
    if inner or not all(
      _fits(shape, tuple(v.aval.shape)) for v in self.equation.outvars for shape in shapes
    ):
      return Unknown(causes_of(operands)) if causes_known(operands) else self._constant(out)
    return elementwise(self._site(), role, operands, shapes)

  def _constant(self, out: tuple[int, ...]) -> Constant:
    constants = [v for v in self.operands if isinstance(v, Constant)]
    shapes = [tuple(v.aval.shape) for v in self.equation.invars]
    if constants and all(_fits(shape, out) for shape in shapes):
      value = elementwise(self._site(), "other", constants, shapes)
      assert isinstance(value, Constant)
      return value
    known = all(v.degree == 0 for v in constants)
    active = any(v.active for v in constants)
    return Constant(free=True, degree=0.0 if known else None, active=active)

  def _nonlinear(self, out: tuple[int, ...]) -> Value:
    if isinstance(self.operands[0], Constant):
      return self._constant(out)
    return elementwise(self._site(), "other", self.operands[:1], [self.shape])

  def _random(self) -> Value:
    """Random bits: keys of each example give numbers of each example."""
    if not causes_known(self.operands):
      return Constant(free=True)
    keys = self.operands[0]
    if isinstance(keys, Batch) and all(isinstance(v, Constant) for v in self.operands[1:]):
      return dataclasses.replace(keys, active=False, columns=())
    return Unknown(causes_of(self.operands))

  def _last_axes(self, name: str) -> Value:
    """Functions of the last one or two axes, mapped over the others."""
    batch = [v for v in self.operands if isinstance(v, Batch)]
    if not causes_known(self.operands):
      return Constant(free=True, active=any(getattr(v, "active", False) for v in self.operands))
    causes = causes_of(self.operands)
    own = len(self.equation.params.get("fft_lengths", (0, 0)))
    own = 1 if "top_k" in name else own
    same = len(batch) == len([v for v in self.operands if not isinstance(v, Constant)])
    same = same and len({v.pieces for v in batch}) == 1 and not batch[0].summed
    rank = len(self.shape)
    if not same or any(piece.axis >= rank - own for piece in batch[0].pieces):
      return Unknown(causes)
    return Batch(
      batch[0].pieces,
      degree=0.0 if all(v.degree == 0 for v in batch) else None,
      active=any(getattr(v, "active", False) for v in self.operands),
      causes=causes | {v.factor for v in batch if v.factor},
    )


def causes_known(values: Sequence[Value]) -> bool:
  """Whether any of some values depends on the batch."""
  return not all(isinstance(v, Constant) for v in values)


def _fits(shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
  """Whether an operand of `shape` takes part entry by entry in a result of shape `out`."""
  return not shape or (
    len(shape) == len(out) and all(a in (1, b) for a, b in zip(shape, out, strict=True))
  )


def named(value: Value, name: Any) -> Value:
  if isinstance(value, Batch) and not value.summed and value.moment is None:
    return dataclasses.replace(value, moment=Moment(name, 1))
  return value


def _uncounted(value: Value) -> Value:
  return dataclasses.replace(value, iota=None) if isinstance(value, Constant) else value
