"""The speed runs' network at a batch of 10,000: 80 steps, 16 epochs.

    python -m experiments tune cifar10_speedrun_10000 --trials 6
    python -m experiments compare cifar10_speedrun_10000

The recipe of `cifar10_speedrun`, which nobody has published at this batch: no figure to expect.
For an accelerator.
"""

import dataclasses

from experiments.configs import cifar10_speedrun

CONFIG = dataclasses.replace(
  cifar10_speedrun.CONFIG, batch_size=10_000, epochs=16, target=0.93, seeds=3
)
GRID = {name: axes | {"rest": (0.5, 4.0)} for name, axes in cifar10_speedrun.GRID.items()}
