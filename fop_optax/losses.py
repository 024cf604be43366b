"""Mean losses that know how many terms they average over.

An ordinary loss is a number; how it came about is lost. These two mark in the traced program the
output of the model and the number of terms (labels) they take the mean over, which the curvature
needs for its scale: see `terms_per_example` in `fop_optax.capture`.
"""

import jax
import jax.numpy as jnp
import optax

# Names of the jitted functions by which capture knows these losses and their distributions.
SOFTMAX, NORMAL = "fop_optax_softmax", "fop_optax_normal"


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean cross entropy of a softmax over the last axis.

  .. math:: \\frac{1}{n} \\sum_{i=1}^{n} -\\log \\mathrm{softmax}(z_i)_{y_i}

  over the `n` terms, the positions of all axes of `logits` but the last.

  Args:
    logits: shape `[..., classes]`, unnormalised log-probabilities.
    labels: integers of shape `[...]`, or probabilities of the shape of `logits`.

  Returns:
    A scalar.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> import fop_optax
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> print(f"{fop_optax.softmax_cross_entropy(logits, jnp.array([0, 1])):.4f}")
    0.2201
  """
  if labels.shape == logits.shape[:-1] and jnp.issubdtype(labels.dtype, jnp.integer):
    terms = optax.softmax_cross_entropy_with_integer_labels
  elif labels.shape == logits.shape and jnp.issubdtype(labels.dtype, jnp.floating):
    terms = optax.softmax_cross_entropy
  else:
    raise ValueError(
      "`fop_optax.softmax_cross_entropy(logits, labels)` takes logits [..., classes] and integer"
      f" labels [...] or probabilities [..., classes], but got {logits.dtype}{list(logits.shape)}"
      f" and {labels.dtype}{list(labels.shape)}."
    )
  return _mark(lambda logits, labels: jnp.mean(terms(logits, labels)), SOFTMAX)(logits, labels)


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean over terms of half the squared distance along the last axis.

  .. math:: \\frac{1}{n} \\sum_{i=1}^{n} \\tfrac{1}{2} \\lVert f_i - y_i \\rVert^2

  the negative log-likelihood of a normal distribution of unit variance, up to a constant. Unlike
  `optax.squared_error` it has the half, sums over the last axis and takes the mean over the rest.

  Args:
    predictions: shape `[..., outputs]`; one number an example is `[batch, 1]`.
    targets: the same shape.

  Returns:
    A scalar.

  Raises:
    ValueError: if the shapes differ or have no axis.

  Example:
    >>> import jax.numpy as jnp
    >>> import fop_optax
    >>> float(fop_optax.squared_error(jnp.ones((4, 2)), jnp.zeros((4, 2))))
    1.0
  """
  if predictions.shape != targets.shape or predictions.ndim == 0:
    raise ValueError(
      "`fop_optax.squared_error(predictions, targets)` takes two arrays [..., outputs] of one"
      f" shape, but got {list(predictions.shape)} and {list(targets.shape)}. One number an example"
      " is [batch, 1]: write `predictions[..., None]`."
    )
  half = lambda f, y: jnp.mean(0.5 * jnp.sum((f - y) ** 2, axis=-1))
  return _mark(half, NORMAL)(predictions, targets)


def _mark(loss, name):
  loss.__name__ = loss.__qualname__ = name
  return jax.jit(loss)
