"""An MLP on CIFAR-10 (50,000 colour photographs, 32 x 32), large batches.

SGD and AdamW have the values of `fashion_mnist_mlp`, but AdamW's rate, which is a tenth, as AdamW
learns nothing at the other. Not tuned on these images: for figures run `tune cifar10_mlp` first.
K-FAC and FOP have their defaults.
"""

from experiments.configs import Config
from experiments.networks import Mlp
from experiments.optimizers import AdamW, Muon, Sgd, Soap

CONFIG = Config(
  dataset="cifar10",
  model=Mlp(hidden=(512, 256)),
  batch_size=2048,
  looped=True,
  epochs=10,
  target=0.52,
  seeds=3,
  sgd=Sgd(learning_rate=0.3, momentum=0.8),
  adamw=AdamW(learning_rate=3e-3, weight_decay=0.1),
  muon=Muon(learning_rate=0.03, weight_decay=0.1),
  soap=Soap(learning_rate=3e-3, weight_decay=0.1),
)

GRID = {
  "sgd": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "momentum": (0.5, 0.8, 0.9, 0.95)},
  "adamw": {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (1e-3, 1e-2, 1e-1, 1.0)},
  "muon": {"learning_rate": (0.01, 0.03, 0.1, 0.3), "weight_decay": (1e-3, 1e-2, 1e-1, 1.0)},
  "soap": {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (1e-3, 1e-2, 1e-1, 1.0)},
  "kfac": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "relative_damping": (0.1, 0.3, 1.0, 3.0)},
  "fop": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "relative_damping": (0.1, 0.3, 1.0, 3.0)},
}
