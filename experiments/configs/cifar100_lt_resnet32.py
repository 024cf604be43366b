"""FOP's table 4: ResNet-32 on long-tailed CIFAR-100, imbalance 100 (10,847 images); top-1 error.

    python -m experiments compare cifar100_lt_resnet32 [--imbalance 50]

As `cifar10_lt_resnet32`, with a hundred classes.
"""

import dataclasses

from experiments.configs import cifar10_lt_resnet32

CONFIG = dataclasses.replace(cifar10_lt_resnet32.CONFIG, dataset="cifar100", target=0.35)
