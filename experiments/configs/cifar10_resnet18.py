"""FOP's table 1 (arXiv:2508.13898): ResNet-18 on CIFAR-10 to 91 %, batches of 2,048 to 50,000.

    python -m experiments compare cifar10_resnet18 --batch-sizes 2048 4096 8192 16384 32768 50000

To expect, epochs to 91 % at 2,048: SGD 58, K-FAC 37, FOP 29; FOP at 50,000: 82. For an accelerator;
`cifar10_resnet18_small` ends on two cores. The paper's crop, flip and weight decay; the rates here
are not tuned.
"""

from experiments.configs import Config
from experiments.networks import ResNet
from experiments.optimizers import AdamW, Fop, Kfac, Sgd

CONFIG = Config(
  dataset="cifar10",
  model=ResNet(18),
  batch_size=2048,
  epochs=100,
  target=0.91,
  augmentation=("crop", "flip"),
  precision="bfloat16",
  seeds=5,
  optimizers=("sgd", "adamw", "kfac", "fop"),
  sgd=Sgd(learning_rate=0.4, momentum=0.9, weight_decay=5e-4),
  adamw=AdamW(learning_rate=4e-3, weight_decay=5e-2),
  kfac=Kfac(weight_decay=1e-2),
  fop=Fop(weight_decay=1e-2),
)
