"""Orthogonalisation as a last step: the polar factor of a direction, whatever made it."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fop_optax.curvature.polar import (
  Triple,
  exact_polar,
  inner_axes,
  newton_schulz,
  over,
  over_largest,
  polar_factors,
)
from fop_optax.curvature.stacks import Stack, plan_stacks, stack_matrices, unstack
from fop_optax.dimensions import Dimensions
from fop_optax.layers import Layers, is_masked
from fop_optax.optimizers import by_tensor, checks
from fop_optax.tensors import Tensor, Tensors, tensors

NS_COEFFS = (3.4445, -4.775, 2.0315)  # of Muon
SCALES = {
  "muon": lambda rows, columns: max(1.0, columns / rows) ** 0.5,
  "rms": lambda rows, columns: max(rows, columns) ** 0.5,
}
OTHERS = ("rms", "keep")


@dataclasses.dataclass(frozen=True)
class OrthogonalizeOptions:
  """Hyperparameters; checked."""

  ns_steps: int
  ns_coeffs: Any
  ns_dtype: Any
  scale: str | None
  others: str
  join_biases: bool
  dimension_numbers: Dimensions
  layers: Layers | None

  def __post_init__(self):
    checks.check_static("ns_steps", self.ns_steps)
    if self.scale is not None:
      checks.one_of("scale", self.scale, tuple(SCALES))
    checks.one_of("others", self.others, OTHERS)
    by_tensor.check_views(self.dimension_numbers, self.layers)
    shape = (3,) if self.ns_coeffs is None else np.shape(self.ns_coeffs)
    if shape[-1:] != (3,) or len(shape) > 2:
      raise ValueError(
        f"`ns_coeffs={self.ns_coeffs!r}` should be three numbers, three numbers for each step, or"
        " None for the exact polar factor."
      )

  @property
  def coefficients(self) -> tuple[Triple, ...]:
    """Of each step of the iteration; none where the polar factor is exact."""
    if self.ns_coeffs is None:
      return ()
    steps = np.asarray(self.ns_coeffs, float)
    rows = steps if steps.ndim == 2 else np.tile(steps, (self.ns_steps, 1))
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)

  def tensors(self, tree: Any) -> Tensors:
    """The matrices of a tree; all else in it are tables, or vectors with one axis."""
    found = tensors(tree, self.dimension_numbers, self.layers, self.join_biases)
    given = self.layers is not None or self.dimension_numbers is not None

    def flat(tensor: Tensor) -> list[Tensor]:
      matrix = not tensor.natural or (not given and len(tensor.dims) == 2)
      return [tensor if matrix else tensor.reshaped((math.prod(tensor.dims),))]

    return found.map(flat)


def orthogonalize(
  *,
  ns_steps: int = 5,
  ns_coeffs: Any = NS_COEFFS,
  ns_dtype: Any = None,
  scale: str | None = "muon",
  others: str = "rms",
  join_biases: bool = True,
  dimension_numbers: Dimensions = None,
  layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces each matrix of a direction by its polar factor, whatever made the direction.

  With the singular values in `S`,

  .. math::
    U S V^\top \mapsto \sqrt{\max(1, n / m)} \; U V^\top

  for a matrix of `m` rows (inputs) and `n` columns (outputs): the steepest step of bounded spectral
  norm. After momentum it is Muon, after :func:`fop_optax.scale_by_soap` SOAP-Muon (Vyas), after
  :func:`fop_optax.scale_by_kfac` ours, and after it with :meth:`fop_optax.Stats.inputs_only`
  Newton-Muon (Du and Su). The length of a direction makes no difference: one rate serves all of
  them, and a norm constraint before it none.

  All matrices of equal shape, or the transposed one, over all parameters, go through one batched
  iteration on their smaller side. `layers` says which matrices there are, as capture found them: a
  kernel of attention or of a convolution is one; experts, scanned layers, and parts of a weight
  that are used apart are one each.

  What is no matrix is scaled to a root mean square of one, so that the same rate serves it: vectors
  (biases, norm scales) and leaves that `layers` or `dimension_numbers` do not say to be matrices.
  Where neither is given, leaves of two axes are, inputs first, as in `optax.contrib.muon`; others
  need dimension numbers.

  Nor is a weight of `layers` with a diagonal side: a lookup table, or one wider than `max_dim` of
  `capture`. Its largest row has that root mean square (column, where the outputs are diagonal).
  Rows of a table do not mix, as an example uses one, hence no polar factor; and scaled each by
  itself, those of tokens not seen of late, nearly forgotten by momentum, would move at full length.

  A direction of zero stays zero, as that of a step which was skipped; one that is not finite stays
  so. Neither comes from the optimizers here; around others use `optax.apply_if_finite`.

  Args:
    ns_steps: steps of the Newton-Schulz iteration.
    ns_coeffs: its three coefficients, those of each step (as many as there are then), or None: the
      exact polar factor, by a singular value decomposition, for tests and small models.
    ns_dtype: dtype of the iteration; None: that of the direction, float32 or better, in full
      precision. `jnp.bfloat16` is quicker on accelerators, and what Muon's authors use.
    scale: `"muon"`: the factor above. `"rms"`: :math:`\sqrt{\max(m, n)}`, a root mean square of one
      (`consistent_rms` of `optax.contrib.muon` is a factor on it: 0.2 to use the rates of AdamW).
      None: singular values of one.
    others: `"rms"`, as above, or `"keep"`: what is no matrix is left as it comes.
    join_biases: with `layers`, whether the bias of a weight is the last row of its matrix, as it is
      in K-FAC's block; otherwise, and where the bias is masked alone, it is a vector.
    dimension_numbers: how leaves with two or more axes are matrices: a tree of
      :class:`fop_optax.DimensionNumbers` (or of those of `optax.contrib.muon`) like params or part
      of one, or a callable that makes one. Axes in neither are a batch of matrices.
    layers: `captured.layers` of `captured = fop_optax.capture(loss, params, ...)`.

  Returns:
    A transformation without state; the learning rate comes after it.

  Raises:
    ValueError: for hyperparameters out of range; in `update` for dimension numbers that do not fit,
      directions that are not real floating point, and trees that are not of these layers.
    TypeError: if `layers` are of another type.

  Example:
    >>> import fop_optax, jax.numpy as jnp, optax
    >>> soap_muon = optax.chain(
    ...   fop_optax.scale_by_soap(inverse_update_period=1),
    ...   fop_optax.orthogonalize(),
    ...   optax.scale_by_learning_rate(0.02),
    ... )
    >>> tx = fop_optax.orthogonalize(ns_coeffs=None)
    >>> updates, _ = tx.update({"w": jnp.diag(jnp.array([1e-3, -5.0]))}, optax.EmptyState())
    >>> print(updates["w"].round(3))
    [[ 1.  0.]
     [ 0. -1.]]

  References:
    Jordan et al., `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, 2024; Vyas et al., `SOAP-Muon
    <https://nikhilvyas.github.io/SOAP_Muon.pdf>`_; Du and Su, `The Newton-Muon Optimizer
    <https://arxiv.org/abs/2604.01472>`_, 2026; Liu et al., `Muon is Scalable for LLM Training
    <https://arxiv.org/abs/2502.16982>`_, 2025
  """
  options = OrthogonalizeOptions(
    ns_steps=ns_steps,
    ns_coeffs=ns_coeffs,
    ns_dtype=ns_dtype,
    scale=scale,
    others=others,
    join_biases=join_biases,
    dimension_numbers=dimension_numbers,
    layers=layers,
  )

  def init(params: optax.Params) -> optax.EmptyState:
    del params
    return optax.EmptyState()

  @jax.jit  # so that an update outside of a user's jit is not one small program for each array
  def apply(updates):
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_masked)
    found = options.tensors(updates)
    stacks = plan_stacks(found)
    directions = [
      stack_matrices(stack, found, leaves, by_tensor.arithmetic(stack, found, leaves))
      for stack in stacks
    ]
    leaves = unstack(stacks, found, _last_step(options, stacks, directions), leaves)
    return jax.tree.unflatten(treedef, leaves)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if not jax.tree.leaves(updates):
      return updates, state
    checks.check_gradient(updates, params)
    by_tensor.check_floating(updates)
    return apply(updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def _last_step(
  options: OrthogonalizeOptions, stacks: Sequence[Stack], directions: list[jax.Array]
) -> list[jax.Array]:
  """Polar factors of the matrices; all else of unit size, or as it is."""
  polar = exact_polar
  if options.coefficients:
    polar = lambda X: newton_schulz(X, options.coefficients, options.ns_dtype)
  matrices = [k for k, s in enumerate(stacks) if len(s.dims) == 2 and not any(s.diagonal)]
  factors = polar_factors(polar, [directions[k] for k in matrices])
  out = dict(zip(matrices, factors, strict=True))
  for k, (stack, d) in enumerate(zip(stacks, directions, strict=True)):
    if k in out and options.scale is not None:
      out[k] = SCALES[options.scale](*stack.dims) * out[k]
    elif k not in out:
      out[k] = _unit_size(d, stack.diagonal) if options.others == "rms" else d
  return [out[k] for k in range(len(stacks))]


def _unit_size(stack: jax.Array, diagonal: tuple[bool, ...]) -> jax.Array:
  """Tensors whose root mean square is one; that of the largest slice along diagonal modes."""
  stack = over_largest(stack)
  along = tuple(axis for axis, alone in enumerate(diagonal, 1) if not alone)
  rms = jnp.sqrt(jnp.mean(stack**2, axis=along, keepdims=True))
  return over(stack, jnp.max(rms, axis=inner_axes(stack), keepdims=True))
