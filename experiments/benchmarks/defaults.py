"""Defaults against tuned rivals, on workloads of many kinds.

    python -m experiments.benchmarks.defaults [--workloads mlp-digits lstm] [--seeds 3]

Every method takes the same steps on the same batches from the same parameters, with a cosine to
zero. AdamW and Muon are tuned: the best of four rates, by their mean final training loss. K-FAC,
FOP and what else is of this library are not: each has one set of defaults for all workloads, at a
third, once and three times the same rate.
Writes `runs.csv` (a line a run), `table.md` and `losses.png` into `--out`.
"""

from collections.abc import Callable, Iterator, Sequence
import csv
import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
import tyro

from experiments.workloads import WORKLOADS
from experiments.workloads.base import Workload
import fop_optax

RATE = 0.1  # of K-FAC and FOP
ADAM_RATE = 0.03  # of methods whose steps are of the size of Adam's
FALLING = optax.exponential_decay(0.3, 20, 1 / 3, end_value=0.1)  # a bound that is loose at first
LAST = 8  # steps whose mean loss is the final training loss


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run.

  Attributes:
    workloads: names in `experiments.workloads`.
    methods: names of optimizers; AdamW, by which the others are measured, always runs.
    seeds: runs at each rate.
    data_dir: folder of prepared data sets; None: as TFDS looks for it.
    out: folder for the results.
  """

  workloads: tuple[str, ...] = tuple(WORKLOADS)
  methods: tuple[str, ...] = ("AdamW", "Muon", "K-FAC", "FOP")
  seeds: int = 3
  data_dir: str | None = None
  out: pathlib.Path = pathlib.Path("results/defaults")


class Method(NamedTuple):
  """An optimizer of the sweep.

  Attributes:
    make: rate schedule, layers -> optimizer.
    rates: peaks of the schedule; of a method that is not tuned the second is the one that counts.
    groups: of examples, as `fop_optax.capture` takes them; None: no capture.
    fisher: as `fop_optax.capture` takes it.
    sharing: likewise.
    eigenvalue: whether it takes the second moments of examples' gradients (EKFAC).
    tuned: whether the best rate counts, workload by workload.
  """

  make: Callable[[optax.Schedule, Any], optax.GradientTransformation]
  rates: tuple[float, ...]
  groups: int | None = None
  fisher: str = "empirical"
  sharing: str = "expand"
  eigenvalue: bool = False
  tuned: bool = False


def _around(rate: float) -> tuple[float, ...]:
  return rate / 3, rate, 3 * rate


def _kfac(fisher="empirical", sharing="expand", **options):
  make = lambda rate, layers: fop_optax.kfac(rate, layers, **options)
  eigenvalue = options.get("scaling") == "eigenvalue"
  return Method(make, _around(RATE), 1, fisher, sharing, eigenvalue)


def _then_polar(direction, groups=None):
  """The polar factor of what `direction(layers)` makes; momentum is `direction`'s."""

  def make(schedule, layers):
    polar = fop_optax.orthogonalize(layers=layers)
    return optax.chain(direction(layers), polar, optax.scale_by_learning_rate(schedule))

  return Method(make, _around(RATE), groups=groups)


def _kfac_direction(layers):
  kfac = fop_optax.scale_by_kfac(layers, relative_damping=1e-2)
  return optax.chain(kfac, optax.trace(0.9))


def _gradient_only(optimizer, rate=ADAM_RATE, **options):
  return Method(lambda schedule, _: optimizer(schedule, **options), _around(rate))


