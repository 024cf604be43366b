"""What the runs of the sweep say: their file, the table, the picture."""

from collections.abc import Sequence
import csv
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.benchmarks.defaults.methods import METHODS

LAST = 8  # steps whose mean loss is the final training loss


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
  def key(self) -> tuple[str, str, float, int]:
    return self.workload, self.method, self.rate, self.seed

  @property
  def diverged(self) -> bool:
    return not np.isfinite(self.train) or self.train > self.curve[0]

  def steps_to(self, loss: float) -> float:
    """The first step whose mean over the last steps is at most `loss`, else infinity."""
    smooth = np.convolve(self.curve, np.full(LAST, 1 / LAST), mode="valid")
    there = np.flatnonzero(smooth <= loss)
    return float(there[0] + LAST) if len(there) else float("inf")


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


COLUMNS = (*Run._fields[:-1], "diverged", "curve")


def save(runs: Sequence[Run], out: pathlib.Path) -> None:
  """Writes `runs.csv`, `table.md` and `losses.png`."""
  out.mkdir(parents=True, exist_ok=True)
  with (out / "runs.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for run in runs:
      curve = " ".join(f"{loss:.5g}" for loss in run.curve)
      numbers = (f"{run.rate:.5g}", run.seed, f"{run.train:.6g}", f"{run.validation:.6g}")
      writer.writerow(
        [run.workload, run.method, *numbers, f"{run.seconds:.3f}", run.diverged, curve]
      )
  (out / "table.md").write_text(table(runs), encoding="utf-8")
  draw(out / "losses.png", runs)


def load(out: pathlib.Path) -> list[Run]:
  """The runs that `save` wrote, if it did; rates are those of their methods."""
  path = out / "runs.csv"
  if not path.exists():
    return []
  with path.open(newline="", encoding="utf-8") as file:
    return [_run(row) for row in csv.DictReader(file)]


def _run(row: dict[str, str]) -> Run:
  rates = METHODS[row["method"]].rates if row.get("method") in METHODS else ()
  written = float(row.get("rate", "nan"))  # with five digits
  same = [rate for rate in rates if abs(rate - written) < 1e-4 * rate]
  if set(row) != set(COLUMNS) or not same:
    raise SystemExit(f"This `runs.csv` is of another version: choose another --out. Line: {row}")
  numbers = (float(row[field]) for field in ("train", "validation", "seconds"))
  curve = np.array(row["curve"].split(), np.float64)
  return Run(row["workload"], row["method"], same[0], int(row["seed"]), *numbers, curve)


def draw(path: pathlib.Path, runs: Sequence[Run]) -> None:
  """Training loss by step of every method on every workload, mean of the seeds.

  Of long trainings it is the mean of the last fiftieth of the steps.
  """
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
    finite = []
    for index, name in enumerate(methods):
      own = [run for run in runs if (run.workload, run.method) == (workload, name)]
      if not own:
        continue
      chosen = reported(own)
      finite += [run.curve for run in chosen if not run.diverged]
      curve = np.mean([run.curve for run in chosen], axis=0)
      window = len(curve) // 50 if len(curve) > 200 else 1
      smooth = np.convolve(curve, np.full(window, 1 / window), mode="valid")
      axis.plot(
        window + np.arange(len(smooth)), smooth, color=colours(index), linewidth=1.3, label=name
      )
    low = min((curve.min() for curve in finite), default=np.nan)
    # A loss whose target moves may stay above its start.
    high = max((max(curve[0], np.quantile(curve, 0.9)) for curve in finite), default=np.nan)
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
