"""Default comparison: an MLP on scikit-learn's handwritten digits, large batches, little data."""

from experiments.configs import Compare
from experiments.optimizers import AdamW, Fop, Kfac, Sgd

CONFIG = Compare(
  dataset="digits",
  hidden=(256, 128),
  batch_size=256,
  epochs=40,
  target=0.97,
  sgd=Sgd(learning_rate=0.1),
  adamw=AdamW(learning_rate=1e-3),
  kfac=Kfac(learning_rate=3e-3, damping=1e-3),
  fop=Fop(learning_rate=3e-3, damping=1e-3),
)

GRID = {
  "sgd": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "momentum": (0.8, 0.9, 0.95)},
  "adamw": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (1e-3, 1e-2, 1e-1)},
  "kfac": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "damping": (1e-4, 1e-3, 1e-2)},
  "fop": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "damping": (1e-4, 1e-3, 1e-2)},
}
