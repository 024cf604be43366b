"""SOAP's language model of 660 M on C4: as `c4_360m`, 6,600 steps.

    python -m experiments compare c4_660m --files .../c4-train.*.json.gz --tokenizer tokenizer.json

To expect, and how to go the whole way on two cores: see there.
"""

import dataclasses

from experiments.configs import c4_360m
from experiments.networks import LanguageModel

CONFIG = dataclasses.replace(c4_360m.CONFIG, model=LanguageModel("660m", remat=True), epochs=66)
