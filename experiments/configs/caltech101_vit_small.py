"""A small ViT on Caltech-101's photographs at 80 pixels: the small stand-in for ImageNet.

    python -m experiments compare caltech101_vit_small

For two cores; nothing in it is tuned.
"""

from experiments.configs import Config
from experiments.networks import ViT
from experiments.optimizers import AdamW

CONFIG = Config(
  dataset="caltech101_80px",
  model=ViT(patch=16, width=64, depth=3, heads=4),
  batch_size=256,
  epochs=5,
  target=0.3,
  augmentation=("flip",),
  seeds=3,
  adamw=AdamW(learning_rate=3e-3),
)
