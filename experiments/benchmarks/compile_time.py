"""Seconds to capture, trace and compile a step of K-FAC and FOP, over those of `optax.sgd`.

    python -m experiments.benchmarks.compile_time [--blocks 12 48] [--forms scanned]

The network is a decoder-only transformer, its blocks written out or one scan over their stacked
weights. Compilations alternate, each of an empty cache.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
import tyro

from experiments.benchmarks import step_cost
from experiments.benchmarks.cases import Case
import fop_optax

WIDTH, HEADS, VOCABULARY, TOKENS, BATCH = 128, 4, 256, 64, 16


def _block(h: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
  """Causal attention and a dense part, each behind a normalisation."""
  norm = lambda h: (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
  q, k, v = jnp.split(norm(h) @ p["qkv"] + p["qkv_bias"], 3, axis=-1)
  heads = lambda a: a.reshape(*a.shape[:-1], HEADS, -1)
  mixed = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
  h = h + mixed.reshape(h.shape) @ p["out"] + p["out_bias"]
  return h + jax.nn.gelu(norm(h) @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def transformer(blocks: int, scan: bool) -> Case:
  """`blocks` blocks of width 128 on 16 x 64 tokens."""
  sizes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}
  sizes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}

  def weights(key):
    keys = jax.random.split(key, len(sizes))
    out = {
      n: jax.random.normal(k, s) / s[0] ** 0.5
      for k, (n, s) in zip(keys, sizes.items(), strict=True)
    }
    return out | {f"{name}_bias": jnp.zeros(shape[1]) for name, shape in sizes.items()}

  def apply(params, x):
    h = params["embedding"][x]
    if scan:
      h, _ = jax.lax.scan(lambda h, p: (_block(h, p), None), h, params["blocks"])
    else:
      h = functools.reduce(_block, params["blocks"], h)
    return h @ params["head"]

  def loss(params, x, y):
    return fop_optax.softmax_cross_entropy(apply(params, x), y)

  keys = jax.random.split(jax.random.key(0), blocks + 4)
  params = {
    "embedding": jax.random.normal(keys[-4], (VOCABULARY, WIDTH)),
    "blocks": jax.vmap(weights)(keys[:blocks]) if scan else list(map(weights, keys[:blocks])),
    "head": jax.random.normal(keys[-3], (WIDTH, VOCABULARY)) / WIDTH**0.5,
  }
  x, y = (jax.random.randint(key, (BATCH, TOKENS), 0, VOCABULARY) for key in keys[-2:])
  return Case(apply, loss, params, x, y, ())


@dataclasses.dataclass(frozen=True)
class Config:
  """What to compile.

  Attributes:
    blocks: numbers of blocks.
    forms: scanned, unrolled.
    rounds: compilations of each step.
  """

  blocks: tuple[int, ...] = (12,)
  forms: tuple[Literal["scanned", "unrolled"], ...] = ("scanned", "unrolled")
  rounds: int = 3


def measure(case: Case, rounds: int) -> tuple[float, dict[str, list[float]]]:
  """Seconds of `capture`, and of tracing and compiling each step, a value a round."""
  steps: dict[str, Any] = {"sgd": lambda: step_cost.sgd(case)}
  for name in step_cost.MAKERS:
    steps[f"{name}, ordinary"] = functools.partial(step_cost.ours, case, name, 10, False)
    steps[f"{name}, every 10"] = functools.partial(step_cost.ours, case, name, 10, None)
  capture, seconds = [], {name: [] for name in steps}
  for _ in range(rounds):
    for name, make in steps.items():
      jax.clear_caches()
      begin = time.perf_counter()
      fop_optax.capture(case.loss, case.params, case.x, case.y)
      capture.append(time.perf_counter() - begin)
      jax.clear_caches()
      seconds[name].append(make().seconds)
  return statistics.median(capture), seconds


def main(config: Config) -> None:
  table = Table(
    title=f"to trace and compile; {jax.devices()[0].device_kind}, jax {jax.__version__}"
  )
  for heading in ("blocks", "step", "seconds", "ratio", "capture, s"):
    table.add_column(heading, no_wrap=True)
  for blocks in config.blocks:
    for form in config.forms:
      capture, seconds = measure(transformer(blocks, form == "scanned"), config.rounds)
      for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["sgd"], strict=True))
        found = "" if name == "sgd" else f"{capture:.2f}"
        table.add_row(
          f"{blocks} {form}", name, f"{statistics.median(own):.1f}", f"{ratio:.2f}", found
        )
      table.add_section()
  Console(width=110).print(table)


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.compile_time"))
