"""The Neumann optimizer's ResNet-50 on ImageNet-1K, batches of 1,600 to 32,000.

    python -m experiments compare imagenet_resnet50_neumann --batch-sizes 1600 4000 8000 16000 32000

To expect (Krishnan et al. 2018, table 3): 23.0, 23.0, 23.1, 23.5 and 24.0 % top-1 error after 210
to 258 epochs, the baseline 23.9 % at 1,600. The rate is linear in the batch after five epochs of
warm-up, then times 0.3 every 40; the paper does not say which rate: this one is the usual 0.1 for
256 images, scaled, and is not tuned. For a machine of accelerators; `--micro-batches` divides a
batch. The whole way on two cores:
`--dataset mock --side 80 --model.width 8 --batch-size 64 --epochs 1`.
"""

from experiments.configs import Config
from experiments.networks import ResNet
from experiments.optimizers import Neumann, Sgd

CONFIG = Config(
  dataset="imagenet2012",
  side=224,
  model=ResNet(50),
  batch_size=1600,
  scale_rate="linear",
  epochs=226,
  target=0.77,
  schedule="staircase",
  warmup=5 / 226,
  label_smoothing=0.1,
  precision="bfloat16",
  seeds=1,
  optimizers=("sgd", "neumann"),
  sgd=Sgd(learning_rate=0.6, weight_decay=5e-5, nesterov=True),
  neumann=Neumann(learning_rate=0.6, weight_decay=5e-5),
)
