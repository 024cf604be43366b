"""Data sets of the benchmarks.

  images.py        small sets, decoded once: digits, MNIST, Fashion-MNIST, CIFAR, Caltech-101
  long_tail.py     long-tailed CIFAR-10 and CIFAR-100
  augmentation.py  pad-crop, flip, cutout, mixup, random resized crop, inside the jitted step;
                   means over views of an image, in evaluation
  order.py         which examples a step sees, and which mirrored: a function of seed and step
  text.py          characters of tiny Shakespeare, and windows of a text
  byte_pairs.py    corpora of files, in byte pairs
  streaming.py     large sets, read by workers as they are trained on: ImageNet, ImageNet-100
  mock.py          made-up photographs in the place of what is too large

Below these: cache.py, folders.py (TFDS folders) and photographs.py (decoding and cropping).
Nothing here imports JAX but what runs inside the step.
"""

from experiments.data.images import Data as Data
from experiments.data.images import holdout as holdout
from experiments.data.images import load as load
from experiments.data.long_tail import long_tailed as long_tailed
