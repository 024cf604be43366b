"""The Neumann optimizer's Inception-ResNet-V2 on ImageNet-1K.

    python -m experiments compare imagenet_inception_resnet_v2_neumann

To expect (Krishnan et al. 2018): 19.5 % top-1 error, the baseline 20.3 %. As
`imagenet_resnet50_neumann`, for a machine of accelerators; the whole way on two cores by `--dataset
mock --side 80 --batch-size 16 --epochs 1` and `--model.width 0.125`.
"""

import dataclasses

from experiments.configs import imagenet_resnet50_neumann
from experiments.networks import Inception

CONFIG = dataclasses.replace(
  imagenet_resnet50_neumann.CONFIG, model=Inception("resnet_v2"), side=299
)
