"""Default comparison: an MLP on scikit-learn's handwritten digits, large batches, little data.

SGD, AdamW, Muon and SOAP are tuned: of a grid of 16 points (below) the one at which all runs
reached the target on held-out training images, in the fewest epochs, by

    python -m experiments tune digits_mlp --seeds 5 --first-seed 100

The grids were moved until that point was inside them. K-FAC and FOP have their defaults.
"""

from experiments.configs import Config
from experiments.networks import Mlp
from experiments.optimizers import AdamW, Muon, Sgd, Soap

CONFIG = Config(
  dataset="digits",
  model=Mlp(hidden=(256, 128)),
  batch_size=256,
  looped=True,
  epochs=40,
  target=0.97,
  sgd=Sgd(learning_rate=0.3, momentum=0.8),
  adamw=AdamW(learning_rate=3e-2, weight_decay=1.0),
  muon=Muon(learning_rate=0.1, weight_decay=0.1),
  soap=Soap(learning_rate=0.03, weight_decay=1.0),
)

GRID = {
  "sgd": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "momentum": (0.5, 0.8, 0.9, 0.95)},
  "adamw": {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (1e-2, 1e-1, 1.0, 3.0)},
  "muon": {"learning_rate": (0.01, 0.03, 0.1, 0.3), "weight_decay": (1e-3, 1e-2, 1e-1, 1.0)},
  "soap": {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (1e-1, 1.0, 3.0, 10.0)},
  "kfac": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "relative_damping": (0.1, 0.3, 1.0, 3.0)},
  "fop": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "relative_damping": (0.1, 0.3, 1.0, 3.0)},
}
