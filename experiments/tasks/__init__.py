"""What is learnt: batches that the compiled step picks by itself, a loss, and an evaluation."""

from experiments.configs import Config
from experiments.data import byte_pairs, images, long_tailed
from experiments.data import text as texts
from experiments.tasks.base import OF_CORPORA, OF_PHOTOGRAPHS, OF_TEXT, check_unused
from experiments.tasks.base import Task as Task
from experiments.tasks.classification import classification
from experiments.tasks.language import language
from experiments.tasks.streaming import streamed


def _corpus(config: Config) -> texts.Text:
  if not config.files:
    raise SystemExit("--dataset byte_pairs needs --files, those of the corpus.")
  return byte_pairs.byte_pairs(config.files, config.vocabulary, config.tokenizer)


TEXTS = {
  "shakespeare": lambda config: texts.shakespeare(config.data_dir),
  "byte_pairs": _corpus,
}


def load(config: Config, tuning: bool = False) -> Task:
  """The task of a configuration; for tuning on a part held out of the training examples."""
  if config.schedule != "staircase":
    check_unused(config, ("stair", "stair_epochs"), f"a schedule that is {config.schedule}")
  if config.dataset in TEXTS:
    if config.dataset != "byte_pairs":
      check_unused(config, OF_CORPORA, "a text that is given by characters")
    text = TEXTS[config.dataset](config)
    return language(config, texts.held_out(text) if tuning else text)
  check_unused(config, OF_TEXT, "images")
  if config.side:
    if tuning:
      raise SystemExit("Streamed data sets are not held out of: tune on a small sibling.")
    return streamed(config)
  check_unused(config, OF_PHOTOGRAPHS, "images that live on the device")
  data = images.load(config.dataset, config.data_dir)
  if config.imbalance > 1:
    data = long_tailed(data, config.imbalance)
  if config.examples:
    data = images.subset(data, config.examples)
  return classification(config, images.holdout(data) if tuning else data)
