"""`capture` and `Captured`: the public face of this package."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.extend.core import primitives
import jax.numpy as jnp
import numpy as np

from fop_optax.capture import auxiliary, flow, layer_table
from fop_optax.capture import batch as batches
from fop_optax.capture.backward import WithStatistics, by_layer, plain
from fop_optax.capture.examples.assumptions import analyse
from fop_optax.capture.fisher import FISHERS, check_marked
from fop_optax.capture.resolve import resolve
from fop_optax.capture.trace import Signature, growing, terms_of, trace_twice
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
  groups: int = 2,
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
    params: any pytree of floating arrays, or of `jax.ShapeDtypeStruct`.
    *args: further arguments, or their shapes, with the batch size of training.
    has_aux: whether the loss returns `(loss, aux)`. Of aux, a leaf whose leading axis grows with
      the batch comes back in the batch's order; other floating leaves are averaged over groups.
    batch_argnums: which of `args` have the batch as leading axis (counted within `args`). By
      default every array but typed keys, `uint32[2]` keys and scalars.
    groups: number of groups the examples are dealt to (example i to group i mod groups), each with
      a gradient of its own; 1 suffices for K-FAC, FOP needs at least 2. The loss is the mean of the
      groups' means: with a mask and unequal counts that is not the mean over the whole batch.
      BatchNorm normalises within a group.
    micro_batches: number of pieces each group is worked off in, for less memory. Equal to one piece
      but for BatchNorm and dropout.
    fisher: which Fisher matrix the statistics estimate: `"empirical"`, from the labels given;
      `"sampled"`, from labels drawn from the model's output (one more backward pass on refresh);
      `"exact"`, the expectation over them (one for each class). The latter two need a marked loss,
      `fop_optax.softmax_cross_entropy` or `squared_error`.
    curvature_fraction: 1, or 1 over a whole number k: statistics are of every k-th example alone,
      which makes a refresh cheaper and them noisier. Gradients are those of all examples. Uses
      whose rows have no axis of examples (within a scan over them) count whole.
    terms_per_example: R above, the number of terms the mean loss has for an example: 1 for a label
      an example, the tokens of an example for a mean over tokens. By default what
      `fop_optax.softmax_cross_entropy` or `squared_error` in the loss say, else 1.
    max_dim: a factor with a longer side is kept as its diagonal.
    strict: raise if any parameter is in no layer, instead of listing it in `fallbacks`.

  Returns:
    A `Captured`.

  Raises:
    ValueError: if the arguments do not fit together, no parameter is in a layer, or, with `strict`,
      any is not.

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
  spec = Spec(
    loss_fn, has_aux, batch_argnums, micro_batches, terms_per_example, max_dim, fisher, every
  )
  flat, treedef = jax.tree_util.tree_flatten_with_path(params)
  paths = tuple(layer_table.printable(path) for path, _ in flat)
  leaves = [leaf for _, leaf in flat]
  _check_params(leaves, paths)
  signature = Signature(loss_fn, has_aux, treedef, batches.classify(args, batch_argnums))
  shapes = tuple(tuple(leaf.shape) for leaf in leaves)
  chunks = batches.Chunks(signature.args, jax.tree.leaves(args), groups, micro_batches, every)
  traced, twice = trace_twice(signature, leaves, chunks.leaves, chunks.size)
  uses = growing(traced, twice, chunks.size)
  resolved = resolve(traced.found, uses, shapes, paths, max_dim)
  if chunks.size == 1 and twice:  # a single example's axis is like any other of size one
    examples = analyse(*trace_twice(signature, leaves, chunks.leaves, 2), signature.args, 2)
  else:
    examples = analyse(traced, twice, signature.args, chunks.size)
  examples.check(groups, micro_batches)
  terms_of(traced.found, chunks.size, terms_per_example, examples.terms)
  check_marked(fisher, traced.found.marks)
  roles: tuple[auxiliary.Role, ...] = ()
  if chunks.count > 1:
    roles = auxiliary.roles(traced, twice, len(leaves), signature.args.batch, chunks.size)
  fallbacks = {paths[leaf]: why for leaf, why in resolved.fallbacks.items()}
  layers = Layers(resolved.layers, shapes, paths, groups)
  if not resolved.layers or (strict and fallbacks):
    raise ValueError(layer_table.refusal(layers, fallbacks))
  notes = examples.notes(groups, micro_batches)
  if terms_per_example is None and not traced.found.marks:
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
    _found=tuple(traced.found.uses),
    _accepted=tuple(uses),
    _loops=batches.Loops(groups=looping and long, micro_batches=looping),
  )


@dataclasses.dataclass(frozen=True)
class Spec:
  """What `capture` was told beside shapes."""

  loss_fn: Callable[..., Any]
  has_aux: bool
  batch_argnums: int | Sequence[int] | None
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
  ) -> tuple[Any, PyTree, Stats]:
    """Loss, gradient of the mean loss, and statistics of this batch, in one backward pass.

    Args:
      params: as given to `capture`.
      *args: as given to `capture`; the batch size may differ.
      refresh: whether to form Kronecker statistics. A Python bool makes two compiled variants, of
        which the one without costs no more than the gradient by groups; a traced bool makes one.
        `fop_optax.refresh_due(opt_state)` gives it.
      key: for `fisher="sampled"`, a new one each step.

    Returns:
      `(loss, grads, stats)`, or `((loss, aux), grads, stats)` with `has_aux`.

    Raises:
      ValueError: if the batch cannot be divided, or params or args are not like the captured ones.
    """
    leaves = self.layers.leaves(params, "params")
    arguments = batches.classify(args, self._spec.batch_argnums)
    signature = Signature(
      self._spec.loss_fn, self._spec.has_aux, jax.tree.structure(params), arguments
    )
    spec, leaves_of_args = self._spec, jax.tree.leaves(args)
    chunks = batches.Chunks(
      arguments, leaves_of_args, self.layers.groups, spec.micro_batches, spec.every
    )
    chunks.size  # noqa: B018  raises if the batch cannot be divided
    static = isinstance(refresh, (bool, np.bool_))
    zeros = _zeros(self.layers, leaves)
    if static and not refresh:
      backward, combine = plain(signature, leaves, chunks.leaves, zeros), tuple
    else:
      flag = None if static else jnp.asarray(refresh)
      backward, combine = self._with_statistics(signature, leaves, chunks, zeros, flag)
      if self._spec.fisher == "sampled" and key is None:
        raise ValueError(
          "With fisher='sampled' labels are drawn: pass `value_and_grad(..., key=key)`, with a new"
          " `key = jax.random.fold_in(seed, step)` each step."
        )
    results = chunks.run(backward, self._loops, key)

    by_leaf = list(zip(*(result.grads for result in results), strict=True))
    unflatten = functools.partial(jax.tree.unflatten, signature.params)
    contrasts = zip(*map(batches.contrasts, by_leaf), strict=True)
    factors = combine(jax.tree.map(lambda *f: batches.mean(f), *(r.factors for r in results)))
    stats = Stats(jnp.asarray(refresh, bool), factors, tuple(map(unflatten, contrasts)))
    grads = unflatten(map(batches.mean, by_leaf))
    loss = batches.mean([result.loss for result in results])
    if not self._spec.has_aux:
      return loss, grads, stats
    auxes = [result.aux for result in results]
    aux = auxiliary.merge(self._aux_roles, auxes, arguments.dynamic(chunks.leaves))
    return (loss, aux), grads, stats

  def _with_statistics(self, signature, leaves, chunks, zeros, refresh):
    """The backward pass with statistics for the inputs at hand, if their layers are ours."""
    size = chunks.size
    traced = signature.trace(leaves, chunks.leaves, chunks.chunk(0, 0))
    if tuple(traced.found.uses) == self._found:
      uses = {key: traced.found.uses[key] for key in self._accepted}
    else:  # the program depends on the batch size
      _, twice = trace_twice(signature, leaves, chunks.leaves, size)
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
    examples = analyse(traced, None, signature.args, size)
    read = examples.terms if size > 1 else self._terms
    terms = terms_of(traced.found, size, self._spec.terms_per_example, read)
    backward = WithStatistics(
      traced=traced,
      uses=uses,
      resolved=resolved,
      params=leaves,
      zeros=zeros,
      rows=examples.rows(uses),
      examples=size,
      terms=terms,
      every=self._spec.every,
      refresh=refresh,
      fisher=self._spec.fisher,
      branch=self._loops.micro_batches,
    )
    return backward, functools.partial(by_layer, resolved)


def _zeros(layers: Layers, leaves: Sequence[Any]) -> tuple[Factors, ...]:
  """Zeros of the factors' shapes, in float32 or the parameter's better precision."""
  dtypes = [jnp.promote_types(leaves[layer.weight].dtype, jnp.float32) for layer in layers]
  return tuple(
    Factors(*(jnp.zeros(shape, dtype) for shape in layer.factor_shapes))
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


def _every(fraction: float) -> int:
  """k of a fraction 1 / k."""
  every = round(1 / fraction) if 0 < fraction <= 1 else 0
  if every == 0 or abs(every * fraction - 1) > 1e-6:
    raise ValueError(
      f"`capture(curvature_fraction={fraction})` takes 1 over a whole number, as 1, 0.5 or 0.25."
    )
  return every


def _check_params(leaves, paths):
  if not leaves:
    raise ValueError("`capture(loss, params, ...)` got params without leaves.")
  for leaf, path in zip(leaves, paths, strict=True):
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
      raise ValueError(
        f"params{path} is a {type(leaf).__name__}, not an array. Split the tree first, for example"
        " `params, static = equinox.partition(model, equinox.is_inexact_array)`."
      )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f"params{path} is {leaf.dtype}{list(leaf.shape)}: only floating arrays have gradients. Hand"
        " it to the loss in a further argument, and leave that out of `batch_argnums`."
      )
