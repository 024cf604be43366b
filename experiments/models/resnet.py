"""Residual networks (He et al., 2015, arXiv:1512.03385), for CIFAR and for ImageNet.

Order of layers, strides, symmetric padding, initialisation and BatchNorm's constants are those of
torchvision (`models/resnet.py`): He-normal convolutions by fan-out, momentum 0.1 (here 0.9 of the
old average) and epsilon 1e-5, a bottleneck's stride in its 3x3 convolution ("v1.5"). The head's
bias starts at zero (torch's: uniform).
"""

from collections.abc import Callable, Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models.functional import Model, from_module
from experiments.models.layers import BatchNorm, torch_uniform

he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
he_fan_in = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


class ConvNorm(nnx.Module):
  """Convolution without bias, symmetric padding, BatchNorm."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    size: int,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    kernel_init: nnx.Initializer = he_fan_out,
    scale_init: nnx.Initializer = nnx.initializers.ones,
    dtype: jnp.dtype | None = None,
  ):
    self.conv = nnx.Conv(
      inputs,
      outputs,
      (size, size),
      strides=stride,
      padding=size // 2,
      use_bias=False,
      kernel_init=kernel_init,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = BatchNorm(
      outputs, momentum=0.9, epsilon=1e-5, scale_init=scale_init, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    return self.norm(self.conv(x), train=train)


class PaddedShortcut(nnx.Module):
  """He et al.'s option A: every second pixel, and zeros for the channels there are more."""

  def __init__(self, inputs: int, outputs: int, stride: int):
    self.stride = stride
    self.before = (outputs - inputs) // 2
    self.after = outputs - inputs - self.before

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    del train
    x = x[:, :: self.stride, :: self.stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (self.before, self.after)))


class Block(nnx.Module):
  """`relu(shortcut(x) + branch(x))`, ReLU between the layers of the branch."""

  expansion = 1

  def __init__(
    self,
    inputs: int,
    width: int,
    stride: int,
    rngs: nnx.Rngs,
    *,
    conv: Callable[..., ConvNorm],
    padded: bool = False,
    zero_residual: bool = False,
  ):
    outputs = width * self.expansion
    conv = functools.partial(conv, rngs=rngs)
    last = {"scale_init": nnx.initializers.zeros} if zero_residual else {}
    self.layers = nnx.List(self.branch(inputs, width, stride, conv, last))
    if stride == 1 and inputs == outputs:
      self.shortcut = None
    elif padded:
      self.shortcut = PaddedShortcut(inputs, outputs, stride)
    else:
      self.shortcut = conv(inputs, outputs, 1, stride=stride)

  def branch(self, inputs, width, stride, conv, last):
    return [conv(inputs, width, 3, stride=stride), conv(width, width, 3, **last)]

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    y = x
    for layer in self.layers[:-1]:
      y = nnx.relu(layer(y, train=train))
    y = self.layers[-1](y, train=train)
    return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x, train=train)))


class Bottleneck(Block):
  """1x1 to `width`, 3x3, 1x1 to four times as many."""

  expansion = 4

  def branch(self, inputs, width, stride, conv, last):
    return [
      conv(inputs, width, 1),
      conv(width, width, 3, stride=stride),
      conv(width, 4 * width, 1, **last),
    ]


