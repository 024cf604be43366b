"""The recipe of the public CIFAR-10 speed runs (Jordan, arXiv:2404.00498): 94.0 %, batch 2,000.

    python -m experiments compare cifar10_speedrun

To expect: Muon 94.0 % in 8 epochs (200 steps, n = 200), of the authors' code. Ours has its network,
label smoothing, alternating flips, shifts by two pixels and evaluation over six views of an image;
what differs: the whitening's bias trains to the end, one rate for all layers. For an accelerator;
`cifar10_speedrun_small` ends on two cores. Other batches: `--batch-sizes 2000 10000 25000 50000`.
"""

from experiments.configs import Config
from experiments.networks import Speedrun
from experiments.optimizers import Muon, Sgd

CONFIG = Config(
  dataset="cifar10",
  model=Speedrun(),
  batch_size=2000,
  epochs=8,
  target=0.94,
  schedule="linear",
  warmup=0.0,
  augmentation=("alternating_flip", "shift"),
  views="shifted",
  label_smoothing=0.2,
  precision="bfloat16",
  seeds=25,
  optimizers=("sgd", "muon", "soap", "kfac", "fop"),
  sgd=Sgd(learning_rate=0.5, momentum=0.85, nesterov=True, weight_decay=5e-4),
  muon=Muon(learning_rate=0.24, beta=0.6),
)
