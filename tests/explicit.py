"""Kronecker factors by brute force: every input and every output gradient written down.

A network is written canonically, in plain Python without scans, vmaps or wrappers, and calls
`tap(name, x, w, b)` for each dense product `x @ w + b` of rows `x[..., inputs]`. A tap keeps `x`
and adds a perturbation of zero to the output, whose gradient is `dy`. The sums are NumPy's, in
float64.

Further arguments of a tap: `stack` numbers the matrices of one name. `coordinate` is a number that
the bias is multiplied by. `fixed` says that the rows are no examples' but in the loss once, and
`turned` that `w` is the transpose of what it is elsewhere.
"""

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


def evaluate(loss_fn, params, x, y, groups=1, terms=1, transform=lambda f: f) -> Explicit:
  """Loss, group gradients and statistics; arguments as of `factors`.

  `transform` is applied to the function that gives gradients: `jax.jit` for a large network.
  """
  each = [
    _group(loss_fn, params, x[i::groups], y[i::groups], groups, terms, transform)
    for i in range(groups)
  ]
  matrices = {
    key: first._replace(
      A=np.mean([group.matrices[key].A for group in each], axis=0),
      G=np.mean([group.matrices[key].G for group in each], axis=0),
    )
    for key, first in each[0].matrices.items()
  }
  loss, grads = np.mean([group.loss for group in each]), [group.grads[0] for group in each]
  return Explicit(float(loss), grads, matrices)


def _group(loss, params, x, y, groups, terms, transform) -> Explicit:
  keys: list[tuple[str, int]] = []
  roles: list[tuple[float, bool, bool]] = []

  def tapped(params, eps):
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

    return loss(params, x, y, tap), (uses, outputs)

  like = jax.eval_shape(lambda params: tapped(params, None)[1][1], params)
  eps = [jnp.zeros(out.shape, out.dtype) for out in like]
  value_and_grad = transform(jax.value_and_grad(tapped, (0, 1), has_aux=True))
  (value, (uses, _)), (grads, dys) = value_and_grad(params, eps)

  by_key: dict[tuple[str, int], list[Use]] = {}
  for key, (rows, w, b), (coordinate, *role), dy in zip(keys, uses, roles, dys, strict=True):
    rows = _rows(rows)
    rows = np.concatenate([rows, np.full_like(rows[:, :1], coordinate)], axis=1)
    by_key.setdefault(key, []).append(Use(rows, _rows(dy), w, b, *role))
  matrices = {key: _matrix(found, len(x) * terms, groups) for key, found in by_key.items()}
  return Explicit(float(value), [grads], matrices)


def _matrix(uses, scale, groups) -> Matrix:
  """Statistics of one matrix; those of its transpose's uses are added to them, both balanced.

  The homogeneous coordinate is 0 in the rows of uses without a bias, but 1 where there is none.
  """
  straight = [use for use in uses if not use.turned]
  turned = [use for use in uses if use.turned]
  w = straight[0].w if straight else turned[0].w.T
  biases = [use.b for use in straight if use.b is not None]
  b = biases[0] if biases else None
  if not biases:
    straight = [
      use._replace(x=np.append(use.x[:, :-1], np.ones_like(use.x[:, -1:]), 1)) for use in straight
    ]
  A, G = _factors(straight, scale, groups) if straight else (0.0, 0.0)
  if turned:
    other = _factors([use._replace(x=use.x[:, :-1]) for use in turned], scale, groups)
    other = np.pad(other[1], (0, 1)), other[0]
    if not straight:
      A, G = other
    else:
      first, second = _balanced(A, G, b is not None), _balanced(*other, b is not None)
      A, G = first[0] + second[0], first[1] + second[1]
  return Matrix(np.asarray(w, float), None if b is None else np.asarray(b, float), A, G)


def _factors(uses, scale, groups):
  """`A`, the mean over rows, of which fixed ones are shared by the groups; `G`, a scaled sum.

  Fixed rows, M of them in a use, are a mean over M in place of one over the examples.
  """
  counts = [(1 / groups if use.fixed else 1.0) for use in uses]
  pairs = list(zip(counts, uses, strict=True))
  A = sum(count * use.x.T @ use.x for count, use in pairs)
  A = A / sum(count * len(use.x) for count, use in pairs)
  G = sum((len(use.x) if use.fixed else scale) * (use.dy.T @ use.dy) for use in uses)
  return A, G


def _balanced(A, G, homogeneous):
  """The same product with equal mean diagonals; zero where it is zero."""
  own = A if homogeneous else A[:-1, :-1]
  means = np.mean(np.diag(own)), np.mean(np.diag(G))
  if 0 in means:
    return 0 * A, 0 * G
  root = np.sqrt(means[1] / means[0])
  return A * root, G / root


def _rows(array) -> np.ndarray:
  return np.asarray(array, np.float64).reshape(-1, array.shape[-1])
