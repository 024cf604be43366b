"""The recipe of the public CIFAR-10 speed runs (Jordan, arXiv:2404.00498): 94.0 %, batch 2,000.

    python -m experiments compare cifar10_speedrun

To expect: Muon 94.0 % in 8 epochs (200 steps, n = 200), of the authors' code. Ours has its network,
label smoothing, alternating flips, shifts by two pixels, evaluation over six views of an image, and
SGD for head and biases, with rates of their own. Filters have steps relative to their norm, which
the authors' Muon comes to, so that every optimizer can stand in its place. For an accelerator;
`cifar10_speedrun_small` ends on two cores. Other batches: `--batch-sizes 2000 10000 25000 50000`.
"""

from experiments.configs import Config
from experiments.networks import Speedrun
from experiments.optimizers import Fop, Kfac, KfacPolar, Muon, Sgd, Soap, SoapMuon
from experiments.parts import Parts

# The best of six points of GRID each, drawn by `tune --trials 6 --seeds 1`; of SGD another than of
# the others. Muon's 0.24 times the length of its direction, the recipe's, is 0.2 here.
RATE, REST, MOMENTUM = 0.188, 0.727, 0.609

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
  optimizers=("sgd", "muon", "soap", "soap_muon", "kfac", "kfac_polar", "fop"),
  parts=Parts(),
  sgd=Sgd(0.0517, 1.54, momentum=0.825, nesterov=True),
  muon=Muon(RATE, REST, beta=MOMENTUM),
  soap=Soap(RATE, REST, weight_decay=0.0, b1=MOMENTUM),
  soap_muon=SoapMuon(RATE, REST, weight_decay=0.0, b1=MOMENTUM),
  kfac=Kfac(RATE, REST, momentum=MOMENTUM),
  kfac_polar=KfacPolar(RATE, REST, momentum=MOMENTUM),
  fop=Fop(RATE, REST, momentum=MOMENTUM),
)
GRID = {
  name: {"learning_rate": (0.05, 0.4), "rest": (0.5, 2.0), momentum: (0.6, 0.85)}
  for name, momentum in {
    "sgd": "momentum",
    "muon": "beta",
    "soap": "b1",
    "soap_muon": "b1",
    "kfac": "momentum",
    "kfac_polar": "momentum",
    "fop": "momentum",
  }.items()
}
