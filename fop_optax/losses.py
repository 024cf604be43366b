"""Mean losses that know what distribution their terms are of.

An ordinary loss is a number; how it came about is lost. These mark in the traced program their
terms and the output of the model that each is of. Capture reads from the marks what distribution
the model predicts (`fisher="sampled"`, `"exact"`), and how many terms the loss has for an example,
which the curvature needs for its scale (`terms_per_example`).
"""

import jax
from jax.extend import source_info_util
import jax.numpy as jnp
import optax

# Lines that capture names are those of the caller.
source_info_util.register_exclusion(__file__)

# Names of the jitted functions by which capture knows these losses and their distributions.
SOFTMAX, NORMAL, SIGMOID = "fop_optax_softmax", "fop_optax_normal", "fop_optax_sigmoid"


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean cross entropy of a softmax over the last axis.

  .. math:: \\frac{1}{n} \\sum_{i=1}^{n} -\\log \\mathrm{softmax}(z_i)_{y_i}

  over the `n` terms, the positions of all axes of `logits` but the last. For a weight a term, as of
  a token mask, take the terms one by one: ``jnp.average(jax.vmap(softmax_cross_entropy)(z, y),
  weights=mask)``.

  *Curvature only*: with ``labels = jax.lax.stop_gradient(jax.nn.softmax(logits))`` the gradient is
  zero, as it is in expectation with labels drawn from the model. The statistics of
  `fisher="sampled"` and `"exact"` do not depend on labels: they are those of a model that predicts
  ``softmax(logits)``, whatever else the loss is.

  Args:
    logits: shape `[..., classes]`, unnormalised log-probabilities.
    labels: integers of shape `[...]`, or probabilities of the shape of `logits`.

  Returns:
    A scalar, in float32 or better.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import fop_optax
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> print(f"{fop_optax.softmax_cross_entropy(logits, jnp.array([0, 1])):.4f}")
    0.2201

    Curvature only, with a value of zero too:

    >>> def mark(logits):
    ...   labels = jax.lax.stop_gradient(jax.nn.softmax(logits))
    ...   entropy = fop_optax.softmax_cross_entropy(logits, labels)
    ...   return entropy - jax.lax.stop_gradient(entropy)
    >>> value, gradient = jax.value_and_grad(mark)(logits)
    >>> float(value), bool(jnp.all(jnp.abs(gradient) < 1e-7))
    (0.0, True)
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
  logits = _wide(logits)
  return jnp.mean(_softmax(0, terms(logits, labels), logits))


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean over terms of half the squared distance along the last axis.

  .. math:: \\frac{1}{n} \\sum_{i=1}^{n} \\tfrac{1}{2} \\lVert f_i - y_i \\rVert^2

  the negative log-likelihood of a normal distribution of unit variance, up to a constant. Unlike
  `optax.squared_error` it has the half, sums over the last axis and takes the mean over the rest.
  For a weight a term take the terms one by one, by `jax.vmap`.

  *Curvature only*: with ``targets = jax.lax.stop_gradient(predictions)`` value and gradient are
  zero. The statistics of `fisher="sampled"` and `"exact"`, which do not depend on targets, are
  those of :math:`\\frac{1}{n} \\sum_i J_i^\\top J_i` with `J` the Jacobian of the predictions.

  Args:
    predictions: shape `[..., outputs]`; one number an example is `[batch, 1]`.
    targets: the same shape.

  Returns:
    A scalar, in float32 or better.

  Raises:
    ValueError: if the shapes differ or have no axis.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import fop_optax
    >>> float(fop_optax.squared_error(jnp.ones((4, 2)), jnp.zeros((4, 2))))
    1.0

    Curvature only:

    >>> mark = lambda f: fop_optax.squared_error(f, jax.lax.stop_gradient(f))
    >>> value, gradient = jax.value_and_grad(mark)(jnp.ones((4, 2)))
    >>> float(value), float(jnp.max(jnp.abs(gradient)))
    (0.0, 0.0)
  """
  _check_pair("squared_error", predictions=predictions, targets=targets)
  predictions = _wide(predictions)
  terms = 0.5 * jnp.sum((predictions - targets) ** 2, axis=-1)
  return jnp.mean(_normal(0, terms, predictions))


def sigmoid_binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean over terms of binary cross entropies, summed along the last axis.

  .. math:: \\frac{1}{n} \\sum_{i=1}^{n} \\sum_j
    -y_{ij} \\log \\sigma(z_{ij}) - (1 - y_{ij}) \\log (1 - \\sigma(z_{ij}))

  the negative log-likelihood of independent Bernoulli variables, as of the pixels of an image or of
  several labels. Unlike `optax.sigmoid_binary_cross_entropy` it sums over the last axis and takes
  the mean over the rest. For a weight a term take the terms one by one, by `jax.vmap`.

  Args:
    logits: shape `[..., outputs]`; one number an example is `[batch, 1]`.
    labels: the same shape, in [0, 1].

  Returns:
    A scalar, in float32 or better.

  Raises:
    ValueError: if the shapes differ or have no axis.

  Example:
    >>> import jax.numpy as jnp
    >>> import fop_optax
    >>> logits = jnp.array([[2.0, 0.0], [0.0, -2.0]])
    >>> loss = fop_optax.sigmoid_binary_cross_entropy(logits, jnp.array([[1, 0], [1, 0]]))
    >>> print(f"{loss:.4f}")
    0.8201
  """
  _check_pair("sigmoid_binary_cross_entropy", logits=logits, labels=labels)
  logits = _wide(logits)
  terms = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
  return jnp.mean(_sigmoid(0, terms, logits))


def _check_pair(name: str, **arrays: jax.Array) -> None:
  """Checks that the two arguments of a loss have one shape, with an axis."""
  (first, a), (second, b) = arrays.items()
  if a.shape != b.shape or a.ndim == 0:
    raise ValueError(
      f"`fop_optax.{name}({first}, {second})` takes two arrays [..., outputs] of one shape, but got"
      f" {list(a.shape)} and {list(b.shape)}. One number an example is [batch, 1]: write"
      f" `{first}[..., None]`."
    )


def _wide(array: jax.Array) -> jax.Array:
  """In float32 or better: weights of terms, 1/n, underflow in float16."""
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _marker(name: str):
  """The jitted function that passes terms on and marks them with a distribution's parameters."""

  def mark(switch: jax.Array, terms: jax.Array, parameters: jax.Array) -> jax.Array:
    # The sum is never taken: it shows `fop_optax.capture.marks` which axes belong together.
    return jnp.where(switch == 0, terms, jnp.sum(parameters, axis=-1))

  mark.__name__ = mark.__qualname__ = name
  return jax.jit(mark)


_softmax, _normal, _sigmoid = map(_marker, (SOFTMAX, NORMAL, SIGMOID))
