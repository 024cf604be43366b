"""What statistics of a part of the batch do to K-FAC's direction, and what they save.

    python -m experiments.benchmarks.curvature_fraction [--batch 1024] [--damping 1e-2]

An MLP on handwritten digits after some epochs of SGD; of one batch the direction
with statistics of every k-th example, against that with all: cosine and relative difference over
all layers, and the FLOPs that XLA counts for gradient and statistics, over those of the gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table
import tyro

from experiments import data
from experiments.models import mlp
import fop_optax


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure.

  Attributes:
    batch: examples in the batch.
    fractions: values of `curvature_fraction`.
    damping: lambda.
    hidden: widths of the hidden layers.
    steps: steps of SGD before.
  """

  batch: int = 1024
  fractions: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
  damping: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
  hidden: tuple[int, ...] = (256, 128)
  steps: int = 100


def trained(loss, params, x, y, steps: int):
  """Parameters after `steps` of SGD with momentum on one batch."""
  tx = optax.sgd(0.1, momentum=0.9)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params, x, y), state)
    return (optax.apply_updates(params, updates), state), None

  return jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0])(
    (params, tx.init(params))
  )[0]


def direction(loss, params, x, y, fraction: float, damping: float) -> jax.Array:
  """K-FAC's direction for one batch, flat."""
  captured = fop_optax.capture(loss, params, x, y, groups=1, curvature_fraction=fraction)
  tx = fop_optax.scale_by_kfac(captured.layers, damping=damping)
  _, grads, stats = jax.jit(captured.value_and_grad)(params, x, y)
  updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
  return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)])


def flops(loss, params, x, y, fraction: float, refresh: bool) -> float:
  """Counted FLOPs of the gradient, with or without statistics."""
  captured = fop_optax.capture(loss, params, x, y, groups=1, curvature_fraction=fraction)
  run = jax.jit(functools.partial(captured.value_and_grad, refresh=refresh))
  return run.lower(params, x, y).compile().cost_analysis()["flops"]


def main(config: Config) -> None:
  digits = data.load("digits")
  images = (digits.train_images[: config.batch] - digits.mean) / digits.std
  x, y = jnp.asarray(images, jnp.float32), jnp.asarray(digits.train_labels[: config.batch])
  model = mlp.mlp(x.shape[1:], digits.classes, config.hidden)
  params, state = model.init(0)  # the latter is empty

  def loss(params, x, y):
    logits, _ = model.apply(params, state, x, train=True)
    return fop_optax.softmax_cross_entropy(logits, y)

  params = trained(loss, params, x, y, config.steps)
  table = Table(title=f"statistics of a part of {len(x)} examples, K-FAC's direction on digits")
  table.add_column("fraction")
  for damping in config.damping:
    table.add_column(f"lambda {damping:g}: cosine, difference")
  table.add_column("FLOPs")
  whole = {lam: direction(loss, params, x, y, 1.0, lam) for lam in config.damping}
  plain = flops(loss, params, x, y, 1.0, refresh=False)
  for fraction in config.fractions:
    cells = []
    for damping in config.damping:
      full, part = whole[damping], direction(loss, params, x, y, fraction, damping)
      cosine = full @ part / jnp.linalg.norm(full) / jnp.linalg.norm(part)
      difference = jnp.linalg.norm(full - part) / jnp.linalg.norm(full)
      cells.append(f"{cosine:.4f}, {difference:.3f}")
    cost = flops(loss, params, x, y, fraction, refresh=True) / plain
    table.add_row(f"1/{round(1 / fraction):g}", *cells, f"{cost:.2f}")
  Console(width=110).print(table)


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.curvature_fraction"))
