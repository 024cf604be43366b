"""Kronecker factors by brute force: every input and every output gradient written down.

A network is written canonically, in plain Python without scans, vmaps or wrappers, and calls
`tap(name, x, w, b)` for each dense product `x @ w + b` of rows `x[..., inputs]`. A tap keeps `x`
and adds a perturbation of zero to the output, whose gradient is `dy`. The sums are NumPy's, in
float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
      `tap(name, x, w, b=None, stack=0)` for `x @ w + b`; `stack` numbers the matrices of one name.
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
    _group(loss_fn, params, x[i::groups], y[i::groups], terms, transform) for i in range(groups)
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


def _group(loss, params, x, y, terms, transform) -> Explicit:
  keys: list[tuple[str, int]] = []

  def tapped(params, eps):
    keys.clear()
    uses, outputs = [], []

    def tap(name, x, w, b=None, stack=0):
      out = x @ w if b is None else x @ w + b
      outputs.append(out)
      out = out if eps is None else out + eps[len(keys)]
      keys.append((name, stack))
      uses.append((x, w, b))
      return out

    return loss(params, x, y, tap), (uses, outputs)

  like = jax.eval_shape(lambda params: tapped(params, None)[1][1], params)
  eps = [jnp.zeros(out.shape, out.dtype) for out in like]
  value_and_grad = transform(jax.value_and_grad(tapped, (0, 1), has_aux=True))
  (value, (uses, _)), (grads, dys) = value_and_grad(params, eps)

  by_key: dict[tuple[str, int], list[tuple]] = {}
  for key, use, dy in zip(keys, uses, dys, strict=True):
    by_key.setdefault(key, []).append((*use, dy))
  matrices = {key: _matrix(found, len(x) * terms) for key, found in by_key.items()}
  return Explicit(float(value), [grads], matrices)


def _matrix(uses, scale) -> Matrix:
  """Statistics of one matrix: `A` a mean over the rows of all its uses, `G` a scaled sum."""
  w, biases = uses[0][1], [b for _, _, b, _ in uses if b is not None]
  b = biases[0] if biases else None
  inputs = np.concatenate([_homogeneous(_rows(x), own, not biases) for x, _, own, _ in uses])
  dys = np.concatenate([_rows(dy) for *_, dy in uses])
  A, G = inputs.T @ inputs / len(inputs), scale * (dys.T @ dys)
  return Matrix(np.asarray(w, float), None if b is None else np.asarray(b, float), A, G)


def _homogeneous(rows, b, always) -> np.ndarray:
  """Rows with a last coordinate of 1, or 0 where no bias is added that is added elsewhere."""
  ones = np.ones_like(rows[:, :1])
  return np.concatenate([rows, ones if always or b is not None else 0 * ones], axis=1)


def _rows(array) -> np.ndarray:
  return np.asarray(array, np.float64).reshape(-1, array.shape[-1])
