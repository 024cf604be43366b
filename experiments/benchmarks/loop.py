"""What the training loop costs beside its step, and how quick the input is alone.

    python -m experiments.benchmarks.loop cifar10_speedrun_small [--optimizers kfac] [options]

Examples a second of the compiled step on one batch again and again, of the loop that trains
(batches made, fed, losses kept; without evaluation), and of batches made and brought to the device
with nothing trained: medians of alternating epochs. Options after the configuration are those of
`python -m experiments train`.
"""

import dataclasses
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments import configs, runs, tasks, training
from experiments.__main__ import parse
from experiments.benchmarks import timing
from experiments.configs import Config

ROUNDS = 5


@dataclasses.dataclass
class Windows:
  """The three things that are timed, each an epoch; the state is carried on."""

  config: Config
  task: tasks.Task
  program: training.Program
  state: training.State
  epoch: int = 1

  def step(self, _: int) -> Any:
    """The step alone, on the first batch."""
    size = self.task.steps if self.config.looped else 1
    fed = next(training.calls(self.config, self.task, 0, 0, size))
    jax.block_until_ready(fed)
    for _ in range(0, self.task.steps, size):
      self.state, loss = self.program.advance(
        self.state, self.task.arrays, fed, jnp.uint32(0), self.program.values
      )
    return loss

  def loop(self, _: int) -> Any:
    """The loop of a run."""
    self.epoch += 1
    self.state, losses, *_ = runs.train_epoch(
      self.state, self.epoch, self.config, 0, self.task, self.program
    )
    return losses

  def input(self, _: int) -> Any:
    """Batches as the loop makes them."""
    self.epoch += 1
    first = (self.epoch - 1) * self.task.steps
    for fed in training.calls(self.config, self.task, 0, first, self.task.steps):
      jax.block_until_ready(fed)
    return fed


def measure(config: Config) -> dict[str, list[float]]:
  """Seconds an epoch of each, a value a round."""
  task, hyper = tasks.load(config), getattr(config, config.optimizers[0])
  program = training.build(config, hyper, task)
  windows = Windows(config, task, program, program.init(0))
  names = ("step", "loop", "input")
  return timing.alternate({name: getattr(windows, name) for name in names}, 1, ROUNDS)


def main(args: list[str]) -> None:
  name, *rest = args or ["digits_mlp"]
  config = parse("train", name, configs.load(name)[0], rest)
  seconds = measure(config)
  steps = tasks.load(config).steps
  title = f"{name}, {config.optimizers[0]}; {jax.devices()[0].device_kind}, jax {jax.__version__}"
  out = Table(title=title)
  for heading in ("", "examples / s", "time over the step's", "range"):
    out.add_column(heading, no_wrap=True)
  for label, own in seconds.items():
    ratio, low, high = timing.ratio(own, seconds["step"])
    rate = steps * config.batch_size / statistics.median(own)
    out.add_row(label, f"{rate:,.0f}", f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
  (Console() if sys.stdout.isatty() else Console(width=110)).print(out)


if __name__ == "__main__":
  main(sys.argv[1:])
