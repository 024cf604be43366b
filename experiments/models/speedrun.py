"""The network of the public CIFAR-10 speed runs (Jordan, arXiv:2404.00498; airbench94_muon).

  whitening       2x2, 24 filters that are not trained, trained bias      32 -> 31 pixels
  GELU
  three groups    of 64, 256 and 256 channels:
    conv 3x3, max-pool 2, BatchNorm, GELU, conv 3x3, BatchNorm, GELU      31 -> 15 -> 7 -> 3
  max-pool 3                                                              3 -> 1
  head            without bias, divided by the number of its inputs

No biases in convolutions, no scales in BatchNorm. 1,971,352 trained parameters, and the 288 of the
filters. The filters are data: `whiten` puts them into the state before training. The recipe that
goes with it trains the whitening's bias for the first three epochs only.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models.functional import Model, State, from_module
from experiments.models.layers import BatchNorm, Frozen, torch_uniform


def whitening_filters(images: jax.Array, size: int = 2, epsilon: float = 5e-4) -> jax.Array:
  """`[size, size, channels, 2 size^2 channels]` filters that whiten the images' patches.

  Eigenvectors v of the patches' second moments over sqrt(eigenvalue + epsilon), and -v.
  """
  channels = images.shape[-1]
  patches = jax.lax.conv_general_dilated_patches(
    images,
    (size, size),
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,
  ).reshape(-1, channels * size**2)
  moments = jnp.matmul(patches.T, patches, precision=jax.lax.Precision.HIGHEST) / len(patches)
  values, vectors = jnp.linalg.eigh(moments)
  filters = vectors / jnp.sqrt(values + epsilon)  # a filter a column
  filters = jnp.concatenate([filters, -filters], axis=1)
  # A patch's entries are [channels, size, size].
  return jnp.moveaxis(filters.reshape(channels, size, size, -1), 0, 2)


def whiten(state: State, images: jax.Array) -> State:
  """The state with filters from `images`, normalised as in training; 5,000 are enough."""
  filters = Frozen(whitening_filters(images))
  return nnx.merge_state(state, nnx.State({"whitening": {"filters": filters}}))


def partial_identity(key, shape, dtype=jnp.float32) -> jax.Array:
  """Torch's uniform weights, but the first filters, one an input, pass that input on as it is."""
  height, width, inputs, outputs = shape
  weights = torch_uniform(key, shape, dtype)
  passed = min(inputs, outputs)
  identity = jnp.zeros((height, width, inputs, passed), dtype)
  identity = identity.at[height // 2, width // 2].set(jnp.eye(inputs, passed, dtype=dtype))
  return weights.at[..., :passed].set(identity)


class Whitening(nnx.Module):
  """Convolution with filters from data, plus a trained bias."""

  def __init__(self, channels: int, rngs: nnx.Rngs, *, dtype: jnp.dtype | None):
    shape = (2, 2, channels, 8 * channels)
    self.filters = Frozen(torch_uniform(rngs.params(), shape, jnp.float32))
    bound = (4 * channels) ** -0.5  # torch's for biases
    self.bias = nnx.Param(
      jax.random.uniform(rngs.params(), shape[-1:], minval=-bound, maxval=bound)
    )
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    dtype = self.dtype or x.dtype
    x = jax.lax.conv_general_dilated(
      x.astype(dtype),
      self.filters[...].astype(dtype),
      (1, 1),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + self.bias[...].astype(dtype)


class Group(nnx.Module):
  """Two convolutions, each with BatchNorm and GELU; a max-pool after the first."""

  def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, *, dtype: jnp.dtype | None):
    self.convs = nnx.List(
      nnx.Conv(
        channels,
        outputs,
        (3, 3),
        use_bias=False,
        kernel_init=partial_identity,
        dtype=dtype,
        rngs=rngs,
      )
      for channels in (inputs, outputs)
    )
    self.norms = nnx.List(
      BatchNorm(outputs, momentum=0.6, epsilon=1e-12, use_scale=False, dtype=dtype, rngs=rngs)
      for _ in range(2)
    )

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nnx.max_pool(self.convs[0](x), (2, 2), strides=(2, 2))
    x = nnx.gelu(self.norms[0](x, train=train), approximate=False)
    x = self.convs[1](x)
    return nnx.gelu(self.norms[1](x, train=train), approximate=False)


class Speedrun(nnx.Module):
  def __init__(self, width: float, classes: int, rngs: nnx.Rngs, *, dtype: jnp.dtype | None = None):
    self.whitening = Whitening(3, rngs, dtype=dtype)
    widths = [24, *(max(1, round(width * w)) for w in (64, 256, 256))]
    self.groups = nnx.List(
      Group(a, b, rngs, dtype=dtype) for a, b in zip(widths[:-1], widths[1:], strict=True)
    )
    unit = nnx.initializers.normal(1.0)
    self.head = nnx.Linear(
      widths[-1], classes, use_bias=False, kernel_init=unit, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    del rngs  # no dropout
    x = nnx.gelu(self.whitening(x), approximate=False)
    for group in self.groups:
      x = group(x, train=train)
    x = nnx.max_pool(x, (3, 3), strides=(3, 3))
    x = x.reshape(x.shape[0], -1)
    return self.head(x) / x.shape[-1]


def speedrun(classes: int = 10, *, width: float = 1.0, dtype: jnp.dtype | None = None) -> Model:
  """The speed-run network for images of 32 pixels; `width` multiplies the groups' channels.

  model = speedrun.speedrun(dtype=jnp.bfloat16)
  params, state = model.init(0)
  state = speedrun.whiten(state, images[:5000])
  """
  return from_module(lambda rngs: Speedrun(width, classes, rngs, dtype=dtype))
