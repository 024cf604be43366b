"""Second pass: evaluates the loss's jaxpr with statistics formed at the accepted uses.

Descends only where accepted uses are; every other equation goes, untouched, to JAX's evaluator.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture import flow, repeated
from fop_optax.capture.examples.values import Piece
from fop_optax.capture.growth import NESTED
from fop_optax.capture.kinds.table import Table
from fop_optax.capture.resolve import Place, Resolved
from fop_optax.capture.second_moments import Rotation, Statistics
from fop_optax.capture.statistics import Moments, form_moments
from fop_optax.capture.values import Key, Path, Product, Use

MARK = -1  # the `part` of a mark's key


class Probe(NamedTuple):
  """What a use needs to form statistics, all `[stack, ...]` of what is left of its stack."""

  zeros: Statistics
  rotation: Rotation | None


Probes = dict[Key, Any]  # a `Probe` for each use; for each mark zeros, one for each of its terms


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluates a jaxpr with statistics at `uses`.

  Attributes:
    uses: the accepted uses.
    moments: for each of them, what to form.
    refresh: a traced bool, or None for always.
    meetings: where the output of a product with a constant meets the batch, see `Found`.
    marks: paths of marked losses whose distributions' parameters are wanted.
    weights: path of a sum of weights, if they are.
  """

  uses: Mapping[Key, Use]
  moments: Mapping[Key, Moments]
  refresh: jax.Array | None
  meetings: Mapping[Path, Mapping[int, int | None]]
  marks: frozenset[Path] = frozenset()
  weights: Path | None = None

  @functools.cached_property
  def entered(self) -> frozenset[Path]:
    """Paths of the equations that have a use, a mark or the weights inside them."""
    paths = [key.path for key in self.uses] + list(self.marks) + [self.weights or ()]
    return frozenset(path[:end] for path in paths for end in range(1, len(path)))

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
  ) -> tuple[list[Any], dict[Path, jax.Array]]:
    """The outputs of `jaxpr`, which stands at `path`, within `depth` scans, and what was seen.

    Of each mark the parameters of its distributions, and the weights.
    """
    seen: dict[Path, jax.Array] = {}
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
      return atom.val if isinstance(atom, core.Literal) else env[atom]

    for index, equation in enumerate(jaxpr.eqns):
      here = (*path, index)
      operands = [read(atom) for atom in equation.invars]
      if here in self.products:
        outputs = [self._product(jaxpr, equation, operands, self.products[here], probes)]
      elif here in self.marks:
        operands = list(map(repeated.once, operands))  # one distribution for all terms that have it
        (value,) = _compat.evaluate_equation(jaxpr, equation, operands)
        outputs, seen[here] = [value + probes[Key(here, MARK)]], operands[2]
      elif here in self.entered or (equation.primitive in NESTED and repeated.any_of(operands)):
        enter = self._scan if equation.primitive is primitives.scan_p else self._inline
        inside = {key: z for key, z in probes.items() if key.path[: len(here)] == here}
        outputs, found = enter(equation, operands, inside, here, depth)
        seen |= found
      else:
        if here == self.weights:
          seen[here] = repeated.once(operands[0])
        outputs = repeated.evaluate(jaxpr, equation, operands, self.meetings.get(here))
      env.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars], seen

  def _product(self, jaxpr, equation, operands, keys, probes):
    """A product, or a sum with a table, that forms statistics in its backward pass."""
    use = self.uses[keys[0]]
    x = _rows_operand(use.product, operands)
    (y,) = repeated.evaluate(jaxpr, equation, operands, None)
    moments = [self.moments[key] for key in keys]
    own = [probes[key].zeros for key in keys], [probes[key].rotation for key in keys], self.refresh
    if not use.repeats:
      return form_moments(moments, x, y, *own)
    x_too = isinstance(x, repeated.Repeated)
    moments = [each.repeated(use.repeats, x_too) for each in moments]
    rows = repeated.repeat(y, use.repeats).rows
    x = x.rows if x_too else x
    return repeated.Repeated(form_moments(moments, x, rows, *own))

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
    constant = operands[:n_consts]
    operands = list(map(repeated.once, operands))
    carry = operands[n_consts : n_consts + n_carry]
    length = params["length"]
    # a weight that the scan goes over brings a slice of its probe; a constant one all of it
    over = {key for key in probes if key in self.uses and depth in self.uses[key].levels}
    sliced = {key: jax.tree.map(lambda z: _unstack(z, length), probes[key]) for key in over}
    sliced |= {key: probes[key] for key in probes if key.part == MARK}
    whole = {key: probes[key] for key in probes if key not in sliced}

    def step(carry, slices):
      sliced, scanned = slices
      arguments = [*constant, *carry, *scanned]
      outputs, seen = self.run(body, consts, arguments, whole | sliced, here, depth + 1)
      outputs = list(map(repeated.once, outputs))
      return outputs[:n_carry], (outputs[n_carry:], seen)

    carry, (stacked, seen) = lax.scan(
      step,
      carry,
      (sliced, operands[n_consts + n_carry :]),
      length=length,
      reverse=params["reverse"],
      unroll=params["unroll"],
    )
    return [*carry, *stacked], seen


def _rows_operand(product: Product, operands: Sequence[Any]) -> Any:
  """What a product's weight meets: the other operand, of a `dynamic_slice` all of its indices."""
  if isinstance(product, Table):
    return jnp.zeros((), jnp.int32)
  others = [operand for side, operand in enumerate(operands) if side != product.weight]
  return others[0] if len(others) == 1 else jnp.stack([jnp.asarray(index) for index in others])


def _unstack(probe: jax.Array, length: int) -> jax.Array:
  return probe.reshape((length, probe.shape[0] // length, *probe.shape[1:]))


def moments_of(
  resolved: Resolved,
  uses: Mapping[Key, Use],
  examples_at: Mapping[Key, tuple[Piece, Piece]],
  examples: int,
  terms: int | None,
  chunks: int,
  every: int,
  reduced: frozenset[Place],
) -> dict[Key, Moments]:
  """What each accepted use is to form, of every `every`-th of a chunk's examples.

  Normalised by its share: A = sum x x' / (N T) over the N T rows of the layer, G = N R sum dy dy'.
  Fixed rows are in every chunk: they count once in A, and their G is that of a mean over them.
  With `terms` None, where weights are in the gradients by their square root, G = sum dy dy'.
  """
  out = {}
  for key, place in resolved.places.items():
    layer, use, (rows, fixed) = resolved.layers[place.layer], uses[key], resolved.rows[place]
    share = 1 / chunks if use.fixed else 1.0
    scale = float(use.rows if use.fixed else examples * terms) if terms else 1.0
    out[key] = Moments(
      product=use.product,
      coefficient=use.scale,
      coordinate=resolved.coordinates.get(key, 0.0),
      homogeneous=bool(layer.biases),
      flipped=place.flipped,
      diagonal=layer.diagonal[::-1] if place.flipped else layer.diagonal,
      scale=(share / (rows + fixed / chunks), scale),
      rows=examples_at.get(key),
      examples=examples,
      every=1 if use.fixed else every,
      fold=use.fold,
      reduced=place in reduced,
      fixed=use.fixed,
    )
  return out
