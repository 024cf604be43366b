"""Which labels the output gradients of the statistics come from.

- `"empirical"`: the labels given. The gradient's own backward pass forms the statistics.
- `"sampled"`: labels drawn from the model's output distribution, for each term by itself.
- `"exact"`: the expectation over that distribution.

For the latter two the loss has to be marked. With `w` the gradient of the loss with respect to a
term and `H = R R'` the Hessian of the term with respect to the parameters `z` of its distribution,

    softmax:  H = diag(p) - p p',  R v = p (sqrt(p)' v) - sqrt(p) v
    normal:   H = I,               R v = v
    sigmoid:  H = diag(p (1 - p)), R v = sqrt(p (1 - p)) v

a second backward pass of the same forward pass starts from `dz = sqrt(w) r`, where `r` is the
residual of the label drawn (`E[r r'] = H`), or a column of `R`. Then `sum dy dy'` estimates, or
summed over the columns is, the Gauss-Newton matrix `sum_t w_t J_t' H_t J_t` of the loss as it is,
whatever the weights: those of several marks, of masks and means enter once, as they do in the loss.
A term of negative weight, which would make it indefinite, counts with the weight's size.

Terms that reach one row must not be perturbed together, or products of two of them enter. Labels
drawn for each term by itself make these zero in expectation. Of columns there is one pass for each
class and each set of terms that reach no common row (`_separate`).
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fop_optax import _compat
from fop_optax.capture.marks import Mark
from fop_optax.layers import Factors
from fop_optax.losses import NORMAL, SIGMOID

FISHERS = ("empirical", "sampled", "exact")
Pullback = Callable[[list[jax.Array]], Any]  # cotangents of the marks' parameters -> factors


def check_marked(
  fisher: str, marks: Sequence[Mark], hidden: Sequence[str], who: str | None = None
) -> None:
  """Checks that the output distribution is known where it is needed, and of all marked losses.

  Raises:
    ValueError: if it is not.
  """
  remedy = ", or capture with fisher='empirical'." if who is None else "."
  who = who or f"`capture(fisher={fisher!r})`"
  if fisher != "empirical" and not marks:
    raise ValueError(
      f"{who} needs to know the distribution of the model's output. Write"
      " the loss with `fop_optax.softmax_cross_entropy(logits, labels)`,"
      " `fop_optax.sigmoid_binary_cross_entropy(logits, labels)` or"
      " `fop_optax.squared_error(predictions, targets)` (outside of `cond`, `while_loop` and of"
      " gradients within the loss)" + remedy
    )

  if fisher != "empirical" and hidden:
    raise ValueError(
      f"A marked loss stands inside of {hidden[0]},"
      f" where {who} would leave it out. Take it out of there (choose its arguments, or weights of"
      " its terms, with `jnp.where`)" + remedy
    )


def statistics(
  fisher: str,
  marks: Sequence[Mark],
  parameters: Sequence[jax.Array],
  weights: Sequence[jax.Array],
  pullback: Pullback,
  examples: int,
  key: jax.Array | None,
) -> Any:
  """The factors, from one further backward pass or from several.

  Args:
    fisher: `"sampled"` or `"exact"`.
    marks: the marked losses.
    parameters: of their distributions, `[*scans, ...]`.
    weights: gradients of the loss with respect to their terms, `[*scans, ...]`.
    pullback: cotangents of `parameters` -> factors.
    examples: N, of the chunk.
    key: for `"sampled"`.
  """
  roots = [
    jnp.sqrt(jnp.abs(mark.spread(w, z)))
    for mark, w, z in zip(marks, weights, parameters, strict=True)
  ]
  if fisher == "sampled":
    assert key is not None
    residuals = map(_residual, marks, parameters, jax.random.split(key, len(marks)))
    return pullback([root * residual for root, residual in zip(roots, residuals, strict=True)])

  zeros = list(map(jnp.zeros_like, parameters))
  total = jax.tree.map(jnp.zeros_like, jax.eval_shape(pullback, zeros))
  total = _compat.vary(total, _compat.varying((parameters, weights)))
  for number, (mark, z, root) in enumerate(zip(marks, parameters, roots, strict=True)):

    def column(v, number=number, mark=mark, z=z, root=root):
      return pullback([*zeros[:number], root * _times_root(mark, z, v), *zeros[number + 1 :]])

    total = _sum_of_columns(column, z, _classes(mark), examples, total)
  return total


def _classes(mark: Mark) -> int:
  """Axis of the classes among those of the scans and of the parameters."""
  return len(mark.scans) + mark.classes


def _residual(mark: Mark, z: jax.Array, key: jax.Array) -> jax.Array:
  """The gradient of each term for a label drawn from its distribution."""
  if mark.distribution == NORMAL:
    return jax.random.normal(key, z.shape, z.dtype)
  if mark.distribution == SIGMOID:
    p = jax.nn.sigmoid(z)
    return p - jax.random.bernoulli(key, p).astype(z.dtype)
  axis = _classes(mark)
  labels = jax.random.categorical(key, z, axis=axis)
  return jax.nn.softmax(z, axis) - jax.nn.one_hot(labels, z.shape[axis], axis=axis, dtype=z.dtype)


def times_hessian(mark: Mark, z: jax.Array, v: jax.Array) -> jax.Array:
  """`H v` of each term."""
  if mark.distribution == NORMAL:
    return v
  if mark.distribution == SIGMOID:
    return _variance(z) * v
  p = jax.nn.softmax(z, _classes(mark))
  return p * v - p * jnp.sum(p * v, _classes(mark), keepdims=True)


def _times_root(mark: Mark, z: jax.Array, v: jax.Array) -> jax.Array:
  """`R v` of each term."""
  if mark.distribution == NORMAL:
    return v
  if mark.distribution == SIGMOID:
    return jnp.sqrt(_variance(z)) * v
  p = jax.nn.softmax(z, _classes(mark))
  return p * jnp.sum(jnp.sqrt(p) * v, _classes(mark), keepdims=True) - jnp.sqrt(p) * v


def _variance(z: jax.Array) -> jax.Array:
  """`p (1 - p)` of Bernoulli variables."""
  return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


def _sum_of_columns(
  column: Callable[[jax.Array], Any], z: jax.Array, classes: int, examples: int, total: Any
) -> Any:
  """Adds to `total` the factors of all columns of all terms of a mark."""
  axes = _axes(z.shape, classes, examples)
  separate = _separate(column, z, axes)
  sizes = [jnp.where(apart, 1, axis.max() + 1) for apart, axis in zip(separate, axes, strict=True)]
  labels = np.arange(z.shape[classes]).reshape(-1, *[1] * (z.ndim - classes - 1))

  def add(number, total):
    number, label = number // z.shape[classes], number % z.shape[classes]
    chosen = labels == label
    for apart, size, axis in zip(separate, sizes, axes, strict=True):
      chosen = chosen & (apart | (axis == number % size))
      number = number // size
    factors = column(jnp.broadcast_to(chosen, z.shape).astype(z.dtype))
    # inputs do not depend on labels: their moments are counted once
    is_pair = lambda node: isinstance(node, Factors)
    plus = lambda t, f: Factors(f.A, t.G + f.G) if is_pair(f) else t + f
    return jax.tree.map(plus, total, factors, is_leaf=is_pair)

  return lax.fori_loop(0, z.shape[classes] * math.prod(sizes), add, total)


def _axes(shape: Sequence[int], classes: int, examples: int) -> list[np.ndarray]:
  """Numbers of the terms along each axis of theirs, to broadcast against `shape`.

  An axis of examples times something, in either order, may be two.
  """
  axes = []
  for axis, size in enumerate(shape):
    numbers = np.arange(size).reshape(-1, *[1] * (len(shape) - axis - 1))
    if axis == classes or size == 1:
      continue
    if size > examples > 1 and size % examples == 0:
      axes += [numbers // (size // examples), numbers % (size // examples)]
    else:
      axes.append(numbers)
  return axes


def _separate(column, z: jax.Array, axes: Sequence[np.ndarray]) -> list[jax.Array]:
  """For each axis of terms, whether terms at different places along it reach no common row.

  Nor, where second moments are formed, a common example. If so, signs that change along the axis
  change no factor: found out on a combination of columns, with one pass for each binary digit of
  the places, so that any two differ in one of them.
  """
  digits = [(i, bit) for i, axis in enumerate(axes) for bit in range(int(axis.max()).bit_length())]
  v = jnp.cos(jnp.arange(z.size, dtype=z.dtype) ** 2 + 1).reshape(z.shape)

  def outputs(pattern):
    signs = jnp.ones((), z.dtype)
    for i, axis in enumerate(axes):
      signs = signs * jnp.where(pattern[0] == i, 1 - 2 * (axis >> pattern[1] & 1), 1)
    is_pair = lambda node: isinstance(node, Factors)
    leaves = jax.tree.leaves(column(signs * v), is_leaf=is_pair)
    return [leaf.G if is_pair(leaf) else leaf for leaf in leaves]

  found = lax.map(outputs, jnp.asarray([(len(axes), 0), *digits]))
  same = jnp.stack([_equal(G) for G in found]).all(axis=0)
  return [
    jnp.stack([same[1 + n] for n, (of, _) in enumerate(digits) if of == i]).all()
    for i in range(len(axes))
  ]


def _equal(factors: jax.Array) -> jax.Array:
  """Which of some factors `[n, stack, ...]` are the first, to rounding."""
  factors = factors.reshape(*factors.shape[:2], -1)
  scale = jnp.max(jnp.abs(factors[0]), axis=-1)
  error = jnp.max(jnp.abs(factors - factors[0]), axis=-1)
  return jnp.all(error <= 64 * jnp.finfo(factors.dtype).eps * scale, axis=-1)
