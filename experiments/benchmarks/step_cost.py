"""What a step of K-FAC and FOP costs over `optax.sgd`.

    python -m experiments.benchmarks.step_cost [--cases mlp-512 mlp-4096 ...] [--kfac-jax]

For each network: milliseconds of a step of SGD with momentum, and the ratio to it of a step without
statistics (`ordinary`), with new statistics and inverses (`refresh`), and of the mean of the steps
between two refreshes in one compiled step whose refresh is traced (`every k`). Beside the latter
the counted floor: the FLOPs of SGD's step and those that the method cannot do without, over SGD's.

    products     2 r o (r + o) for a layer's matrix [r, o] and each of M^-1 V; K-FAC has one, FOP
                 three (M^-1 g_avg, M^-1 g_perp, F g_avg)
    refresh      2 N T (r^2 + o^2) for A and G of N examples with T rows, r^3 + o^3 for the inverses

of a side of which only the diagonal is kept, nothing. `--compile-threads` compiles so many steps at
a time, for machines with many cores: seconds of compilation say nothing then and are left out.
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from typing import Any, Literal

import jax
import optax
from rich.console import Console
from rich.table import Table
import tyro

from experiments.benchmarks import cases, peers, timing
import fop_optax

MAKERS = {"kfac": fop_optax.kfac, "fop": fop_optax.fop}
PRODUCTS = {"kfac": 1, "fop": 3}  # of the damped inverse or the Fisher matrix with a gradient
DEFAULT = ("mlp-512", "mlp-4096", "cnn-pooled-256", "cnn-flat-256")


@dataclasses.dataclass(frozen=True)
class Config:
  """What to time.

  Attributes:
    cases: networks and batch sizes: mlp-N, cnn-pooled-N, cnn-flat-N, resnet18-N, gpt2-N.
    optimizers: of kfac and fop.
    kinds: of ordinary, refresh and every, which steps.
    period: steps between two refreshes.
    rounds: rounds of alternating windows.
    kfac_jax: also time kfac_jax.Optimizer, which has to be installed.
    compile_threads: how many steps are compiled at a time.
    out: a CSV file to write.
  """

  cases: tuple[str, ...] = DEFAULT
  optimizers: tuple[str, ...] = ("kfac", "fop")
  kinds: tuple[Literal["ordinary", "refresh", "every"], ...] = ("ordinary", "refresh", "every")
  period: int = 10
  rounds: int = 11
  kfac_jax: bool = False
  compile_threads: int = 1
  out: str | None = None


@dataclasses.dataclass
class Stepper:
  """A compiled step with the state that it carries on."""

  compiled: Callable[..., Any]
  carry: Any
  batch: Any
  seconds: float  # to trace and compile
  bytes: int  # arguments, outputs and temporaries of the step

  def window(self, steps: int) -> Any:
    for _ in range(steps):
      self.carry = self.compiled(self.carry, *self.batch)
    return self.carry


def stepper(step: Callable[..., Any], carry: Any, batch: Any) -> Stepper:
  """Compiles `step(carry, *batch) -> carry`, its carry donated."""
  carry = jax.tree.map(lambda a: a.copy(), carry)
  begin = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(carry, *batch).compile()
  seconds = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  size = memory.argument_size_in_bytes + memory.output_size_in_bytes
  size += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  return Stepper(compiled, carry, batch, seconds, size)


def sgd(case: cases.Case) -> Stepper:
  """A step of SGD with momentum."""
  tx = optax.sgd(1e-2, momentum=0.9)

  def step(carry, x, y):
    params, state = carry
    _, grads = jax.value_and_grad(case.loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return stepper(step, (case.params, tx.init(case.params)), (case.x, case.y))


def ours(case: cases.Case, name: str, period: int, refresh: bool | None) -> Stepper:
  """A step of ours; `refresh=None` reads from the state whether it is due."""
  captured = fop_optax.capture(
    case.loss, case.params, case.x, case.y, groups=2 if name == "fop" else 1
  )
  tx = MAKERS[name](1e-3, captured.layers, damping=1e-2, curvature_update_period=period)

  def step(carry, x, y):
    params, state = carry
    due = fop_optax.refresh_due(state) if refresh is None else refresh
    _, grads, stats = captured.value_and_grad(params, x, y, refresh=due)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return stepper(step, (case.params, tx.init(case.params)), (case.x, case.y))


def floor(case: cases.Case, name: str, plain_flops: float, refreshes: float) -> float:
  """Counted FLOPs over those of a plain step, with so many refreshes a step (0, 1, 1 / period)."""
  flops = plain_flops
  layers = fop_optax.capture(case.loss, case.params, case.x, case.y).layers
  rows = (case.rows,) * len(layers) if isinstance(case.rows, int) else case.rows
  for layer, own in zip(layers, rows, strict=True):
    sides = [d for d, diagonal in zip(layer.dims, layer.diagonal, strict=True) if not diagonal]
    flops += PRODUCTS[name] * 2 * layer.rows * layer.outputs * sum(sides)
    flops += refreshes * sum(2 * len(case.x) * own * d**2 + d**3 for d in sides)
  return flops / plain_flops


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: a method's step of one kind on one network."""

  case: str
  method: str
  kind: str
  milliseconds: float
  ratio: float
  ratio_min: float
  ratio_max: float
  floor: float | None
  compile_ratio: float | None
  memory_ratio: float | None


