"""Kronecker factors by brute force: every input and every output gradient written down.

A network is written canonically, in plain Python without scans, vmaps or wrappers, and calls
`tap(name, x, w, b)` for each dense product `x @ w + b` of rows `x[..., inputs]`. A tap keeps `x`
and adds a perturbation of zero to the output, whose gradient is `dy`. The sums are NumPy's, in
float64.

Further arguments of a tap: `stack` numbers the matrices of one name. `coordinate` is a number that
the bias is multiplied by. `fixed` says that the rows are no examples' but in the loss once, and
`turned` that `w` is the transpose of what it is elsewhere.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Use(NamedTuple):
  """Rows, and the gradients of what they are taken to."""

  x: np.ndarray  # [rows, inputs + 1], with the homogeneous coordinate
  dy: np.ndarray  # [rows, outputs]
  w: np.ndarray
  b: np.ndarray | None
  fixed: bool
  turned: bool


class Matrix(NamedTuple):
  """A dense matrix of the network and the statistics of all its uses, `A` of `[x; 1]`."""

  w: np.ndarray  # [inputs, outputs]
  b: np.ndarray | None
  A: np.ndarray  # [inputs + 1, inputs + 1]
  G: np.ndarray  # [outputs, outputs]

  @property
  def factors(self) -> tuple[np.ndarray, np.ndarray]:
    """`(A, G)`, `A` without the homogeneous coordinate where there is no bias."""
    return (self.A if self.b is not None else self.A[:-1, :-1]), self.G


class Explicit(NamedTuple):
  """What a batch gives: the mean loss, a gradient for each group, and each matrix."""

  loss: float
  grads: list[Any]
  matrices: dict[tuple[str, int], Matrix]  # by name and place in a stack


def factors(loss, params, x, y, groups=1, terms=1) -> dict[str, list[tuple]]:
  """Factors `(A, G)` of each named weight, one pair for each of its stacked matrices.

  Args:
    loss: `loss(params, x, y, tap)`, the mean over the examples of `x` and `y`, with calls
      `tap(name, x, w, b=None, stack=0, coordinate=1.0, fixed=False, turned=False)`.
    params: any pytree.
    x: inputs, examples first.
    y: labels, examples first.
    groups: example i belongs to group i mod groups; factors are averaged over groups.
    terms: R, the number of terms that the mean loss has for an example.
  """
  matrices = evaluate(loss, params, x, y, groups, terms).matrices
  out: dict[str, list[tuple]] = {}
  for (name, _), matrix in sorted(matrices.items(), key=lambda item: item[0]):
    out.setdefault(name, []).append(matrix.factors)
  return out


def evaluate(
  loss_fn, params, x, y, groups=1, terms=1, transform=lambda f: f, marked=None
) -> Explicit:
  """Loss, group gradients and statistics; arguments as of `factors`.

  `transform` is applied to the function that gives gradients: `jax.jit` for a large network. With
  `marked(params, x, tap)`, which gives `(z[..., C], weights[...], "softmax" or "normal")` of the
  terms of each mark, `G` is the sum of `w_t J_t' H_t J_t` over terms t and rows of the output.
  """
  keys: list[tuple[str, int]] = []
  roles: list[tuple[float, bool, bool]] = []

  def tapped(params, eps, x, y, function=loss_fn):
    keys.clear()
    roles.clear()
    uses, outputs = [], []

    def tap(name, x, w, b=None, stack=0, coordinate=1.0, fixed=False, turned=False):
      out = x @ w if b is None else x @ w + coordinate * b
      outputs.append(out)
      out = out if eps is None else out + eps[len(keys)]
      keys.append((name, stack))
      roles.append((0.0 if b is None else coordinate, fixed, turned))
      uses.append((x, w, b))
      return out

    return function(params, x, y, tap), (uses, outputs)

  def terms_of(params, eps, x):
    return tapped(params, eps, x, None, lambda params, x, y, tap: marked(params, x, tap))[0]

  gradient = transform(jax.value_and_grad(tapped, (0, 1), has_aux=True))
  jacobians = transform(functools.partial(_jacobians, terms_of))
  losses, grads, by_group = [], [], []
  for group in range(groups):
    args = x[group::groups], y[group::groups]
    like = jax.eval_shape(lambda params, args=args: tapped(params, None, *args)[1][1], params)
    named = list(zip(keys, roles, strict=True))
    eps = [jnp.zeros(out.shape, out.dtype) for out in like]
    (loss, (uses, _)), (grad, dys) = gradient(params, eps, *args)
    if marked:
      dys = _columns(jacobians(params, eps, args[0]), dys)
    losses.append(loss)
    grads.append(grad)
    by_group.append(_by_key(named, uses, dys))
  scale = None if marked else len(x) // groups * terms
  matrices = {key: _matrix([uses[key] for uses in by_group], scale) for key in by_group[0]}
  return Explicit(float(np.mean(losses)), grads, matrices)


def _by_key(named, uses, dys) -> dict[tuple[str, int], list[Use]]:
  out: dict[tuple[str, int], list[Use]] = {}
  for (key, (coordinate, *role)), (rows, w, b), dy in zip(named, uses, dys, strict=True):
    rows = _rows(rows)
    rows = np.concatenate([rows, np.full_like(rows[:, :1], coordinate)], axis=1)
    out.setdefault(key, []).append(Use(rows, _rows(dy), w, b, *role))
  return out


def _jacobians(terms_of, params, eps, x):
  """For each mark the weighted Hessians of its terms, and their Jacobians `[terms, C, ...]`."""
  out = []
  for number, (z, weights, kind) in enumerate(terms_of(params, eps, x)):
    shape = (-1, z.shape[-1])
    of_eps = lambda eps, number=number, shape=shape: terms_of(params, eps, x)[number][0].reshape(
      shape
    )
    hessians = jax.vmap(jax.hessian(jax.nn.logsumexp))(z.reshape(shape))
    if kind == "normal":
      hessians = jnp.broadcast_to(jnp.eye(z.shape[-1]), hessians.shape)
    out.append((weights.reshape(-1, 1, 1) * hessians, jax.jacrev(of_eps)(eps)))
  return out


def _columns(marks, dys):
  """For each output `[columns, ..., outputs]`, of which `sum_t w_t J_t' H_t J_t` is the square."""
  columns = []
  for hessians, jacobians in marks:
    values, vectors = np.linalg.eigh(hessians)
    roots = vectors * np.sqrt(np.maximum(values, 0))[:, None]
    columns.append([np.einsum("tc...,tcd->td...", jacobian, roots) for jacobian in jacobians])
  return [
    np.concatenate([piece.reshape(-1, *dy.shape) for piece in pieces])
    for *pieces, dy in zip(*columns, dys, strict=True)
  ]


def _matrix(groups, scale) -> Matrix:
  """Statistics of one matrix; those of its transpose's uses are added to them, both balanced.

  The homogeneous coordinate is 0 in the rows of uses without a bias, but 1 where there is none.
  """
  straight = [[use for use in uses if not use.turned] for uses in groups]
  turned = [[use._replace(x=use.x[:, :-1]) for use in uses if use.turned] for uses in groups]
  w = straight[0][0].w if straight[0] else turned[0][0].w.T
  biases = [use.b for use in straight[0] if use.b is not None]
  b = np.asarray(biases[0], float) if biases else None
  pairs = []
  if straight[0]:
    if not biases:
      straight = [[use._replace(x=_with_ones(use.x)) for use in uses] for uses in straight]
    pairs.append(_factors(straight, scale))
  if turned[0]:
    G, A = _factors(turned, scale)
    pairs.append((np.pad(A, (0, 1)), G))
  if len(pairs) > 1:
    pairs = [_balanced(*pair, bool(biases)) for pair in pairs]
  A, G = (sum(factors) for factors in zip(*pairs, strict=True))
  return Matrix(np.asarray(w, float), b, A, G)


def _factors(groups, scale):
  """`A`, the mean over rows, of which fixed ones are the groups' in common; `G`, a scaled sum.

  Fixed rows, M of them in a use, are a mean over M in place of one over the examples. Without
  `scale` the sum is of columns that are scaled.
  """
  A, G = [], []
  for uses in groups:
    shares = [1 / len(groups) if use.fixed else 1.0 for use in uses]
    total = sum(share * use.x.T @ use.x for share, use in zip(shares, uses, strict=True))
    A.append(total / sum(share * len(use.x) for share, use in zip(shares, uses, strict=True)))
    scales = [len(use.x) if use.fixed and scale else scale or 1.0 for use in uses]
    G.append(sum(own * (use.dy.T @ use.dy) for own, use in zip(scales, uses, strict=True)))
  return np.mean(A, axis=0), np.mean(G, axis=0)


def _balanced(A, G, homogeneous):
  """The same product with equal mean diagonals; zero where it is zero."""
  own = A if homogeneous else A[:-1, :-1]
  means = np.mean(np.diag(own)), np.mean(np.diag(G))
  if 0 in means:
    return 0 * A, 0 * G
  root = np.sqrt(means[1] / means[0])
  return A * root, G / root


def _with_ones(rows) -> np.ndarray:
  return np.concatenate([rows[:, :-1], np.ones_like(rows[:, -1:])], axis=1)


def _rows(array) -> np.ndarray:
  return np.asarray(array, np.float64).reshape(-1, array.shape[-1])
