"""Flax models of Hugging Face diffusers, the last version that has them."""

import jax
import jax.numpy as jnp

from experiments.public_models import problem
from experiments.public_models.problem import Collection, Problem

DIFFUSERS = Collection("diffusers", package="diffusers")


@DIFFUSERS.model("U-Net of Stable Diffusion", "Linen")
def unet() -> Problem:
  from diffusers import FlaxUNet2DConditionModel

  model = FlaxUNet2DConditionModel(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=4,
    cross_attention_dim=16,
  )  # fmt: skip
  params = model.init_weights(problem.KEY)

  def loss_fn(params, x, prompt, key):
    keys = jax.random.split(key)
    noise = jax.random.normal(keys[0], x.shape)
    times = jax.random.randint(keys[1], (len(x),), 0, 1000)
    level = jnp.cos(0.5 * jnp.pi * times / 1000)[:, None, None, None]
    noisy = level * x + jnp.sqrt(1 - level**2) * noise
    return problem.squared_error(
      model.apply({"params": params}, noisy, times, prompt).sample, noise
    )

  args = problem.images(4, 16, 16), problem.images(5, 16), problem.KEY
  return Problem(loss_fn, params, args)
