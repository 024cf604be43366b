"""Images: classifiers of several kinds, an autoencoder, a long tail, a contrastive loss."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments import data
from experiments.workloads.base import Workload, from_module, split
import fop_optax

load = functools.cache(data.load)  # decoding takes longer than most runs


def _examples(name: str, data_dir: str | None, size: int, validation: int):
  """Normalised images and labels: `size` of the training set, and held out ones beside them."""
  images = load(name, data_dir)
  order = np.random.default_rng(0).permutation(len(images.train_labels))[: size + validation]
  x = (images.train_images[order] - images.mean) / images.std
  return split((x.astype(np.float32), images.train_labels[order]), validation)


def _classifier(module, init_and_apply=from_module):
  init, apply = init_and_apply(module)
  return init, lambda params, x, y: fop_optax.softmax_cross_entropy(apply(params, x), y)


class MLP(nnx.Module):
  """Dense layers over flattened images."""

  def __init__(self, sizes, rngs, activation=nnx.relu):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    self.layers = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in pairs)
    self.activation = activation

  def __call__(self, x):
    x = x.reshape(len(x), -1)
    for layer in self.layers[:-1]:
      x = self.activation(layer(x))
    return self.layers[-1](x)


def mlp_digits(data_dir):
  """64-128-64-10 with ReLU, a sixth of the data in a batch."""
  init, loss = _classifier(lambda rngs: MLP((64, 128, 64, 10), rngs))
  return Workload("mlp-digits", init, loss, *_examples("digits", data_dir, 1200, 237), 256, 80)


def mlp_fashion(data_dir):
  """784-256-128-10 with ReLU, a tenth of the data in a batch."""
  init, loss = _classifier(lambda rngs: MLP((784, 256, 128, 10), rngs))
  examples = _examples("fashion_mnist", data_dir, 20_000, 5_000)
  return Workload("mlp-fashion", init, loss, *examples, 2_000, 80)


def long_tail_fashion(data_dir):
  """784-128-64-10 on classes of 6,000 down to 60 examples; validation is balanced."""
  init, loss = _classifier(lambda rngs: MLP((784, 128, 64, 10), rngs))
  (x, y), _ = _examples("fashion_mnist", data_dir, 60_000, 0)
  counts = (6000 * 100.0 ** (-np.arange(10) / 9)).round().astype(int)
  kept = np.concatenate([np.flatnonzero(y == c)[:n] for c, n in enumerate(counts)])
  images = load("fashion_mnist", data_dir)
  test = (images.test_images[:4000] - images.mean) / images.std
  validation = test.astype(np.float32), images.test_labels[:4000]
  return Workload("long-tail", init, loss, (x[kept], y[kept]), validation, 1_000, 80)


def autoencoder_digits(data_dir):
  """64-64-8-64-64 with tanh, squared error."""
  init, apply = from_module(lambda rngs: MLP((64, 64, 8, 64, 64), rngs, jnp.tanh))

  def loss(params, x):
    return fop_optax.squared_error(apply(params, x), x.reshape(len(x), -1))

  (train, _), (validation, _) = _examples("digits", data_dir, 1200, 237)
  return Workload("autoencoder", init, loss, (train,), (validation,), 256, 120)


class ConvNet(nnx.Module):
  """3x3 convolutions at stride 2, with or without normalisation, a mean over pixels, a head."""

  def __init__(self, channels, rngs, normalised, classes=10):
    pairs = list(zip(channels[:-1], channels[1:], strict=True))
    self.convs = nnx.List(nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in pairs)
    norm = lambda b: nnx.BatchNorm(b, use_running_average=False, rngs=rngs)
    self.norms = nnx.List(norm(b) if normalised else lambda x: x for _, b in pairs)
    self.head = nnx.Linear(channels[-1], classes, rngs=rngs)

  def __call__(self, x):
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
    return self.head(x.mean((1, 2)))


def cnn_digits(data_dir):
  """Two convolutions with BatchNorm."""
  init, loss = _classifier(lambda rngs: ConvNet((1, 16, 32), rngs, normalised=True))
  return Workload("cnn-batchnorm", init, loss, *_examples("digits", data_dir, 1200, 237), 128, 80)


def cnn_cifar(data_dir):
  """Three convolutions without normalisation, a tenth of the data in a batch."""
  init, loss = _classifier(lambda rngs: ConvNet((3, 12, 24, 32), rngs, normalised=False))
  examples = _examples("cifar10", data_dir, 2_500, 1_000)
  return Workload("cnn-plain", init, loss, *examples, 250, 80)


class ResidualBlock(nnx.Module):
  def __init__(self, inputs, outputs, stride, rngs):
    conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
    norm = lambda: nnx.BatchNorm(outputs, use_running_average=False, rngs=rngs)
    self.first, self.second = (
      conv(inputs, outputs, (3, 3), strides=stride),
      conv(outputs, outputs, (3, 3)),
    )
    self.norms = nnx.List([norm(), norm()])
    plain = stride == 1 and inputs == outputs
    self.shortcut = (lambda x: x) if plain else conv(inputs, outputs, (1, 1), strides=stride)

  def __call__(self, x):
    h = nnx.relu(self.norms[0](self.first(x)))
    return nnx.relu(self.norms[1](self.second(h)) + self.shortcut(x))


class ResNet(nnx.Module):
  """A stem at stride 2 and three residual blocks."""

  def __init__(self, width, rngs, classes=10):
    self.stem = nnx.Conv(3, width, (3, 3), strides=2, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(width, use_running_average=False, rngs=rngs)
    self.blocks = nnx.List(
      [
        ResidualBlock(width, width, 1, rngs),
        ResidualBlock(width, 2 * width, 2, rngs),
        ResidualBlock(2 * width, 4 * width, 2, rngs),
      ]
    )
    self.head = nnx.Linear(4 * width, classes, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.stem(x)))
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean((1, 2)))


def resnet_cifar(data_dir):
  """A residual network of eight layers, eight channels wide at first, with BatchNorm."""
  init, loss = _classifier(lambda rngs: ResNet(8, rngs))
  examples = _examples("cifar10", data_dir, 2_500, 1_000)
  return Workload("resnet", init, loss, *examples, 128, 80)


class Attention(nnx.Module):
  def __init__(self, width, heads, rngs):
    self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
    self.out = nnx.Linear(width, width, rngs=rngs)
    self.heads = heads

  def __call__(self, x):
    batch, tokens, width = x.shape
    q, k, v = jnp.moveaxis(self.qkv(x).reshape(batch, tokens, 3, self.heads, -1), 2, 0)
    weights = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(weights), v)
    return self.out(mixed.reshape(batch, tokens, width))


class ViT(nnx.Module):
  """Patches, positions, blocks with LayerNorm before, a mean over tokens, a head."""

  def __init__(self, patch, tokens, width, blocks, rngs, channels=1, classes=10):
    self.patch = nnx.Conv(channels, width, (patch, patch), strides=patch, rngs=rngs)
    self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, width)))
    norm = lambda: nnx.LayerNorm(width, rngs=rngs)
    self.norms = nnx.List(norm() for _ in range(2 * blocks + 1))
    self.mixers = nnx.List(Attention(width, 4, rngs) for _ in range(blocks))
    self.ups = nnx.List(nnx.Linear(width, 4 * width, rngs=rngs) for _ in range(blocks))
    self.downs = nnx.List(nnx.Linear(4 * width, width, rngs=rngs) for _ in range(blocks))
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(self, x):
    x = self.patch(x)
    x = x.reshape(len(x), -1, x.shape[-1]) + self.positions[...]
    for i, (mixer, up, down) in enumerate(zip(self.mixers, self.ups, self.downs, strict=True)):
      x = x + mixer(self.norms[2 * i](x))
      x = x + down(nnx.gelu(up(self.norms[2 * i + 1](x))))
    return self.head(self.norms[-1](x).mean(1))


def vit_fashion(data_dir):
  """16 patches of 7x7, width 32, two blocks."""
  init, loss = _classifier(lambda rngs: ViT(7, 16, 32, 2, rngs))
  examples = _examples("fashion_mnist", data_dir, 2_000, 1_000)
  return Workload("vit", init, loss, *examples, 200, 80)


def contrastive_fashion(data_dir):
  """Two noisy views of each image, told from the views of the others (InfoNCE)."""
  init, apply = from_module(lambda rngs: MLP((784, 128, 32), rngs))

  def loss(params, first, second):
    views = (apply(params, first), apply(params, second))
    a, b = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in views)
    return fop_optax.softmax_cross_entropy(a @ b.T / 0.1, jnp.arange(len(a)))

  def two_views(rng, batch):
    (x,) = batch
    return tuple(x + rng.standard_normal(x.shape, np.float32) for _ in range(2))

  (train, _), (validation, _) = _examples("fashion_mnist", data_dir, 8_000, 1_000)
  sizes = {"batch": 256, "steps": 80}
  return Workload(
    "contrastive", init, loss, (train,), (validation,), **sizes, interacting=True, augment=two_views
  )


def regression_fashion(data_dir):
  """Mean and variance of the lower half's rows from the upper half, a Gaussian likelihood."""
  init, apply = from_module(lambda rngs: MLP((392, 128, 64, 28), rngs, jnp.tanh))

  def loss(params, x, y):
    mean, log_scale = jnp.split(apply(params, x), 2, axis=-1)
    return jnp.mean(jnp.sum(log_scale + 0.5 * ((y - mean) * jnp.exp(-log_scale)) ** 2, -1))

  def halves(x, _):
    x = x[..., 0]
    return x[:, :14].reshape(len(x), -1), x[:, 14:].mean(2)

  train, validation = (halves(*part) for part in _examples("fashion_mnist", data_dir, 8_000, 2_000))
  return Workload("heteroscedastic", init, loss, train, validation, 800, 100, marked=False)
