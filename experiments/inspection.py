"""What the curvature of each layer was over a training: numbers an epoch, heat maps, spectra."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pandas as pd

import fop_optax

# Number -> what is drawn of it, and how that is called.
MAPS = {
  "beta": (lambda x: x, "beta, share of the contrast"),
  "eta": (lambda x: x, "eta, rate of the layer's step"),
  "rho2": (lambda x: x, "rho², distance from K-FAC"),
  "condition": (np.log10, "log10 of the condition, damped"),
}


def readings(state: Any, layers: fop_optax.Layers, epoch: int) -> list[dict[str, Any]]:
  """A line a layer: the means of its matrices' numbers. None where there is no curvature."""
  try:
    found = fop_optax.diagnostics(state, layers, condition=True, spectra=True)
  except ValueError:  # an optimizer of another library
    return []
  lines = []
  for name, numbers in found.get("layers", {}).items():
    line: dict[str, Any] = {"epoch": epoch, "layer": name}
    for key, own in numbers.items():
      own = np.asarray(own, np.float64)
      line[key] = own.mean(0).tolist() if key.startswith("spectrum") else float(own.mean())
    lines.append(line)
  return lines


def frame_of(path: pathlib.Path) -> pd.DataFrame:
  """The lines of a run's `layers.jsonl`."""
  lines = path.read_text(encoding="utf-8").splitlines()
  return pd.DataFrame([json.loads(line) for line in lines])


def draw(run: pathlib.Path) -> list[pathlib.Path]:
  """Writes `layers.png` and `spectra.png` into a run's folder, if it has `layers.jsonl`."""
  if not (run / "layers.jsonl").exists():
    return []
  frame = frame_of(run / "layers.jsonl")
  paths = [run / "layers.png", run / "spectra.png"]
  for path, figure in zip(paths, (draw_maps(frame), draw_spectra(frame)), strict=True):
    figure.savefig(path, dpi=150)
  return paths


def draw_maps(frame: pd.DataFrame) -> Any:
  """Heat maps, layers by epochs, of what is there of `MAPS`."""
  import matplotlib.figure

  names = [name for name in MAPS if name in frame]
  order = list(dict.fromkeys(frame.layer))
  figure = matplotlib.figure.Figure(
    figsize=(3.6 * len(names) + 2, 0.28 * len(order) + 1.6), layout="constrained"
  )
  axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
  for axis, name in zip(axes, names, strict=True):
    of, label = MAPS[name]
    table = frame.pivot(index="layer", columns="epoch", values=name).loc[order]
    # cells are drawn around their epoch
    first, last = table.columns[0] - 0.5, table.columns[-1] + 0.5
    image = axis.imshow(
      of(table.to_numpy(np.float64)), aspect="auto", interpolation="nearest", cmap="viridis",
      extent=(first, last, len(order) - 0.5, -0.5),
    )  # fmt: skip
    figure.colorbar(image, ax=axis)
    axis.set_title(label, fontsize=10)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
  axes[0].set_yticks(range(len(order)), [_short(name) for name in order], fontsize=8)
  return figure


def draw_spectra(frame: pd.DataFrame) -> Any:
  """Eigenvalues of both running factors of each layer after the last epoch, over the largest."""
  import matplotlib
  import matplotlib.figure

  last = frame[frame.epoch == frame.epoch.max()]
  figure = matplotlib.figure.Figure(figsize=(10, 3.8), layout="constrained")
  colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(last)))
  for axis, side in zip(figure.subplots(1, 2, sharey=True), ("A", "G"), strict=True):
    for colour, line in zip(colours, last.itertuples(), strict=True):
      values = np.array(getattr(line, f"spectrum_{side}"))
      if len(values) and values[0] > 0:
        share = np.arange(1, len(values) + 1) / len(values)
        axis.plot(share, values / values[0], color=colour, label=_short(line.layer))
    axis.set_yscale("log")
    axis.set_ylim(1e-8, 2)
    axis.set_xlabel(f"place of the eigenvalue of {side}, share of the side")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  figure.axes[0].set_ylabel("eigenvalue over the largest")
  if len(last) <= 12:
    figure.axes[1].legend(frameon=False, fontsize=8)
  return figure


def _short(name: str, most: int = 40) -> str:
  """`['a'][0]['kernel']` as a.0.kernel; the end of a long one."""
  name = re.sub(r"\['?(.*?)'?\]", r".\1", name).lstrip(".")
  return name if len(name) <= most else f"…{name[1 - most :]}"
