"""Texts: windows by seed and step, and byte pairs of files."""

import gzip
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import byte_pairs, folders, text


def test_windows_are_of_the_text_and_of_seed_and_step():
  corpus = text.characters("to be, or not to be: that is the question. " * 20, 0.25)
  whole = np.concatenate([corpus.train, corpus.validation])
  assert corpus.decode(whole) == "to be, or not to be: that is the question. " * 20
  assert len(corpus.validation) == len(whole) // 4
  assert corpus.vocabulary == len(set(corpus.decode(whole))) and corpus.train.dtype == np.uint8
  counted = np.arange(100)
  x, y = text.windows(counted, 400, 7, seed=1, step=5)
  assert x.shape == y.shape == (400, 7) and x.dtype == y.dtype == np.int32
  np.testing.assert_array_equal(y, x + 1)
  np.testing.assert_array_equal(x, x[:, :1] + np.arange(7))
  assert x.min() == 0 and y.max() == 99
  np.testing.assert_array_equal(x, text.windows(counted, 400, 7, seed=1, step=5)[0])
  for seed, step in ((1, 6), (2, 5)):
    assert not np.array_equal(x, text.windows(counted, 400, 7, seed, step)[0])
  on_device = text.take(jnp.asarray(counted), text.starts(100, 400, 7, 1, 5), 7)
  assert all(np.array_equal(a, b) for a, b in zip(on_device, (x, y), strict=True))
  with pytest.raises(ValueError, match="7 ids hold no window of 7"):
    text.windows(counted[:7], 1, 7, 0, 0)


def test_blocks_have_every_id_but_the_first_as_a_target_once():
  for size in (99, 100, 101):
    x, y = text.blocks(np.arange(size), 9)
    np.testing.assert_array_equal(y.ravel(), np.arange(1, len(y) * 9 + 1))
    np.testing.assert_array_equal(x + 1, y)
    assert y.size == 9 * ((size - 1) // 9)
  assert text.id_type(256) == np.uint8 and text.id_type(257) == np.uint16
  assert text.id_type(65536) == np.uint16 and text.id_type(65537) == np.uint32


def test_no_shakespeare_says_where_it_goes(tmp_path):
  with pytest.raises(SystemExit, match="No .*tiny_shakespeare/1.0.0/input.txt. Put the text"):
    text.shakespeare(str(tmp_path))


@pytest.mark.skipif(
  not (folders.root() / "tiny_shakespeare").is_dir(),
  reason="no tiny_shakespeare is prepared",
)
def test_shakespeare():
  play = text.shakespeare()
  assert (len(play.train), len(play.validation), play.vocabulary) == (1003855, 111539, 65)
  assert play.decode(play.train[:14]) == "First Citizen:"


def test_byte_pairs(empty_cache, tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  plain, lines = tmp_path / "a.txt", tmp_path / "b.json.gz"
  plain.write_text("the cat sat on the mat, naïvely. " * 30, encoding="utf-8")
  with gzip.open(lines, "wt", encoding="utf-8") as file:
    for number in range(40):
      print(json.dumps({"text": f"the dog {number}", "url": "none"}), file=file)
  corpus = byte_pairs.byte_pairs([plain, lines], vocabulary=300, validation=0.2)
  whole = np.concatenate([corpus.train, corpus.validation])
  documents = [plain.read_text(encoding="utf-8"), *(f"the dog {number}" for number in range(40))]
  assert corpus.decode(whole) == "".join(one + byte_pairs.END for one in documents)
  assert corpus.vocabulary == 300 and whole.dtype == np.uint16 and whole.max() < 300
  assert isinstance(corpus.train, np.memmap)
  assert len(whole) < len("".join(documents)) / 2  # pairs were learned
  files = sorted(empty_cache.iterdir())
  assert [file.suffix for file in files] == [".npy", ".json"]
  before = [file.stat().st_mtime_ns for file in files]
  again = byte_pairs.byte_pairs([plain, lines], vocabulary=300, validation=0.2)
  np.testing.assert_array_equal(again.train, corpus.train)
  assert [file.stat().st_mtime_ns for file in files] == before  # nothing is made again
  given = byte_pairs.byte_pairs([lines], tokenizer=files[1], validation=0)
  expected = tokenizers.Tokenizer.from_file(str(files[1])).encode("the dog 0").ids
  assert given.train[: len(expected)].tolist() == expected
  assert given.decode(given.train).startswith("the dog 0" + byte_pairs.END)
  plain.write_text("another text")
  other = byte_pairs.byte_pairs([plain], tokenizer=files[1], validation=0)
  assert other.decode(other.train) == "another text" + byte_pairs.END
  with pytest.raises(SystemExit, match="No .*c.txt"):
    byte_pairs.byte_pairs([tmp_path / "c.txt"])


def test_byte_pairs_without_the_library(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(SystemExit, match=r"pip install 'fop_optax\[text\]'"):
    byte_pairs.byte_pairs([tmp_path / "a.txt"])
