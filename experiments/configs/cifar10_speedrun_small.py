"""The small sibling of `cifar10_speedrun`: a quarter of the width, 10,000 images, for two cores.

    python -m experiments compare cifar10_speedrun_small [--batch-sizes 250 1000 5000]

The same path in float32. Nothing in it is tuned.
"""

import dataclasses

from experiments.configs import cifar10_speedrun
from experiments.networks import Speedrun

CONFIG = dataclasses.replace(
  cifar10_speedrun.CONFIG,
  model=Speedrun(width=0.25),
  examples=10_000,
  batch_size=500,
  epochs=6,
  target=0.5,
  precision="float32",
  seeds=3,
)
