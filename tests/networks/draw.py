"""What a network is drawn from: how often each kind of block comes, and values of its fields."""

import dataclasses

from hypothesis import strategies as st

from networks.blocks import (
  BIAS_NUMBERS,
  BIAS_TRAPS,
  FORWARD,
  LOOKUPS,
  NUMBERS,
  ODD,
  PENALTIES,
  REVERSE,
  VIEWS,
  Dense,
  Derivative,
  Embed,
  Joined,
  LowRank,
  Norm,
  Numbered,
  Odd,
  Viewed,
)
from networks.network import AROUND, AROUND_TOKENS, EMPIRICAL, EXACT, Blocks, Network
from networks.repeated import EXPERTS, REPEATS, STACKED, STACKS, Experts, Shared, Stack
from networks.spelling import ACTIVATIONS, CLASSES, PRODUCTS, STORED, SUMS, WIDTHS, WRAPS, Spelling
from networks.tokens import QKV, Attention, Convolve, Recurrent

_WRAP = ["none"] * 5 + list(WRAPS)
SPELLING = {"product": PRODUCTS, "sum": SUMS} | dict.fromkeys(
  ["around_product", "around_sum", "around_both"], _WRAP
)


def _spelling(rng):
  return _draw(rng, Spelling, SPELLING)


def _second_spelling(rng):
  return rng.choice([None, _spelling(rng)])


DENSE = {
  "outputs": WIDTHS,
  "bias": ["none", "bias", "bias"],
  "stored": STORED,
  "reading": range(3),
  "spelling": _spelling,
  "residual": ["none", "before", "after"],
  "activation": ACTIVATIONS,
  "single": [False, False, False, True],
}
BLOCKS = [
  (6, Dense, DENSE),
  (1, Dense, DENSE | {"bias": BIAS_NUMBERS}),
  (1, Dense, DENSE | {"bias": BIAS_TRAPS}),
  (1, Dense, DENSE | {"penalty_on_w": [*PENALTIES, "spectral"]}),
  (0.3, Dense, DENSE | {"bias": ["bias"], "penalty_on_b": ["l2"]}),
  (
    3,
    Shared,
    {
      "times": [2, 3],
      "bias": ["none", "same", "same", "some"],
      "repeat": REPEATS,
      "stored": STORED,
      "spelling": _spelling,
      "last": _second_spelling,
    },
  ),
  (
    4,
    Stack,
    {
      "layers": [2, 4],
      "bias": ["none", "stacked", "stacked", "shared"],
      "form": STACKS,
      "stored": STACKED,
      "spelling": _spelling,
    },
  ),
  (
    2,
    Experts,
    {
      "outputs": WIDTHS,
      "bias": ["none", "outside", "vmap", "map"],
      "joint": ["no", "no", "no", "einsum", "vmap"],
      "form": EXPERTS,
    },
  ),
  (
    1,
    LowRank,
    {
      "outputs": WIDTHS,
      "form": ["apart", "scaled", "product", "merged"],
      "bias": [True, False],
    },
  ),
  (3, Viewed, {"use": VIEWS, "bias": [True, False], "besides": [True, False]}),
  (3, Odd, {"use": ODD, "bias": [True, False], "besides": [True, False]}),
  (1, Norm, {"after": [True, False]}),
  (2, Embed, {"look_up": LOOKUPS}),
  (1, Joined, {"axis": [0, 1], "late": [True, False], "bias": [True, False]}),
  (1.5, Numbered, {"outputs": WIDTHS, "number": NUMBERS}),
  (
    3,
    Derivative,
    {
      "form": [*FORWARD, *REVERSE],
      "linear": [True, False],
      "bias": [True, True, False],
      "spelling": _spelling,
    },
  ),
]
TOKEN_BLOCKS = [
  (
    3,
    Convolve,
    {
      "kernel": [1, 2, 3],
      "stride": [1, 2],
      "dilation": [1, 1, 2],
      "groups": [1, 1, 2],
      "padding": [(2, 2), (1, 2), (2, 1)],
      "first": [True, False],
      "bias": [True, False],
    },
  ),
  (0.5, Dense, DENSE | {"bias": ["positions"]}),
  (
    3,
    Recurrent,
    {
      "outputs": WIDTHS,
      "bias": ["none", "sum", "input", "state"],
      "form": ["scan", "loop", "precomputed", "joint"],
      "checkpoint": [True, False],
      "reverse": [True, False],
      "spelling": _spelling,
    },
  ),
  (3, Attention, {"qkv": [*QKV, "apart", "fused"], "bias": [True, False], "around": _WRAP}),
]
HEAD = {
  "outputs": [CLASSES],
  "bias": ["bias", "none"],
  "stored": ["plain", "transposed", "flat", "leading"],
  "activation": ["softplus"],
}
NETWORK = {
  "groups": [1, 2, 2, 2, 3],
  "micro_batches": [1, 1, 2],
  "refresh": ["true", "both", "traced"],
  "seed": range(100),
}
# Kinds of blocks at fixed points: lookups at constant indices are views, and in a scan over uses
# there is no saying how many points there are.
AT_POINTS = (Dense, LowRank, Norm, Joined, Numbered, Attention, Convolve)
# Kinds that know no other token, nor how many rows a constant has.
OF_A_TOKEN = (LowRank, Norm, Joined, Numbered, Embed, Shared, Stack, Odd)