TABLE = {
  "AdamW": Method(lambda rate, _: optax.adamw(rate), (3e-3, 1e-2, 3e-2, 1e-1), tuned=True),
  "Muon": Method(lambda rate, _: optax.contrib.muon(rate), (1e-2, 3e-2, 1e-1, 3e-1), tuned=True),
  "K-FAC": _kfac(),
  "FOP": Method(lambda rate, layers: fop_optax.fop(rate, layers), _around(RATE), groups=2),
}
OTHERS = {
  "SOAP": _gradient_only(fop_optax.soap),
  "SOAP every step": _gradient_only(fop_optax.soap, inverse_update_period=1),
  "KL-SOAP": _gradient_only(fop_optax.soap, kl=True, correct_bias=False),
  "Shampoo": _gradient_only(fop_optax.shampoo),
  "EKFAC": _kfac(scaling="eigenvalue"),
  "K-FAC then polar": _then_polar(_kfac_direction, groups=1),
  "SOAP then polar": _then_polar(lambda _: fop_optax.scale_by_soap(inverse_update_period=1)),
  "Neumann": _gradient_only(fop_optax.neumann, rate=0.1, steps_per_epoch=1),
}
# What the defaults were chosen from, and what else is on offer: the model's own Fisher in place of
# the empirical one, the rows of an example added up.
VARIANTS = {
  "K-FAC damping 0.1": _kfac(relative_damping=0.1),
  "K-FAC damping 0.3": _kfac(relative_damping=0.3),
  "K-FAC constraint 0.03": _kfac(norm_constraint=0.03),
  "K-FAC constraint 0.3": _kfac(norm_constraint=0.3),
  "K-FAC constraint falling": _kfac(norm_constraint=FALLING),
  "K-FAC decay 0.1": _kfac(weight_decay=0.1),
  "K-FAC every step": _kfac(curvature_update_period=1),
  "K-FAC every 10": _kfac(curvature_update_period=10),
  "K-FAC sampled": _kfac("sampled"),
  "K-FAC sampled every step": _kfac("sampled", curvature_update_period=1),
  "K-FAC sampled every 10": _kfac("sampled", curvature_update_period=10),
  "K-FAC reduce": _kfac(sharing="reduce"),
}
METHODS = TABLE | OTHERS | VARIANTS
MARKED = "sampled", "exact"  # values of `fisher` that need a marked loss


class Run(NamedTuple):
  """One run; `curve` is the training loss of every step."""

  workload: str
  method: str
  rate: float
  seed: int
  train: float  # mean of the last steps' losses
  validation: float
  seconds: float  # of all steps, without compilation
  curve: np.ndarray

  @property
  def diverged(self) -> bool:
    return not np.isfinite(self.train) or self.train > self.curve[0]

  def steps_to(self, loss: float) -> float:
    """The first step whose mean over the last steps is at most `loss`, else infinity."""
    smooth = np.convolve(self.curve, np.full(LAST, 1 / LAST), mode="valid")
    there = np.flatnonzero(smooth <= loss)
    return float(there[0] + LAST) if len(there) else float("inf")


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


def run_all(workload: Workload, name: str, method: Method, seeds: int) -> Iterator[Run]:
  """All runs of one method on one workload: one program for all rates and seeds."""
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
  for rate in method.rates:
    for seed in range(seeds):
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


def best(runs: Sequence[Run]) -> list[Run]:
  """The runs at the rate whose mean final training loss is lowest, of the one method in `runs`."""
  by_rate = {r.rate: [run for run in runs if run.rate == r.rate] for r in runs}
  loss = lambda runs: np.mean([np.inf if run.diverged else run.train for run in runs])
  return min(by_rate.values(), key=loss)


def reported(runs: Sequence[Run]) -> list[Run]:
  """Of the one method in `runs`, those that count: at its best rate, or at its own if not tuned."""
  method = METHODS[runs[0].method]
  return best(runs) if method.tuned else [run for run in runs if run.rate == method.rates[1]]


class Standing(NamedTuple):
  """How one method did on one workload, against AdamW at its best rate."""

  runs: list[Run]  # as `reported`
  steps: float  # to AdamW's final loss, over all steps; median of the seeds
  seconds: float  # to it, over AdamW's
  progress: list[float]  # of each seed, towards AdamW's final loss: 1 is as far

  @property
  def train(self) -> float:
    return float(np.mean([run.train for run in self.runs]))

  @property
  def validation(self) -> float:
    return float(np.mean([run.validation for run in self.runs]))


def standing(runs: Sequence[Run], adamw: Sequence[Run]) -> Standing:
  """`runs` of one method on one workload, `adamw` those at AdamW's best rate."""
  chosen = reported(runs)
  pairs = [(run, rival) for run in chosen for rival in adamw if run.seed == rival.seed]
  steps = np.median([run.steps_to(rival.train) / len(run.curve) for run, rival in pairs])
  cost = np.median([run.seconds / rival.seconds for run, rival in pairs])
  progress = [
    float((run.curve[0] - run.train) / (rival.curve[0] - rival.train)) for run, rival in pairs
  ]
  return Standing(chosen, float(steps), float(steps * cost), progress)


