"""The Neumann optimizer's ResNet-101 on ImageNet-1K.

    python -m experiments compare imagenet_resnet101_neumann

To expect (Krishnan et al. 2018): 21.7 % top-1 error, the baseline 22.6 %. As
`imagenet_resnet50_neumann`, for a machine of accelerators; the whole way on two cores by `--dataset
mock --side 80 --batch-size 16 --epochs 1` and `--model.width 8`.
"""

import dataclasses

from experiments.configs import imagenet_resnet50_neumann
from experiments.networks import ResNet

CONFIG = dataclasses.replace(imagenet_resnet50_neumann.CONFIG, model=ResNet(101), side=224)