def _draw(rng, kind, options, **fields):
  """`kind` with each field drawn from a list, or by a function of `rng`."""
  for name, values in options.items():
    fields[name] = values(rng) if callable(values) else rng.choice(list(values))
  return kind(**fields)


def _block(rng, tokens, fixed):
  table = BLOCKS + (TOKEN_BLOCKS if tokens else [])
  if fixed:
    table = [row for row in table if row[1] in AT_POINTS]
  ((_, kind, options),) = rng.choices(table, [weight for weight, *_ in table])
  block = _draw(rng, kind, options)
  if not isinstance(block, Dense):
    return block
  if fixed and block.bias == "positions":  # a table at fixed points is a penalty
    block = dataclasses.replace(block, bias="bias")
  if block.spelling.bias == "either" and block.penalty_on_w == "spectral":
    block = dataclasses.replace(block, penalty_on_w="l2")  # turned, it makes the bias count in G
  return block


def _tree(rng, tokens, fixed):
  """A block, or two of them joined."""
  if rng.random() < 2 / 3:
    return _block(rng, tokens, fixed)
  blocks = (_block(rng, tokens, fixed), _block(rng, tokens, fixed))
  how = rng.choice(["row", "residual", "sum", "gate"])
  return Blocks(blocks, how, _around(rng, tokens, blocks))


def _around(rng, tokens, blocks):
  of_a_token = [isinstance(b, OF_A_TOKEN) or _is_plain(b) for b in blocks]
  if tokens and all(of_a_token) and rng.random() < 0.5:
    return rng.choice(list(AROUND_TOKENS))
  return rng.choice(["none", rng.choice(list(AROUND))])


def _may_double(blocks):
  """A constant counts the same with each example twice, but in a loop over the two."""
  return not any(
    isinstance(b, Blocks) and b.around in ("map", "scan of checkpoints") for b in blocks
  )


def _is_plain(block):
  return isinstance(block, Dense) and block.bias != "positions"


def draw_network(rng) -> Network:
  """A random network, from a `random.Random`."""
  tokens, aux = rng.choice([0, 4]), rng.choice([True, False])
  fixed = rng.choice([0, 0, 0, 0, 0, 5])
  fisher = rng.choice(["empirical"] * 5 + ["exact"])
  body = [_tree(rng, tokens, fixed) for _ in range(rng.choice([1, 2]))]
  blocks = (*body, _draw(rng, Dense, HEAD))
  around = _around(rng, tokens, blocks)
  if around == "twice the batch" and not _may_double(body):
    around = "none"
  return _draw(
    rng,
    Network,
    NETWORK,
    body=Blocks(blocks, around=around),
    tokens=tokens,
    loss=rng.choice(EXACT if fisher == "exact" else EMPIRICAL),
    fisher=fisher,
    fixed=fixed,
    weak=rng.choice([False] * 4 + [True]),
    aux=aux,
    unused=aux and rng.choice([True, False]),
  )


# Drawn evenly: left to itself, hypothesis repeats and varies a few of the many options.
networks = st.randoms(use_true_random=True).map(draw_network)
