"""Small language models, in Flax Linen and NNX."""

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

NANODO = Collection(
  "nanodo",
  repository="google-deepmind/nanodo",
  commit="10aefdeed40a63293daf112b91a5538cd24fa3a4",
)


@NANODO.model("decoder, rematerialised", "Linen")
def decoder() -> Problem:
  from nanodo import model

  config = model.DoConfig(D=32, H=4, L=16, N=2, V=96, F=64, remat=True)
  tokens = problem.labels(96, 16)
  return problem.linen(model.TransformerDo(config), [tokens], problem.next_token, tokens)
