"""Command line: `python -m experiments.public_models [NAMES] --sources DIR --out DIR`."""

import dataclasses
import importlib
import pathlib
import pkgutil
import sys
from typing import Annotated

import jax
from rich.console import Console
import tyro

from experiments import public_models
from experiments.__main__ import progress
from experiments.public_models import measure, model_table
from experiments.public_models.problem import Collection, Model

TOOLS = ("__main__", "measure", "problem", "model_table")


@dataclasses.dataclass(frozen=True)
class Options:
  """Captures the losses of public models and says what share of them is in layers.

  Attributes:
    names: parts of the names of collections or models; all by default.
    sources: folder with clones of the repositories (see the README beside this program).
    out: folder for `table.md` and `models.csv`.
    steps: whether to take steps as well, and compare gradients; without, only losses are traced.
  """

  names: tyro.conf.Positional[tuple[str, ...]] = ()
  sources: pathlib.Path = pathlib.Path("sources")
  out: Annotated[pathlib.Path, tyro.conf.arg(aliases=["-o"])] = pathlib.Path(
    "results/public_models"
  )
  steps: bool = True


def collections() -> list[Collection]:
  """Those of all files beside this one."""
  names = (module.name for module in pkgutil.iter_modules(public_models.__path__))
  modules = [
    importlib.import_module(f"experiments.public_models.{name}")
    for name in names
    if name not in TOOLS
  ]
  found = {id(v): v for module in modules for v in vars(module).values() if type(v) is Collection}
  return list(found.values())


def run(model: Model, version: str, steps: bool = True) -> model_table.Row:
  """Builds and measures one model."""
  try:
    return model_table.Row(model, version, measure.measure(model.build(), steps))
  except Exception as error:  # a collection may not run with the installed versions
    return model_table.Row(model, version, None, f"{type(error).__name__}: {str(error)[:200]}")
  finally:
    jax.clear_caches()


def main(options: Options) -> None:
  """Measures the models that are there."""
  wanted = lambda *texts: (
    not options.names
    or any(name.lower() in text.lower() for name in options.names for text in texts)
  )
  rows, missing, saved = [], [], []
  console = Console(width=None if sys.stdout.isatty() else 160)
  every = [(c, [m for m in c.models if wanted(c.title, m.name)]) for c in collections()]
  with progress(sum(len(models) for _, models in every), "public models") as bar:
    for collection, models in every:
      version = collection.find(options.sources)  # others may import it
      if models and not version:
        missing.append(collection)
        continue
      for model in models:
        bar.update(bar.task_ids[0], note=f"{collection.title}: {model.name}")
        rows.append(run(model, version, options.steps))
        saved = model_table.save(options.out, rows)
        bar.update(bar.task_ids[0], advance=1)
  console.print(model_table.table(rows))
  for collection in missing:
    where = collection.package or options.sources / collection.folder
    console.print(f"skipped {collection.title}: {where} is not there", highlight=False)
  console.print("saved", ", ".join(map(str, saved)), highlight=False)


if __name__ == "__main__":
  main(tyro.cli(Options))
