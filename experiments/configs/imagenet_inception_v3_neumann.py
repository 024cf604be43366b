"""The Neumann optimizer's Inception-V3 on ImageNet-1K.

    python -m experiments compare imagenet_inception_v3_neumann

To expect (Krishnan et al. 2018): 20.8 % top-1 error, the baseline 21.7 %. As
`imagenet_resnet50_neumann`, for a machine of accelerators; the whole way on two cores by `--dataset
mock --side 80 --batch-size 16 --epochs 1` and `--model.width 0.125`.
"""

import dataclasses

from experiments.configs import imagenet_resnet50_neumann
from experiments.networks import Inception

CONFIG = dataclasses.replace(imagenet_resnet50_neumann.CONFIG, model=Inception("v3"), side=299)
