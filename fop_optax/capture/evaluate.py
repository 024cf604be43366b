"""Second pass: evaluates the loss's jaxpr with statistics formed at the accepted uses.

Descends only where accepted uses are; every other equation goes, untouched, to JAX's evaluator.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from fop_optax import _compat
from fop_optax.capture import flow
from fop_optax.capture.products import Moments, product_with_moments
from fop_optax.capture.resolve import Resolved
from fop_optax.capture.values import Key, Path, Use
from fop_optax.layers import Factors

Probes = dict[Key, Factors]  # for each use zeros, [stack, ...] of what is left of its stack


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluates a jaxpr with statistics at `uses`.

  Attributes:
    uses: the accepted uses.
    moments: for each of them, what to form.
    refresh: a traced bool, or None for always.
  """

  uses: Mapping[Key, Use]
  moments: Mapping[Key, Moments]
  refresh: jax.Array | None

  @functools.cached_property
  def entered(self) -> frozenset[Path]:
    """Paths of the equations that have a use inside them."""
    return frozenset(key.path[:end] for key in self.uses for end in range(1, len(key.path)))

  @functools.cached_property
  def products(self) -> Mapping[Path, list[Key]]:
    """The uses at each equation: several if its weight is joined from parts."""
    out: dict[Path, list[Key]] = {}
    for key in self.uses:
      out.setdefault(key.path, []).append(key)
    return out

  def run(
    self,
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    probes: Probes,
    path: Path = (),
    depth: int = 0,
  ) -> list[Any]:
    """The outputs of `jaxpr`, which stands at `path`, within `depth` scans."""
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
      return atom.val if isinstance(atom, core.Literal) else env[atom]

    for index, equation in enumerate(jaxpr.eqns):
      here = (*path, index)
      operands = [read(atom) for atom in equation.invars]
      if here in self.products:
        outputs = [self._product(jaxpr, equation, operands, self.products[here], probes)]
      elif here in self.entered:
        enter = self._scan if equation.primitive is primitives.scan_p else self._inline
        inside = {key: z for key, z in probes.items() if key.path[: len(here)] == here}
        outputs = enter(equation, operands, inside, here, depth)
      else:
        outputs = _compat.evaluate_equation(jaxpr, equation, operands)
      env.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _product(self, jaxpr, equation, operands, keys, probes):
    side = self.uses[keys[0]].product.weight

    def multiply(x, w):
      pair = (x, w) if side == 1 else (w, x)
      return _compat.evaluate_equation(jaxpr, equation, pair)[0]

    x, w = operands[1 - side], operands[side]
    moments = [self.moments[key] for key in keys]
    return product_with_moments(multiply, moments, x, w, [probes[k] for k in keys], self.refresh)

  def _inline(self, equation, operands, probes, here, depth):
    inner, consts = _compat.open_jaxpr(flow.inner_jaxpr(equation))

    def run(probes, *operands):
      return self.run(inner, consts, operands, probes, here, depth)

    if equation.primitive is primitives.remat_p:
      params = equation.params
      run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return run(probes, *operands)

  def _scan(self, equation, operands, probes, here, depth):
    params = equation.params
    body, consts = _compat.open_jaxpr(params["jaxpr"])
    n_consts, n_carry = _compat.scan_split(params, len(operands))
    constant, carry = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    length = params["length"]
    # a weight that the scan goes over brings a slice of its probe; a constant one all of it
    over = {use for use in probes if depth in self.uses[use].levels}
    sliced = {use: jax.tree.map(lambda z: _unstack(z, length), probes[use]) for use in over}
    whole = {use: probes[use] for use in probes if use not in over}

    def step(carry, slices):
      sliced, scanned = slices
      arguments = [*constant, *carry, *scanned]
      outputs = self.run(body, consts, arguments, whole | sliced, here, depth + 1)
      return outputs[:n_carry], outputs[n_carry:]

    carry, stacked = lax.scan(
      step,
      carry,
      (sliced, operands[n_consts + n_carry :]),
      length=length,
      reverse=params["reverse"],
      unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _unstack(probe: jax.Array, length: int) -> jax.Array:
  return probe.reshape((length, probe.shape[0] // length, *probe.shape[1:]))


def moments_of(resolved: Resolved, uses: Mapping[Key, Use]) -> dict[Key, Moments]:
  """What each accepted use is to form."""
  out = {}
  for key, (index, flipped) in resolved.places.items():
    layer = resolved.layers[index]
    diagonal = layer.diagonal[::-1] if flipped else layer.diagonal
    out[key] = Moments(uses[key].product, layer.bias is not None, diagonal)
  return out
