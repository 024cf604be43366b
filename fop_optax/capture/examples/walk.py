"""The walk: one loop over a jaxpr, an environment, and a rule for each primitive.

Primitives go by name: most of them are exported nowhere, and one that is not known here, or renamed
by JAX, leaves a value of which nothing is said.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat
from fop_optax.capture import flow
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
  join,
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
CALLED = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"}
SMALL = 4096  # entries of a constant that are looked at


@dataclasses.dataclass(frozen=True)
class Product:
  """The operands of a product or a lookup, and its result."""

  operands: tuple[Value, ...]
  output: Value


@dataclasses.dataclass
class Walk:
  """What all frames share: the number of examples, and products by path."""

  examples: int
  products: dict[Path, Product] = dataclasses.field(default_factory=dict)
  sources: dict[Path, str] = dataclasses.field(default_factory=dict)

  def run(
    self,
    jaxpr: Any,
    consts: Sequence[Any],
    twin: tuple[Any, Sequence[Any]] | None,
    inputs: Sequence[Value],
    path: Path = (),
    depth: int = 0,
    source: Callable[[], str] = str,
  ) -> list[Value]:
    """The values of the outputs of a jaxpr that stands at `path`, within `depth` scans.

    `source` is the line of the equation it belongs to, for equations that have none of their own.

    `twin` is the same jaxpr (and its constants) for twice as many examples.
    """
    other, other_consts = twin if twin and _alike(jaxpr, twin[0]) else (None, ())
    env: dict[Any, Value] = {}
    for i, (variable, const) in enumerate(zip(jaxpr.constvars, consts, strict=False)):
      env[variable] = _known(const, other_consts[i] if i < len(other_consts) else None)
    for i, (variable, value) in enumerate(zip(jaxpr.invars, inputs, strict=True)):
      env[variable] = _named(value, (path, "input", i))
    for index, equation in enumerate(jaxpr.eqns):
      same = other.eqns[index] if other is not None else None
      operands: list[Value] = []
      for place, atom in enumerate(equation.invars):
        if isinstance(atom, core.Literal):
          second = same.invars[place] if same is not None else None
          operands.append(_known(atom.val, getattr(second, "val", None)))
        else:
          operands.append(env.get(atom, Constant()))
      step = _Step(self, jaxpr, equation, same, operands, (*path, index), depth, source)
      env.update(zip(equation.outvars, step.outputs(), strict=True))
    return [
      _known(atom.val, None) if isinstance(atom, core.Literal) else env.get(atom, Constant())
      for atom in jaxpr.outvars
    ]


def _alike(jaxpr: Any, other: Any) -> bool:
  """Whether two jaxprs have the same equations, up to sizes."""
  return len(jaxpr.eqns) == len(other.eqns) and all(
    a.primitive is b.primitive and len(a.invars) == len(b.invars)
    for a, b in zip(jaxpr.eqns, other.eqns, strict=True)
  )


def _known(value: Any, twice: Any) -> Constant:
  """A literal or a closed-over array: a number, if all entries are."""
  numbers = [_number(v) for v in (value, twice)]
  return Constant() if numbers[0] is None else Constant(numbers=(numbers[0], numbers[1]))


def _number(value: Any) -> float | None:
  if value is None or isinstance(value, jax.core.Tracer) or not hasattr(value, "dtype"):
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
  if not 0 < np.size(value) <= SMALL or not _real(value.dtype):
    return None
  array = np.asarray(value)
  number = float(array.flat[0])
  return number if math.isfinite(number) and np.all(array == array.flat[0]) else None


def _real(dtype: Any) -> bool:
  return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


@dataclasses.dataclass(frozen=True)
class _Step:
  """One equation."""

  walk: Walk
  jaxpr: Any
  equation: Any
  twin: Any  # the equation for twice the examples, or None
  operands: list[Value]
  path: Path
  depth: int
  outer: Callable[[], str]

  def source(self) -> str:
    if self.path not in self.walk.sources:
      own = _compat.source_of(self.jaxpr, self.equation)
      self.walk.sources[self.path] = own or self.outer()
    return self.walk.sources[self.path]

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
    equation, name = self.equation, self.equation.primitive.name
    outputs = self._nested(name)
    if outputs is None:
      one = self._one(name)
      outputs = one if isinstance(one, list) else [one] * len(equation.outvars)
      if name in ("dot_general", "conv_general_dilated", "gather"):
        self.walk.products[self.path] = Product(tuple(self.operands), outputs[0])
    return [
      self._finished(value, variable, place)
      for place, (value, variable) in enumerate(zip(outputs, equation.outvars, strict=True))
    ]

  def _finished(self, value: Value, variable: Any, place: int) -> Value:
    """Discrete values carry no gradient; a value of each example has a name of its own."""
    passive = not jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    passive |= self.equation.primitive.name == "stop_gradient"
    if isinstance(value, (Constant, Batch)) and value.active and passive:
      value = dataclasses.replace(value, active=False)
    return _named(value, (self.path, place))

  # Equations with jaxprs inside.

  def _nested(self, name: str) -> list[Value] | None:
    equation = self.equation
    if equation.primitive in flow.INLINED or name in CALLED:
      return self._inline()
    if name == "scan":
      return self._scan()
    if name == "cond":
      return self._cond()
    if name == "while":
      return self._while()
    return None

  def _run(self, name: str, inputs: Sequence[Value], path: Path, depth: int, pick=None):
    """Walks the jaxpr that stands in the parameters under `name`."""
    take = lambda e: _compat.open_jaxpr(e.params[name] if pick is None else e.params[name][pick])
    jaxpr, consts = take(self.equation)
    twin = take(self.twin) if self.twin is not None else None
    return self.walk.run(jaxpr, consts, twin, inputs, path, depth, self.source)

  def _inline(self) -> list[Value]:
    params = self.equation.params
    names = [n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params]
    if not names:
      return [Unknown(causes_of(self.operands))] * len(self.equation.outvars)
    return self._run(names[0], self.operands, self.path, self.depth)

  def _cond(self) -> list[Value]:
    choice, *operands = self.operands
    number = len(self.equation.params["branches"])
    branches = [
      self._run("branches", operands, (*self.path, i), self.depth, i) for i in range(number)
    ]
    outputs = branches[0]
    for branch in branches[1:]:
      outputs = list(map(join, outputs, branch))
    if isinstance(choice, Constant):
      return outputs
    unknown = Unknown(choice.causes)
    return [unknown if isinstance(v, Constant) else self._with(v, [choice]) for v in outputs]

  def _while(self) -> list[Value]:
    params = self.equation.params
    before = params["cond_nconsts"]
    consts = self.operands[before : before + params["body_nconsts"]]
    carry = self.operands[before + params["body_nconsts"] :]
    outputs = self._settled(
      carry, lambda carry: self._run("body_jaxpr", [*consts, *carry], self.path, self.depth)
    )
    return [dataclasses.replace(v, degree=None) if isinstance(v, Batch) else v for v in outputs]

  def _settled(self, carry: Sequence[Value], step: Any) -> list[Value]:
    """What is known of a carry at every step."""
    carry = list(carry)
    for _ in range(4):
      after = list(map(join, carry, map(_unnamed, step(carry))))
      if after == carry:
        return carry
      carry = after
    return [
      Unknown(causes_of([v])) if v != w else v for v, w in zip(carry, step(carry), strict=True)
    ]

  def _scan(self) -> list[Value]:
    equation = self.equation
    body, _ = _compat.open_jaxpr(equation.params["jaxpr"])
    n_consts, n_carry = _compat.scan_split(equation.params, len(self.operands))
    length, level = int(equation.params["length"]), -1 - self.depth
    consts, scanned = self.operands[:n_consts], self.operands[n_consts + n_carry :]
    slices = [self._slice(v, level) for v in scanned]
    initial = self.operands[n_consts : n_consts + n_carry]
    adding = [_accumulates(body, n_consts + i, i) is True for i in range(n_carry)]
    zero = Constant(numbers=(0.0, 0.0))

    def run(carry):
      full = [zero if adds else v for adds, v in zip(adding, carry, strict=True)]
      return self._run("jaxpr", [*consts, *full, *slices], self.path, self.depth + 1)

    def step(carry):
      outputs = run(carry)[:n_carry]
      return [
        v if adds else self._carried(out, level)
        for adds, v, out in zip(adding, carry, outputs, strict=True)
      ]

    carry = self._settled(initial, step)
    outputs = run(carry)
    twice = (int(self.twin.params["length"]),) if self.twin is not None else None
    final = list(carry)
    for i, adds in enumerate(adding):
      if adds:
        total = self._total(outputs[i], level, length, twice)
        shape = tuple(body.outvars[i].aval.shape)
        final[i] = elementwise(self._site(), "add", [initial[i], total], [shape, shape])
    return final + [self._stacked(v, level) for v in outputs[n_carry:]]

  def _slice(self, value: Value, level: int) -> Value:
    """What one step of a scan sees of an array that it goes over."""
    if isinstance(value, Batch):
      return axes.remapped(_unnamed(value), lambda axis: axis - 1 if axis else level)
    if isinstance(value, Constant) and 0 not in value.uniform and value.numbers is None:
      value = dataclasses.replace(value, free=True)
    return axes.remapped(value, lambda axis: axis - 1 if axis else None)

  def _carried(self, value: Value, level: int) -> Value:
    """A carry at the next step: if it has met examples, nothing is known of it from then on."""
    if isinstance(value, Batch) and value.at(level):
      return Unknown(value.causes | {Cause("carry", self.source())})
    return value

  def _total(self, value: Value, level: int, length: int, twice: Any) -> Value:
    """The sum of a value over the steps of a scan."""
    placed = _placed(value, level)
    rank = 64  # above that of any array: the axis of steps goes first, and is summed over
    shape = (length, *[1] * rank)
    more = (*twice, *[1] * rank) if twice else None
    return sums.reduce_sum(placed, (0,), shape, more, self.source)

  def _stacked(self, value: Value, level: int) -> Value:
    return _placed(value, level)

  # Equations of one result, or of several alike.

  def _site(self) -> Site:
    return Site((self.path, 0), self.source, self.walk.examples)

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
      return sums.reduce_sum(first, params["axes"], shape, self.twice, self.source)
    if name in REDUCTIONS:
      return sums.reduced(first, params["axes"], len(shape), self.source)
    if name in ("psum", "pmax", "pmin"):
      return self._collective(name)
    if name.startswith("scatter"):
      return self._scatter()
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
    if name.startswith(("random_", "threefry")):
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


def _named(value: Value, name: Any) -> Value:
  if isinstance(value, Batch) and not value.summed and value.moment is None:
    return dataclasses.replace(value, moment=Moment(name, 1))
  return value


def _unnamed(value: Value) -> Value:
  """`value` without the name of its root, which is another one at each step of a loop."""
  if isinstance(value, Batch):
    return dataclasses.replace(value, moment=None, columns=())
  return value


def _uncounted(value: Value) -> Value:
  return dataclasses.replace(value, iota=None) if isinstance(value, Constant) else value


def _placed(value: Value, level: int) -> Value:
  """`value` stacked over the steps of a scan along a new first axis."""
  if isinstance(value, Batch):
    pieces = tuple(
      sorted(
        p._replace(axis=0 if p.axis == level else p.axis + (p.axis >= 0)) for p in value.pieces
      )
    )
    return dataclasses.replace(value, pieces=pieces, columns=())
  if isinstance(value, Constant):
    return axes.remapped(dataclasses.replace(value, free=value.numbers is None), lambda a: a + 1)
  return value


def _accumulates(jaxpr: Any, place: int, out: int) -> bool | None:
  """Whether output `out` of a jaxpr is input `place` plus something; None if it is neither.

  Nothing else may read the input, nor what becomes of it on the way.
  """
  variable, target, added = jaxpr.invars[place], jaxpr.outvars[out], False
  while True:
    readers = [e for e in jaxpr.eqns for v in e.invars if v is variable]
    leaving = [v for v in jaxpr.outvars if v is variable]
    if variable is target and not readers and len(leaving) == 1:
      return added
    if len(readers) != 1 or leaving:
      return None
    (equation,) = readers
    step = _step_of(equation, [v is variable for v in equation.invars].index(True))
    if step is None:
      return None
    output, adds = step
    variable, added = equation.outvars[output], added or adds


def _step_of(equation: Any, place: int) -> tuple[int, bool] | None:
  """Which output of an equation an operand goes to, and whether something is added to it there."""
  name = equation.primitive.name
  if name in ("add", "add_any") or (name == "sub" and place == 0):
    return 0, True
  if ROLES.get(name) == "same":
    return 0, False
  if equation.primitive in flow.INLINED:
    inner, _ = _compat.open_jaxpr(flow.inner_jaxpr(equation))
    for output in range(len(equation.outvars)):
      added = _accumulates(inner, place, output)
      if added is not None:
        return output, added
  if name == "scan":
    body, _ = _compat.open_jaxpr(equation.params["jaxpr"])
    consts, carry = _compat.scan_split(equation.params, len(equation.invars))
    if consts <= place < consts + carry:
      added = _accumulates(body, place, place - consts)
      return None if added is None else (place - consts, added)
  return None
