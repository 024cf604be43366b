"""What a run leaves behind: a table in the terminal, `table.md` and `models.csv`."""

from collections.abc import Sequence
import csv
import math
import pathlib
import re
import statistics
from typing import NamedTuple

from rich.table import Table

from experiments import comparison
from experiments.public_models.measure import Measurement
from experiments.public_models.problem import Model

COLUMNS = (
  "collection", "version", "model", "framework", "parameters", "layers", "in layers",
  "gradient error", "K-FAC step", "FOP step",
)  # fmt: skip


class Row(NamedTuple):
  """A model, and what was measured, or why it could not be."""

  model: Model
  version: str
  found: Measurement | None
  problem: str = ""

  def cells(self) -> list[str]:
    model, found = self.model, self.found
    cells = [model.collection.title, self.version, model.name, model.framework]
    if found is None:
      return [*cells, self.problem, *[""] * (len(COLUMNS) - len(cells) - 1)]
    share = f"{100 * found.in_layers / found.elements:.1f} %"
    cells += [f"{found.parameters:,}", str(found.layers), share]
    if math.isnan(found.gradient_error):
      return [*cells, "", "", ""]
    steps = ("finite" if finite else "no" for finite in (found.kfac_finite, found.fop_finite))
    error = f"{found.gradient_error:.0e}" if found.gradient_error else "0"
    return [*cells, error, *steps]


def summary(rows: Sequence[Row]) -> str:
  """The share over all elements, and how it is spread over the models."""
  found = [row.found for row in rows if row.found is not None]
  if not found:
    return "No model was measured."
  inside, elements = sum(f.in_layers for f in found), sum(f.elements for f in found)
  shares = [100 * f.in_layers / f.elements for f in found]
  collections = {row.model.collection.title for row in rows if row.found is not None}
  return (
    f"{len(found)} models of {len(collections)} collections: {inside:,} of {elements:,} elements"
    f" ({100 * inside / elements:.1f} %) of all arrays with at least two axes are in layers."
    f" By model: at least 95 % in {sum(share >= 95 for share in shares)} of {len(shares)},"
    f" median {statistics.median(shares):.1f} %, mean {statistics.fmean(shares):.1f} %."
  )


def table(rows: Sequence[Row]) -> Table:
  out = Table(title="Public models", caption=summary(rows))
  for index, name in enumerate(COLUMNS):
    out.add_column(name, justify="left" if index < 4 else "right", overflow="fold")
  for row in rows:
    out.add_row(*row.cells())
  return out


def reasons(refused: dict[str, str]) -> list[tuple[str, str]]:
  """The refused arrays, those of like name and reason together."""
  groups: dict[tuple[str, str], list[str]] = {}
  for array, reason in refused.items():
    name = re.sub(r"_?\d+", "", re.sub(r" \[.*?\]$", "", array))
    groups.setdefault((name, _short(reason)), []).append(array)
  return [
    (arrays[0] if len(arrays) == 1 else f"{len(arrays)} like {arrays[0]}", reason)
    for (_, reason), arrays in groups.items()
  ]


def _short(reason: str) -> str:
  """A reason without folders and columns of its source line."""
  return re.sub(r" at \S*/([^/:\s]+:\d+):\d+", r" at \1", reason)


def save(folder: pathlib.Path, rows: Sequence[Row]) -> list[pathlib.Path]:
  """Writes `table.md` and `models.csv` into `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = [summary(rows), "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
  lines += [_line(row.cells()) for row in rows]
  lines += ["", "Arrays with at least two axes that are in no layer:", ""]
  for row in rows:
    for array, reason in reasons(row.found.refused if row.found else {}):
      lines.append(f"- {row.model.collection.title}, {row.model.name}: `{array}`: {reason}")
  versions = ", ".join(" ".join(item) for item in comparison.versions().items())
  lines += ["", f"Measured with {versions}.", ""]
  paths = [folder / "table.md", folder / "models.csv"]
  paths[0].write_text("\n".join(lines), encoding="utf-8")
  with paths[1].open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow((*COLUMNS, "in no layer"))
    for row in rows:
      refused = row.found.refused if row.found else {}
      writer.writerow((*row.cells(), "; ".join(f"{a}: {_short(w)}" for a, w in refused.items())))
  return paths


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"
