"""Command line: `python -m experiments COMMAND [CONFIG] [options]`."""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import pathlib
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
import tyro

from experiments import comparison, configs, inspection, optimizers, report, runs, tasks, training
from experiments.configs import Config

COMMANDS = ("train", "compare", "tune", "report", "list")
DEFAULT = "digits_mlp"
USAGE = f"""\
usage: python -m experiments train CONFIG [--optimizers NAME] [options]
       python -m experiments compare [CONFIG] [options]
       python -m experiments tune [CONFIG] [options]
       python -m experiments report [RESULTS_DIR]
       python -m experiments list

train    trains the first of --optimizers, from the first seed; goes on where it was killed
compare  trains every optimizer of CONFIG with the same schedule, budget, weights and batches;
         prints a table, saves CSV, JSON and a plot; runs that are done are not made again
tune     runs the grid of CONFIG, or --trials N points of its box, on held-out training examples;
         prints the best points
report   makes one page, report.html, of all runs in a folder of results
list     the configurations, and what each is

CONFIG   one of {", ".join(configs.NAMES)} (default: {DEFAULT})
options  --field value, --field.of.a.part value, or --set field=value ...: all of them by
         python -m experiments compare CONFIG --help"""


def progress(total: int, label: str) -> Progress:
  """A live bar on standard error; silent where that is no terminal."""
  console = Console(stderr=True)
  bar = Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
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


def train(name: str, config: Config) -> None:
  """Trains one optimizer from one seed, and prints what each epoch came to."""
  optimizer, seed = config.optimizers[0], config.first_seed
  configs.check_pieces(config, (optimizer,))
  task = tasks.load(config)
  build = functools.partial(training.build, config, getattr(config, optimizer), task)
  path = runs.folder_of(pathlib.Path(config.out) / name, config, optimizer, seed)
  with progress(config.epochs, f"{name}, {optimizers.TABLE[optimizer].title}") as bar:
    for row in runs.train(path, config, optimizer, seed, task, build, final=True):
      text = (
        f"epoch {row.epoch:4d}  train loss {row.train_loss:.4f}  test loss {row.test_loss:.4f}"
        f"  accuracy {100 * row.test_accuracy:.2f} %  {row.seconds:.1f} s"
        f"  {row.examples_per_second:,.0f} examples/s"
      )
      bar.update(bar.task_ids[0], advance=1)
      bar.console.print(text, highlight=False) if bar.console.is_terminal else print(text)
  pictures = inspection.draw(path)
  output().print("saved", ", ".join(map(str, [path, *pictures])), highlight=False, soft_wrap=True)
  if config.diagnostics and not pictures:
    title = optimizers.TABLE[optimizer].title
    output().print(f"{title} keeps no curvature by layer: --diagnostics found nothing to write.")


