"""`capture`: finds the layers of a loss; the public face of this package."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any
import warnings

import jax
from jax.extend.core import primitives

from fop_optax.capture import auxiliary, counted, flow, layer_table, second_moments, tiles
from fop_optax.capture import batch as batches
from fop_optax.capture.arguments import check_params, classify
from fop_optax.capture.captured import Captured, Spec
from fop_optax.capture.examples.assumptions import analyse
from fop_optax.capture.fisher import FISHERS, check_marked
from fop_optax.capture.resolve import resolve
from fop_optax.capture.sharing import SHARINGS, reducible, rows_of
from fop_optax.capture.trace import Signature, growing, raw_numbers, terms_of, trace_twice
from fop_optax.layers import Layers

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
  sharing: str = "expand",
  curvature_fraction: float = 1.0,
  terms_per_example: int | None = None,
  max_dim: int = 8192,
  block_size: int | None = None,
  strict: bool = False,
) -> Captured:
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
  Of a product of complex numbers with real weights (`re + 1j im`) a row is one of real numbers, two
  of them where both parts of `y` are used: `Re(x dy) = Re x Re dy - Im x Im dy`.

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
      loss, `fop_optax.softmax_cross_entropy`, `squared_error` or `sigmoid_binary_cross_entropy`;
      they are the Gauss-Newton matrix of what is marked, with the weights that it has in the loss
      (their sizes, where they are negative), and know nothing of the rest. Exact is for tests and
      small heads: a backward pass for each class, times the terms that share a row (R for attention
      over an example's tokens, 1 where every row is of one term; N R where examples interact, as in
      contrastive losses), and a few that find out which terms these are.
    sharing: what stands for an example with several rows (tokens, time steps, places of an image):
      `"expand"`, each row for itself, as above; `"reduce"`, one row, the mean of its inputs beside
      the sum of its gradients, :math:`A = \\frac{1}{N} \\sum_n a_n a_n^\\top` with
      :math:`a_n = \\frac{1}{T} \\sum_t x_{nt}` and
      :math:`G = NR \\sum_n g_n g_n^\\top` with :math:`g_n = \\sum_t dy_{nt}`: fewer FLOPs by the
      factor T. Of linear layers it is the Gauss-Newton matrix where the rows are summed or averaged
      into one term of the loss (pooling), as expand is where each row has a term of its own
      (Eschenhagen et al., 2023). All uses and steps of a scan are rows of an example. Lookups,
      tables, fixed rows, complex numbers and uses whose examples are not seen expand; the table
      says which layers reduce.
    curvature_fraction: 1, or 1 over a whole number k: statistics are of every k-th example alone,
      which makes a refresh cheaper and them noisier. Gradients are those of all examples. Uses
      whose rows have no axis of examples (within a scan over them) count whole.
    terms_per_example: R above, the number of terms the mean loss has for an example: 1 for a label
      an example, the tokens of an example for a mean over tokens, the entries of an example for a
      mean over all of an array. By default what such a mark in the
      loss says, else the entries that the loss's last means are taken of,
      where that is clear, else 1; of a mean with weights (a mask of tokens) as many as these count,
      :math:`NR = (\\sum w)^2 / \\sum w^2`; the table says which. Sampled and exact statistics have
      no use for it.
    max_dim: a factor with a longer side is kept as its diagonal.
    block_size: the longest block of a factor; None: whole factors. A longer side is split into
      equal ranges, the bias with the last: what correlates one with another is taken for zero,
      which changes the curvature, and so the steps. A weight of m by n such ranges is as many
      layers, whose blocks are kept, inverted and owned by devices each by itself; `A_i` is kept n
      times and `G_j` m times. Statistics of a batch are formed whole and then cut. Not for
      `scaling="eigenvalue"`, nor for `layers=` where it should say which matrices there are.
    strict: raise if any parameter is in no layer, instead of listing it in `fallbacks`.

  Returns:
    A `Captured`. Where a fifth of the parameters or more is in no layer, a warning has the largest.

  Raises:
    ValueError: if the arguments do not fit together or cannot be cut into the pieces, params are
      not floating, the loss is no mean over the batch and is to be cut into pieces, no parameter is
      in a layer, or, with `strict`, any is not.
    TypeError: if `loss_fn` is no function.

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
  counts = {"groups": groups, "micro_batches": micro_batches, "max_dim": max_dim}
  counts |= {} if block_size is None else {"block_size": block_size}
  _check_options(counts, fisher, sharing, terms_per_example)
  if not callable(loss_fn):
    raise TypeError(
      "`capture(loss_fn, params, *args)` takes the function of the loss first, as"
      f" `loss_fn(params, *args)` gives one number, not a {type(loss_fn).__name__}."
    )
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
    sharing=sharing,
  )
  shapes = tuple(tuple(leaf.shape) for leaf in leaves)
  chunks = batches.Chunks(signature.args, leaves_of_args, groups, micro_batches, every)
  with chunks.explained():
    traced, twice = trace_twice(signature, leaves, chunks.leaves, chunks.size)
  uses = growing(traced, twice, chunks.size)
  resolved = resolve(traced.found, uses, shapes, paths, max_dim)
  program, bigger, size = traced, twice, chunks.size
  if size == 1 and twice:  # a single example's axis is like any other of size one
    size = 2
    program, bigger = trace_twice(signature, leaves, chunks.leaves, size)
  examples = analyse(program, bigger, signature.args, size)
  examples.check(groups, micro_batches)
  weights = None
  if fisher == "empirical":
    terms = terms_of(traced.found, chunks.size, terms_per_example, examples.terms)
    if terms == examples.terms and terms_per_example is None:
      weights = counted.weights_of(program.jaxpr, uses.values(), examples.weights)
  check_marked(fisher, traced.found.marks, traced.found.hidden)
  roles: tuple[auxiliary.Role, ...] = ()
  if chunks.count > 1:
    roles = auxiliary.roles(traced, twice, len(leaves), signature.args.batch, chunks.size)
  fallbacks = {paths[leaf]: why for leaf, why in resolved.fallbacks.items()}
  layers = Layers(resolved.layers, shapes, paths, groups, resolved.frozen, fisher)
  if not resolved.layers or (strict and fallbacks):
    raise ValueError(layer_table.refusal(layers, fallbacks))
  if warning := layer_table.left_out(layers, fallbacks):
    warnings.warn(warning, stacklevel=2)
  notes = [*resolved.notes, *examples.notes(groups, micro_batches)]
  if fisher == "empirical" and terms_per_example is None and (weights or not traced.found.marks):
    notes += examples.terms_note(weights is not None)
  rows, reduced = examples.rows(uses), frozenset()
  measured = second_moments.measurable(resolved, uses, rows, chunks.size)
  notes += layer_table.unmeasured_note(
    [layer.path for index, layer in enumerate(layers) if index not in measured]
  )
  if sharing == "reduce":
    reduced = reducible(resolved, uses, rows, chunks.size)
    notes.append(
      layer_table.sharing_note([layers[i].path for i in sorted({p.layer for p in reduced})])
    )
  convolutions = flow.contains(traced.jaxpr, primitives.conv_general_dilated_p)
  looping = not (convolutions and jax.default_backend() == "cpu")
  long = len(uses) > _LONG or flow.contains(traced.jaxpr, primitives.scan_p)
  parts, grid = tiles.split(layers, block_size)
  row_counts = rows_of(resolved, reduced, chunks)
  return Captured(
    layers=parts,
    fallbacks=fallbacks,
    notes=tuple(notes),
    rows=tuple(row_counts[tile.layer] for tile in grid),
    examples=chunks.count * chunks.size // every,
    _spec=spec,
    _terms=examples.terms,
    _weights=weights,
    _aux_roles=roles,
    _growth=traced.growth,
    _found=tuple(traced.found.uses),
    _accepted=tuple(uses),
    _loops=batches.Loops(groups=looping and long, micro_batches=looping),
    _whole=layers,
    _tiles=grid,
  )


def _check_options(counts, fisher, sharing, terms):
  for name, value in counts.items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(f"`capture({name}=...)` takes a whole number of at least 1, not {value!r}.")
  if terms is not None and (not isinstance(terms, int) or terms < 1):
    raise ValueError(
      f"`capture(terms_per_example=...)` takes a whole number or None, not {terms!r}."
    )
  for name, value, known in (("fisher", fisher, FISHERS), ("sharing", sharing, SHARINGS)):
    if value not in known:
      raise ValueError(f"`capture({name}={value!r})` is unknown: one of {', '.join(known)}.")


def _every(fraction: float) -> int:
  """k of a fraction 1 / k."""
  every = round(1 / fraction) if 0 < fraction <= 1 else 0
  if every == 0 or abs(every * fraction - 1) > 1e-6:
    raise ValueError(
      f"`capture(curvature_fraction={fraction})` takes 1 over a whole number, as 1, 0.5 or 0.25."
    )
  return every
