"""SOAP's language model of 360 M on C4: batches of 2 M tokens, 20 tokens a parameter.

    python -m experiments compare c4_360m --files .../c4-train.*.json.gz --tokenizer tokenizer.json

To expect (Vyas et al. 2024): SOAP needs at least 40 % fewer steps than AdamW to AdamW's final loss
at a refresh every ten steps, and 20 % fewer than Shampoo; later studies, with both tuned, find 1.1
to 1.4 times. The paper has T5's tokenizer (give its tokenizer.json; without one a vocabulary is
trained on the files), a cosine, and does not give its rates: these are the code's. Set `target` to
AdamW's final loss. For a machine of accelerators; the whole way on two cores: `--model.size 0.2m
--length 64 --batch-size 8 --micro-batches 2 --epochs 1 --steps-per-epoch 3`.
"""

from experiments.configs import Config
from experiments.networks import LanguageModel
from experiments.optimizers import AdamW, Muon, Shampoo, Soap, SoapMuon

CONFIG = Config(
  dataset="byte_pairs",
  model=LanguageModel("360m", remat=True),
  batch_size=2048,
  length=1024,
  steps_per_epoch=100,
  epochs=36,  # 3,600 steps, 7.5 billion tokens
  micro_batches=64,
  held_out=1_048_576,
  metric="test_loss",
  target=3.0,
  precision="bfloat16",
  warmup=1 / 6,
  seeds=1,
  optimizers=("adamw", "muon", "soap", "soap_muon", "shampoo", "kfac"),
  adamw=AdamW(learning_rate=3e-3, weight_decay=1e-4, b1=0.95, b2=0.95),
  muon=Muon(learning_rate=0.02),
  soap=Soap(learning_rate=3e-3, weight_decay=1e-4),
  soap_muon=SoapMuon(learning_rate=0.02, weight_decay=1e-4),
  shampoo=Shampoo(learning_rate=3e-3),
)
