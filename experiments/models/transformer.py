"""Decoder-only language models, of 0.2 M parameters to the 360 M and 660 M of the SOAP paper.

Blocks `h + attention(norm(h))`, `h + down(gelu(up(norm(h))))`, all of them one block with stacked
weights in a scan: a program of one block, whatever the depth. Rotary positions (Su et al., 2021),
no biases, LayerNorm (scales alone; of queries and keys too), hidden layers four times as wide.

This is the model family of SOAP (Vyas et al., arXiv:2409.11321, appendix A), which starts from the
OLMo code base and has it from Zhao et al. (arXiv:2407.07972): widths 1024, 1024 and 1408 and depths
12, 24 and 24 for 210 M, 360 M and 660 M, heads of 64, T5's vocabulary, an output matrix of its own.
These sizes are checked by their counts, not by the papers' text: SOAP's 33.5 G tokens at 100 a
parameter are 335 M, what the 360 M model has without its embedding, as the paper says it counts;
368 M and 661 M are all of them. That queries and keys are normalised is not checked.

Weights start truncated normal with the deviation of 1 / sqrt(inputs) (1 / sqrt(width) for the
embedding), the two that add to the residual stream divided by sqrt(2 depth), as in OLMo but for its
sqrt(2 (number of the layer + 1)).
"""

import dataclasses

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from experiments.models.functional import Model, from_module

T5_VOCABULARY = 32_128  # 32,100 pieces, padded


@dataclasses.dataclass(frozen=True)
class Size:
  """Width of the residual stream, number of blocks, width of an attention head."""

  width: int
  depth: int
  head: int = 64


# Named by the parameters in their blocks, 12 depth width^2; SOAP's as the paper calls them.
SIZES = {
  "0.2m": Size(64, 4, head=16),
  "1m": Size(128, 5, head=32),
  "3m": Size(192, 7),
  "10m": Size(320, 8),
  "30m": Size(512, 10),
  "85m": Size(768, 12),
  "210m": Size(1024, 12),
  "360m": Size(1024, 24),
  "660m": Size(1408, 24),
}


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
  """Rotary positions: each pair (i, i + head / 2) turned by position * base^(-2 i / head)."""
  _, length, _, head = x.shape  # [batch, length, heads, head]
  wide = jnp.promote_types(x.dtype, jnp.float32)  # eight bits are too few for positions
  frequencies = base ** (-jnp.arange(0, head, 2, dtype=wide) / head)
  angles = jnp.arange(length)[:, None, None] * frequencies
  cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
  first, second = jnp.split(x.astype(wide), 2, axis=-1)
  turned = [first * cos - second * sin, first * sin + second * cos]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Block(nnx.Module):
  """Causal self-attention and a hidden layer, each added to the residual stream."""

  def __init__(
    self, size: Size, rngs: nnx.Rngs, *, qk_norm: bool, dropout: float, dtype: jnp.dtype | None
  ):
    width = size.width

    def dense(inputs, outputs, scale=1.0):
      kernel_init = nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
      return nnx.Linear(
        inputs, outputs, use_bias=False, kernel_init=kernel_init, dtype=dtype, rngs=rngs
      )

    self.norms = nnx.List(layer_norm(width, dtype, rngs) for _ in range(2))
    self.qk_norms = nnx.List(layer_norm(width, dtype, rngs) for _ in range(2 * qk_norm))
    residual = 1 / (2 * size.depth)
    self.qkv = dense(width, 3 * width)
    self.out = dense(width, width, residual)
    self.up = dense(width, 4 * width)
    self.down = dense(4 * width, width, residual)
    self.dropout = nnx.Dropout(dropout)
    self.head = size.head

  def attention(self, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    if self.qk_norms:
      q, k = self.qk_norms[0](q), self.qk_norms[1](k)
    q, k, v = (y.reshape(*y.shape[:2], -1, self.head) for y in (q, k, v))
    mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return self.out(mixed.reshape(x.shape))

  def __call__(self, h: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    drop = lambda y: self.dropout(y, deterministic=not train, rngs=rngs)
    h = h + drop(self.attention(self.norms[0](h)))
    return h + drop(self.down(nnx.gelu(self.up(self.norms[1](h)), approximate=False)))


def layer_norm(width: int, dtype: jnp.dtype | None, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(width, epsilon=1e-5, use_bias=False, dtype=dtype, rngs=rngs)


class LanguageModel(nnx.Module):
  """Tokens `[batch, length]` -> logits of the next one, `[batch, length, vocabulary]`."""

  def __init__(
    self,
    size: Size,
    vocabulary: int,
    rngs: nnx.Rngs,
    *,
    tied: bool,
    remat: bool,
    qk_norm: bool,
    dropout: float,
    dtype: jnp.dtype | None,
  ):
    width, depth = size.width, size.depth
    init = nnx.initializers.truncated_normal(width**-0.5)
    self.embed = nnx.Embed(vocabulary, width, embedding_init=init, dtype=dtype, rngs=rngs)

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
      return Block(size, rngs, qk_norm=qk_norm, dropout=dropout, dtype=dtype)

    self.blocks = stacked(rngs)  # every weight with a leading axis, of layers
    self.norm = layer_norm(width, dtype, rngs)
    self.logits = (
      None
      if tied
      else nnx.Linear(width, vocabulary, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
    )
    self.depth, self.remat = depth, remat

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
    graphdef, weights = nnx.split(self.blocks)

    def step(h, layer):
      weights, key = layer
      rngs = None if key is None else nnx.Rngs(dropout=key)
      return nnx.merge(graphdef, weights)(h, train=train, rngs=rngs), None

    if self.remat:
      step = jax.checkpoint(step, prevent_cse=False)  # scan does that
    keys = None if rngs is None else jax.random.split(rngs.dropout(), self.depth)
    h, _ = lax.scan(step, self.embed(x), (weights, keys))
    h = self.norm(h)
    return self.embed.attend(h) if self.logits is None else self.logits(h)


def language_model(
  size: str | Size = "1m",
  *,
  vocabulary: int = T5_VOCABULARY,
  tied: bool = False,
  remat: bool = False,
  qk_norm: bool = True,
  dropout: float = 0.0,
  dtype: jnp.dtype | None = None,
) -> Model:
  """A decoder-only transformer; `depth (12 width^2 + 4 width) + width + 2 vocabulary width`.

  Args:
    size: one of `SIZES`, or a `Size`.
    vocabulary: number of tokens.
    tied: the output matrix is the embedding (one `vocabulary width` less).
    remat: activations of a block are computed anew in the backward pass, not kept.
    qk_norm: LayerNorm of queries and keys over the whole width (else two `width` less a block).
    dropout: of what is added to the residual stream.
    dtype: of the computation.
  """
  if isinstance(size, str):
    if size not in SIZES:
      raise ValueError(f"No language model {size!r}: sizes are {', '.join(SIZES)}, or a `Size`.")
    size = SIZES[size]
  return from_module(
    lambda rngs: LanguageModel(
      size,
      vocabulary,
      rngs,
      tied=tied,
      remat=remat,
      qk_norm=qk_norm,
      dropout=dropout,
      dtype=dtype,
    )
  )
