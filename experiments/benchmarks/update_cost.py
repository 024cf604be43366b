"""What an update of the methods that need gradients alone costs over one of `optax.adamw`.

    python -m experiments.benchmarks.update_cost [--cases 1024 transformer] [--peers FILE.py ...]

A case is one matrix of that side, or the parameters of a decoder-only transformer of four blocks
("transformer") or of GPT-2's shapes ("gpt2-8").
For each method: milliseconds of an update, the mean over a period of ten with its new bases, its
ratio to AdamW's, the bytes of the state over AdamW's, and the counted FLOPs, for a matrix [m, n]

    SOAP       6 m n (m + n)   statistics, rotation of the gradient, and back
               and each period   14/3 (m^3 + n^3) + 4 m n (m + n)   S Q, its QR, the moment's turn
    Shampoo    4 m n (m + n)   statistics, and the product with both roots
               and each period   11 (m^3 + n^3)   eigenvectors and their product; Newton's
               iterations, as many as it takes, are not counted
    Muon       20 m^2 n + 10 m^3   five steps of two products and a square, m the smaller side

for SOAP and Shampoo without the sides beyond what they keep. Where the gradient is taken too, time
is that of a whole step over AdamW's: of the transformer on 16 x 64 tokens ("step"), or of GPT-2 on
8 x 1,024 in bfloat16 ("gpt2-8-step").
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table
import tyro

from experiments.benchmarks import cases, compile_cases, peers, timing
import fop_optax

PERIOD = 10
MAX_DIM = 10_000  # sides beyond have no factor


class Method(NamedTuple):
  """An optimizer and the FLOPs of its update of a matrix [m, n], without a period and in each."""

  make: Callable[[], optax.GradientTransformation]
  flops: Callable[[int, int], float] = lambda m, n: 0.0
  refresh: Callable[[int, int], float] = lambda m, n: 0.0


def _kept(*dims: int) -> list[int]:
  return [d for d in dims if d <= MAX_DIM]


def _soap(**options):
  return Method(
    lambda: fop_optax.soap(1e-3, inverse_update_period=PERIOD, max_precond_dim=MAX_DIM, **options),
    lambda m, n: 6.0 * m * n * sum(_kept(m, n)),
    lambda m, n: sum(14 / 3 * d**3 + 4 * m * n * d for d in _kept(m, n)),
  )


def _shampoo(refresh=lambda m, n: sum(11.0 * d**3 for d in _kept(m, n)), **options):
  return Method(
    lambda: fop_optax.shampoo(1e-3, inverse_update_period=PERIOD, block_size=8192, **options),
    lambda m, n: 4.0 * m * n * sum(_kept(m, n)),
    refresh,
  )


METHODS = {
  "AdamW": Method(lambda: optax.adamw(1e-3)),
  "Muon": Method(
    lambda: optax.contrib.muon(1e-3),
    lambda m, n: 20 * min(m, n) ** 2 * max(m, n) + 10 * min(m, n) ** 3,
  ),
  "SOAP": _soap(),
  "SOAP, factorized": _soap(factorized=True),
  "SOAP, one-sided": Method(
    lambda: fop_optax.soap(1e-3, inverse_update_period=PERIOD, one_sided=True),
    lambda m, n: 6 * min(m, n) ** 2 * max(m, n),
    lambda m, n: 14 / 3 * min(m, n) ** 3 + 4 * min(m, n) ** 2 * max(m, n),
  ),
  "Shampoo": _shampoo(),
  "Shampoo, Newton": _shampoo(lambda m, n: 0.0, root="newton"),
  "Neumann": Method(lambda: fop_optax.neumann(1e-3, steps_per_epoch=PERIOD)),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What to time.

  Attributes:
    cases: sides of a matrix; "transformer", "gpt2-N" for the parameters of one; "step",
      "gpt2-N-step" for a whole step of it.
    methods: names; AdamW always runs.
    rounds: rounds of alternating windows of ten updates.
    compile_threads: how many updates are compiled at a time.
    peers: Python files of other people's optimizers, to time them too, as
      `experiments.benchmarks.peers.from_file` takes them.
    out: a CSV file to write.
  """

  cases: tuple[str, ...] = ("256", "1024", "4096", "transformer", "step")
  methods: tuple[str, ...] = tuple(METHODS)
  rounds: int = 7
  compile_threads: int = 1
  peers: tuple[pathlib.Path, ...] = ()
  out: str | None = None


