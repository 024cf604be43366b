"""Command line: `python -m experiments compare|tune [CONFIG] [options]`."""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib
import statistics
import sys

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
import tyro

from experiments import comparison, configs, data, optimizers, train

USAGE = f"""\
usage: python -m experiments compare [CONFIG] [options]
       python -m experiments tune [CONFIG] [options]

compare  trains every optimizer of CONFIG with the same schedule, budget, weights and batches;
         prints a table, saves CSV, JSON and a plot
tune     runs the grid of CONFIG on a part held out of the training images; prints the best points

CONFIG   one of {", ".join(configs.NAMES)} (default: {configs.NAMES[0]})
options  python -m experiments compare CONFIG --help"""


def progress(total: int, label: str) -> Progress:
  """A live bar on standard error; silent where that is no terminal."""
  console = Console(stderr=True)
  bar = Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("{task.fields[note]}"),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  )
  bar.add_task(label, total=total, note="")
  return bar


def output() -> Console:
  """Standard output, wide enough for the tables where it is no terminal."""
  return Console() if sys.stdout.isatty() else Console(width=110)


def compare(name: str, config: configs.Compare) -> None:
  """Trains all optimizers of `config`, seed by seed, and reports."""
  images = data.load(config.dataset, config.data_dir)
  seeds = range(config.first_seed, config.first_seed + config.seeds)
  rows: list[train.Row] = []
  with progress(len(config.optimizers) * config.seeds * config.epochs, name) as bar:
    runs = {}
    for optimizer in config.optimizers:
      bar.update(bar.task_ids[0], note=f"compiling {optimizers.TABLE[optimizer].title}")
      runs[optimizer] = train.compile_run(config, optimizer, images)
    # Optimizers alternate within a seed: a machine that slows down slows all of them.
    for seed, (optimizer, run) in itertools.product(seeds, runs.items()):
      for row in run.train(seed):
        rows.append(row)
        note = f"{optimizers.TABLE[optimizer].title}, seed {seed}: {100 * row.test_accuracy:.1f} %"
        bar.update(bar.task_ids[0], advance=1, note=note)
  rows.sort(key=lambda row: (config.optimizers.index(row.optimizer), row.seed, row.epoch))
  summaries = comparison.summarize(rows, config.target)
  paths = comparison.save(
    pathlib.Path(config.out) / name,
    rows,
    summaries,
    config,
    device=jax.devices()[0].device_kind,
    compile_seconds={optimizer: run.compile_seconds for optimizer, run in runs.items()},
  )
  console = output()
  console.print(comparison.table(summaries, config))
  console.print("saved", ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


def tune(name: str, config: configs.Compare, grid: dict[str, dict[str, tuple[float, ...]]]) -> None:
  """Runs the grid on held-out training images; best: most runs at the target, then soonest."""
  images = data.holdout(data.load(config.dataset, config.data_dir))
  points = [
    (optimizer, dict(zip(grid[optimizer], values, strict=True)))
    for optimizer in config.optimizers
    for values in itertools.product(*grid[optimizer].values())
  ]
  results: dict[str, list[tuple]] = {}
  with progress(len(points), f"tune {name}") as bar:
    for optimizer, values in points:
      hyper = dataclasses.replace(getattr(config, optimizer), **values)
      run = train.compile_run(dataclasses.replace(config, **{optimizer: hyper}), optimizer, images)
      seeds = range(config.first_seed, config.first_seed + config.seeds)
      rows = [row for seed in seeds for row in run.train(seed)]
      (summary,) = comparison.summarize(rows, config.target)
      # A run that does not get there counts as one epoch beyond the budget.
      epochs = [e or config.epochs + 1 for e in summary.epochs_to_target]
      loss = statistics.fmean(row.test_loss for row in rows if row.epoch == config.epochs)
      results.setdefault(optimizer, []).append((statistics.fmean(epochs), loss, values, summary))
      bar.update(bar.task_ids[0], advance=1, note=f"{optimizer} {values}")
  out = Table(title=f"{name}: grid on {len(images.test_labels)} held-out training images")
  for heading in ("optimizer", "values", "epochs to target", "final loss", "final accuracy, %"):
    out.add_column(heading, no_wrap=True)
  for optimizer, found in results.items():
    for _, loss, values, summary in sorted(found, key=lambda result: result[:2]):
      out.add_row(
        optimizer,
        " ".join(f"{key}={value:g}" for key, value in values.items()),
        comparison.reached(summary.epochs_to_target, 1),
        f"{loss:.4f}",
        comparison.spread([100 * a for a in summary.final_accuracy], 2),
      )
    out.add_section()
  output().print(out)


def main(args: Sequence[str]) -> None:
  """Runs the command line `args`."""
  command, *rest = args or ["--help"]
  if command in ("-h", "--help"):
    print(USAGE)
    return
  if command not in ("compare", "tune"):
    raise SystemExit(f"unknown command {command!r}\n\n{USAGE}")
  name = rest.pop(0) if rest and not rest[0].startswith("-") else configs.NAMES[0]
  if name not in configs.NAMES:
    raise SystemExit(f"unknown CONFIG {name!r}: one of {', '.join(configs.NAMES)}")
  default, grid = configs.load(name)
  prog = f"python -m experiments {command} {name}"
  config = tyro.cli(configs.Compare, default=default, args=rest, prog=prog)
  unknown = [optimizer for optimizer in config.optimizers if optimizer not in optimizers.TABLE]
  if unknown:
    raise SystemExit(f"unknown optimizers {unknown}: any of {', '.join(optimizers.TABLE)}")
  if command == "compare":
    compare(name, config)
  else:
    tune(name, config, grid)


if __name__ == "__main__":
  main(sys.argv[1:])
