"""Inception-V3 and Inception-ResNet-V2 (Szegedy et al., arXiv:1512.00567 and 1602.07261).

Widths and kernels are those of the reference code, TF-slim, from which torchvision's Inception-V3
and Keras's Inception-ResNet-V2 take theirs; the papers' text differs in places. No auxiliary head.
Weights are truncated normal of deviation 0.1, BatchNorm's epsilon 1e-3. Deviations: BatchNorm has
scales, as torchvision and timm have it (TF-slim and Keras leave them out), and forgets 0.1 of its
average in a step as theirs (TF-slim: 0.0003).

Networks are written as functions from the number of inputs to a module that knows its `outputs`.
"""

from collections.abc import Callable, Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models.functional import Model, from_module
from experiments.models.layers import BatchNorm

Make = Callable[[int], nnx.Module]  # number of input channels -> module with `outputs`

normal = nnx.initializers.truncated_normal(0.1)


class ConvNorm(nnx.Module):
  """Convolution without bias, BatchNorm, ReLU."""

  def __init__(self, inputs, outputs, kernel, stride, padding, dtype, rngs):
    self.conv = nnx.Conv(
      inputs,
      outputs,
      kernel,
      strides=stride,
      padding=padding,
      use_bias=False,
      kernel_init=normal,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = BatchNorm(outputs, momentum=0.9, epsilon=1e-3, dtype=dtype, rngs=rngs)
    self.outputs = outputs

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    return nnx.relu(self.norm(self.conv(x), train=train))


class Pool(nnx.Module):
  """The mean at stride 1, of the pixels inside of the image; or the maximum at stride 2."""

  def __init__(self, inputs: int, kind: str):
    self.outputs, self.kind = inputs, kind

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    del train
    if self.kind == "max":
      return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


class Chain(nnx.Module):
  """Layers one after the other."""

  def __init__(self, inputs: int, makers: Sequence[Make]):
    layers = []
    for make in makers:
      layers.append(make(inputs))
      inputs = layers[-1].outputs
    self.layers, self.outputs = nnx.List(layers), inputs

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for layer in self.layers:
      x = layer(x, train=train)
    return x


class Mixed(nnx.Module):
  """Branches side by side, their channels one after the other."""

  def __init__(self, inputs: int, makers: Sequence[Make]):
    self.branches = nnx.List(make(inputs) for make in makers)
    self.outputs = sum(branch.outputs for branch in self.branches)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    return jnp.concatenate([branch(x, train=train) for branch in self.branches], axis=-1)


class Residual(nnx.Module):
  """`relu(x + scale up(branches(x)))`, `up` a 1x1 convolution with bias; or without the ReLU."""

  def __init__(self, inputs, makers, scale, relu, dtype, rngs):
    self.branches = Mixed(inputs, makers)
    self.up = nnx.Conv(
      self.branches.outputs, inputs, (1, 1), kernel_init=normal, dtype=dtype, rngs=rngs
    )
    self.scale, self.relu, self.outputs = scale, relu, inputs

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = x + self.scale * self.up(self.branches(x, train=train))
    return nnx.relu(x) if self.relu else x


def _chain(*makers: Make) -> Make:
  return lambda inputs: Chain(inputs, makers)


def _mixed(*makers: Make) -> Make:
  return lambda inputs: Mixed(inputs, makers)


def _pool(kind: str) -> Make:
  return lambda inputs: Pool(inputs, kind)


def _conv_maker(width: float, dtype, rngs) -> Callable[..., Make]:
  """`conv(outputs, kernel)`: padded at stride 1, not at stride 2, unless told."""

  def conv(outputs, height, breadth=None, *, stride=1, padding=None):
    return lambda inputs: ConvNorm(
      inputs,
      max(1, round(outputs * width)),
      (height, breadth or height),
      stride,
      padding or ("SAME" if stride == 1 else "VALID"),
      dtype,
      rngs,
    )

  return conv


def _stem(conv) -> list[Make]:
  return [
    conv(32, 3, stride=2),  # 299 pixels -> 149
    conv(32, 3, padding="VALID"),
    conv(64, 3),
    _pool("max"),  # 73
    conv(80, 1),
    conv(192, 3, padding="VALID"),
    _pool("max"),  # 35
  ]


def _mixed_a(conv, first: int, pooled: int) -> Make:
  return _mixed(
    conv(first, 1),
    _chain(conv(48, 1), conv(64, 5)),
    _chain(conv(64, 1), conv(96, 3), conv(96, 3)),
    _chain(_pool("mean"), conv(pooled, 1)),
  )


def _mixed_c(conv, inner: int) -> Make:
  return _mixed(
    conv(192, 1),
    _chain(conv(inner, 1), conv(inner, 1, 7), conv(192, 7, 1)),
    _chain(
      conv(inner, 1), conv(inner, 7, 1), conv(inner, 1, 7), conv(inner, 7, 1), conv(192, 1, 7)
    ),
    _chain(_pool("mean"), conv(192, 1)),
  )


def _mixed_e(conv) -> Make:
  fork = lambda: _mixed(conv(384, 1, 3), conv(384, 3, 1))
  return _mixed(
    conv(320, 1),
    _chain(conv(384, 1), fork()),
    _chain(conv(448, 1), conv(384, 3), fork()),
    _chain(_pool("mean"), conv(192, 1)),
  )


def _v3(conv) -> list[Make]:
  return [
    *_stem(conv),
    _mixed_a(conv, 64, 32),  # 35 x 35 x 256
    _mixed_a(conv, 64, 64),  # 288
    _mixed_a(conv, 64, 64),
    _mixed(
      conv(384, 3, stride=2),
      _chain(conv(64, 1), conv(96, 3), conv(96, 3, stride=2)),
      _pool("max"),
    ),  # 17 x 17 x 768
    *(_mixed_c(conv, inner) for inner in (128, 160, 160, 192)),
    _mixed(
      _chain(conv(192, 1), conv(320, 3, stride=2)),
      _chain(conv(192, 1), conv(192, 1, 7), conv(192, 7, 1), conv(192, 3, stride=2)),
      _pool("max"),
    ),  # 8 x 8 x 1280
    _mixed_e(conv),  # 2048
    _mixed_e(conv),
  ]


def _resnet_v2(conv, residual, depths: Sequence[int]) -> list[Make]:
  a = (conv(32, 1), _chain(conv(32, 1), conv(32, 3)), _chain(conv(32, 1), conv(48, 3), conv(64, 3)))
  b = (conv(192, 1), _chain(conv(128, 1), conv(160, 1, 7), conv(192, 7, 1)))
  c = (conv(192, 1), _chain(conv(192, 1), conv(224, 1, 3), conv(256, 3, 1)))
  return [
    *_stem(conv),
    _mixed_a(conv, 96, 64),  # 35 x 35 x 320
    *[residual(a, 0.17)] * depths[0],
    _mixed(
      conv(384, 3, stride=2),
      _chain(conv(256, 1), conv(256, 3), conv(384, 3, stride=2)),
      _pool("max"),
    ),  # 17 x 17 x 1088
    *[residual(b, 0.1)] * depths[1],
    _mixed(
      _chain(conv(256, 1), conv(384, 3, stride=2)),
      _chain(conv(256, 1), conv(288, 3, stride=2)),
      _chain(conv(256, 1), conv(288, 3), conv(320, 3, stride=2)),
      _pool("max"),
    ),  # 8 x 8 x 2080
    *[residual(c, 0.2)] * (depths[2] - 1),
    residual(c, 1.0, relu=False),
    conv(1536, 1),
  ]


class Inception(nnx.Module):
  """The layers, a mean over pixels, dropout, a head."""

  def __init__(self, makers: Sequence[Make], classes, dropout, dtype, rngs):
    self.layers = Chain(3, makers)
    self.dropout = nnx.Dropout(dropout)
    self.head = nnx.Linear(self.layers.outputs, classes, kernel_init=normal, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    x = self.layers(x, train=train).mean((1, 2))
    return self.head(self.dropout(x, deterministic=not train, rngs=rngs))


def inception_v3(
  classes: int = 1000,
  *,
  width: float = 1.0,
  dropout: float = 0.5,
  dtype: jnp.dtype | None = None,
) -> Model:
  """Inception-V3 for images of 299 pixels (75 at least): 23,834,568 parameters.

  That is torchvision's without its auxiliary head. `width` multiplies all channels.
  """

  def make(rngs):
    conv = _conv_maker(width, dtype, rngs)
    return Inception(_v3(conv), classes, dropout, dtype, rngs)

  return from_module(make)


def inception_resnet_v2(
  classes: int = 1000,
  *,
  width: float = 1.0,
  depths: Sequence[int] = (10, 20, 10),
  dropout: float = 0.2,
  dtype: jnp.dtype | None = None,
) -> Model:
  """Inception-ResNet-V2 for images of 299 pixels (75 at least): 55,843,464 parameters, as timm's.

  `depths` are the residual blocks at 35, 17 and 8 pixels, `width` multiplies all channels.
  """

  def make(rngs):
    conv = _conv_maker(width, dtype, rngs)

    def residual(makers, scale, relu=True):
      return lambda inputs: Residual(inputs, makers, scale, relu, dtype, rngs)

    return Inception(_resnet_v2(conv, residual, depths), classes, dropout, dtype, rngs)

  return from_module(make)
