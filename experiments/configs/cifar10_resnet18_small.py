"""The small sibling of `cifar10_resnet18`: an eighth of the width, 5,000 images, for two cores.

    python -m experiments compare cifar10_resnet18_small [--batch-sizes 125 500 2500]

The same path in float32; a minute or two a run. Nothing in it is tuned.
"""

import dataclasses

from experiments.configs import cifar10_resnet18
from experiments.networks import ResNet

CONFIG = dataclasses.replace(
  cifar10_resnet18.CONFIG,
  model=ResNet(18, width=8),
  examples=5_000,
  batch_size=250,
  epochs=5,
  target=0.45,
  precision="float32",
  seeds=3,
)
