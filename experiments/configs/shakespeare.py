"""A character transformer of 0.2 M on tiny Shakespeare: 300 steps of 4,096 tokens.

    python -m experiments compare shakespeare

Small enough for two cores (minutes a run). Nothing in it is tuned; for figures run `tune` first.
A larger one: `--model.size 3m --epochs 50`.
"""

from experiments.configs import Config
from experiments.networks import LanguageModel
from experiments.optimizers import AdamW

CONFIG = Config(
  dataset="shakespeare",
  model=LanguageModel("0.2m"),
  batch_size=64,
  length=64,
  steps_per_epoch=30,
  epochs=10,
  metric="test_loss",
  target=2.0,
  seeds=3,
  optimizers=("adamw", "muon", "soap", "soap_fisher", "shampoo", "kfac", "ekfac", "fop"),
  adamw=AdamW(learning_rate=1e-2),
)
