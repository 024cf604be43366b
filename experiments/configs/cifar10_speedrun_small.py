"""The small sibling of `cifar10_speedrun`: a quarter of the width, 5,000 images, for two cores.

    python -m experiments compare cifar10_speedrun_small [--batch-sizes 125 500 2500]

The same path in float32. Nothing in it is tuned.
"""

import dataclasses

from experiments.configs import cifar10_speedrun
from experiments.networks import Speedrun

CONFIG = dataclasses.replace(
  cifar10_speedrun.CONFIG,
  model=Speedrun(width=0.25),
  examples=5_000,
  batch_size=250,
  epochs=5,
  target=0.5,
  precision="float32",
  seeds=3,
)
