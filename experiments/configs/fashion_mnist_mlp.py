"""An MLP on Fashion-MNIST (60,000 images of clothes, 28 x 28), large batches.

SGD and AdamW are tuned: of a grid of 16 points (below) the one that reached the target on held-out
training images in the fewest epochs, then with the lowest loss at the end, by

    python -m experiments tune fashion_mnist_mlp --seeds 1 --first-seed 100

SGD reached it nowhere in the grid: its point is the one of lowest loss, inside the grid. Muon and
SOAP have the rates that were best on the digits, K-FAC and FOP their defaults.
"""

from experiments.configs import Config
from experiments.networks import Mlp
from experiments.optimizers import AdamW, Muon, Sgd, Soap

CONFIG = Config(
  dataset="fashion_mnist",
  model=Mlp(hidden=(256, 128)),
  batch_size=2048,
  looped=True,
  epochs=10,
  target=0.88,
  seeds=3,
  sgd=Sgd(learning_rate=0.3, momentum=0.8),
  adamw=AdamW(learning_rate=3e-2, weight_decay=0.1),
  muon=Muon(learning_rate=0.1, weight_decay=0.1),
  soap=Soap(learning_rate=0.03, weight_decay=0.1),
)

GRID = {
  "sgd": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "momentum": (0.5, 0.8, 0.9, 0.95)},
  "adamw": {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (1e-3, 1e-2, 1e-1, 1.0)},
  "muon": {"learning_rate": (0.01, 0.03, 0.1, 0.3), "weight_decay": (1e-3, 1e-2, 1e-1, 1.0)},
  "soap": {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (1e-3, 1e-2, 1e-1, 1.0)},
  "kfac": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "relative_damping": (0.1, 0.3, 1.0, 3.0)},
  "fop": {"learning_rate": (0.03, 0.1, 0.3, 1.0), "relative_damping": (0.1, 0.3, 1.0, 3.0)},
}