def measure(name: str, config: Config) -> list[Row]:
  """All lines of one network."""
  case = cases.build(name)
  every = f"every {config.period}"
  steps_of = {
    "ordinary": ("ordinary", False, 0),
    "refresh": ("refresh", True, 1),
    "every": (every, None, 1 / config.period),
  }
  kinds: dict[str, bool | None] = {steps_of[kind][0]: steps_of[kind][1] for kind in config.kinds}
  shares = {steps_of[kind][0]: steps_of[kind][2] for kind in config.kinds}
  pairs = list(itertools.product(config.optimizers, kinds))
  with concurrent.futures.ThreadPoolExecutor(config.compile_threads) as pool:
    plain, *steppers = pool.map(
      lambda make: make(),
      [
        lambda: sgd(case),
        *(
          functools.partial(ours, case, optimizer, config.period, kinds[kind])
          for optimizer, kind in pairs
        ),
      ],
    )
  steps = dict(zip(pairs, steppers, strict=True))
  print(f"{name}, sgd: compiled in {plain.seconds:.0f} s", flush=True)
  for (optimizer, kind), step in steps.items():
    print(f"{name}, {optimizer}, {kind}: compiled in {step.seconds:.0f} s", flush=True)
  windows: dict[Any, timing.Window] = {key: step.window for key, step in steps.items()}
  windows |= {"sgd": plain.window}
  others: dict[Any, peers.KfacJax] = {}
  if config.kfac_jax:
    others["kfac_jax", f"{every}, statistics always"] = peers.KfacJax(case, config.period, 1)
    others["kfac_jax", every] = peers.KfacJax(case, config.period, config.period)
  windows |= {key: peer.window for key, peer in others.items()}
  seconds = timing.alternate(windows, config.period, config.rounds)
  plain_flops = plain.compiled.cost_analysis()["flops"]

  def row(key: Any, method: str, kind: str, *counted: float | None) -> Row:
    milliseconds = 1e3 * statistics.median(seconds[key])
    ratios = timing.ratio(seconds[key], seconds["sgd"])
    return Row(name, method, kind, milliseconds, *ratios, *counted)

  rows = [row("sgd", "sgd", "", 1.0, 1.0, 1.0)]
  for (optimizer, kind), step in steps.items():
    counted = floor(case, optimizer, plain_flops, shares[kind])
    compiling = step.seconds / plain.seconds if config.compile_threads == 1 else None
    memory = step.bytes / plain.bytes
    rows.append(row((optimizer, kind), optimizer, kind, counted, compiling, memory))
  return rows + [row(key, *key, None, None, None) for key in others]


def table(rows: list[Row]) -> Table:
  """The lines as a table."""
  out = Table(
    title=f"a step over one of SGD; {jax.devices()[0].device_kind}, jax {jax.__version__}"
  )
  for heading in (
    "network",
    "method",
    "step",
    "ms",
    "ratio",
    "range",
    "floor",
    "compile",
    "memory",
  ):
    out.add_column(heading, no_wrap=True)
  for case, group in itertools.groupby(rows, lambda row: row.case):
    for row in group:
      out.add_row(
        case,
        row.method,
        row.kind,
        f"{row.milliseconds:.1f}",
        f"{row.ratio:.2f}",
        f"{row.ratio_min:.2f} to {row.ratio_max:.2f}",
        *(
          "" if x is None else f"{x:.2f}" for x in (row.floor, row.compile_ratio, row.memory_ratio)
        ),
      )
    out.add_section()
  return out


def main(config: Config) -> None:
  console = Console() if sys.stdout.isatty() else Console(width=130)
  rows = []
  for name in config.cases:
    rows += measure(name, config)
    console.print(table([row for row in rows if row.case == name]))
  if config.out:
    console.print("saved", timing.save(rows, config.out))


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.step_cost"))