def compare(name: str, config: Config) -> None:
  """Trains all optimizers of `config`, batch size by batch size and seed by seed, and reports."""
  configs.check_pieces(config, config.optimizers)
  folder = pathlib.Path(config.out) / name
  seeds = range(config.first_seed, config.first_seed + config.seeds)
  rows: list[runs.Row] = []
  seconds: dict[str, float] = {}
  sizes = configs.by_batch_size(config)
  total = len(sizes) * len(config.optimizers) * config.seeds * config.epochs
  with progress(total, name) as bar:
    for own in sizes:
      task = tasks.load(own)

      @functools.cache
      def program(optimizer, own=own, task=task):
        title = optimizers.TABLE[optimizer].title
        bar.update(bar.task_ids[0], note=f"compiling {title}, batch {own.batch_size}")
        made = training.build(own, getattr(own, optimizer), task)
        seconds[f"{optimizer}, batch {own.batch_size}"] = made.compile_seconds
        return made

      # Optimizers alternate within a seed: a machine that slows down slows all of them.
      for seed, optimizer in itertools.product(seeds, config.optimizers):
        path = runs.folder_of(folder, own, optimizer, seed)
        build = functools.partial(program, optimizer)
        for row in runs.train(path, own, optimizer, seed, task, build):
          rows.append(row)
          title, share = optimizers.TABLE[optimizer].title, 100 * row.test_accuracy
          bar.update(bar.task_ids[0], advance=1, note=f"{title}, seed {seed}: {share:.1f} %")
  epochs = comparison.of_optimizers(config.optimizers, comparison.curves(rows))
  summary = comparison.summarize(
    comparison.outcomes(epochs, comparison.target_of(config)), config.optimizers[0]
  )
  paths = comparison.save(folder, epochs, summary, config, compile_seconds=seconds)
  console = output()
  console.print(comparison.table(summary, config))
  console.print("saved", ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


def tune(name: str, config: Config, grid: dict[str, dict[str, tuple[float, ...]]]) -> None:
  """Runs the grid on held-out training examples; best: most runs at the target, then soonest."""
  configs.check_pieces(config, config.optimizers)
  task = tasks.load(config, tuning=True)
  points = [
    (optimizer, point)
    for optimizer in config.optimizers
    if optimizer in grid
    for point in points_of(grid[optimizer], config.trials, config.first_seed)
  ]
  seeds = range(config.first_seed, config.first_seed + config.seeds)
  results: dict[str, list[tuple]] = {}
  programs: dict[Any, training.Program] = {}

  def build(own, hyper):
    structure = training.structure_of(hyper)
    if structure not in programs:
      programs[structure] = training.build(own, hyper, task)
    return programs[structure].of(hyper)

  with progress(len(points), f"tune {name}") as bar:
    for optimizer, values in points:
      hyper = dataclasses.replace(getattr(config, optimizer), **values)
      own = dataclasses.replace(config, **{optimizer: hyper})
      label = "-".join(f"{key}={value:g}" for key, value in values.items())
      root = pathlib.Path(config.out) / name / "tune" / label
      paths = {seed: runs.folder_of(root, own, optimizer, seed) for seed in seeds}
      rows = [
        row
        for seed, path in paths.items()
        for row in runs.train(
          path, own, optimizer, seed, task, functools.partial(build, own, hyper)
        )
      ]
      found = comparison.outcomes(comparison.curves(rows), comparison.target_of(config))
      (line,) = comparison.summarize(found).itertuples()
      # A run that does not get there counts as one epoch beyond the budget.
      epochs = found.epochs.fillna(config.epochs + 1).mean()
      worse = line.test_loss if config.metric == "test_loss" else -line.test_accuracy
      results.setdefault(optimizer, []).append((epochs, worse, values, line))
      bar.update(bar.task_ids[0], advance=1, note=f"{optimizer} {values}")
  ranked = {
    optimizer: sorted(trials, key=lambda trial: trial[:2]) for optimizer, trials in results.items()
  }
  title = f"{name}: {len(points)} points on {task.held_out:,} held-out training examples"
  console = output()
  console.print(comparison.trials_table(ranked, config, title))
  paths = comparison.save_trials(pathlib.Path(config.out) / name / "tune", ranked, config)
  console.print("saved", ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


def points_of(axes: dict[str, tuple[float, ...]], trials: int, seed: int) -> list[dict]:
  """All points of a grid; or `trials` drawn from its box, log-uniform, of three digits.

  An axis that has a zero, which has no logarithm, is drawn from its values.
  """
  if not trials:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
  rng = np.random.default_rng(seed)

  def draw(values):
    if min(values) <= 0:
      return float(rng.choice(values))
    return float(f"{np.exp(rng.uniform(np.log(min(values)), np.log(max(values)))):.3g}")

  return [{name: draw(values) for name, values in axes.items()} for _ in range(trials)]


def as_flags(args: Sequence[str]) -> list[str]:
  """`--set field=value field=value` as `--field value --field value`."""
  flags, setting = [], False
  for arg in args:
    if arg == "--set":
      setting = True
    elif setting and "=" in arg and not arg.startswith("-"):
      field, value = arg.split("=", 1)
      flags += [f"--{field.replace('_', '-')}", value]
    else:
      setting = False
      flags.append(arg)
  return flags


def parse(command: str, name: str, default: Config, args: Sequence[str]) -> Config:
  """`default` with the options of the command line."""
  try:
    return tyro.cli(
      tyro.conf.AvoidSubcommands[Config],
      default=default,
      args=as_flags(args),
      prog=f"python -m experiments {command} {name}",
    )
  except ValueError as error:
    raise SystemExit(str(error)) from error


def main(args: Sequence[str]) -> None:
  """Runs the command line `args`."""
  command, *rest = args or ["--help"]
  if command in ("-h", "--help"):
    print(USAGE)
    return
  if command not in COMMANDS:
    raise SystemExit(f"unknown command {command!r}{runs.nearest(command, COMMANDS)}\n\n{USAGE}")
  if command == "list":
    for name in configs.NAMES:
      print(f"{name:24} {configs.described(name)}")
    return
  if command == "report":
    output().print("saved", str(report.write(pathlib.Path(*rest or ["results"]))), highlight=False)
    return
  name = rest.pop(0) if rest and not rest[0].startswith("-") else DEFAULT
  if name not in configs.NAMES:
    raise SystemExit(f"unknown CONFIG {name!r}{runs.nearest(name, configs.NAMES)}")
  default, grid = configs.load(name)
  config = parse(command, name, default, rest)
  if command == "train":
    train(name, config)
  elif command == "compare":
    compare(name, config)
  else:
    tune(name, config, grid)


if __name__ == "__main__":
  main(sys.argv[1:])
