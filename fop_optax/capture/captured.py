"""`Captured`: a loss whose layers are known, for its gradient and statistics each step."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat, group_gradients
from fop_optax.capture import auxiliary, counted, layer_table, second_moments, sharing, tiles
from fop_optax.capture import batch as batches
from fop_optax.capture.arguments import classify
from fop_optax.capture.backward import WithStatistics, by_layer, plain
from fop_optax.capture.check import Check, Finding
from fop_optax.capture.counted import Weights
from fop_optax.capture.examples.assumptions import analyse
from fop_optax.capture.fisher import check_marked
from fop_optax.capture.growth import Growth
from fop_optax.capture.outcomes import Outcome
from fop_optax.capture.resolve import resolve
from fop_optax.capture.second_moments import Statistics
from fop_optax.capture.trace import Signature, growing, terms_of, trace_twice
from fop_optax.capture.values import Key
from fop_optax.layers import Basis, Factors, Layers, Stats

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Spec:
  """What `capture` was told beside shapes."""

  loss_fn: Callable[..., Any]
  has_aux: bool
  arguments: int  # number of them, after params
  batch_argnums: int | Sequence[int] | None
  numbers: frozenset[int]  # leaves of arguments in the form of keys that are none
  micro_batches: int
  terms_per_example: int | None
  max_dim: int
  fisher: str
  every: int
  sharing: str


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
  """A loss whose layers are known; made by `fop_optax.capture`.

  `str(captured)` is a table of its parameters, their layers and the reasons of those in none.

  Attributes:
    layers: the layers, static and hashable: all that an optimizer needs.
    fallbacks: path of each parameter in no layer -> why.
    notes: what else was found, a sentence each; they stand below the table.
    rows: for each layer, of how many rows its statistics are, of the batch at the time of capture.
    examples: and of how many examples.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> def loss(params, x, y):
    ...   return fop_optax.squared_error(x @ params["w"] * params["gain"], y)
    >>> params = {"w": jnp.ones((3, 2)), "gain": jnp.ones(2)}
    >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
    >>> captured = fop_optax.capture(loss, params, x, y)
    >>> print([layer.path for layer in captured.layers], list(captured.fallbacks), captured.rows)
    ["['w']"] ["['gain']"] (8,)
    >>> value, grads, stats = captured.value_and_grad(params, x, y)
    >>> print(value, grads["gain"], stats.factors[0].A.shape)
    9.0 [9. 9.] (1, 3, 3)
  """

  layers: Layers
  fallbacks: Mapping[str, str]
  notes: tuple[str, ...]
  rows: tuple[int, ...]
  examples: int
  _spec: Spec
  _terms: int  # R as the loss had it at the time of capture
  _weights: Weights | None  # and of which weights
  _aux_roles: tuple[auxiliary.Role, ...]
  _growth: Growth | None
  _found: tuple[Key, ...]  # uses at the time of capture, and those of them that are layers
  _accepted: tuple[Key, ...]
  _loops: batches.Loops
  _whole: Layers  # layers before long sides were split
  _tiles: tuple[tiles.Tile, ...]  # which part of them each of `layers` is

  def __str__(self) -> str:
    return layer_table.table(self.layers, self.fallbacks, self.notes)

  def value_and_grad(
    self,
    params: PyTree,
    *args: Any,
    refresh: bool | jax.Array = True,
    key: jax.Array | None = None,
    loss_scale: jax.typing.ArrayLike | None = None,
    basis: Sequence[Basis] | None = None,
  ) -> tuple[Any, PyTree, Stats]:
    """Loss, gradient of the mean loss, and statistics of this batch, in one backward pass.

    Inside `jax.shard_map` all three are the device's own. One mean makes those of the whole batch:
    `jax.lax.pmean(captured.value_and_grad(params, *args), axis_name)`. Give each device a key of
    its own there, `jax.random.fold_in(key, jax.lax.axis_index(axis_name))`.

    Args:
      params: as given to `capture`.
      *args: as given to `capture`; the batch size may differ.
      refresh: whether to form Kronecker statistics. A Python bool makes two compiled variants, of
        which the one without costs no more than the gradient by groups; a traced bool makes one.
        `fop_optax.refresh_due(opt_state)` gives it.
      key: for `fisher="sampled"`, a new one each step.
      loss_scale: S, a number or a traced scalar (as of `jmp.DynamicLossScale`), for float16, whose
        gradients of a mean would underflow. The backward pass starts from S instead of 1, and the
        gradient, contrasts and G come back divided by what that makes of them, as the loss itself
        is never multiplied: write `loss_fn` without S. What overflows comes back not finite, so
        that the caller can lower S; the optimizer makes no step then.
      basis: `fop_optax.bases(opt_state)`, for optimizers with `scaling="eigenvalue"`: the gradients
        of examples are turned by it, squared and averaged beside the other statistics,
        :math:`S = \\frac{R}{N} \\sum_n (U_A^\\top V_n U_G)^2` entry by entry, `V_n` the gradient
        of example n's own loss. Rows of an example are added up first (a few megabytes of examples
        at a time on CPU, 256 elsewhere), uses of a weight and steps of a scan are not; with
        `sharing="reduce"` all are, inputs and gradients each by themselves. Layers whose rows
        cannot be told apart by example have the diagonal of `A (x) G` in the basis instead: tied
        weights, tables and those of a scan over examples; `str(captured)` names them. With
        `fisher="exact"` terms of one example take a backward pass each.

    Returns:
      `(loss, grads, stats)`, or `((loss, aux), grads, stats)` with `has_aux`.

    Raises:
      ValueError: if the batch cannot be divided, params or args are not like the captured ones, in
        their number, shapes or layers, `loss_scale` is no positive number, or `basis` is of other
        layers.
    """
    _check_scale(loss_scale)
    leaves = self.layers.leaves(params, "params")
    signature, chunks = self._inputs(params, args)
    # in `shard_map` the gradient is that of the device, as it is without a check of types: AD would
    # add up cotangents of what all devices share, but could not divide them by their number
    axes = _compat.varying(signature.args.dynamic(chunks.leaves))
    leaves = _compat.vary(leaves, axes)
    static = isinstance(refresh, (bool, np.bool_))
    shards = chunks.shards(leaves)
    one_sum = self._spec.sharing == "reduce"  # of sums by example the moment is formed at once
    whole_rows = shards == chunks.shards(())  # no device has but some features of them
    if one_sum or (static and (not refresh or (chunks.count == 1 and whole_rows))):
      shards = batches.Shards()  # nothing to wait for: a sum is added up where it is formed
    whole = self._whole
    dtypes = [jnp.promote_types(leaves[layer.weight].dtype, jnp.float32) for layer in whole]
    zeros = _compat.vary(_zeros(whole, dtypes, shards, basis is not None), axes)
    rotations, flag = None, None if static else jnp.asarray(refresh)
    if basis is not None:
      if whole != self.layers:
        raise ValueError(
          "`basis=` measures second moments of whole matrices, and `capture(block_size=...)` has"
          ' split some: capture without it for `scaling="eigenvalue"`.'
        )
      rotations = second_moments.rotations(whole, basis, dtypes, flag)
      rotations = _compat.vary(rotations, axes)
    if static and not refresh:
      backward = plain(signature, leaves, chunks.leaves, zeros, loss_scale)
      combine = tuple
    else:
      backward, combine = self._with_statistics(
        signature, leaves, chunks, zeros, rotations, flag, loss_scale
      )
      if self._spec.fisher == "sampled" and key is None:
        raise ValueError(
          "With fisher='sampled' labels are drawn: pass `value_and_grad(..., key=key)`, with a new"
          " `key = jax.random.fold_in(seed, step)` each step."
        )
    results = chunks.run(backward, self._loops, key)

    by_leaf = list(zip(*(result.grads for result in results), strict=True))
    unflatten = functools.partial(jax.tree.unflatten, signature.params)
    contrasts = zip(*map(group_gradients.contrasts, by_leaf), strict=True)
    statistics = jax.tree.map(lambda *f: group_gradients.mean(f), *(r.statistics for r in results))
    statistics = combine(jax.tree.map(lambda f: jnp.sum(f, axis=1), statistics))  # over the shards
    loss = group_gradients.mean([result.loss for result in results])
    stats = Stats(
      jnp.asarray(refresh, bool),
      tiles.cut([own.factors for own in statistics], self._tiles),
      tuple(map(unflatten, contrasts)),
      loss,
      tuple(own.S for own in statistics if own.S is not None),
    )
    grads = unflatten(map(group_gradients.mean, by_leaf))
    if not self._spec.has_aux:
      return loss, grads, stats
    auxes = [result.aux for result in results]
    aux = auxiliary.merge(self._aux_roles, auxes, signature.args.dynamic(chunks.leaves))
    return (loss, aux), grads, stats

  def check(self, params: PyTree, *args: Any, key: jax.Array | None = None) -> tuple[Finding, ...]:
    """Evaluates on one batch what capture assumes of the loss, and prints what holds.

    To be run once before a long training. It takes a handful of evaluations of the gradient, three
    of which compile a program of their own. The findings are, by name:

    - `finite`: loss and gradient are;
    - `repeatable`: evaluated again, the loss is the same;
    - `mean`: the batch taken twice has the same loss and gradient. A sum over the examples, or over
      a number written into the loss, has twice as much;
    - `order`: so has the batch in another order;
    - `pieces`: so have, in the mean, the pieces that `groups` and `micro_batches` cut the batch
      into (where it is captured in one, as few equal ones as can be);
    - `gradient`: `value_and_grad` gives the gradient of `jax.grad`;
    - `aux`: what is put together from the pieces is that of the whole batch;
    - `reached`: every parameter has a gradient;
    - `statistics`: those of all layers are finite, and none is zero.

    Two outcomes are the same if loss and gradient differ by less than the square root of the
    rounding unit of the coarsest floating type that the loss computes in, relative to their norms.
    With a loss that depends on a key `mean`, `order`, `pieces` and `aux` are not tried: other
    batches draw other numbers. BatchNorm does not hold in `pieces` (and `aux`), as it should be.

    Args:
      params: as given to `capture`, but arrays.
      *args: as given to `capture`, but arrays: a batch.
      key: for `fisher="sampled"`; by default `jax.random.key(0)`.

    Returns:
      The findings, tuples `(name, holds, text)`; `holds` is None where nothing could be tried.

    Raises:
      ValueError: as `value_and_grad`; under `jax.jit`.

    Example:
      >>> import fop_optax, jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["w"]) ** 2)  # a sum, not a mean
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.arange(24.0).reshape(8, 3)
      >>> captured = fop_optax.capture(loss_fn, params, x)
      >>> findings = captured.check(params, x)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
      holds: The loss, 25848, and its gradient are finite.
      holds: Evaluated again the loss is the same (25848 and 25848).
      does not hold: The batch taken twice has twice the loss (25848 and 51696, gradients 0.5
      apart). It is a sum over the examples, or divided by a number written into it: ...
      >>> [finding.name for finding in findings if finding.holds is False]
      ['mean', 'pieces']
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, args))):
      raise ValueError(
        "`captured.check` evaluates the loss and prints: call it outside of `jax.jit`, once before"
        " training."
      )
    signature, chunks = self._inputs(params, args)
    if self._spec.fisher == "sampled" and key is None:
      key = jax.random.key(0)
    value, grads, stats = jax.jit(self.value_and_grad)(params, *args, key=key)
    loss, aux = value if self._spec.has_aux else (value, ())
    check = Check(
      signature=signature,
      params=jax.tree.leaves(params),
      chunks=chunks,
      layers=self.layers,
      aux_roles=self._aux_roles,
      captured=Outcome(loss, jax.tree.leaves(grads), aux),
      factors=stats.factors,
    )
    findings = check.findings()
    for finding in findings:
      print(finding)
    return findings

  def _inputs(self, params, args):
    """The loss with the roles of its arguments, and the batch as it will be cut."""
    spec = self._spec
    if len(args) != spec.arguments:
      raise ValueError(
        f"The loss got {len(args)} arguments after params, but {spec.arguments} in"
        " `fop_optax.capture(loss, params, *args)`. Pass the same ones, in their order."
      )
    arguments = classify(args, spec.batch_argnums, spec.numbers)
    signature = Signature(spec.loss_fn, spec.has_aux, jax.tree.structure(params), arguments)
    leaves = jax.tree.leaves(args)
    chunks = batches.Chunks(arguments, leaves, self.layers.groups, spec.micro_batches, spec.every)
    chunks.size  # noqa: B018  raises if the batch cannot be divided
    return signature, chunks

  def _with_statistics(self, signature, leaves, chunks, zeros, rotations, refresh, loss_scale):
    """The backward pass with statistics for the inputs at hand, if their layers are ours."""
    size = chunks.size
    chunk = chunks.chunk(0, 0)
    with chunks.explained():
      traced = signature.trace(leaves, chunks.leaves, chunk, self._growth)
    if traced.growth is self._growth and tuple(traced.found.uses) == self._found:
      uses = {key: traced.found.uses[key] for key in self._accepted}
    else:  # the program depends on the batch size
      traced, twice = trace_twice(signature, leaves, chunks.leaves, size, chunk)
      uses = growing(traced, twice, size)
    layers = self._whole
    resolved = resolve(traced.found, uses, layers.shapes, layers.paths, self._spec.max_dim)
    if resolved.layers != layers.entries:
      raise ValueError(
        "The loss has other layers with these arguments than it had in `fop_optax.capture`:"
        f" {len(resolved.layers)} instead of {len(layers)}. Capture it with the arguments of"
        " training."
        + "".join(
          f"\n  now: {now}\n  captured: {then}"
          for now, then in zip(resolved.layers, layers, strict=False)
          if now != then
        )[:2000]
      )
    terms, weights, examples = None, None, analyse(traced, None, signature.args, size)
    if self._spec.fisher == "empirical":
      given, read = self._spec.terms_per_example, examples.terms if size > 1 else self._terms
      terms = terms_of(traced.found, size, given, read)
      if size == 1:
        weights = counted.still_there(traced.jaxpr, self._weights)
      elif terms == read and given is None:
        weights = counted.weights_of(traced.jaxpr, uses.values(), examples.weights)
    check_marked(self._spec.fisher, traced.found.marks, traced.found.hidden)
    rows, reduced = examples.rows(uses), frozenset()
    if self._spec.sharing == "reduce":
      reduced = sharing.reducible(resolved, uses, rows, size)
    measured = {}
    if rotations:
      shown = second_moments.measurable(resolved, uses, rows, size)
      measured = {index: rotations[index] for index in shown}
    backward = WithStatistics(
      traced=traced,
      uses=uses,
      resolved=resolved,
      params=leaves,
      zeros=zeros,
      rotations=measured,
      rows=rows,
      examples=size,
      chunks=chunks.count,
      terms=terms,
      weights=weights,
      every=self._spec.every,
      reduced=reduced,
      refresh=refresh,
      fisher=self._spec.fisher,
      loss_scale=loss_scale,
      branch=self._loops.micro_batches,
    )
    return backward, functools.partial(by_layer, resolved, rotations)


def _zeros(
  layers: Layers, dtypes: Sequence[Any], shards: batches.Shards, squares: bool
) -> tuple[Statistics, ...]:
  """Zeros of the statistics' shapes by shard, with second moments if `squares`."""

  def zeros(layer, dtype):
    factors = Factors(*(shards.zeros(shape, dtype) for shape in layer.factor_shapes))
    S = shards.zeros((layer.stack, *layer.dims), dtype) if squares else None
    return Statistics(factors, S)

  return tuple(map(zeros, layers, dtypes))


def _check_scale(scale):
  if scale is None:
    return
  known = not isinstance(scale, jax.core.Tracer)
  if jnp.ndim(scale) or (known and not 0 < float(scale) < math.inf):
    shown = f"an array of shape {list(jnp.shape(scale))}" if jnp.ndim(scale) else scale
    raise ValueError(
      f"`value_and_grad(..., loss_scale=S)` takes one positive number, as 2.0**15, not {shown}."
    )
