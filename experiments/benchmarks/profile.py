"""Where the time of a step goes on an accelerator: its kernels, with the operation each is of.

    python -m experiments.benchmarks.profile resnet18-2048 fop refresh

The last argument is ordinary, refresh or traced (the mean over a period of ten); "sgd" instead of a
method profiles that. Kernels are added up by the operation of the program they belong to.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
from typing import Annotated, Literal

import jax
from rich.console import Console
from rich.table import Table
import tyro

from experiments.benchmarks import cases, step_cost

STEPS = 10
REFRESH = {"ordinary": False, "refresh": True, "traced": None}
NAMED = re.compile(r"%?([\w.-]+) = (\S+) .*?op_name=\"([^\"]*)\"")


@dataclasses.dataclass(frozen=True)
class Config:
  """What to profile.

  Attributes:
    case: as in `experiments.benchmarks.step_cost`.
    method: sgd, kfac, fop.
    kind: which step.
    lines: how many operations to print.
  """

  case: Annotated[str, tyro.conf.Positional]
  method: Annotated[Literal["sgd", "kfac", "fop"], tyro.conf.Positional] = "sgd"
  kind: Annotated[Literal["ordinary", "refresh", "traced"], tyro.conf.Positional] = "traced"
  lines: int = 40


def kernels(stepper: step_cost.Stepper) -> dict[str, tuple[float, int]]:
  """Milliseconds a step, and number, of the kernels of each operation of the program."""
  jax.block_until_ready(stepper.window(STEPS))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(stepper.window(STEPS))
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
  found: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
  for plane in profile.planes:
    if not plane.name.startswith("/device:"):
      continue
    for line in plane.lines:
      if not line.name.startswith("Stream"):
        continue
      for event in line.events:
        name = str(dict(event.stats).get("hlo_op", event.name))
        milliseconds, count = found[name]
        found[name] = milliseconds + event.duration_ns / 1e6 / STEPS, count + 1
  return dict(found)


def table(config: Config, found: dict[str, tuple[float, int]], program: str) -> Table:
  """The longest of them, with type and source."""
  source = {name: (kind, origin) for name, kind, origin in NAMED.findall(program)}
  total = sum(milliseconds for milliseconds, _ in found.values())
  out = Table(
    title=f"{config.case}, {config.method}, {config.kind}: {total:.2f} ms a step in kernels;"
    f" {jax.devices()[0].device_kind}, jax {jax.__version__}"
  )
  for heading in ("ms", "kernels a step", "operation", "type", "of"):
    out.add_column(heading, no_wrap=True)
  for name, (milliseconds, count) in sorted(found.items(), key=lambda item: -item[1][0])[
    : config.lines
  ]:
    kind, origin = source.get(name, ("", ""))
    out.add_row(f"{milliseconds:.3f}", f"{count / STEPS:.1f}", name, kind[:44], origin[-90:])
  return out


def main(config: Config) -> None:
  case = cases.build(config.case)
  if config.method == "sgd":
    stepper = step_cost.sgd(case)
  else:
    stepper = step_cost.ours(case, config.method, STEPS, REFRESH[config.kind])
  found = kernels(stepper)
  if not found:
    raise SystemExit(f"No kernels in the trace: {jax.devices()[0].device_kind} is no accelerator.")
  Console(width=220).print(table(config, found, stepper.compiled.as_text()))


if __name__ == "__main__":
  main(tyro.cli(Config, prog="python -m experiments.benchmarks.profile"))
