"""Text by characters: transformers and a recurrent network."""

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from experiments.data.text import shakespeare
from experiments.workloads.base import Workload, from_module, split
import fop_optax

LENGTH = 32


def _examples(data_dir: str | None, size: int, validation: int):
  """Windows of tiny Shakespeare, and the characters that follow; how many characters there are."""
  text = shakespeare(data_dir)
  ids = np.concatenate([text.train, text.validation])
  starts = np.random.default_rng(0).integers(0, len(ids) - LENGTH - 1, size + validation)
  windows = ids[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
  return split((windows[:, :-1], windows[:, 1:]), validation), text.vocabulary


def _normalise(x):
  return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _attention(h, qkv, out, heads):
  batch, tokens, width = h.shape
  q, k, v = jnp.moveaxis((h @ qkv).reshape(batch, tokens, 3, heads, -1), 2, 0)
  scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
  scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens))) > 0, scores, -1e9)
  mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
  return mixed.reshape(batch, tokens, width) @ out


def _block(h, p, heads=4):
  h = h + _attention(p["scale1"] * _normalise(h), p["qkv"], p["out"], heads)
  return h + jax.nn.gelu(p["scale2"] * _normalise(h) @ p["up"] + p["bias"]) @ p["down"]


def _transformer(vocabulary: int, width: int, blocks: int):
  def init(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    stack = lambda a, b: normal(blocks, a, b) * a**-0.5
    blocks_ = {
      "qkv": stack(width, 3 * width),
      "out": stack(width, width) / (2 * blocks) ** 0.5,
      "up": stack(width, 4 * width),
      "down": stack(4 * width, width) / (2 * blocks) ** 0.5,
      "bias": jnp.zeros((blocks, 4 * width)),
      "scale1": jnp.ones((blocks, width)),
      "scale2": jnp.ones((blocks, width)),
    }
    table = 0.1 * normal(vocabulary, width)
    return {"table": table, "positions": 0.02 * normal(LENGTH, width), "blocks": blocks_}

  return init


def transformer_tied(data_dir):
  """Two blocks of width 64 written out, embedding and head one matrix."""
  examples, vocabulary = _examples(data_dir, 8_000, 1_000)

  def loss(params, x, y):
    h = params["table"][x] + params["positions"]
    for i in range(2):
      h = _block(h, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]))
    return fop_optax.softmax_cross_entropy(_normalise(h) @ params["table"].T, y)

  init = _transformer(vocabulary, 64, 2)
  return Workload("transformer-tied", init, loss, *examples, 64, 80)


def transformer_scanned(data_dir):
  """Four blocks of width 32 in a scan."""
  examples, vocabulary = _examples(data_dir, 8_000, 1_000)
  initial = _transformer(vocabulary, 32, 4)

  def init(seed):
    params = initial(seed)
    head = 32**-0.5 * jax.random.normal(jax.random.key(seed + 1000), (32, vocabulary))
    return params | {"head": head}

  def loss(params, x, y):
    h = params["table"][x] + params["positions"]
    h, _ = lax.scan(lambda h, p: (_block(h, p), None), h, params["blocks"])
    return fop_optax.softmax_cross_entropy(_normalise(h) @ params["head"], y)

  return Workload("transformer-scanned", init, loss, *examples, 64, 80)


class Lstm(nnx.Module):
  def __init__(self, vocabulary, width, rngs):
    self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
    self.cell = nnx.RNN(nnx.OptimizedLSTMCell(width, width, rngs=rngs))
    self.head = nnx.Linear(width, vocabulary, rngs=rngs)

  def __call__(self, x):
    return self.head(self.cell(self.embed(x)))


def lstm(data_dir):
  """An LSTM of width 64."""
  examples, vocabulary = _examples(data_dir, 8_000, 1_000)
  init, apply = from_module(lambda rngs: Lstm(vocabulary, 64, rngs))
  loss = lambda params, x, y: fop_optax.softmax_cross_entropy(apply(params, x), y)
  return Workload("lstm", init, loss, *examples, 64, 80)
