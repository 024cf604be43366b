"""Multilayer perceptrons: classifiers of flattened images, and the MNIST autoencoder."""

from collections.abc import Callable, Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models.functional import Model, from_module

AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def sparse_normal(connections: int = 15) -> nnx.Initializer:
  """Unit normal weights for `connections` random inputs of each unit, zeros for all others."""

  def init(key, shape, dtype=jnp.float32):
    inputs, outputs = shape
    normal, order = jax.random.split(key)
    ranks = jax.random.permutation(
      order, jnp.broadcast_to(jnp.arange(inputs)[:, None], (inputs, outputs)), independent=True
    )
    return jax.random.normal(normal, shape, dtype) * (ranks < connections)

  return init


class MLP(nnx.Module):
  """Dense layers, an activation after each but the last and those in `linear`."""

  def __init__(
    self,
    sizes: Sequence[int],
    rngs: nnx.Rngs,
    *,
    activation: Callable[[jax.Array], jax.Array] = nnx.relu,
    linear: Sequence[int] = (),
    kernel_init: nnx.Initializer | None = None,
    dropout: float = 0.0,
    dtype: jnp.dtype | None = None,
  ):
    kernel_init = kernel_init or nnx.initializers.lecun_normal()
    self.layers = nnx.List(
      nnx.Linear(inputs, outputs, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
      for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True)
    )
    self.dropout = nnx.Dropout(dropout)
    self.activation = activation
    self.linear = tuple(linear)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    x = x.reshape(x.shape[0], -1)
    for number, layer in enumerate(self.layers[:-1]):
      x = layer(x)
      if number not in self.linear:
        x = self.activation(x)
      x = self.dropout(x, deterministic=not train, rngs=rngs)
    return self.layers[-1](x)


def mlp(
  image_shape: Sequence[int],
  classes: int,
  hidden: Sequence[int],
  *,
  dropout: float = 0.0,
  dtype: jnp.dtype | None = None,
) -> Model:
  """A multilayer perceptron with ReLU over flattened images."""
  sizes = (math.prod(image_shape), *hidden, classes)
  return from_module(lambda rngs: MLP(sizes, rngs, dropout=dropout, dtype=dtype))


def autoencoder(sizes: Sequence[int] = AUTOENCODER, *, dtype: jnp.dtype | None = None) -> Model:
  """The MNIST autoencoder, 784-1000-500-250-30 and mirrored; outputs are logits of the pixels.

  From Hinton and Salakhutdinov (2006), as K-FAC's paper trains it (Martens and Grosse 2015,
  section 13: tanh, sparse initialisation of Martens 2010; the code itself is linear). The original
  has logistic units. 2,837,314 parameters. The loss is the cross entropy of each pixel.
  """
  code = len(sizes) // 2 - 1  # number of the layer that gives the code
  return from_module(
    lambda rngs: MLP(
      sizes,
      rngs,
      activation=jnp.tanh,
      linear=(code,),
      kernel_init=sparse_normal(),
      dtype=dtype,
    )
  )
