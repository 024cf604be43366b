"""What a comparison leaves behind: a table, CSV, JSON and a plot."""

from collections.abc import Sequence
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import statistics
import subprocess
from typing import Any

from rich.table import Table

from experiments import optimizers
from experiments.configs import Compare
from experiments.train import Row

# Okabe and Ito's colours, told apart in the common forms of colour blindness; with line styles.
STYLES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."), ("#D55E00", (0, (4, 1))))
PACKAGES = ("fop_optax", "jax", "jaxlib", "optax", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class Summary:
  """The runs of one optimizer. Lists have one entry a seed; None: the target was not reached."""

  optimizer: str
  epochs_to_target: list[int | None]
  seconds_to_target: list[float | None]
  final_accuracy: list[float]
  seconds_per_epoch: float  # median over seeds of the mean epoch


def summarize(rows: Sequence[Row], target: float) -> list[Summary]:
  """One `Summary` an optimizer, in the order of their first rows."""
  runs: dict[str, dict[int, list[Row]]] = {}
  for row in rows:
    runs.setdefault(row.optimizer, {}).setdefault(row.seed, []).append(row)
  summaries = []
  for name, by_seed in runs.items():
    first = [next((r for r in run if r.test_accuracy >= target), None) for run in by_seed.values()]
    last = [run[-1] for run in by_seed.values()]
    summaries.append(
      Summary(
        name,
        [r and r.epoch for r in first],
        [r and r.seconds for r in first],
        [r.test_accuracy for r in last],
        statistics.median(r.seconds / r.epoch for r in last),
      )
    )
  return summaries


def spread(values: Sequence[float], digits: int) -> str:
  """Mean and sample standard deviation, the latter where there is more than one value."""
  text = f"{statistics.fmean(values):.{digits}f}"
  if len(values) > 1:
    text += f" ± {statistics.stdev(values):.{digits}f}"
  return text


def reached(values: Sequence[float | None], digits: int) -> str:
  """`spread` if every run got there; else only how many did, as a mean of those would flatter."""
  there = [value for value in values if value is not None]
  if len(there) == len(values):
    return spread(there, digits)
  return f"– ({len(there)}/{len(values)} reached)"


def table(summaries: Sequence[Summary], config: Compare) -> Table:
  """The comparison as a table."""
  share = f"{100 * config.target:g} %"
  out = Table(
    title=f"{config.dataset}, MLP {'-'.join(map(str, config.hidden))}, batch {config.batch_size},"
    f" {config.epochs} epochs, {config.seeds} seed{'s' * (config.seeds != 1)}",
    caption="mean ± standard deviation over seeds; seconds of training, without compilation and"
    " evaluation",
  )
  out.add_column("optimizer")
  for heading in (
    f"epochs to {share}",
    f"seconds to {share}",
    "ms / epoch",
    "final test accuracy, %",
  ):
    out.add_column(heading, justify="right")
  for s in summaries:
    out.add_row(
      optimizers.TABLE[s.optimizer].title,
      reached(s.epochs_to_target, 1),
      reached(s.seconds_to_target, 3),
      f"{1000 * s.seconds_per_epoch:.1f}",
      spread([100 * a for a in s.final_accuracy], 2),
    )
  return out


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on."""
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"
  return {"python": platform.python_version(), **found}


def commit() -> str | None:
  """The commit of the checkout, marked `-dirty` where files differ from it; None outside git."""
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


def save(
  folder: pathlib.Path,
  rows: Sequence[Row],
  summaries: Sequence[Summary],
  config: Compare,
  **more: Any,
) -> list[pathlib.Path]:
  """Writes `curves.csv` (a line an epoch), `summary.json` and `curves.png` into `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  curves, summary, plot = (folder / name for name in ("curves.csv", "summary.json", "curves.png"))
  with curves.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(Row._fields)
    writer.writerows(rows)
  document = {
    "config": dataclasses.asdict(config),
    "seeds": list(range(config.first_seed, config.first_seed + config.seeds)),
    "results": [dataclasses.asdict(s) for s in summaries],
    "versions": versions(),
    "commit": commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    **more,
  }
  summary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
  draw(plot, rows, config)
  return [curves, summary, plot]


def draw(path: pathlib.Path, rows: Sequence[Row], config: Compare) -> None:
  """Test accuracy by epoch and by seconds (median of the seeds): mean of the seeds, and range."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  import numpy as np

  figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
  names = list(dict.fromkeys(row.optimizer for row in rows))
  lowest = []
  for index, name in enumerate(names):
    colour, dashes = STYLES[index % len(STYLES)]
    runs = np.array(
      [(r.seed, r.epoch, r.seconds, 100 * r.test_accuracy) for r in rows if r.optimizer == name]
    )
    runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))].reshape(-1, config.epochs, 4)
    epochs, seconds, accuracy = runs[0, :, 1], np.median(runs[:, :, 2], 0), runs[:, :, 3]
    lowest.append(accuracy.mean(0)[len(epochs) // 4])
    for axis, x in zip(axes, (epochs, seconds), strict=True):
      axis.plot(
        x, accuracy.mean(0), color=colour, linestyle=dashes, linewidth=1.8,
        label=optimizers.TABLE[name].title,
      )  # fmt: skip
      axis.fill_between(x, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.15, linewidth=0)
  for axis, label in zip(
    axes, ("epoch", "seconds of training (no compilation, no evaluation)"), strict=True
  ):
    axis.axhline(100 * config.target, color="0.4", linestyle=":", linewidth=1)
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].set_xlim(left=0)
  axes[1].set_xscale("log")  # the cost of a step differs several times between methods
  target = 100 * config.target
  top = max(target, *(100 * r.test_accuracy for r in rows))
  # From the first quarter on every mean curve is in sight, and the target is never at the edge.
  axes[0].set_ylim(min(*lowest, target - 5) - 1, min(100.0, top + 1))
  axes[0].set_ylabel("test accuracy, %")
  axes[0].legend(loc="lower right", frameon=False)
  figure.suptitle(
    f"{config.dataset}, MLP, batch {config.batch_size}: mean and range of {config.seeds} seeds"
  )
  figure.savefig(path, dpi=150)
  plt.close(figure)
