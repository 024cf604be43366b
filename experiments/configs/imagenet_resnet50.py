"""FOP's table 3: ResNet-50 on ImageNet-1K, batches of 1,024 to 8,192, to 75.9 %.

    python -m experiments compare imagenet_resnet50 --batch-sizes 1024 2048 4096 8192

To expect: LARS of MLPerf needs 35 epochs at 1,632 and 42 at 8,192. For a machine of accelerators,
with ImageNet as a TFDS folder; on two cores the whole way, of made-up photographs, is gone by
`--dataset mock --side 64 --model.width 8 --batch-size 64 --epochs 1`. Rates are not tuned.
"""

from experiments.configs import Config
from experiments.networks import ResNet
from experiments.optimizers import Fop, Kfac, Sgd

CONFIG = Config(
  dataset="imagenet2012",
  side=224,
  model=ResNet(50),
  batch_size=1024,
  epochs=60,
  target=0.759,
  label_smoothing=0.1,
  precision="bfloat16",
  seeds=3,
  optimizers=("sgd", "kfac", "fop"),
  sgd=Sgd(learning_rate=0.4, weight_decay=5e-5, nesterov=True),
  kfac=Kfac(weight_decay=1e-3),
  fop=Fop(weight_decay=1e-3),
)
