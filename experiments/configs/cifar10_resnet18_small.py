"""The small sibling of `cifar10_resnet18`: an eighth of the width, 10,000 images, for two cores.

    python -m experiments compare cifar10_resnet18_small [--batch-sizes 250 1000 5000]

The same path in float32; half a minute an epoch. Nothing in it is tuned.
"""

import dataclasses

from experiments.configs import cifar10_resnet18
from experiments.networks import ResNet

CONFIG = dataclasses.replace(
  cifar10_resnet18.CONFIG,
  model=ResNet(18, width=8),
  examples=10_000,
  batch_size=500,
  epochs=6,
  target=0.45,
  precision="float32",
  seeds=3,
)