Standings = dict[str, dict[str, Standing]]  # workload -> method -> how it did


def standings(runs: Sequence[Run]) -> Standings:
  """How every method did on every workload."""
  grouped: dict[str, dict[str, list[Run]]] = {}
  for run in runs:
    grouped.setdefault(run.workload, {}).setdefault(run.method, []).append(run)
  return {
    workload: {name: standing(own, best(of["AdamW"])) for name, own in of.items()}
    for workload, of in grouped.items()
  }


def table(runs: Sequence[Run]) -> str:
  """Markdown: final losses of all methods, and steps and seconds to AdamW's."""
  names = list(dict.fromkeys(run.method for run in runs))
  ours = [name for name in names if not METHODS[name].tuned]
  heads = [
    "workload",
    *(f"{name}, training" for name in names),
    "validation: " + ", ".join(names),
    "steps to AdamW's loss: " + ", ".join(ours),
    "seconds: " + ", ".join(ours),
  ]
  lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
  everything = standings(runs)
  for workload, stands in everything.items():
    own = [run for run in runs if run.workload == workload]
    trained = [_training([run for run in own if run.method == name]) for name in names]
    of = {field: [] for field in ("validation", "steps", "seconds")}
    for field, values in of.items():
      for name in names if field == "validation" else ours:
        values.append(f"{getattr(stands[name], field):.3g}" if name in stands else "–")
    lines.append("| " + " | ".join([workload, *trained, *map(", ".join, of.values())]) + " |")
  return "\n".join([*lines, "", *summary(runs, everything)]) + "\n"


def _training(runs: Sequence[Run]) -> str:
  """The mean final training loss of one method: at its best rate, or at each."""
  if not runs:
    return "–"
  if METHODS[runs[0].method].tuned:
    chosen = best(runs)
    return f"{np.mean([run.train for run in chosen]):.4g} at {chosen[0].rate:g}"
  rates = METHODS[runs[0].method].rates
  means = [np.mean([run.train for run in runs if run.rate == rate]) for rate in rates]
  return ", ".join(f"{mean:.4g}" for mean in means)


def summary(runs: Sequence[Run], everything: Standings) -> list[str]:
  """What holds over all workloads, a line each."""
  lines = []
  for name in dict.fromkeys(run.method for run in runs if not METHODS[run.method].tuned):
    own = [run for run in runs if run.method == name]
    pairs = [(of[name], of) for of in everything.values() if name in of]
    lines.append(
      f"- {name}: {sum(run.diverged for run in own)} of {len(own)} runs diverged."
      f" {_ahead(pairs)}. Steps to AdamW's final loss, median:"
      f" {np.median([mine.steps for mine, _ in pairs]):.2f} of AdamW's; seconds"
      f" {np.median([mine.seconds for mine, _ in pairs]):.2f}."
    )
  return lines + _difference(everything)


def _ahead(pairs: Sequence[tuple[Standing, dict[str, Standing]]]) -> str:
  """On how many workloads a method is not above its rivals."""
  parts = []
  for field, loss in (("train", "training"), ("validation", "validation")):
    for rival in [name for name in ("AdamW", "Muon") if name in pairs[0][1]]:
      count = sum(getattr(mine, field) <= getattr(of[rival], field) for mine, of in pairs)
      parts.append(f"{rival}'s {loss} loss on {count}")
  return f"Of {len(pairs)} workloads it is not above " + ", ".join(parts)


def _difference(everything: Standings) -> list[str]:
  """FOP against K-FAC, with an interval."""
  both = [of for of in everything.values() if "K-FAC" in of and "FOP" in of]
  gaps = [np.mean(of["FOP"].progress) - np.mean(of["K-FAC"].progress) for of in both]
  if len(gaps) < 2:
    return []
  half = 1.96 * np.std(gaps, ddof=1) / len(gaps) ** 0.5
  return [
    "- FOP against K-FAC: progress from the first training loss towards AdamW's last (1: as far)"
    f" differs by {np.mean(gaps):+.4f} ± {half:.4f} (95 % over {len(gaps)} workloads)."
  ]


