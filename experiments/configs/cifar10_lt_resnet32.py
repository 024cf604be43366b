"""FOP's table 4: ResNet-32 on long-tailed CIFAR-10, imbalance 100 (12,406 images); top-1 error.

    python -m experiments compare cifar10_lt_resnet32 [--imbalance 50]

To expect: the paper has 2.3 to 3.3 points less error than its baselines. For an accelerator;
`--model.width 4 --epochs 5` ends on two cores. Rates are not tuned.
"""

from experiments.configs import Config
from experiments.networks import ResNet
from experiments.optimizers import AdamW, Sgd

CONFIG = Config(
  dataset="cifar10",
  imbalance=100,
  model=ResNet(32, width=16),
  batch_size=512,
  epochs=200,
  target=0.7,
  augmentation=("crop", "flip"),
  seeds=3,
  optimizers=("sgd", "adamw", "kfac", "fop"),
  sgd=Sgd(learning_rate=0.2, weight_decay=2e-4),
  adamw=AdamW(learning_rate=3e-3, weight_decay=5e-2),
)
