"""The small sibling of `cifar10_resnet18`: a narrow ResNet-18, three epochs, for two cores.

    python -m experiments compare cifar10_resnet18_small --batch-sizes 500 2000 10000

The same path, float32, an eighth of the width. Nothing in it is tuned.
"""

import dataclasses

from experiments.configs import cifar10_resnet18
from experiments.networks import ResNet

CONFIG = dataclasses.replace(
  cifar10_resnet18.CONFIG,
  model=ResNet(18, width=8),
  batch_size=2000,
  epochs=3,
  target=0.5,
  precision="float32",
  seeds=3,
)