def save(runs: Sequence[Run], config: Config) -> None:
  """Writes `runs.csv`, `table.md` and `losses.png`."""
  config.out.mkdir(parents=True, exist_ok=True)
  with (config.out / "runs.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow([*Run._fields[:-1], "diverged", "curve"])
    for run in runs:
      curve = " ".join(f"{loss:.5g}" for loss in run.curve)
      numbers = (f"{run.rate:.5g}", run.seed, f"{run.train:.6g}", f"{run.validation:.6g}")
      writer.writerow(
        [run.workload, run.method, *numbers, f"{run.seconds:.3f}", run.diverged, curve]
      )
  (config.out / "table.md").write_text(table(runs), encoding="utf-8")
  draw(config.out / "losses.png", runs)


def draw(path: pathlib.Path, runs: Sequence[Run]) -> None:
  """Training loss by step of every method on every workload, mean of the seeds."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  names = list(dict.fromkeys(run.workload for run in runs))
  methods = list(dict.fromkeys(run.method for run in runs))
  colours = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20")
  columns = min(4, len(names))
  rows = -(-len(names) // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False, layout="constrained"
  )
  for axis, workload in zip(axes.flat, names, strict=False):
    for index, name in enumerate(methods):
      own = [run for run in runs if (run.workload, run.method) == (workload, name)]
      if not own:
        continue
      curve = np.mean([run.curve for run in reported(own)], axis=0)
      steps = 1 + np.arange(len(curve))
      axis.plot(steps, curve, color=colours(index), linewidth=1.3, label=name)
    finite = [run.curve for run in runs if run.workload == workload and not run.diverged]
    low = min((curve.min() for curve in finite), default=np.nan)
    high = max((curve[0] for curve in finite), default=np.nan)
    if not finite:
      axis.text(0.5, 0.5, "all runs diverged", transform=axis.transAxes, ha="center")
    elif low >= 0:
      axis.set_yscale("log")
      least = min(curve[curve > 0].min() for curve in finite)
      axis.set_ylim(max(0.8 * least, 1e-6 * high), 1.3 * high)
    else:
      axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.set_title(workload, fontsize=10)
    axis.grid(alpha=0.25)
  for axis in axes.flat[len(names) :]:
    axis.set_visible(False)
  lines, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(lines, labels, loc="outside upper center", ncols=6, fontsize=8, frameon=False)
  figure.supxlabel("step")
  figure.supylabel("training loss")
  figure.savefig(path, dpi=130)
  plt.close(figure)


def main(config: Config) -> None:
  console = Console(width=120)
  if unknown := set(config.methods) - set(METHODS) or set(config.workloads) - set(WORKLOADS):
    raise SystemExit(
      f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join(METHODS)}; workloads are"
      f" {', '.join(WORKLOADS)}"
    )
  names = dict.fromkeys(("AdamW", *config.methods))  # what the others are measured by
  runs: list[Run] = []
  for workload_name in config.workloads:
    workload = WORKLOADS[workload_name](config.data_dir)
    for name in names:
      method = METHODS[name]
      if workload.interacting and (method.groups or 0) > 1:
        continue  # examples of different groups would not meet
      if method.fisher in MARKED and not workload.marked:
        continue
      own = list(run_all(workload, name, method, config.seeds))
      runs += own
      console.print(_line(workload_name, name, own))
    save(runs, config)  # after each workload: a long run may be cut short
  console.print((config.out / "table.md").read_text(encoding="utf-8"))


def _line(workload: str, name: str, runs: Sequence[Run]) -> str:
  chosen = reported(runs)
  mean = lambda field: np.mean([getattr(run, field) for run in chosen])
  return (
    f"{workload:20} {name:24} rate {chosen[0].rate:<6.3g} training {mean('train'):<9.4g}"
    f" validation {mean('validation'):<9.4g} {mean('seconds'):.1f} s, diverged"
    f" {sum(run.diverged for run in runs)} of {len(runs)}"
  )


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.defaults"))
