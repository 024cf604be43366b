"""Seconds to trace, lower and compile a step of K-FAC and FOP, over those of AdamW.

    python -m experiments.benchmarks.compile_time [--networks vit-3 scanned-12] [--rounds 3]

K-FAC and FOP have their defaults, and their refresh is traced: one program for all steps. Programs
alternate, each of an empty cache. Seconds are of the processor, all threads of XLA's together,
which other work on the machine changes less than those of a clock; both are medians over the
rounds, and so is the ratio of each round. Beside them what the optimized HLO holds: conditionals,
loops, fusions, and how many of those are different and not of XLA's library of kernels. On CPU each
of these is a function that LLVM compiles, most of the seconds; equal ones are compiled once.

Networks are small, as the seconds hardly depend on sizes: those of `compile_cases`.
"""

from collections.abc import Callable
import dataclasses
import statistics
import time
from typing import Any, NamedTuple

import jax
import optax
from rich.console import Console
from rich.table import Table
import tyro

from experiments.benchmarks import compile_cases, hlo, step_cost
from experiments.benchmarks.cases import Case
import fop_optax

STAGES = ("trace", "lower", "compile")
Step = Callable[..., Any]  # carry, x, y -> carry


@dataclasses.dataclass(frozen=True)
class Config:
  """What to compile.

  Attributes:
    networks: of `compile_cases`; for 12 or 3 another number of blocks.
    optimizers: of adamw, kfac and fop; the first is what the others are divided by.
    rounds: compilations of each step.
  """

  networks: tuple[str, ...] = compile_cases.NETWORKS
  optimizers: tuple[str, ...] = ("adamw", "kfac", "fop")
  rounds: int = 3


class Seconds(NamedTuple):
  """Of one program: for each stage those of the processor, and all by the clock."""

  stages: tuple[float, ...]
  wall: float

  @property
  def total(self) -> float:
    return sum(self.stages)


class Compiled(NamedTuple):
  """One step, compiled several times."""

  seconds: list[Seconds]
  counts: hlo.Counts


def step_of(case: Case, name: str) -> tuple[Step, Any]:
  """A training step of an optimizer, and what it carries."""
  if name == "adamw":
    tx = optax.adamw(1e-3)

    def plain(carry, x, y):
      params, state = carry
      _, grads = jax.value_and_grad(case.loss)(params, x, y)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    return plain, (case.params, tx.init(case.params))
  groups = 2 if name == "fop" else 1
  captured = fop_optax.capture(case.loss, case.params, case.x, case.y, groups=groups)
  ours = step_cost.MAKERS[name](0.1, captured.layers)

  def step(carry, x, y):
    params, state = carry
    due = fop_optax.refresh_due(state)
    _, grads, stats = captured.value_and_grad(params, x, y, refresh=due)
    updates, state = ours.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step, (case.params, ours.init(case.params))


def compile_step(case: Case, name: str) -> tuple[Seconds, Any]:
  """The seconds that one step takes, and the compiled program."""
  step, carry = step_of(case, name)
  jax.clear_caches()
  stages, wall = [], time.perf_counter()
  made: Any = jax.jit(step, donate_argnums=0)
  advance = (lambda f: f.trace(carry, case.x, case.y), lambda f: f.lower(), lambda f: f.compile())
  for stage in advance:
    begin = time.process_time()
    made = stage(made)
    stages.append(time.process_time() - begin)
  return Seconds(tuple(stages), time.perf_counter() - wall), made


def measure(case: Case, optimizers: tuple[str, ...], rounds: int) -> dict[str, Compiled]:
  """Every optimizer's step, in turn."""
  found: dict[str, Compiled] = {}
  for _ in range(rounds):
    for name in optimizers:
      seconds, compiled = compile_step(case, name)
      if name not in found:
        found[name] = Compiled([], hlo.counts(compiled))
      found[name].seconds.append(seconds)
  return found


def main(config: Config) -> None:
  device = jax.devices()[0].device_kind
  table = Table(title=f"seconds of the processor; {device}, jax {jax.__version__}")
  headings = ("network", "step", *STAGES, "sum", "ratio", "by the clock", *hlo.Counts._fields)
  for heading in headings:
    table.add_column(heading, justify="left" if heading in ("network", "step") else "right")
  for network in config.networks:
    found = measure(compile_cases.build(network), config.optimizers, config.rounds)
    first = found[config.optimizers[0]].seconds
    for name, (seconds, counts) in found.items():
      median = lambda values: statistics.median(list(values))
      stages = [median(own.stages[i] for own in seconds) for i in range(len(STAGES))]
      ratio = median(a.total / b.total for a, b in zip(seconds, first, strict=True))
      table.add_row(
        network,
        name,
        *(f"{value:.2f}" for value in [*stages, median(own.total for own in seconds), ratio]),
        f"{median(own.wall for own in seconds):.1f}",
        *map(str, counts),
      )
    table.add_section()
  Console(width=130).print(table)


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.compile_time"))
