"""The quadratic model of a loss in a few directions, with exact curvature.

    m(w) = loss + b'w + w'(C + lambda D)w / 2        for the step  delta = sum_i w_i v_i

    b_i  = v_i' g          C_ij = v_i' (sum_t w_t J_t' H_t J_t) v_j          D_ij = v_i' v_j

with the gradient `g`, the Gauss-Newton matrix of the marked loss (its terms `t` with weights `w_t`,
the Jacobian `J_t` of the parameters of each term's distribution and its Hessian `H_t` in them), and
no approximation by layers: a Jacobian-vector product for each direction, no backward pass through
the network.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture.batch import Result
from fop_optax.capture.captured import Captured
from fop_optax.capture.evaluate import MARK, Evaluation
from fop_optax.capture.fisher import check_marked, times_hessian
from fop_optax.capture.values import Key
from fop_optax.factorizations import eigh
from fop_optax.group_gradients import mean


class QuadraticModel(NamedTuple):
  """A quadratic model of the loss in `k` directions, see :func:`fop_optax.quadratic_model`.

  Example:
    >>> import fop_optax, jax.numpy as jnp
    >>> b, C, D = jnp.array([-1.0, -2.0]), jnp.diag(jnp.array([1.0, 4.0])), jnp.eye(2)
    >>> model = fop_optax.QuadraticModel(jnp.array(5.0), linear=b, curvature=C, gram=D)
    >>> print(model.minimizer(), model.change(model.minimizer()))
    [1.  0.5] -1.0
    >>> print(model.minimizer(damping=1.0).round(3), model.minimizer(fixed=[0.25, None]))
    [0.5 0.4] [0.25 0.5 ]
  """

  loss: jax.Array  # shape=(): of the batch, at the parameters
  linear: jax.Array  # b, shape=(k,)
  curvature: jax.Array  # C, shape=(k, k)
  gram: jax.Array  # D, shape=(k, k)

  def minimizer(
    self, damping: jax.typing.ArrayLike = 0.0, fixed: Sequence[Any | None] | None = None
  ) -> jax.Array:
    r"""The coefficients of the best step, :math:`w = -(C + \lambda D)^{-1} b`.

    A direction that is zero, or no other than those before it in this batch's curvature, gets the
    shortest of the solutions: of a step before that there was none, 0.

    Args:
      damping: lambda, as of `kfac(damping=...)`.
      fixed: for each direction its coefficient, None where it is free (a rate or a momentum that
        is given).

    Returns:
      `w`, shape `[k]`.

    Raises:
      ValueError: if `fixed` has not one entry a direction.
    """
    if fixed is not None and len(fixed) != len(self.linear):
      raise ValueError(
        f"`minimizer(fixed=...)` has {len(fixed)} entries for {len(self.linear)} directions: give"
        " a number or None for each."
      )
    matrix = self.curvature + damping * self.gram
    free = jnp.asarray([value is None for value in fixed or [None] * len(self.linear)])
    given = jnp.stack([jnp.asarray(0.0 if v is None else v, matrix.dtype) for v in fixed or [0.0]])
    given = jnp.broadcast_to(given, self.linear.shape)
    right = jnp.where(free, self.linear + matrix @ given, 0)
    # to unit diagonal: directions may differ in length by orders of magnitude
    scale = jnp.where(free, jnp.sqrt(jnp.abs(jnp.diagonal(matrix))), 0)
    scale = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    values, vectors = eigh(scale[:, None] * matrix * scale)
    kept = values > 8 * len(values) * jnp.finfo(values.dtype).eps
    along = vectors.T @ (scale * right)
    free_part = -scale * (vectors @ jnp.where(kept, along / jnp.where(kept, values, 1), 0))
    return jnp.where(free, free_part, given)

  def change(self, w: jax.Array, damping: jax.typing.ArrayLike = 0.0) -> jax.Array:
    r"""The model's change of the loss, :math:`b^\top w + w^\top (C + \lambda D) w / 2`.

    Args:
      w: a coefficient for each direction, shape `[k]`.
      damping: lambda.
    """
    return self.linear @ w + 0.5 * w @ (self.curvature + damping * self.gram) @ w


def quadratic_model(
  captured: Captured,
  params: Any,
  args: Sequence[Any],
  vectors: Sequence[Any],
) -> QuadraticModel:
  r"""The quadratic model of a marked loss along some directions, with its exact curvature.

  From a direction :math:`v_1 = M^{-1} g` of `scale_by_kfac` and the step before, :math:`v_2`, it
  gives the rate and the momentum that are best for the batch (Martens and Grosse, 2015, section
  7); from FOP's mean and orthogonal parts a rate for each. On a convex quadratic such steps are
  those of preconditioned conjugate gradients.

  Args:
    captured: of a loss marked by `fop_optax.softmax_cross_entropy` or another of its kind.
      Its groups and micro-batches are those of the model; its `fisher` has no part in it.
    params: as given to `capture`.
    args: the loss's arguments after params, as a sequence.
    vectors: the directions, trees like params.

  Returns:
    A :class:`QuadraticModel`. Terms of the loss that are not marked (a penalty) are in `loss` and
    `linear`, and not in `curvature`.

  Raises:
    ValueError: if there is no marked loss or one inside of `cond` or `while_loop`; without a
      direction, and for trees that are not like params; if `args` is no sequence.
    TypeError: if `captured` is something else.

  Example:
    >>> import fop_optax, jax, jax.numpy as jnp
    >>> def loss(params, x, y):
    ...   return fop_optax.squared_error(x @ params["w"], y)
    >>> params = {"w": jnp.zeros((2, 1))}
    >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [3.0]])
    >>> captured = fop_optax.capture(loss, params, x, y)
    >>> grads = jax.grad(loss)(params, x, y)
    >>> model = fop_optax.quadratic_model(captured, params, (x, y), [grads])
    >>> w = model.minimizer()
    >>> step = jax.tree.map(lambda g: w[0] * g, grads)
    >>> after = loss(jax.tree.map(jnp.add, params, step), x, y)
    >>> print(f"{model.loss:.4f} {model.change(w):.4f} {after - model.loss:.4f}")
    2.5000 -2.4038 -2.4038

  References:
    Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
    <https://arxiv.org/abs/1503.05671>`_, 2015
  """
  if not isinstance(captured, Captured):
    raise TypeError(
      f"`quadratic_model(captured, params, args, vectors)` has a {type(captured).__name__} for"
      " `captured`: pass what `captured = fop_optax.capture(loss, params, ...)` returned."
    )
  if hasattr(args, "shape") or not isinstance(args, Sequence):
    raise ValueError(
      f"`quadratic_model(captured, params, args, vectors)` takes the loss's arguments after params"
      f" as a tuple, `(x, y)` or `(x,)`, not a {type(args).__name__}."
    )
  if not vectors:
    raise ValueError("`quadratic_model(..., vectors)` needs at least one direction.")
  leaves = captured.layers.leaves(params, "params")
  trees = [
    captured.layers.leaves(v, f"The tree `vectors[{i}]` in `quadratic_model`")
    for i, v in enumerate(vectors)
  ]
  basis = [
    [jnp.asarray(v).astype(p.dtype) for v, p in zip(tree, leaves, strict=True)] for tree in trees
  ]
  signature, chunks = captured._inputs(params, args)

  def of_chunk(chunk, key):
    del key
    loss, linear, curvature = _of_chunk(captured, signature, chunks, leaves, basis, chunk)
    return Result(loss, (), [linear, curvature], ())

  results = chunks.run(of_chunk, captured._loops, None)
  linear, curvature = (mean(list(parts)) for parts in zip(*(r.grads for r in results), strict=True))
  wide = [[leaf.astype(linear.dtype) for leaf in tree] for tree in basis]
  dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))
  gram = jnp.stack([jnp.stack([dot(a, b) for b in wide]) for a in wide])
  return QuadraticModel(mean([r.loss for r in results]), linear, curvature, gram)


def _of_chunk(captured, signature, chunks, leaves, basis, chunk):
  """Loss, `b` and `C` of one chunk of the batch."""
  with chunks.explained():
    traced = signature.trace(leaves, chunks.leaves, chunk, None)
  marks = traced.found.marks
  check_marked("exact", marks, traced.found.hidden, "`quadratic_model`")
  paths = [mark.path for mark in marks]
  evaluation = Evaluation({}, {}, None, {}, frozenset(paths))

  def forward(params, weights):
    probes = {Key(path, MARK): weight for path, weight in zip(paths, weights, strict=True)}
    outputs, marked = evaluation.run(traced.jaxpr, traced.consts, [*params, *chunk], probes)
    return outputs[0], [marked[path] for path in paths]

  zeros = [mark.probe() for mark in marks]
  zeros = _compat.vary(zeros, _compat.varying((leaves, chunk)))
  weights = jax.grad(lambda weights: forward(leaves, weights)[0])(zeros)
  (loss, z), pushforward = jax.linearize(lambda params: forward(params, zeros), leaves)
  tangents = [pushforward(v) for v in basis]
  dtype = jnp.promote_types(loss.dtype, jnp.float32)
  linear = jnp.stack([slope for slope, _ in tangents]).astype(dtype)
  curvature = jnp.zeros((len(basis), len(basis)), dtype)
  for number, mark in enumerate(marks):
    along = jnp.stack([u[number] for _, u in tangents])
    size = jnp.abs(mark.spread(weights[number], z[number]))
    bent = jax.vmap(lambda u, mark=mark, of=z[number]: times_hessian(mark, of, u))(along)
    flat = lambda array: array.reshape(len(basis), -1).astype(dtype)
    curvature += flat(along) @ flat(size * bent).T
  return loss, linear, curvature
