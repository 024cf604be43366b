"""Corpora of files in byte pairs, by the `tokenizers` library: an extra of its own.

The vocabulary is trained on the corpus, or read from a `tokenizer.json`. Ids are made once, into a
file of the cache that is read by memory map: a corpus may be larger than memory.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from experiments.data import cache
from experiments.data.text import Text, id_type, split

END = "<|endoftext|>"  # after every document, where the vocabulary has it
DOCUMENTS = 1000  # in one call of the tokenizer, which works on them in parallel


def byte_pairs(
  files: Sequence[str | os.PathLike],
  vocabulary: int = 50_257,
  tokenizer: str | os.PathLike | None = None,
  validation: float = 0.01,
) -> Text:
  """A corpus in byte pairs.

  Args:
    files: read in this order; see `documents`. C4 is `en/c4-train.*.json.gz` of
      https://huggingface.co/datasets/allenai/c4.
    vocabulary: how large a vocabulary to train on these files, `END` and the 256 bytes included. A
      small corpus may give fewer.
    tokenizer: a `tokenizer.json` in place of that.
    validation: the part at the end that is not trained on.

  Raises:
    SystemExit: where `tokenizers` is not installed, or a file is not there, with what to do.
  """
  tokenizers = _library()
  paths = [pathlib.Path(file).expanduser() for file in files]
  given = None if tokenizer is None else pathlib.Path(tokenizer).expanduser()
  for path in filter(None, [*paths, given]):
    if not path.exists():
      raise SystemExit(f"No {path}.")
  model = tokenizers.Tokenizer.from_file(str(given or tokenizer_file(paths, vocabulary)))
  size = model.get_vocab_size()
  path = cache.folder() / f"byte_pairs-{_digest(model.to_str(), _state(paths))}.npy"
  if not path.exists():
    _write(path, _ids(model, documents(paths)), id_type(size))
  decode = lambda ids: model.decode([int(i) for i in ids], skip_special_tokens=False)
  return split(np.load(path, mmap_mode="r"), validation, size, decode)


def tokenizer_file(paths: Sequence[pathlib.Path], vocabulary: int) -> pathlib.Path:
  """The `tokenizer.json` of a byte-level vocabulary trained on these files, once."""
  tokenizers = _library()
  path = cache.folder() / f"tokenizer-{vocabulary}-{_digest(_state(paths))}.json"
  if not path.exists():
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = byte_level(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocabulary,
      special_tokens=[END],
      initial_alphabet=byte_level.alphabet(),
      show_progress=False,
    )
    model.train_from_iterator(documents(paths), trainer)
    with cache.replacing(path) as file:
      file.write(model.to_str().encode())
  return path


def documents(paths: Iterable[pathlib.Path]) -> Iterator[str]:
  """The texts of files, one after the other.

  A `.json` or `.jsonl` file has a document a line, its `text` field (C4's form); any other is one
  document in UTF-8, which is in memory at once. Each may be compressed by gzip (`.gz`).
  """
  for path in paths:
    compressed = path.suffix == ".gz"
    lines = (path.with_suffix("") if compressed else path).suffix in (".json", ".jsonl")
    with (gzip.open if compressed else open)(path, "rt", encoding="utf-8") as file:
      if lines:
        yield from (json.loads(line)["text"] for line in file if line.strip())
      else:
        yield file.read()


def _ids(model: Any, texts: Iterable[str]) -> Iterator[list[int]]:
  end = model.token_to_id(END)
  texts = iter(texts)
  while part := list(itertools.islice(texts, DOCUMENTS)):
    for encoding in model.encode_batch(part, add_special_tokens=False):
      yield encoding.ids if end is None else [*encoding.ids, end]


def _write(path: pathlib.Path, ids: Iterator[list[int]], dtype: np.dtype) -> None:
  """An .npy file of all ids, without holding them: the header last, when their number is known."""
  header = lambda count: {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
  with cache.replacing(path) as file:
    np.lib.format.write_array_header_1_0(file, header(10**18))  # room for any number
    begin, count = file.tell(), 0
    for document in ids:
      count += len(document)
      file.write(np.array(document, dtype).tobytes())
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header(count))
    if file.tell() != begin:
      raise RuntimeError("NumPy's header has another length than before.")


def _state(paths: Sequence[pathlib.Path]) -> str:
  """What tells whether a file is another one: its path, size and time."""
  states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
  return repr(states)


def _digest(*parts: str) -> str:
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _library() -> Any:
  with contextlib.suppress(ImportError):
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers

    return tokenizers
  raise SystemExit(
    "Byte pairs need the package `tokenizers`. Install it with: pip install 'fop_optax[text]'"
  )
