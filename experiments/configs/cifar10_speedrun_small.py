"""The small sibling of `cifar10_speedrun`: a quarter of the width, three epochs, for two cores.

    python -m experiments compare cifar10_speedrun_small --batch-sizes 500 2000 10000

Nothing in it is tuned.
"""

import dataclasses

from experiments.configs import cifar10_speedrun
from experiments.networks import Speedrun

CONFIG = dataclasses.replace(
  cifar10_speedrun.CONFIG,
  model=Speedrun(width=0.25),
  epochs=3,
  target=0.6,
  precision="float32",
  seeds=3,
)
