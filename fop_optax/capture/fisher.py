"""Which labels the output gradients of the statistics come from.

- `"empirical"`: the labels given. The gradient's own backward pass forms the statistics.
- `"sampled"`: labels drawn from the model's output distribution, one a term.
- `"exact"`: the expectation over that distribution, one backward pass a class (or output).

For the latter two the loss has to be marked. A second backward pass of the same forward pass starts
at the marks: with `w` the gradient of the loss with respect to a mark's value, a mean over n terms,

    softmax:  sampled  dz = w (p - e_y) / n,   y ~ p        exact  dz_c = w sqrt(p_c) (p - e_c) / n
    normal:   sampled  dz = w e / n,           e ~ N(0, 1)  exact  dz_o = w e_o / n

Summed over c (or o) the outer products of the exact ones are the Gauss-Newton matrix of a term.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from fop_optax import _compat
from fop_optax.capture.values import Mark
from fop_optax.layers import Factors
from fop_optax.losses import SOFTMAX

FISHERS = ("empirical", "sampled", "exact")


def check_marked(fisher: str, marks: Sequence[Mark]) -> None:
  """Checks that the output distribution is known where it is needed.

  Raises:
    ValueError: if it is not.
  """
  if fisher != "empirical" and not marks:
    raise ValueError(
      f"`capture(fisher={fisher!r})` needs to know the distribution of the model's output. Write"
      " the loss with `fop_optax.softmax_cross_entropy(logits, labels)` or"
      " `fop_optax.squared_error(predictions, targets)`, or capture with fisher='empirical'."
    )


def cotangent(mark: Mark, output: jax.Array, weight: jax.Array, noise: jax.Array) -> jax.Array:
  """The gradient of the loss at a mark's operand if its labels were drawn.

  Args:
    mark: the mark.
    output: the operand, `[*scans, ..., classes]`.
    weight: gradient with respect to the mark's value, `[*scans]`.
    noise: key.
  """
  if mark.distribution == SOFTMAX:
    labels = jax.random.categorical(noise, output)
    residual = jax.nn.softmax(output) - jax.nn.one_hot(labels, output.shape[-1])
  else:
    residual = jax.random.normal(noise, output.shape, output.dtype)
  return _weighted(residual, output, mark, weight)


def cotangent_of(mark: Mark, output: jax.Array, weight: jax.Array, index: Any) -> jax.Array:
  """The column of class (or output) `index` of the square root of the Gauss-Newton matrix."""
  unit = jax.nn.one_hot(index, output.shape[-1])
  if mark.distribution == SOFTMAX:
    p = jax.nn.softmax(output)
    root = jnp.sqrt(jnp.take(p, index, axis=-1))[..., None]
    return _weighted(root * (p - unit), output, mark, weight)
  return _weighted(jnp.broadcast_to(unit, output.shape), output, mark, weight)


def _weighted(residual, output, mark, weight):
  weight = weight.reshape(*weight.shape, *[1] * (output.ndim - weight.ndim))
  return (weight * residual / mark.terms).astype(output.dtype)


def statistics(
  fisher: str,
  marks: Sequence[Mark],
  outputs: Sequence[jax.Array],
  weights: Sequence[jax.Array],
  pullback: Any,
  key: jax.Array | None,
) -> Any:
  """Sums of moments from a second backward pass (one a class for `"exact"`).

  Args:
    fisher: `"sampled"` or `"exact"`.
    marks: the marked losses.
    outputs: their operands.
    weights: gradients with respect to their values.
    pullback: cotangents of the operands -> sums of moments.
    key: for `"sampled"`.
  """
  if fisher == "sampled":
    assert key is not None
    keys = jax.random.split(key, len(marks))
    return pullback(list(map(cotangent, marks, outputs, weights, keys)))

  def add(total, sums):
    # inputs do not depend on labels: their moments are counted once
    return jax.tree.map(
      lambda t, s: Factors(s.A, t.G + s.G), total, sums, is_leaf=lambda x: isinstance(x, Factors)
    )

  total = jax.tree.map(jnp.zeros_like, jax.eval_shape(pullback, list(outputs)))
  total = _compat.vary(total, _compat.varying((outputs, weights)))
  for number, mark in enumerate(marks):
    zeros = [jnp.zeros_like(output) for output in outputs]

    def one(total, index, number=number, mark=mark, zeros=zeros):
      start = list(zeros)
      start[number] = cotangent_of(mark, outputs[number], weights[number], index)
      return add(total, pullback(start)), None

    total, _ = lax.scan(one, total, jnp.arange(outputs[number].shape[-1]))
  return total
