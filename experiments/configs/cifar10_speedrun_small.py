"""The small sibling of `cifar10_speedrun`: a quarter of the width, 5,000 images, for two cores.

    python -m experiments compare cifar10_speedrun_small [--batch-sizes 125 500 2500]

The same path in float32, evaluated on the images as they are. Nothing in it is tuned.
"""

import dataclasses

from experiments.configs import cifar10_speedrun
from experiments.networks import Speedrun
from experiments.parts import Parts

CONFIG = dataclasses.replace(
  cifar10_speedrun.CONFIG,
  model=Speedrun(width=0.25),
  examples=5_000,
  batch_size=250,
  parts=Parts(head=168.0, biases=13.0, weight_decay=5e-4),  # the recipe's rates at this batch
  epochs=5,
  target=0.5,
  views="one",
  precision="float32",
  seeds=3,
)
GRID = cifar10_speedrun.GRID
