"""FOP's table 2: T2T-ViT-14 on a hundred classes of ImageNet, batches of 512 to 4,096.

    python -m experiments compare imagenet_t2t_vit14 --classes n01440764 ... --batch-sizes 512 4096

The paper says neither which hundred classes nor which T2T-ViT-14: name yours by `--classes` (none:
all thousand); the module is the official performer. For an accelerator. Rates are not tuned.
"""

from experiments.configs import Config
from experiments.networks import T2tViT
from experiments.optimizers import AdamW, Fop, Kfac

CONFIG = Config(
  dataset="imagenet2012",
  side=224,
  model=T2tViT(),
  batch_size=512,
  epochs=100,
  target=0.7,
  label_smoothing=0.1,
  mixup=0.2,
  precision="bfloat16",
  seeds=3,
  optimizers=("adamw", "kfac", "fop"),
  adamw=AdamW(learning_rate=1e-3, weight_decay=5e-2),
  kfac=Kfac(weight_decay=1e-3),
  fop=Fop(weight_decay=1e-3),
)
