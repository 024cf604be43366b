"""T2T-ViT-14 (Yuan et al., Tokens-to-Token ViT, arXiv:2101.11986).

FOP's paper trains "T2T-ViT" on ImageNet-100 and does not say which. This is what the official code
(yitu-opensource/T2T-ViT) calls `t2t_vit_14` and its table T2T-ViT-14, 21.5 M parameters: two token
modules with performer attention (Choromanski et al., arXiv:2009.14794). `tokens="transformer"` is
its `t2t_vit_t_14`, with full attention there and 384 parameters fewer: no biases of queries, keys
and values, as in all blocks after.

Sizes, dropout of 0.1 in the performers, LayerNorm's epsilon of 1e-5, sinusoidal positions that are
not trained, and truncated normal weights are those of the official code; its training adds
stochastic depth of 0.1 (`drop_path=0.1`).
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import vit
from experiments.models.functional import Model, from_module
from experiments.models.layers import Frozen

normal = vit.normal


def unfold(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
  """The patches of images, overlapping: `[batch, height, width, channels * size^2]`."""
  return jax.lax.conv_general_dilated_patches(
    x,
    (size, size),
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,  # it only copies
  )


class TokenPerformer(nnx.Module):
  """`y = v + out(attention(norm(x)))`, then `y + mlp(norm(y))`; softmax by random features.

  With m features `phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)`, rows of w orthogonal and of length
  sqrt(m): `E[phi(q) phi(k)] ~ exp(q k)`, so attention is `phi(q) (sum_t phi(k_t) v_t)` over
  `phi(q) sum_t phi(k_t)`, linear in the number of tokens. (m = width / 2, as the official code has
  it, and its scale of w: rows of a Gaussian matrix would have length sqrt(width).)
  """

  def __init__(
    self, inputs: int, width: int, rngs: nnx.Rngs, *, dropout: float, dtype: jnp.dtype | None
  ):
    dense = lambda a, b: nnx.Linear(a, b, kernel_init=normal, dtype=dtype, rngs=rngs)
    norm = lambda size: nnx.LayerNorm(size, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.kqv, self.out = dense(inputs, 3 * width), dense(width, width)
    self.norms = nnx.List([norm(inputs), norm(width)])
    self.mlp = vit.MLP(width, width, rngs, dtype=dtype)
    self.dropout = nnx.Dropout(dropout)
    features = width // 2
    orthogonal = nnx.initializers.orthogonal(math.sqrt(features))
    self.features = Frozen(orthogonal(rngs.params(), (features, width)))

  def phi(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    w = self.features[...]
    exponent = x @ w.T - 0.5 * jnp.sum(x * x, -1, keepdims=True)
    return jnp.exp(exponent) / math.sqrt(len(w))

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    drop = lambda y: self.dropout(y, deterministic=not train, rngs=rngs)
    k, q, v = jnp.split(self.kqv(self.norms[0](x)), 3, axis=-1)
    k, q = self.phi(k), self.phi(q)  # [batch, tokens, features]
    total = jnp.einsum("btm,bm->bt", q, k.sum(1))[..., None]
    mixed = jnp.einsum("btm,bmd->btd", q, jnp.einsum("btm,btd->bmd", k, v)) / (total + 1e-8)
    y = v + drop(self.out(mixed.astype(v.dtype)))
    return y + drop(self.mlp(self.norms[1](y)))


class TokenTransformer(nnx.Module):
  """`y = v + out(attention(norm(x)))`, then `y + mlp(norm(y))`, one head; no dropout."""

  def __init__(
    self, inputs: int, width: int, rngs: nnx.Rngs, *, dropout: float, dtype: jnp.dtype | None
  ):
    del dropout
    norm = lambda size: nnx.LayerNorm(size, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.norms = nnx.List([norm(inputs), norm(width)])
    # The official scale is by the inputs' width.
    self.attention = vit.Attention(
      inputs, width, 1, rngs, qkv_bias=False, scale=inputs**-0.5, dtype=dtype
    )
    self.mlp = vit.MLP(width, width, rngs, dtype=dtype)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    del train, rngs
    mixed, v = self.attention.mix(self.norms[0](x))
    y = v + mixed
    return y + self.mlp(self.norms[1](y))


TOKENS = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nnx.Module):
  """Patches of 7 pixels at stride 4, a token module, twice 3x3 tokens at stride 2 into one."""

  def __init__(
    self,
    tokens: str,
    width: int,
    token_width: int,
    rngs: nnx.Rngs,
    *,
    dropout: float,
    dtype: jnp.dtype | None,
  ):
    sizes = (3 * 7 * 7, token_width * 3 * 3)
    self.mixers = nnx.List(
      TOKENS[tokens](size, token_width, rngs, dropout=dropout, dtype=dtype) for size in sizes
    )
    self.project = nnx.Linear(
      token_width * 3 * 3, width, kernel_init=normal, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    x = unfold(x, 7, 4, 2)
    for mixer in self.mixers:
      batch, height, width, _ = x.shape
      x = mixer(x.reshape(batch, height * width, -1), train=train, rngs=rngs)
      x = unfold(x.reshape(batch, height, width, -1), 3, 2, 1)
    return self.project(x.reshape(x.shape[0], -1, x.shape[-1]))


def sinusoids(tokens: int, width: int) -> np.ndarray:
  """Positions of Vaswani et al. (2017): sines at even, cosines at odd places."""
  place = np.arange(width)
  angles = np.arange(tokens)[:, None] / 10_000 ** (2 * (place // 2) / width)
  return np.where(place % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


class T2TViT(nnx.Module):
  """Tokens to token, a class token, fixed positions, blocks, a head on the class token."""

  def __init__(
    self,
    tokens: str,
    image: int,
    width: int,
    depth: int,
    heads: int,
    token_width: int,
    classes: int,
    rngs: nnx.Rngs,
    *,
    token_dropout: float,
    dropout: float,
    drop_path: float,
    dtype: jnp.dtype | None,
  ):
    self.tokens = TokensToToken(
      tokens, width, token_width, rngs, dropout=token_dropout, dtype=dtype
    )
    self.class_token = nnx.Param(normal(rngs.params(), (1, width)))
    self.positions = Frozen(jnp.asarray(sinusoids((image // 16) ** 2 + 1, width)))
    self.dropout = nnx.Dropout(dropout)
    self.blocks = nnx.List(
      vit.Block(
        width,
        heads,
        3 * width,
        rngs,
        qkv_bias=False,
        epsilon=1e-5,
        dropout=dropout,
        drop_path=rate,
        dtype=dtype,
      )
      for rate in vit.depth_rates(drop_path, depth)
    )
    self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(width, classes, kernel_init=normal, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    x = self.tokens(x, train=train, rngs=rngs)  # [batch, tokens, width]
    x = vit.with_class_token(x, self.class_token[...]) + self.positions[...].astype(x.dtype)
    x = self.dropout(x, deterministic=not train, rngs=rngs)
    for block in self.blocks:
      x = block(x, train=train, rngs=rngs)
    return self.head(self.norm(x[:, 0]))


def t2t_vit_14(
  classes: int = 1000,
  *,
  tokens: str = "performer",
  image: int = 224,
  width: int = 384,
  depth: int = 14,
  heads: int = 6,
  token_width: int = 64,
  token_dropout: float = 0.1,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  dtype: jnp.dtype | None = None,
) -> Model:
  """T2T-ViT-14 for images of a multiple of 16 pixels: 21,465,806 parameters for 1,000 classes.

  The positions that are not trained, 197 x 384, are not in that. Sizes are arguments for narrow
  ones.
  """
  if tokens not in TOKENS:
    raise ValueError(f"{tokens=} is none of the token modules: {', '.join(map(repr, TOKENS))}.")
  return from_module(
    lambda rngs: T2TViT(
      tokens,
      image,
      width,
      depth,
      heads,
      token_width,
      classes,
      rngs,
      token_dropout=token_dropout,
      dropout=dropout,
      drop_path=drop_path,
      dtype=dtype,
    )
  )
