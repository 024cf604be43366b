"""The MNIST autoencoder of the K-FAC paper, 784-1000-500-250-30 and back, in large batches.

    python -m experiments.benchmarks.autoencoder [--batch 2000] [--steps 100]

Adam and Muon at the best of some rates, K-FAC with its defaults, and K-FAC with rate, momentum and
damping from the quadratic model, which refuses steps that raise the loss of their batch. Prints the
training loss (binary cross entropy of the pixels, Martens and Grosse's; a mean over the last tenth
of the steps), the squared error of the reconstruction at the end, on all images used, and seconds.

The cross entropy is no marked loss: its curvature in the logits is `p (1 - p)`, that of a softmax
over two classes, zero and the logit, and so it is written.
"""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
import tyro

from experiments import data
import fop_optax

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
Step = Callable[..., tuple[Any, Any, jax.Array]]  # rate, carry, x, key


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run.

  Attributes:
    batch: images in a step.
    steps: of each run.
    images: of the training set that are used.
    adam: Adam's rates.
    muon: Muon's rates.
    kfac: rates of K-FAC with its defaults.
    damping: lambda that the adaptive run starts from.
    data_dir: folder of prepared data sets; None: as TFDS looks for it.
  """

  batch: int = 2000
  steps: int = 100
  images: int = 20_000
  adam: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
  muon: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
  kfac: tuple[float, ...] = (0.1,)
  damping: float = 1.0
  data_dir: str | None = None


def init(seed: int) -> list[dict[str, jax.Array]]:
  """Fifteen connections a unit, normal, and biases of zero (Martens, 2010)."""
  params = []
  for key, (a, b) in zip(
    jax.random.split(jax.random.key(seed), len(SIZES) - 1),
    zip(SIZES[:-1], SIZES[1:], strict=True),
    strict=True,
  ):
    normal, order = jax.random.split(key)
    ranks = jax.vmap(lambda k, a=a: jax.random.permutation(k, a))(jax.random.split(order, b)).T
    params.append({"w": jax.random.normal(normal, (a, b)) * (ranks < 15), "b": jnp.zeros(b)})
  return params


def logits(params, x):
  h = x
  for number, layer in enumerate(params):
    h = h @ layer["w"] + layer["b"]
    if number not in (3, len(params) - 1):  # the code and the output are linear
      h = jnp.tanh(h)
  return h


def loss_fn(params, x):
  """Cross entropy, summed over pixels, mean over images."""
  z = logits(params, x)
  pairs = jnp.stack([jnp.zeros_like(z), z], axis=-1)
  return SIZES[-1] * fop_optax.softmax_cross_entropy(pairs, jnp.stack([1 - x, x], axis=-1))


def squared_error(params, x):
  return jnp.mean(jnp.sum((jax.nn.sigmoid(logits(params, x)) - x) ** 2, axis=-1))


def first_order(make, steps: int) -> tuple[Callable, Step]:
  tx = lambda rate: make(optax.cosine_decay_schedule(rate, steps))

  def step(rate, carry, x, key):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, state = tx(rate).update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  return lambda params: (params, tx(1.0).init(params)), step


def kfac(captured, steps: int) -> tuple[Callable, Step]:
  tx = lambda rate: fop_optax.kfac(optax.cosine_decay_schedule(rate, steps), captured.layers)

  def step(rate, carry, x, key):
    params, state = carry
    refresh = fop_optax.refresh_due(state)
    loss, grads, stats = captured.value_and_grad(params, x, refresh=refresh, key=key)
    updates, state = tx(rate).update(grads, state, params, stats=stats)
    return (optax.apply_updates(params, updates), state), loss

  return lambda params: (params, tx(1.0).init(params)), step


def adaptive(captured, damping: float) -> tuple[Callable, Step]:
  """Rate and momentum from the quadratic model, damping by its predictions; no rate is given."""
  tx = optax.inject_hyperparams(fop_optax.scale_by_kfac)(
    captured.layers, damping=damping, curvature_update_period=fop_optax.WarmupPeriod(20, 5)
  )

  def step(rate, carry, x, key):
    del rate
    params, state, previous = carry
    refresh = fop_optax.refresh_due(state)
    loss, grads, stats = captured.value_and_grad(params, x, refresh=refresh, key=key)
    direction, state = tx.update(grads, state, params, stats=stats)
    model = fop_optax.quadratic_model(captured, params, (x,), [direction, previous])
    w = model.minimizer(state.hyperparams["damping"])
    change = jax.tree.map(lambda d, p: w[0] * d + w[1] * p, direction, previous)
    new = optax.apply_updates(params, change)
    risen = loss_fn(new, x) - loss
    state = fop_optax.adapt_damping(state, risen / model.change(w))
    keep = lambda a, b: jax.tree.map(lambda a, b: jnp.where(risen < 0, a, b), a, b)
    zero = jax.tree.map(jnp.zeros_like, change)
    return (keep(new, params), state, keep(change, zero)), loss

  return lambda params: (params, tx.init(params), jax.tree.map(jnp.zeros_like, params)), step


def run(start: Callable, step: Step, rate: float, x: np.ndarray, config: Config):
  """Mean loss of the last tenth of the steps, squared error on the images, and seconds."""
  compiled = jax.jit(step)
  carry = start(init(0))
  rng = np.random.default_rng(0)
  jax.block_until_ready(compiled(rate, carry, x[: config.batch], jax.random.key(0)))
  losses, began = [], time.perf_counter()
  for number in range(config.steps):
    chosen = rng.choice(len(x), config.batch, replace=False)
    carry, loss = compiled(rate, carry, x[chosen], jax.random.key(number))
    losses.append(float(loss))
  seconds = time.perf_counter() - began
  error = float(jax.jit(squared_error)(carry[0], x))
  return float(np.mean(losses[-max(1, config.steps // 10) :])), error, seconds


def main(config: Config) -> None:
  images = data.load("mnist", config.data_dir).train_images[: config.images]
  x = (images.reshape(len(images), -1) / 255).astype(np.float32)
  captured = fop_optax.capture(loss_fn, init(0), x[: config.batch], fisher="sampled")
  methods = {
    "Adam": (first_order(optax.adam, config.steps), config.adam),
    "Muon": (first_order(optax.contrib.muon, config.steps), config.muon),
    "K-FAC, defaults": (kfac(captured, config.steps), config.kfac),
    "K-FAC, adaptive": (adaptive(captured, config.damping), (0.0,)),
  }
  table = Table(title=f"MNIST autoencoder, {config.steps} steps of {config.batch} images")
  for heading in ("method", "rate", "training loss", "squared error", "seconds"):
    table.add_column(heading)
  console = Console(width=100)
  for name, ((start, step), rates) in methods.items():
    for rate in rates:
      loss, error, seconds = run(start, step, rate, x, config)
      row = (name, f"{rate:g}" if rate else "-", f"{loss:.2f}", f"{error:.3f}", f"{seconds:.0f}")
      console.print(*row)
      table.add_row(*row)
  console.print(table)


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.autoencoder"))
