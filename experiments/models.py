"""Models, each as three functions over one tree of parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx
import jax

Params = Any


class Model(NamedTuple):
  init: Callable[[int], Params]  # seed -> parameters
  apply: Callable[[Params, jax.Array], jax.Array]  # parameters, normalised images -> logits


class MLP(nnx.Module):
  """Dense layers with a ReLU between."""

  def __init__(self, sizes: Sequence[int], rngs: nnx.Rngs):
    self.layers = nnx.List(
      nnx.Linear(inputs, outputs, rngs=rngs)
      for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0], -1)
    for layer in self.layers[:-1]:
      x = nnx.relu(layer(x))
    return self.layers[-1](x)


def mlp(image_shape: Sequence[int], classes: int, hidden: Sequence[int]) -> Model:
  """A multilayer perceptron over flattened images."""
  height, width, channels = image_shape
  sizes = [height * width * channels, *hidden, classes]
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: MLP(sizes, nnx.Rngs(0))))

  return Model(
    init=lambda seed: nnx.state(MLP(sizes, nnx.Rngs(seed)), nnx.Param),
    apply=lambda params, x: nnx.merge(graphdef, params)(x),
  )
