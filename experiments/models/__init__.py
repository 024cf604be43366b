"""The networks of the papers, in Flax NNX, each a `Model`: `init(seed)` and `apply(params, ...)`.

  ============== ===========================================================================
  `mlp`          multilayer perceptrons; the MNIST autoencoder
  `resnet`       ResNet-18 and ResNet-32 for CIFAR; ResNet-50 and ResNet-101 for ImageNet
  `inception`    Inception-V3, Inception-ResNet-V2
  `vit`          vision transformers: S/16, B/16 and smaller
  `t2t_vit`      T2T-ViT-14
  `transformer`  decoder-only language models, 0.2 M to the SOAP paper's 360 M and 660 M
  `speedrun`     the network of the public CIFAR-10 speed runs
  ============== ===========================================================================

Images are `[batch, height, width, channels]`, normalised; tokens `[batch, length]`. `dtype` is
what a model computes in; parameters and BatchNorm's statistics are always float32.
"""

from experiments.models.functional import Model, from_module, parameter_count

__all__ = ["Model", "from_module", "parameter_count"]
