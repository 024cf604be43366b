"""Executes sources and writes the notebooks beside them."""

import sys
import time

import nbformat

from notebooks import SOURCES
from notebooks.execute import execute


def main(*names: str) -> None:
  unknown = set(names) - {source.stem for source in SOURCES}
  if unknown:
    raise SystemExit(
      f"There is no notebook {', '.join(sorted(unknown))}: choose of"
      f" {', '.join(source.stem for source in SOURCES)}."
    )
  for source in SOURCES:
    if not names or source.stem in names:
      start = time.perf_counter()
      nbformat.write(execute(source), source.with_suffix(".ipynb"))
      print(f"{source.stem}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
  main(*sys.argv[1:])
