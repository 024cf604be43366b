"""Vision transformers (Dosovitskiy et al., arXiv:2010.11929): S/16, B/16 and smaller.

Blocks with LayerNorm before, a class token, learned positions, GELU by the error function. As in
DeiT and timm every dense layer, the head too, starts truncated normal of deviation 0.02 (the
original's are Glorot-uniform, its head zero, which leaves all layers before it without a gradient,
and so without statistics, in the first step).
"""

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models.functional import Model, from_module

normal = nnx.initializers.truncated_normal(0.02)


class Attention(nnx.Module):
  """Multi-head self-attention over `[batch, tokens, inputs]`, to `width` outputs."""

  def __init__(
    self,
    inputs: int,
    width: int,
    heads: int,
    rngs: nnx.Rngs,
    *,
    qkv_bias: bool,
    scale: float | None = None,
    dtype: jnp.dtype | None = None,
  ):
    self.qkv = nnx.Linear(
      inputs, 3 * width, use_bias=qkv_bias, kernel_init=normal, dtype=dtype, rngs=rngs
    )
    self.out = nnx.Linear(width, width, kernel_init=normal, dtype=dtype, rngs=rngs)
    self.heads = heads
    self.scale = scale  # None: (width / heads)^-1/2

  def mix(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output of attention, and the values, both `[batch, tokens, width]`."""
    batch, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))  # [batch, tokens, heads, width / heads]
    mixed = jax.nn.dot_product_attention(q, k, v, scale=self.scale)
    return self.out(mixed.reshape(batch, tokens, -1)), v.reshape(batch, tokens, -1)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.mix(x)[0]


class MLP(nnx.Module):
  """Two dense layers, GELU between."""

  def __init__(self, width: int, hidden: int, rngs: nnx.Rngs, *, dtype: jnp.dtype | None = None):
    self.up = nnx.Linear(width, hidden, kernel_init=normal, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(hidden, width, kernel_init=normal, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(nnx.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
  """`x + attention(norm(x))`, then `x + mlp(norm(x))`, each with dropout and stochastic depth."""

  def __init__(
    self,
    width: int,
    heads: int,
    hidden: int,
    rngs: nnx.Rngs,
    *,
    qkv_bias: bool = True,
    epsilon: float = 1e-6,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    dtype: jnp.dtype | None = None,
  ):
    norm = lambda: nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
    self.norms = nnx.List([norm(), norm()])
    self.attention = Attention(width, width, heads, rngs, qkv_bias=qkv_bias, dtype=dtype)
    self.mlp = MLP(width, hidden, rngs, dtype=dtype)
    self.dropout = nnx.Dropout(dropout)
    self.path = nnx.Dropout(drop_path, broadcast_dims=(1, 2))  # of an example as a whole

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    for norm, branch in zip(self.norms, (self.attention, self.mlp), strict=True):
      y = self.dropout(branch(norm(x)), deterministic=not train, rngs=rngs)
      x = x + self.path(y, deterministic=not train, rngs=rngs)
    return x


def depth_rates(drop_path: float, depth: int) -> list[float]:
  """Stochastic depth's rates, rising linearly from zero to `drop_path`."""
  return [drop_path * i / max(depth - 1, 1) for i in range(depth)]


class ViT(nnx.Module):
  """Patches, a class token, positions, blocks, LayerNorm, a head on the class token."""

  def __init__(
    self,
    image: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    classes: int,
    rngs: nnx.Rngs,
    *,
    channels: int = 3,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    dtype: jnp.dtype | None = None,
  ):
    self.patch = nnx.Conv(
      channels,
      width,
      (patch, patch),
      strides=patch,
      padding="VALID",
      kernel_init=normal,
      dtype=dtype,
      rngs=rngs,
    )
    tokens = (image // patch) ** 2
    self.class_token = nnx.Param(normal(rngs.params(), (1, width)))
    self.positions = nnx.Param(normal(rngs.params(), (tokens + 1, width)))
    self.dropout = nnx.Dropout(dropout)
    self.blocks = nnx.List(
      Block(width, heads, 4 * width, rngs, dropout=dropout, drop_path=rate, dtype=dtype)
      for rate in depth_rates(drop_path, depth)
    )
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(width, classes, kernel_init=normal, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    x = self.patch(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])  # [batch, tokens, width]
    x = with_class_token(x, self.class_token[...]) + self.positions[...].astype(x.dtype)
    x = self.dropout(x, deterministic=not train, rngs=rngs)
    for block in self.blocks:
      x = block(x, train=train, rngs=rngs)
    return self.head(self.norm(x[:, 0]))


def with_class_token(x: jax.Array, token: jax.Array) -> jax.Array:
  """`token`, `[1, width]`, before the tokens of each example."""
  token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], *token.shape))
  return jnp.concatenate([token, x], axis=1)


def vit(
  image: int,
  patch: int,
  width: int,
  depth: int,
  heads: int,
  classes: int,
  *,
  channels: int = 3,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  dtype: jnp.dtype | None = None,
) -> Model:
  """A vision transformer of any size, for square images of `image` pixels."""
  return from_module(
    lambda rngs: ViT(
      image,
      patch,
      width,
      depth,
      heads,
      classes,
      rngs,
      channels=channels,
      dropout=dropout,
      drop_path=drop_path,
      dtype=dtype,
    )
  )


def vit_s16(classes: int = 1000, *, image: int = 224, **options) -> Model:
  """ViT-S/16 as in DeiT and timm: 22,050,664 parameters for 1,000 classes."""
  return vit(image, 16, 384, 12, 6, classes, **options)


def vit_b16(classes: int = 1000, *, image: int = 224, **options) -> Model:
  """ViT-B/16: 86,567,656 parameters for 1,000 classes."""
  return vit(image, 16, 768, 12, 12, classes, **options)
