"""`python -m experiments report RESULTS_DIR`: one page of all runs in a folder, in one file."""

import base64
import html
import io
import json
import pathlib
from typing import Any, NamedTuple

import pandas as pd

from experiments import comparison, inspection, optimizers
from experiments.comparison import Target, cells, interval, of_optimizers, outcomes, summarize
from experiments.runs import Log

STYLE = """\
:root { color-scheme: light dark; --line: #8884; --soft: #8882 }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } tr:hover td { background: var(--soft) }
td { white-space: nowrap } th.left, td.left { text-align: left } .scroll { overflow-x: auto }
img { max-width: 100%; height: auto; background: white; border-radius: .5rem }
details { margin: .5rem 0 } pre { overflow-x: auto; font-size: .85rem }
"""


class Comparison(NamedTuple):
  """The runs of one configuration."""

  name: str
  record: dict[str, Any]  # of one of them
  epochs: pd.DataFrame
  unfinished: int
  layers: list[pathlib.Path]  # the `layers.jsonl` that there are


def read(folder: pathlib.Path) -> list[Comparison]:
  """All runs below a folder, by the configuration they are of.

  Raises:
    SystemExit: if there are none.
  """
  logs: dict[pathlib.Path, list[Log]] = {}
  for path in sorted(folder.glob("**/runs/*/batch-*/seed-*/metrics.jsonl")):
    logs.setdefault(path.parents[4], []).append(Log(path))
  found = []
  for root, own in logs.items():
    own = [log for log in own if log.rows()]
    if not own:
      continue
    epochs = comparison.curves(row for log in own for row in log.rows())
    name = str(root.relative_to(folder)) if root != folder else root.name
    unfinished = sum(not log.done for log in own)
    layers = [path for log in own if (path := log.path.with_name("layers.jsonl")).exists()]
    found.append(Comparison(name, own[0].record or {}, epochs, unfinished, layers))
  if not found:
    raise SystemExit(
      f"{folder} holds no runs. Make some with `python -m experiments compare --out {folder}`."
    )
  return found


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes `report.html` into a folder of results."""
  sections = "\n".join(map(_section, read(folder)))
  page = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>fop_optax: experiments</title><style>{STYLE}</style>"
    f"<h1>Experiments</h1>{sections}</html>\n"
  )
  path = folder / "report.html"
  path.write_text(page, encoding="utf-8")
  return path


def _section(own: Comparison) -> str:
  metric, value = own.record["target"]
  target = metric, value
  known = [name for name in optimizers.TABLE if name in set(own.epochs.optimizer)]
  epochs = of_optimizers(known, own.epochs)
  runs = outcomes(epochs, target)
  summary = summarize(runs, "adamw" if "adamw" in known else known[0])
  parts = [f"<h2>{html.escape(own.name)}</h2>", _table(summary, target)]
  for size, part in epochs.groupby("batch_size", sort=True):
    seeds = part.seed.nunique()
    title = f"batch {size}: mean and range of {seeds} seed{'s' * (seeds != 1)}"
    parts.append(_image(comparison.draw(part, target, title), f"curves, {title}"))
  if summary.batch_size.nunique() > 1:
    parts.append(_image(comparison.draw_batches(summary, target), "to the target, by batch size"))
  for path in own.layers:
    run = html.escape(" ".join(path.parts[-4:-1]))
    frame = inspection.frame_of(path)
    pictures = inspection.draw_maps(frame), inspection.draw_spectra(frame)
    drawn = "".join(_image(figure, f"layers of {run}") for figure in pictures)
    parts.append(f"<details><summary>Layers of {run}</summary>{drawn}</details>")
  if own.unfinished:
    parts.append(f"<p>{own.unfinished} of these runs are not finished.</p>")
  record = html.escape(json.dumps(own.record, indent=2))
  parts.append(f"<details><summary>What was run</summary><pre>{record}</pre></details>")
  return "\n".join(parts)


def _table(summary: pd.DataFrame, target: Target) -> str:
  headings, rows = cells(summary, target)
  headings = [*headings, "95 % interval", "n", "speed-up"]
  for line, row in zip(summary.itertuples(), rows, strict=True):
    metric, unit = target[0], 100 if target[0] == "test_accuracy" else 1
    mean, std = getattr(line, metric), getattr(line, f"{metric}_std")
    low, high = interval(unit * mean, unit * std, line.n)
    row += [
      "" if pd.isna(low) else f"{low:.4g} to {high:.4g}",
      str(line.n),
      "–" if pd.isna(line.speed_up) else f"{line.speed_up:.2f}",
    ]
  left = headings.index("optimizer")
  cell = lambda tag, index, text: (
    f"<{tag}{' class=left' * (index == left)}>{html.escape(text)}</{tag}>"
  )
  lines = [("th", headings), *(("td", row) for row in rows)]
  body = "".join(
    "<tr>" + "".join(cell(tag, i, text) for i, text in enumerate(line)) + "</tr>"
    for tag, line in lines
  )
  note = (
    "<p>Mean ± standard deviation over seeds; the interval is Student's, of the final value;"
    " seconds of training, without compilation and evaluation; speed-up: AdamW's seconds to the"
    " target over its own. A dash: not all runs got there.</p>"
  )
  return f'<div class="scroll"><table>{body}</table></div>{note}'


def _image(figure: Any, text: str) -> str:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=150)
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>'
