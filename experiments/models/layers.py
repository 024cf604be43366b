"""What several of the networks are made of."""

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

# What torch gives a convolution or dense layer: uniform within 1 / sqrt(inputs).
torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Frozen(nnx.Variable):
  """An array of the model that is not trained: whitening filters, random features."""


class BatchNorm(nnx.Module):
  """Normalisation over all axes but the last, as torch has it, with statistics in float32.

  A running variance is of n / (n - 1) times the batch's. NNX's own assigns its statistics by
  `mean[...] = x`, for which the whole program traced so far is searched each time: with it
  Inception-ResNet-V2 takes five times as long to trace under `fop_optax.capture`.

  Args:
    features: size of the last axis.
    momentum: what is kept of the running statistics in a step of training.
    epsilon: added to the variance.
    use_scale: whether there are scales; there always are biases.
    scale_init: of the scales.
    dtype: of the outputs; None: that of the inputs.
    rngs: for `scale_init`.
  """

  def __init__(
    self,
    features: int,
    *,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    scale_init: nnx.Initializer = nnx.initializers.ones,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
    self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))
    self.scale = (
      nnx.Param(scale_init(rngs.params(), (features,), jnp.float32)) if use_scale else None
    )
    self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
    self.momentum, self.epsilon, self.dtype = momentum, epsilon, dtype

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    dtype = self.dtype or x.dtype
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, var = self._of_batch(x) if train else (self.mean[...], self.var[...])
    factor = lax.rsqrt(var + self.epsilon)
    if self.scale is not None:
      factor = factor * self.scale[...]
    return ((x - mean) * factor + self.bias[...]).astype(dtype)

  def _of_batch(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the batch, which move the running ones."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    var = jnp.square(x - mean).mean(axes)
    rows = x.size // x.shape[-1]
    for running, new in ((self.mean, mean), (self.var, var * (rows / max(rows - 1, 1)))):
      old = running[...]
      moved = self.momentum * old + (1 - self.momentum) * new
      running.set_value(moved.astype(old.dtype))
    return mean, var
