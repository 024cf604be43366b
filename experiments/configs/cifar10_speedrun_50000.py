"""The speed runs' network at a batch of 50,000: 40 steps, 40 epochs.

    python -m experiments tune cifar10_speedrun_50000 --trials 6
    python -m experiments compare cifar10_speedrun_50000

The recipe of `cifar10_speedrun`, which nobody has published at this batch: no figure to expect.
For an accelerator; how much memory it takes is not known, as it has not been run.
"""

import dataclasses

from experiments.configs import cifar10_speedrun

CONFIG = dataclasses.replace(
  cifar10_speedrun.CONFIG, batch_size=50_000, epochs=40, target=0.9, seeds=3
)
GRID = {name: axes | {"rest": (0.5, 8.0)} for name, axes in cifar10_speedrun.GRID.items()}
