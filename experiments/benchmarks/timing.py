"""Timing that survives a busy machine: alternating windows, one ratio a round, their median."""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import pathlib
import statistics
import time
from typing import Any

import jax

Window = Callable[[int], Any]  # runs so many steps and returns what has to be waited for


def alternate(windows: Mapping[Any, Window], steps: int, rounds: int) -> dict[Any, list[float]]:
  """Seconds a step of each window of `steps`, a value a round; the order turns by one a round."""
  names = list(windows)
  seconds: dict[Any, list[float]] = {name: [] for name in names}
  for window in windows.values():
    jax.block_until_ready(window(steps))  # warm
  for turn in range(rounds):
    start = turn % len(names)
    for name in names[start:] + names[:start]:
      begin = time.perf_counter()
      jax.block_until_ready(windows[name](steps))
      seconds[name].append((time.perf_counter() - begin) / steps)
  return seconds


def ratio(seconds: list[float], baseline: list[float]) -> tuple[float, float, float]:
  """Median, smallest and largest of the rounds' ratios."""
  ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
  return statistics.median(ratios), min(ratios), max(ratios)


def save(rows: Sequence[Any], out: str) -> pathlib.Path:
  """Writes dataclasses of one kind as a CSV file."""
  path = pathlib.Path(out)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
  return path
