"""What each device does, keeps and sends as devices are added, counted in the compiled program.

    python -m experiments.benchmarks.scaling [--devices 1 2 4 8] [--methods K-FAC SOAP]

A step of a decoder-only transformer (`--blocks`, width 128) on a mesh of host devices: gradient,
statistics and new inverses, with curvature on every device ("replicated") or owned
(`fop_optax.Sharding`). *Strong* scaling shares one batch out, *weak* scaling gives each device as
much as one had. Numbers are of one device: FLOPs of its products, convolutions and LAPACK calls,
over those of one device alone; bytes of the optimizer's state; operations between devices and the
bytes that come out of them, beyond those of the gradient with AdamW. No times: host devices share
the cores.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import optax
from rich.console import Console
from rich.table import Table
import tyro

from experiments.benchmarks import hlo, timing
from experiments.benchmarks.compile_cases import TOKENS, VOCABULARY, transformer
import fop_optax

Make = Callable[[Any, fop_optax.Sharding | None], optax.GradientTransformation]
# layers, sharding -> optimizer; groups of the capture, None for gradients alone
METHODS: dict[str, tuple[Make, int | None]] = {
  "AdamW": (lambda layers, sharding: optax.adamw(1e-3), None),
  "K-FAC": (lambda layers, sharding: fop_optax.kfac(0.1, layers, sharding=sharding), 1),
  "FOP": (lambda layers, sharding: fop_optax.fop(0.1, layers, sharding=sharding), 2),
  "SOAP": (lambda layers, sharding: fop_optax.soap(layers=layers, sharding=sharding), None),
  "Shampoo": (lambda layers, own: fop_optax.shampoo(0.01, layers=layers, sharding=own), None),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What to count.

  Attributes:
    devices: numbers of host devices.
    methods: names.
    blocks: of the transformer.
    batch: examples of 64 tokens on one device, and in all where scaling is strong.
    out: folder for `scaling.csv` and `scaling.png`.
  """

  devices: tuple[int, ...] = (1, 2, 4, 8)
  methods: tuple[str, ...] = tuple(METHODS)
  blocks: int = 8
  batch: int = 16
  out: pathlib.Path = pathlib.Path("results/scaling")


@dataclasses.dataclass(frozen=True)
class Row:
  """One device's part of a step."""

  scaling: str
  method: str
  owned: bool
  devices: int
  flops: float
  state_bytes: int
  operations: int
  moved_bytes: int


@functools.cache  # on one device strong is weak
def count(
  method: str, owned: bool, devices: int, examples: int, blocks: int
) -> tuple[float, int, hlo.Moved]:
  """FLOPs, bytes of the state, and what is moved, of a step with refresh."""
  case = transformer(blocks, scan=False)
  shape = jax.ShapeDtypeStruct((examples, TOKENS), case.x.dtype)
  make, groups = METHODS[method]
  captured = fop_optax.capture(case.loss, case.params, shape, shape, groups=groups or 1)
  first = jax.devices()[:devices]
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=first)
  tx = optax.with_extra_args_support(
    make(captured.layers, fop_optax.Sharding(mesh) if owned else None)
  )

  def step(params, state, x, y):
    if groups is None:
      _, grads = jax.value_and_grad(case.loss)(params, x, y)
      updates, state = tx.update(grads, state, params)
    else:
      _, grads, stats = captured.value_and_grad(params, x, y)
      updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  with jax.set_mesh(mesh):
    params = jax.device_put(case.params, NamedSharding(mesh, PartitionSpec()))
    state = tx.init(params)
    tokens = jax.device_put(
      jax.random.randint(jax.random.key(0), shape.shape, 0, VOCABULARY, shape.dtype),
      NamedSharding(mesh, PartitionSpec("data")),
    )
    compiled = jax.jit(step).lower(params, state, tokens, tokens).compile()
  held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
  return hlo.flops(compiled), held, hlo.moved(compiled)


def measure(config: Config, console: Console) -> list[Row]:
  """All rows, each printed when it is there."""
  rows = []
  for devices in config.devices:
    for scaling in ("strong", "weak"):
      examples = config.batch * (devices if scaling == "weak" else 1)
      *_, plain = count("AdamW", False, devices, examples, config.blocks)
      for name in config.methods:
        for owned in (False, True) if name != "AdamW" else (False,):
          flops, held, moved = count(name, owned, devices, examples, config.blocks)
          more = moved.operations - plain.operations, moved.bytes - plain.bytes
          rows.append(Row(scaling, name, owned, devices, flops, held, *more))
          console.print(rows[-1])
  return rows


def table(rows: list[Row]) -> Table:
  """A line for each method and way, a column for each number of devices."""
  devices = sorted({row.devices for row in rows})
  out = Table(title="one device's part: FLOPs over one device's / state, MB / operations, MB moved")
  for heading in ("scaling", "method", "curvature", *map(str, devices)):
    out.add_column(heading, no_wrap=True)
  for key in dict.fromkeys((row.scaling, row.method, row.owned) for row in rows):
    own = {row.devices: row for row in rows if (row.scaling, row.method, row.owned) == key}
    first = own[devices[0]].flops
    cells = [
      f"{row.flops / first:.3f} / {row.state_bytes / 1e6:.2f} / {row.operations},"
      f" {row.moved_bytes / 1e6:.1f}"
      for row in (own[n] for n in devices)
    ]
    out.add_row(key[0], key[1], "owned" if key[2] else "replicated", *cells)
  return out


def draw(rows: list[Row], path: pathlib.Path) -> None:
  """FLOPs and bytes of one device over the number of them."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
  colours = dict(zip(dict.fromkeys(row.method for row in rows), plt.get_cmap("tab10").colors))  # noqa: B905
  panels = (("strong", "flops"), ("weak", "flops"), ("strong", "state_bytes"))
  for axis, (scaling, field) in zip(axes, panels, strict=True):
    for key in dict.fromkeys((row.method, row.owned) for row in rows):
      own = [row for row in rows if (row.scaling, row.method, row.owned) == (scaling, *key)]
      values = [getattr(row, field) / getattr(own[0], field) for row in own]
      label = f"{key[0]}{', owned' if key[1] else ''}"
      style = "o-" if key[1] else "x--"
      axis.plot([row.devices for row in own], values, style, color=colours[key[0]], label=label)
    axis.set(title=f"{scaling}: {'FLOPs' if field == 'flops' else 'state'} of one device")
    axis.set(xlabel="devices", xscale="log", yscale="log" if scaling == "strong" else "linear")
    ticks = sorted({row.devices for row in rows})
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
  axes[0].set_ylabel("over those of one alone")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def main(config: Config) -> None:
  if unknown := set(config.methods) - set(METHODS):
    raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; methods are {', '.join(METHODS)}")
  if len(jax.devices()) < max(config.devices):
    raise SystemExit(f"{len(jax.devices())} devices, and {max(config.devices)} are asked for.")
  console = Console(width=150)
  rows = measure(config, console)
  console.print(table(rows))
  console.print("saved", timing.save(rows, str(config.out / "scaling.csv")))
  draw(rows, config.out / "scaling.png")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  asked = tyro.cli(Config, prog="python -m experiments.benchmarks.scaling")
  if jax.config.jax_num_cpu_devices < max(asked.devices):
    jax.config.update("jax_num_cpu_devices", max(asked.devices))
  main(asked)
