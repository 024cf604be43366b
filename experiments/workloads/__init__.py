"""Small training problems of many kinds: what defaults are chosen by, and what tries them."""

from collections.abc import Callable

from experiments.workloads import held_out, images, scales, text
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
# Those that no rate was chosen by. They need no data folder, and the default sweep leaves them out.
HELD_OUT: dict[str, Callable[[], Workload]] = {
  "physics-informed": held_out.physics_informed,
  "denoiser": held_out.denoiser,
  "gru": held_out.gru,
  "vae": held_out.autoencoder_variational,
  "experts": held_out.experts,
  "heads": held_out.heads,
  "lora": held_out.low_rank_adapters,
  "td": held_out.td_learning,
  "small-units": scales.small_units,
  "small-loss": scales.small_loss,
  "small-weights": scales.small_weights,
  "large-inputs": scales.large_inputs,
  "small-batches": scales.small_batches,
  "many-steps": scales.many_steps,
}


def build(name: str, data_dir: str | None = None) -> Workload:
  """The workload of a name in `WORKLOADS` or `HELD_OUT`."""
  return HELD_OUT[name]() if name in HELD_OUT else WORKLOADS[name](data_dir)