class ResNet(nnx.Module):
  """A stem, stages of blocks at falling resolution and doubling width, a mean, a head.

  Args:
    block: `Block` or `Bottleneck`.
    depths: blocks in each stage.
    width: channels of the first stage.
    classes: outputs.
    imagenet_stem: 7x7 at stride 2 and a max-pool, in place of 3x3.
    padded: shortcuts without parameters (option A), in place of 1x1 convolutions.
    zero_residual: the last BatchNorm of each branch starts with scales of zero.
    kernel_init, head_init: of convolutions, of the head.
    dtype: of the computation.
  """

  def __init__(
    self,
    block: type[Block],
    depths: Sequence[int],
    width: int,
    classes: int,
    rngs: nnx.Rngs,
    *,
    imagenet_stem: bool = False,
    padded: bool = False,
    zero_residual: bool = False,
    kernel_init: nnx.Initializer = he_fan_out,
    head_init: nnx.Initializer = torch_uniform,
    dtype: jnp.dtype | None = None,
  ):
    conv = functools.partial(ConvNorm, kernel_init=kernel_init, dtype=dtype)
    size, stride = (7, 2) if imagenet_stem else (3, 1)
    self.stem = conv(3, width, size, stride=stride, rngs=rngs)
    self.imagenet_stem = imagenet_stem
    blocks, inputs = [], width
    for stage, depth in enumerate(depths):
      for number in range(depth):
        stride = 2 if stage and not number else 1
        channels = width * 2**stage
        blocks.append(
          block(
            inputs, channels, stride, rngs, conv=conv, padded=padded, zero_residual=zero_residual
          )
        )
        inputs = channels * block.expansion
    self.blocks = nnx.List(blocks)
    self.head = nnx.Linear(inputs, classes, kernel_init=head_init, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    del rngs  # no dropout
    x = nnx.relu(self.stem(x, train=train))
    if self.imagenet_stem:
      x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for block in self.blocks:
      x = block(x, train=train)
    return self.head(x.mean((1, 2)))


def resnet18(
  classes: int = 10,
  *,
  width: int = 64,
  zero_residual: bool = False,
  dtype: jnp.dtype | None = None,
) -> Model:
  """ResNet-18 for images of 32 pixels: a 3x3 stem at stride 1, no max-pool, else torchvision's.

  11,173,962 parameters for 10 classes, as in kuangliu/pytorch-cifar; about (width / 64)^2 of them
  at other widths. FOP's paper does not say which ResNet-18 it trains; this is the one commonly
  meant on CIFAR-10.
  """
  return from_module(
    lambda rngs: ResNet(
      Block, (2, 2, 2, 2), width, classes, rngs, zero_residual=zero_residual, dtype=dtype
    )
  )


def resnet32(classes: int = 10, *, width: int = 16, dtype: jnp.dtype | None = None) -> Model:
  """ResNet-32 of He et al. for CIFAR: three stages of five blocks, shortcuts of option A.

  464,154 parameters for 10 classes (0.46 M in the paper). The long-tail papers' one (LDAM-DRW, BBN,
  Zhang et al. 2021) after akamaster/pytorch_resnet_cifar10: He-normal by fan-in, the head too.
  """
  return from_module(
    lambda rngs: ResNet(
      Block,
      (5, 5, 5),
      width,
      classes,
      rngs,
      padded=True,
      kernel_init=he_fan_in,
      head_init=he_fan_in,
      dtype=dtype,
    )
  )


def resnet50(
  classes: int = 1000,
  *,
  width: int = 64,
  zero_residual: bool = False,
  dtype: jnp.dtype | None = None,
) -> Model:
  """ResNet-50 for ImageNet, torchvision's: 25,557,032 parameters for 1,000 classes."""
  return _imagenet((3, 4, 6, 3), classes, width, zero_residual, dtype)


def resnet101(
  classes: int = 1000,
  *,
  width: int = 64,
  zero_residual: bool = False,
  dtype: jnp.dtype | None = None,
) -> Model:
  """ResNet-101 for ImageNet, torchvision's: 44,549,160 parameters for 1,000 classes."""
  return _imagenet((3, 4, 23, 3), classes, width, zero_residual, dtype)


def _imagenet(depths, classes, width, zero_residual, dtype) -> Model:
  return from_module(
    lambda rngs: ResNet(
      Bottleneck,
      depths,
      width,
      classes,
      rngs,
      imagenet_stem=True,
      zero_residual=zero_residual,
      dtype=dtype,
    )
  )
