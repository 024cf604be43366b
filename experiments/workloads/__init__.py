"""Small training problems of many kinds, on real data: what defaults are chosen by."""

from collections.abc import Callable

from experiments.workloads import images, text
from experiments.workloads.base import Workload

# Name -> builder, called with the data folder (None: as TFDS looks for it).
WORKLOADS: dict[str, Callable[[str | None], Workload]] = {
  "mlp-digits": images.mlp_digits,
  "mlp-fashion": images.mlp_fashion,
  "autoencoder": images.autoencoder_digits,
  "cnn-batchnorm": images.cnn_digits,
  "cnn-plain": images.cnn_cifar,
  "resnet": images.resnet_cifar,
  "vit": images.vit_fashion,
  "long-tail": images.long_tail_fashion,
  "heteroscedastic": images.regression_fashion,
  "contrastive": images.contrastive_fashion,
  "transformer-tied": text.transformer_tied,
  "transformer-scanned": text.transformer_scanned,
  "lstm": text.lstm,
}
