"""Defaults against tuned rivals, on workloads of many kinds.

    python -m experiments.benchmarks.defaults [--workloads mlp-digits lstm] [--seeds 3]

Every method takes the same steps on the same batches from the same parameters, with a cosine to
zero. AdamW and Muon are tuned: the best of four rates, by their mean final training loss. K-FAC,
FOP and what else is of this library are not: each has one set of defaults for all workloads, at a
third, once and three times the same rate. `--workloads held-out` takes fourteen of other kinds, by
which no rate was chosen, and that need no folder of data sets.
Writes `runs.csv` (a line a run), `table.md` and `losses.png` into `--out`; runs that are there
already are not made again: a sweep that was stopped goes on, and more seeds are added.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
import tyro

from experiments.benchmarks.defaults.methods import MARKED, METHODS, RATE, TABLE, Method
from experiments.benchmarks.defaults.results import LAST, Run, load, reported, save, table
from experiments.workloads import HELD_OUT, WORKLOADS, build
from experiments.workloads.base import Workload
import fop_optax


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run.

  Attributes:
    workloads: names in `experiments.workloads`; `held-out` is all of those that are held out.
    methods: names of optimizers; AdamW, by which the others are measured, always runs.
    seeds: runs at each rate.
    data_dir: folder of prepared data sets; None: as TFDS looks for it.
    out: folder for the results.
  """

  workloads: tuple[str, ...] = tuple(WORKLOADS)
  methods: tuple[str, ...] = tuple(TABLE)
  seeds: int = 3
  data_dir: str | None = None
  out: pathlib.Path = pathlib.Path("results/defaults")


def gradients(workload: Workload, method: Method) -> tuple[Any, Callable]:
  """Layers, and `(params, state, batch, key) -> loss, gradient, arguments of the update`."""
  if method.groups is None:

    def plain(params, state, batch, key):
      del state, key
      return *jax.value_and_grad(workload.loss)(params, *batch), {}

    return None, plain
  shapes = jax.eval_shape(lambda: workload.init(0))
  batch = next(workload.batches(0))
  captured = fop_optax.capture(
    workload.loss,
    shapes,
    *batch,
    groups=method.groups,
    fisher=method.fisher,
    sharing=method.sharing,
  )

  def with_statistics(params, state, batch, key):
    refresh = fop_optax.refresh_due(state)
    basis = fop_optax.bases(state) if method.eigenvalue else None
    loss, grads, stats = captured.value_and_grad(
      params, *batch, refresh=refresh, key=key, basis=basis
    )
    return loss, grads, {"stats": stats}

  return captured.layers, with_statistics


def run_all(
  workload: Workload, name: str, method: Method, wanted: Sequence[tuple[float, int]]
) -> Iterator[Run]:
  """One method on one workload at rates and seeds: one program for all of them."""
  if not wanted:
    return
  layers, gradient = gradients(workload, method)

  def optimizer(peak):
    schedule = optax.cosine_decay_schedule(peak, workload.steps)
    return optax.with_extra_args_support(method.make(schedule, layers))

  @jax.jit
  def step(peak, count, params, state, *batch):
    loss, grads, extra = gradient(params, state, batch, jax.random.key(count))
    updates, state = optimizer(peak).update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, loss

  init = jax.jit(lambda params: optimizer(RATE).init(params))
  validate = jax.jit(workload.loss)
  held_out = workload.held_out()
  warm = workload.init(0)
  jax.block_until_ready(step(0.1, 0, warm, init(warm), *next(workload.batches(0))))
  for rate, seed in wanted:
    params = workload.init(seed)
    state, losses = init(params), []
    start = time.perf_counter()
    for count, batch in enumerate(workload.batches(seed)):
      params, state, loss = step(rate, count, params, state, *batch)
      losses.append(loss)
    curve = np.array(jax.block_until_ready(losses), np.float64)
    seconds = time.perf_counter() - start
    validation = float(validate(params, *held_out))
    final = float(np.mean(curve[-LAST:]))
    yield Run(workload.name, name, rate, seed, final, validation, seconds, curve)


def fits(workload: Workload, method: Method) -> bool:
  """Whether the method can run there: its groups meet, its Fisher matrix is marked."""
  meets = not workload.interacting or (method.groups or 0) <= 1
  return meets and (workload.marked or method.fisher not in MARKED)


def main(config: Config) -> None:
  console = Console(width=120)
  workloads = _named(config.workloads)
  unknown = set(config.methods) - set(METHODS) or set(workloads) - {*WORKLOADS, *HELD_OUT}
  if unknown:
    raise SystemExit(
      f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join(METHODS)}; workloads are"
      f" {', '.join(WORKLOADS)}, and held-out, which are {', '.join(HELD_OUT)}"
    )
  names = dict.fromkeys(("AdamW", *config.methods))  # what the others are measured by
  runs = {run.key: run for run in load(config.out)}
  for workload_name in workloads:
    workload = build(workload_name, config.data_dir)
    for name, method in ((name, METHODS[name]) for name in names):
      if not fits(workload, method):
        continue
      asked = [(rate, seed) for rate in method.rates for seed in range(config.seeds)]
      missing = [at for at in asked if (workload.name, name, *at) not in runs]
      for run in run_all(workload, name, method, missing):
        runs[run.key] = run
      console.print(_line([runs[workload.name, name, *at] for at in asked]), soft_wrap=True)
    save(list(runs.values()), config.out)  # after each workload: a long run may be cut short
  console.print(table(list(runs.values())))


def _named(workloads: Sequence[str]) -> list[str]:
  """With all of their names for `held-out`, each once."""
  groups = (HELD_OUT if name == "held-out" else (name,) for name in workloads)
  return list(dict.fromkeys(name for group in groups for name in group))


def _line(runs: Sequence[Run]) -> str:
  """How one method did on one workload."""
  chosen = reported(runs)
  mean = lambda field: np.mean([getattr(run, field) for run in chosen])
  return (
    f"{chosen[0].workload:20} {chosen[0].method:24} rate {chosen[0].rate:<6.3g} training"
    f" {mean('train'):<9.4g} validation {mean('validation'):<9.4g} {mean('seconds'):.1f} s,"
    f" diverged {sum(run.diverged for run in runs)} of {len(runs)}"
  )


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.defaults"))
