"""What a comparison leaves behind: tables of runs and of optimizers, CSV, JSON and a plot."""

from collections.abc import Iterable, Sequence
import dataclasses
import datetime
import json
import math
import pathlib
from typing import Any

import pandas as pd
from rich.table import Table
from scipy import stats

from experiments import optimizers
from experiments.configs import Config
from experiments.runs import Row, commit, hardware, versions

# Okabe and Ito's colours, told apart in the common forms of colour blindness; with line styles.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
DASHES = ("-", "--", "-.", (0, (4, 1)), ":", (0, (6, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
Target = tuple[str, float]  # "test_accuracy" or "test_loss", and its value
RUN = ["batch_size", "optimizer", "seed"]
TO_TARGET = ["epochs", "steps", "seconds"]
ENDS = ["test_accuracy", "test_loss"]


def curves(rows: Iterable[Row]) -> pd.DataFrame:
  """A line an epoch."""
  return pd.DataFrame(rows, columns=list(Row._fields))


def arrived(epochs: pd.DataFrame, target: Target) -> pd.Series:
  """Which epochs are at the target or beyond."""
  metric, value = target
  return epochs[metric] <= value if metric == "test_loss" else epochs[metric] >= value


def outcomes(epochs: pd.DataFrame, target: Target) -> pd.DataFrame:
  """A line a run: what it took to the target (NaN where it did not get there), how it ended."""
  last = epochs.groupby(RUN, sort=False).last().reset_index()
  there = epochs[arrived(epochs, target)].groupby(RUN, sort=False).first().reset_index()
  names = {"epoch": "epochs", "step": "steps"}
  there = there.rename(columns=names)[[*RUN, *TO_TARGET]]
  last["seconds_per_epoch"] = last.seconds / last.epoch
  ends = last[[*RUN, *ENDS, "train_loss", "seconds_per_epoch"]]
  return ends.merge(there, on=RUN, how="left")


def summarize(runs: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
  """A line an optimizer and batch size.

  Means of what it took are NaN if one run did not get there: a mean of the others would flatter.
  `speed_up` is the seconds to the target of the optimizer `reference` over its own.
  """
  lines = []
  for (size, name), own in runs.groupby(RUN[:2], sort=False):
    line = {"batch_size": size, "optimizer": name, "n": len(own)}
    line["reached"] = int(own.epochs.notna().sum())
    line["seconds_per_epoch"] = own.seconds_per_epoch.median()
    for column in [*TO_TARGET, *ENDS]:
      line[column] = own[column].mean(skipna=False)
      line[f"{column}_std"] = own[column].std(skipna=False)
    lines.append(line)
  out = pd.DataFrame(lines)
  by_size = out[out.optimizer == reference].set_index("batch_size").seconds
  out["speed_up"] = out.batch_size.map(by_size) / out.seconds
  return out


def interval(mean: float, std: float, n: int) -> tuple[float, float]:
  """The 95 % confidence interval of a mean, by Student's t; NaN of less than three runs."""
  if n < 3 or not math.isfinite(std):
    return math.nan, math.nan
  half = stats.t.ppf(0.975, n - 1) * std / math.sqrt(n)
  return mean - half, mean + half


def spread(mean: float, std: float, digits: int) -> str:
  """Mean and sample standard deviation, the latter where there is more than one value."""
  text = f"{mean:.{digits}f}"
  return text if math.isnan(std) else f"{text} ± {std:.{digits}f}"


def reached(line: Any, column: str, digits: int) -> str:
  """What it took to the target; or how many runs got there, if not all did."""
  if line.reached < line.n:
    return f"– ({line.reached}/{line.n} reached)"
  return spread(getattr(line, column), getattr(line, f"{column}_std"), digits)


def target_of(config: Config) -> Target:
  return config.metric, config.target


def words(target: Target) -> str:
  """The target in a heading."""
  metric, value = target
  return f"loss {value:g}" if metric == "test_loss" else f"{100 * value:g} %"


def cells(summary: pd.DataFrame, target: Target) -> tuple[list[str], list[list[str]]]:
  """Headings and text of the table: sizes of a batch only where there are several."""
  share, by_loss = words(target), target[0] == "test_loss"
  several = summary.batch_size.nunique() > 1
  headings = [
    *(["batch"] if several else []),
    "optimizer",
    f"epochs to {share}",
    f"seconds to {share}",
    "ms / epoch",
    "final test loss" if by_loss else "final test accuracy, %",
  ]
  rows = []
  for line in summary.itertuples():
    rows.append([
      *([f"{line.batch_size:,}"] if several else []),
      optimizers.TABLE[line.optimizer].title,
      reached(line, "epochs", 1),
      reached(line, "seconds", 3),
      f"{1000 * line.seconds_per_epoch:.1f}",
      final(line, by_loss),
    ])  # fmt: skip
  return headings, rows


def final(line: Any, by_loss: bool) -> str:
  if by_loss:
    return spread(line.test_loss, line.test_loss_std, 4)
  return spread(100 * line.test_accuracy, 100 * line.test_accuracy_std, 2)


def table(summary: pd.DataFrame, config: Config) -> Table:
  """The comparison as a table."""
  sizes = "" if summary.batch_size.nunique() > 1 else f" batch {summary.batch_size.iloc[0]},"
  seeds = f"{config.seeds} seed{'s' * (config.seeds != 1)}"
  out = Table(
    title=f"{config.dataset}, {config.model.title},{sizes} {config.epochs} epochs, {seeds}",
    caption="mean ± standard deviation over seeds; seconds of training, without compilation and"
    " evaluation",
  )
  headings, rows = cells(summary, target_of(config))
  for heading in headings:
    out.add_column(heading, justify="left" if heading == "optimizer" else "right")
  for row in rows:
    out.add_row(*row)
  return out


# Of a trial: epochs to the target (one beyond the budget where it is not reached), how it ended
# (less is better), its values, its line of `summarize`.
Trial = tuple[float, float, dict[str, float], Any]


def trials_table(ranked: dict[str, list[Trial]], config: Config, title: str) -> Table:
  """The trials of a search, the best first."""
  out = Table(title=title)
  for heading in ("optimizer", "values", "epochs to target", "final loss", "final"):
    out.add_column(heading, no_wrap=True)
  for name, trials in ranked.items():
    for _, _, values, line in trials:
      out.add_row(
        name,
        " ".join(f"{key}={value:g}" for key, value in values.items()),
        reached(line, "epochs", 1),
        f"{line.test_loss:.4f}",
        final(line, config.metric == "test_loss"),
      )
    out.add_section()
  return out


def save_trials(
  folder: pathlib.Path, ranked: dict[str, list[Trial]], config: Config
) -> list[pathlib.Path]:
  """Writes all trials of each optimizer, the best first, as `OPTIMIZER-batch-SIZE.csv`."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for name, trials in ranked.items():
    lines = [
      {**values, **{key: getattr(line, key) for key in ("n", "reached", *TO_TARGET, *ENDS)}}
      for _, _, values, line in trials
    ]
    paths.append(folder / f"{name}-batch-{config.batch_size}.csv")
    pd.DataFrame(lines).to_csv(paths[-1], index=False)
  return paths


def save(
  folder: pathlib.Path, epochs: pd.DataFrame, summary: pd.DataFrame, config: Config, **more: Any
) -> list[pathlib.Path]:
  """Writes `curves.csv` (a line an epoch), `summary.json` and `curves.png` into `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  lines, document, plot = (folder / name for name in ("curves.csv", "summary.json", "curves.png"))
  epochs.to_csv(lines, index=False)
  content = {
    "config": dataclasses.asdict(config),
    "seeds": list(range(config.first_seed, config.first_seed + config.seeds)),
    "results": json.loads(summary.to_json(orient="records")),
    "versions": versions(),
    "hardware": hardware(),
    "commit": commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    **more,
  }
  document.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
  first = epochs[epochs.batch_size == epochs.batch_size.iloc[0]]
  title = f"{config.dataset}, {config.model.title}, batch {first.batch_size.iloc[0]}"
  figure = draw(
    first, target_of(config), f"{title}: mean and range of {first.seed.nunique()} seeds"
  )
  figure.savefig(plot, dpi=150)
  return [lines, document, plot]


def draw(epochs: pd.DataFrame, target: Target, title: str) -> Any:
  """What the target is of, by epoch and by seconds (median of the seeds): mean and range."""
  import matplotlib.figure

  metric, goal = target
  unit, label = (100, "test accuracy, %") if metric == "test_accuracy" else (1, "test loss")
  figure = matplotlib.figure.Figure(figsize=(10, 4.2), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True)
  early = []
  for index, (name, own) in enumerate(epochs.groupby("optimizer", sort=False)):
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    by_epoch = own.groupby("epoch")
    values = unit * by_epoch[metric].agg(["mean", "min", "max"])
    early.append(values["mean"].iloc[len(values) // 4])
    for axis, x in zip(axes, (values.index, by_epoch.seconds.median()), strict=True):
      axis.plot(
        x, values["mean"], color=colour, linestyle=dashes, linewidth=1.8,
        label=optimizers.TABLE[str(name)].title,
      )  # fmt: skip
      axis.fill_between(x, values["min"], values["max"], color=colour, alpha=0.15, linewidth=0)
  labels = ("epoch", "seconds of training (no compilation, no evaluation)")
  for axis, below in zip(axes, labels, strict=True):
    axis.axhline(unit * goal, color="0.4", linestyle=":", linewidth=1)
    axis.set_xlabel(below)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].set_xlim(left=0)
  axes[1].set_xscale("log")  # the cost of a step differs several times between methods
  axes[0].set_ylim(*_limits(unit * epochs[metric], unit * goal, early, metric))
  axes[0].set_ylabel(label)
  place = "lower right" if metric == "test_accuracy" else "upper right"
  axes[0].legend(loc=place, frameon=False)
  figure.suptitle(title)
  return figure


def _limits(values, goal, early, metric):
  """From the first quarter on every mean curve is in sight; the target is never at the edge."""
  finite = values[values.map(math.isfinite)]
  if metric == "test_accuracy":
    return min(*early, goal - 5) - 1, min(100.0, max(goal, finite.max()) + 1)
  high = max([goal, *(x for x in early if math.isfinite(x))])
  low = min(goal, finite.min())
  return low - 0.05 * (high - low), high + 0.1 * (high - low)


def draw_batches(summary: pd.DataFrame, target: Target) -> Any:
  """Seconds and steps to the target over the batch size; runs that never arrive have no point."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=(10, 3.8), layout="constrained")
  columns = (("steps", "steps"), ("seconds", "seconds of training"))
  for axis, (column, label) in zip(figure.subplots(1, 2), columns, strict=True):
    for index, (name, own) in enumerate(summary.groupby("optimizer", sort=False)):
      axis.errorbar(
        own.batch_size, own[column], own[f"{column}_std"].fillna(0),
        color=COLOURS[index % len(COLOURS)], linestyle=DASHES[index % len(DASHES)], marker="o",
        capsize=3, label=optimizers.TABLE[str(name)].title,
      )  # fmt: skip
    axis.set_xscale("log")
    if summary[column].notna().any():
      axis.set_yscale("log")
    axis.set_xlabel("batch size")
    axis.set_ylabel(f"{label} to {words(target)}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  figure.axes[0].legend(frameon=False)
  return figure


def of_optimizers(names: Sequence[str], frame: pd.DataFrame) -> pd.DataFrame:
  """Lines in the order of `names`, then by batch size, seed and epoch."""
  order = {name: index for index, name in enumerate(names)}
  keys = [name for name in ("batch_size", "optimizer", "seed", "epoch") if name in frame]
  by = lambda column: column.map(order) if column.name == "optimizer" else column
  return frame.sort_values(keys, key=by, kind="stable", ignore_index=True)
