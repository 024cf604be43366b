"""`capture` and `Captured`: the public face of this package."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.extend.core import primitives
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat
from fop_optax.capture import auxiliary, flow, layer_table
from fop_optax.capture import batch as batches
from fop_optax.capture.arguments import check_params, classify
from fop_optax.capture.backward import WithStatistics, by_layer, plain
from fop_optax.capture.check import Check, Finding, Outcome
from fop_optax.capture.examples.assumptions import analyse
from fop_optax.capture.fisher import FISHERS, check_marked
from fop_optax.capture.growth import Growth
from fop_optax.capture.resolve import resolve
from fop_optax.capture.trace import Signature, growing, raw_numbers, terms_of, trace_twice
from fop_optax.capture.values import Key
from fop_optax.layers import Factors, Layers, Stats

PyTree = Any

# Above so many products the groups go in a loop: a program written out takes long to compile twice,
# and is not quicker (of 12 blocks of a transformer 1.5 times the seconds, and the same steps).
_LONG = 16


def capture(
  loss_fn: Callable[..., Any],
  params: PyTree,
  *args: Any,
  has_aux: bool = False,
  batch_argnums: int | Sequence[int] | None = None,
  groups: int = 1,
  micro_batches: int = 1,
  fisher: str = "empirical",
  curvature_fraction: float = 1.0,
  terms_per_example: int | None = None,
  max_dim: int = 8192,
  strict: bool = False,
) -> "Captured":
  """Finds the layers of a loss, for gradients by group of examples and Kronecker statistics.

  The loss is traced on shapes alone, never run. A parameter is in a layer if every gradient of the
  loss reaches it through products `y = x W` whose other operand depends on the batch, on the way to
  which it is only cast, reshaped, transposed or sliced, or through its addition to such a `y` as
  a bias, or, if it has two axes or more, to anything that depends on the batch (a table of
  positions). Every other parameter is in `Captured.fallbacks`, with the reason.

  For N examples with T rows `x` each (tokens, and the uses of the weight added up), R terms of the
  loss each, and `dy` the gradient of the mean loss with respect to a row of `y`, the statistics are

  .. math:: A = \\frac{1}{NT} \\sum x x^\\top, \\qquad G = NR \\sum dy\\, dy^\\top,

  so that :math:`A \\otimes G` estimates the block of the empirical Fisher matrix of the mean loss.

  Args:
    loss_fn: `loss_fn(params, *args)`, the mean loss over the batch, or `(loss, aux)`.
    params: any pytree of floating arrays, or of `jax.ShapeDtypeStruct`. Complex leaves and those
      of 8 bits are in no layer; their gradients are those of `jax.grad`.
    *args: further arguments, or their shapes, with the batch size of training. What is no array (a
      Python number, a string) is handed to the loss as it is: one that changes from step to step
      should be an array here too, as it is one under `jax.jit`.
    has_aux: whether the loss returns `(loss, aux)`. Of aux, a leaf whose leading axis grows with
      the batch comes back in the batch's order; other floating leaves are averaged over groups.
    batch_argnums: which of `args` have the batch as leading axis (counted within `args`): all their
      arrays but scalars, whatever their type, so keys with one an example. Arrays of the others are
      the same for all examples, but for keys: typed ones, and `uint32[2]` that the loss draws from.
      These are folded anew for each group and micro-batch. By default all arrays have the batch but
      keys and scalars; typed keys `[n]` have it if n is the leading axis of another array.
    groups: number of groups the examples are dealt to (example i to group i mod groups), each with
      a gradient of its own: 1 for K-FAC, 2 or more for FOP. Loss and gradient are the means of the
      groups'. Those of the whole batch they are but for: normalisation over the batch (BatchNorm's
      is within a group), random numbers drawn from a key, token masks with unequal counts, examples
      that interact (pairs, contrasts, a recurrence along the batch), of which capture warns, and
      losses that are no mean over the examples, for which it raises. It sees both in the program
      where it understands it; `Captured.check` evaluates whether they are.
    micro_batches: number of pieces each group is worked off in, for less memory. Equal to one piece
      but for the same.
    fisher: which Fisher matrix the statistics estimate: `"empirical"`, from the labels given;
      `"sampled"`, from labels drawn from the model's output, for each term by itself (one more
      backward pass on refresh); `"exact"`, the expectation over them. The latter two need a marked
      loss, `fop_optax.softmax_cross_entropy` or `squared_error`; they are the Gauss-Newton matrix
      of what is marked, with the weights that it has in the loss (their sizes, where they are
      negative), and know nothing of the rest. Exact is for tests and small heads: a backward pass
      for each class, times the terms that share a row (R for attention over an example's tokens, 1
      where every row is of one term; N R where examples interact, as in contrastive losses), and a
      few that find out which terms these are.
    curvature_fraction: 1, or 1 over a whole number k: statistics are of every k-th example alone,
      which makes a refresh cheaper and them noisier. Gradients are those of all examples. Uses
      whose rows have no axis of examples (within a scan over them) count whole.
    terms_per_example: R above, the number of terms the mean loss has for an example: 1 for a label
      an example, the tokens of an example for a mean over tokens, the entries of an example for a
      mean over all of an array. By default what `fop_optax.softmax_cross_entropy` or
      `squared_error` in the loss say, else the entries that the loss's last means (or sums over
      counts of a mask) are taken of, where that is clear, else 1; the table says which. Sampled and
      exact statistics have no use for it.
    max_dim: a factor with a longer side is kept as its diagonal.
    strict: raise if any parameter is in no layer, instead of listing it in `fallbacks`.

  Returns:
    A `Captured`.

  Raises:
    ValueError: if the arguments do not fit together or cannot be cut into the pieces, params are
      not floating, the loss is no mean over the batch and is to be cut into pieces, no parameter is
      in a layer, or, with `strict`, any is not.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import fop_optax
    >>> def loss_fn(params, x, y):
    ...   hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    ...   return fop_optax.softmax_cross_entropy(hidden @ params["w2"], y)
    >>> params = {"w1": jnp.ones((4, 8)), "b1": jnp.zeros(8), "w2": jnp.ones((8, 3))}
    >>> x, y = jnp.ones((6, 4)), jnp.zeros(6, int)
    >>> captured = fop_optax.capture(loss_fn, params, x, y)
    >>> [(layer.path, layer.rows, layer.outputs) for layer in captured.layers]
    [("['w1']", 5, 8), ("['w2']", 8, 3)]
    >>> loss, grads, stats = captured.value_and_grad(params, x, y)
    >>> stats.factors[0].A.shape, stats.factors[0].G.shape
    ((1, 5, 5), (1, 8, 8))
  """
  _check_options(groups, micro_batches, fisher, terms_per_example, max_dim)
  every = _every(curvature_fraction)
  flat, treedef = jax.tree_util.tree_flatten_with_path(params)
  paths = tuple(layer_table.printable(path) for path, _ in flat)
  leaves, leaves_of_args = [leaf for _, leaf in flat], jax.tree.leaves(args)
  check_params(leaves, paths)
  signature = Signature(loss_fn, has_aux, treedef, classify(args, batch_argnums))
  signature.args.size(leaves_of_args)
  numbers = raw_numbers(signature, leaves, leaves_of_args)
  if numbers:
    arguments = classify(args, batch_argnums, numbers)
    signature = dataclasses.replace(signature, args=arguments)
  spec = Spec(
    loss_fn=loss_fn,
    has_aux=has_aux,
    arguments=len(args),
    batch_argnums=batch_argnums,
    numbers=numbers,
    micro_batches=micro_batches,
    terms_per_example=terms_per_example,
    max_dim=max_dim,
    fisher=fisher,
    every=every,
  )
  shapes = tuple(tuple(leaf.shape) for leaf in leaves)
  chunks = batches.Chunks(signature.args, leaves_of_args, groups, micro_batches, every)
  traced, twice = trace_twice(signature, leaves, chunks.leaves, chunks.size)
  uses = growing(traced, twice, chunks.size)
  resolved = resolve(traced.found, uses, shapes, paths, max_dim)
  if chunks.size == 1 and twice:  # a single example's axis is like any other of size one
    examples = analyse(*trace_twice(signature, leaves, chunks.leaves, 2), signature.args, 2)
  else:
    examples = analyse(traced, twice, signature.args, chunks.size)
  examples.check(groups, micro_batches)
  if fisher == "empirical":
    terms_of(traced.found, chunks.size, terms_per_example, examples.terms)
  check_marked(fisher, traced.found.marks)
  roles: tuple[auxiliary.Role, ...] = ()
  if chunks.count > 1:
    roles = auxiliary.roles(traced, twice, len(leaves), signature.args.batch, chunks.size)
  fallbacks = {paths[leaf]: why for leaf, why in resolved.fallbacks.items()}
  layers = Layers(resolved.layers, shapes, paths, groups, resolved.frozen)
  if not resolved.layers or (strict and fallbacks):
    raise ValueError(layer_table.refusal(layers, fallbacks))
  notes = [*resolved.notes, *examples.notes(groups, micro_batches)]
  if fisher == "empirical" and terms_per_example is None and not traced.found.marks:
    notes += examples.terms_note()
  convolutions = flow.contains(traced.jaxpr, primitives.conv_general_dilated_p)
  looping = not (convolutions and jax.default_backend() == "cpu")
  long = len(uses) > _LONG or flow.contains(traced.jaxpr, primitives.scan_p)
  return Captured(
    layers=layers,
    fallbacks=fallbacks,
    notes=tuple(notes),
    _spec=spec,
    _terms=examples.terms,
    _aux_roles=roles,
    _growth=traced.growth,
    _found=tuple(traced.found.uses),
    _accepted=tuple(uses),
    _loops=batches.Loops(groups=looping and long, micro_batches=looping),
  )


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


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
  """A loss whose layers are known; made by `fop_optax.capture`.

  `str(captured)` is a table of its parameters, their layers and the reasons of those in none.

  Attributes:
    layers: the layers, static and hashable: all that an optimizer needs.
    fallbacks: path of each parameter in no layer -> why.
    notes: what else was found, a sentence each; they stand below the table.
  """

  layers: Layers
  fallbacks: Mapping[str, str]
  notes: tuple[str, ...]
  _spec: Spec
  _terms: int  # R as the loss had it at the time of capture
  _aux_roles: tuple[auxiliary.Role, ...]
  _growth: Growth | None
  _found: tuple[Key, ...]  # uses at the time of capture, and those of them that are layers
  _accepted: tuple[Key, ...]
  _loops: batches.Loops

  def __str__(self) -> str:
    return layer_table.table(self.layers, self.fallbacks, self.notes)

  def value_and_grad(
    self,
    params: PyTree,
    *args: Any,
    refresh: bool | jax.Array = True,
    key: jax.Array | None = None,
    loss_scale: jax.typing.ArrayLike | None = None,
  ) -> tuple[Any, PyTree, Stats]:
    """Loss, gradient of the mean loss, and statistics of this batch, in one backward pass.

    Inside `jax.shard_map` all three are the device's own. One mean makes those of the whole batch:
    `jax.lax.pmean(captured.value_and_grad(params, *args), axis_name)`.

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

    Returns:
      `(loss, grads, stats)`, or `((loss, aux), grads, stats)` with `has_aux`.

    Raises:
      ValueError: if the batch cannot be divided, params or args are not like the captured ones, in
        their number, shapes or layers, or `loss_scale` is no positive number.
    """
    _check_scale(loss_scale)
    leaves = self.layers.leaves(params, "params")
    signature, chunks = self._inputs(params, args)
    # in `shard_map` the gradient is that of the device, as it is without a check of types: AD would
    # add up cotangents of what all devices share, but could not divide them by their number
    axes = _compat.varying(signature.args.dynamic(chunks.leaves))
    leaves = _compat.vary(leaves, axes)
    static = isinstance(refresh, (bool, np.bool_))
    shards = chunks.shards
    if static and (chunks.count == 1 or not refresh):
      shards = batches.Shards()  # nothing to wait for: a sum is added up where it is formed
    zeros = _compat.vary(_zeros(self.layers, leaves, shards), axes)
    if static and not refresh:
      backward = plain(signature, leaves, chunks.leaves, zeros, loss_scale)
      combine = tuple
    else:
      flag = None if static else jnp.asarray(refresh)
      backward, combine = self._with_statistics(signature, leaves, chunks, zeros, flag, loss_scale)
      if self._spec.fisher == "sampled" and key is None:
        raise ValueError(
          "With fisher='sampled' labels are drawn: pass `value_and_grad(..., key=key)`, with a new"
          " `key = jax.random.fold_in(seed, step)` each step."
        )
    results = chunks.run(backward, self._loops, key)

    by_leaf = list(zip(*(result.grads for result in results), strict=True))
    unflatten = functools.partial(jax.tree.unflatten, signature.params)
    contrasts = zip(*map(batches.contrasts, by_leaf), strict=True)
    factors = jax.tree.map(lambda *f: batches.mean(f), *(r.factors for r in results))
    factors = combine(jax.tree.map(lambda f: jnp.sum(f, axis=1), factors))  # over the shards
    loss = batches.mean([result.loss for result in results])
    stats = Stats(jnp.asarray(refresh, bool), factors, tuple(map(unflatten, contrasts)), loss)
    grads = unflatten(map(batches.mean, by_leaf))
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
      holds: The loss, 25848, and its gradient are finite. ...
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

  def _with_statistics(self, signature, leaves, chunks, zeros, refresh, loss_scale):
    """The backward pass with statistics for the inputs at hand, if their layers are ours."""
    size = chunks.size
    chunk = chunks.chunk(0, 0)
    traced = signature.trace(leaves, chunks.leaves, chunk, self._growth)
    if traced.growth is self._growth and tuple(traced.found.uses) == self._found:
      uses = {key: traced.found.uses[key] for key in self._accepted}
    else:  # the program depends on the batch size
      traced, twice = trace_twice(signature, leaves, chunks.leaves, size, chunk)
      uses = growing(traced, twice, size)
    layers = self.layers
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
    terms, examples = None, analyse(traced, None, signature.args, size)
    if self._spec.fisher == "empirical":
      read = examples.terms if size > 1 else self._terms
      terms = terms_of(traced.found, size, self._spec.terms_per_example, read)
    check_marked(self._spec.fisher, traced.found.marks)
    backward = WithStatistics(
      traced=traced,
      uses=uses,
      resolved=resolved,
      params=leaves,
      zeros=zeros,
      rows=examples.rows(uses),
      examples=size,
      chunks=chunks.count,
      terms=terms,
      every=self._spec.every,
      refresh=refresh,
      fisher=self._spec.fisher,
      loss_scale=loss_scale,
      branch=self._loops.micro_batches,
    )
    return backward, functools.partial(by_layer, resolved)


def _zeros(layers: Layers, leaves: Sequence[Any], shards: batches.Shards) -> tuple[Factors, ...]:
  """Zeros of the factors' shapes by shard, in float32 or the parameter's better precision."""
  dtypes = [jnp.promote_types(leaves[layer.weight].dtype, jnp.float32) for layer in layers]
  return tuple(
    Factors(*(shards.zeros(shape, dtype) for shape in layer.factor_shapes))
    for layer, dtype in zip(layers, dtypes, strict=True)
  )


def _check_options(groups, micro_batches, fisher, terms, max_dim):
  for name, value in (("groups", groups), ("micro_batches", micro_batches), ("max_dim", max_dim)):
    if not isinstance(value, int) or value < 1:
      raise ValueError(f"`capture({name}=...)` takes a whole number of at least 1, not {value!r}.")
  if terms is not None and (not isinstance(terms, int) or terms < 1):
    raise ValueError(
      f"`capture(terms_per_example=...)` takes a whole number or None, not {terms!r}."
    )
  if fisher not in FISHERS:
    raise ValueError(f"`capture(fisher={fisher!r})` is unknown: one of {', '.join(FISHERS)}.")


def _check_scale(scale):
  if scale is None:
    return
  known = not isinstance(scale, jax.core.Tracer)
  if jnp.ndim(scale) or (known and not 0 < float(scale) < math.inf):
    shown = f"an array of shape {list(jnp.shape(scale))}" if jnp.ndim(scale) else scale
    raise ValueError(
      f"`value_and_grad(..., loss_scale=S)` takes one positive number, as 2.0**15, not {shown}."
    )


def _every(fraction: float) -> int:
  """k of a fraction 1 / k."""
  every = round(1 / fraction) if 0 < fraction <= 1 else 0
  if every == 0 or abs(every * fraction - 1) > 1e-6:
    raise ValueError(
      f"`capture(curvature_fraction={fraction})` takes 1 over a whole number, as 1, 0.5 or 0.25."
    )
  return every