class Updater:
  """A compiled update, or step, with the state that it carries on."""

  def __init__(self, tx: optax.GradientTransformation, case: str):
    loss, params, *batch = _problem(case)
    whole = case.endswith("step")
    self.inputs = batch if whole else [jax.tree.map(jnp.sin, params)]

    def step(carry, *inputs):
      params, state = carry
      grads = jax.grad(loss)(params, *inputs) if whole else inputs[0]
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    state = tx.init(params)
    self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    self.carry = params, state
    begin = time.perf_counter()
    self.compiled = jax.jit(step, donate_argnums=0).lower(self.carry, *self.inputs).compile()
    self.seconds = time.perf_counter() - begin

  def window(self, steps: int) -> Any:
    for _ in range(steps):
      self.carry = self.compiled(self.carry, *self.inputs)
    return self.carry


def _problem(case: str) -> tuple[Any, ...]:
  """Loss, parameters in buffers of their own, batch."""
  if case.isdecimal():
    return None, {"w": jax.random.normal(jax.random.key(0), (int(case), int(case)))}
  if case.startswith("gpt2"):
    network = cases.build(case.removesuffix("-step"))
  else:
    network = compile_cases.transformer(4, scan=False)
  return network.loss, network.params, network.x, network.y


def flops(method: Method, params: Any) -> float:
  """Counted FLOPs of an update, the mean over a period."""
  total = 0.0
  for leaf in jax.tree.leaves(params):
    if leaf.ndim == 2:
      total += method.flops(*leaf.shape) + method.refresh(*leaf.shape) / PERIOD
  return total


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table."""

  case: str
  method: str
  milliseconds: float
  ratio: float
  ratio_min: float
  ratio_max: float
  gigaflops: float
  state_ratio: float
  compile_seconds: float


def measure(case: str, methods: dict[str, Method], config: Config) -> list[Row]:
  """All lines of one case."""
  with concurrent.futures.ThreadPoolExecutor(config.compile_threads) as pool:
    made = pool.map(lambda method: Updater(method.make(), case), methods.values())
    updaters = dict(zip(methods, made, strict=True))
  windows = {name: own.window for name, own in updaters.items()}
  seconds = timing.alternate(windows, PERIOD, config.rounds)
  _, params, *_ = _problem(case)
  return [
    Row(
      case,
      name,
      1e3 * statistics.median(seconds[name]),
      *timing.ratio(seconds[name], seconds["AdamW"]),
      flops(methods[name], params) / 1e9,
      own.bytes / updaters["AdamW"].bytes,
      own.seconds,
    )
    for name, own in updaters.items()
  ]


def chosen(config: Config) -> dict[str, Method]:
  """The methods to time, by name."""
  if unknown := set(config.methods) - set(METHODS):
    raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join(METHODS)}")
  methods = {name: METHODS[name] for name in dict.fromkeys(("AdamW", *config.methods))}
  for path in config.peers:
    make, like = peers.from_file(path, PERIOD)
    own = METHODS.get(like, Method(make))
    methods[path.stem] = own._replace(make=make)
  return methods


def table(rows: list[Row]) -> Table:
  """The lines as a table."""
  out = Table(title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  for heading in ("case", "method", "ms", "over AdamW", "range", "GFLOP", "state", "compile, s"):
    out.add_column(heading, no_wrap=True)
  for row in rows:
    out.add_row(
      row.case,
      row.method,
      f"{row.milliseconds:.2f}",
      f"{row.ratio:.2f}",
      f"{row.ratio_min:.2f} to {row.ratio_max:.2f}",
      f"{row.gigaflops:.2f}",
      f"{row.state_ratio:.2f}",
      f"{row.compile_seconds:.1f}",
    )
  return out


def main(config: Config) -> None:
  console = Console() if sys.stdout.isatty() else Console(width=120)
  rows: list[Row] = []
  for case in config.cases:
    own = measure(case, chosen(config), config)
    rows += own
    console.print(table(own))
  if config.out:
    console.print("saved", timing.save(rows, config.out))


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.update_cost"))
