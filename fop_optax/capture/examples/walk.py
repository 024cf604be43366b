"""The walk: one loop over a jaxpr, an environment, and jaxprs inside of equations."""

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
from fop_optax.capture.examples import axes, sums
from fop_optax.capture.examples.elementwise import elementwise
from fop_optax.capture.examples.step import ROLES, Step, named
from fop_optax.capture.examples.values import (
  Batch,
  Cause,
  Constant,
  Unknown,
  Value,
  causes_of,
  join,
)
from fop_optax.capture.values import Path

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
      env[variable] = named(value, (path, "input", i))
    for index, equation in enumerate(jaxpr.eqns):
      same = other.eqns[index] if other is not None else None
      operands: list[Value] = []
      for place, atom in enumerate(equation.invars):
        if isinstance(atom, core.Literal):
          second = same.invars[place] if same is not None else None
          operands.append(_known(atom.val, getattr(second, "val", None)))
        else:
          operands.append(env.get(atom, Constant()))
      here = (*path, index)
      step = _Nested(
        jaxpr, equation, same, operands, here, source, self.sources, self.examples, self, depth
      )
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
class _Nested(Step):
  """An equation that may have jaxprs inside, within `depth` scans."""

  walk: Walk
  depth: int

  def _outputs(self) -> list[Value]:
    equation, name = self.equation, self.equation.primitive.name
    if equation.primitive in flow.INLINED or name in CALLED:
      return self._inline()
    if name == "scan":
      return self._scan()
    if name == "cond":
      return self._cond()
    if name == "while":
      return self._while()
    outputs = super()._outputs()
    if name in ("dot_general", "conv_general_dilated", "gather"):
      self.walk.products[self.path] = Product(tuple(self.operands), outputs[0])
    return outputs

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
    return final + [_placed(v, level) for v in outputs[n_carry:]]

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


def _unnamed(value: Value) -> Value:
  """`value` without the name of its root, which is another one at each step of a loop."""
  if isinstance(value, Batch):
    return dataclasses.replace(value, moment=None, columns=())
  return value


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
