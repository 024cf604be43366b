"""Notebooks run from their sources; what is committed is their source, with outputs, and tidy."""

import re

import nbformat
import pytest

from notebooks import REPOSITORY, SOURCES
from notebooks.execute import execute, read

by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
COLAB = "https://colab.research.google.com/github"
# Where somebody's files are, terminal colours, and what a kernel warns of.
UNTIDY = r"(?<![\w.])/(home|root|tmp|work|usr|opt|Users|content)/|\x1b|\wWarning: "


def outputs(notebook):
  return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def texts(notebook):
  """All that a reader sees, but for pictures."""
  found = [cell.source for cell in notebook.cells]
  for output in outputs(notebook):
    data = output.get("data", {})
    found += [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]
  return found


def test_there_are_notebooks():
  assert SOURCES
  kept = {source.with_suffix(".ipynb") for source in SOURCES}
  assert set(SOURCES[0].parent.glob("*.ipynb")) == kept


@by_name
def test_notebook_is_its_source_with_outputs(source):
  notebook = nbformat.read(source.with_suffix(".ipynb"), 4)
  cells = lambda book: [(cell.cell_type, cell.source, cell.id) for cell in book.cells]
  assert cells(notebook) == cells(read(source)), f"run `python -m notebooks {source.stem}`"
  assert notebook.metadata == read(source).metadata
  counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
  assert counts == list(range(1, len(counts) + 1))
  assert outputs(notebook)
  assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data"}
  assert {output.get("name", "stdout") for output in outputs(notebook)} == {"stdout"}


@by_name
def test_notebook_is_tidy(source):
  notebook = nbformat.read(source.with_suffix(".ipynb"), 4)
  for text in texts(notebook):
    assert not re.search(UNTIDY, text), text
  title, install = notebook.cells[:2]
  assert title.source.startswith("# ")
  assert f"]({COLAB}/{REPOSITORY}/blob/main/notebooks/{source.stem}.ipynb)" in title.source
  assert f"https://github.com/{REPOSITORY} " in install.source
  assert len(source.with_suffix(".ipynb").read_bytes()) < 600_000


@by_name
def test_readme_links_to_the_notebook_and_to_colab(source):
  readme = (source.parents[1] / "README.md").read_text(encoding="utf-8")
  path = f"notebooks/{source.stem}.ipynb"
  assert f"]({path})" in readme
  assert f"]({COLAB}/{REPOSITORY}/blob/main/{path})" in readme


@by_name
def test_links_between_notebooks_are_there(source):
  links = re.findall(r"\]\(([^)#]+)[^)]*\)", source.read_text(encoding="utf-8"))
  for link in links:
    assert link.startswith("https://") or (source.parent / link).exists(), link


@pytest.mark.slow
@by_name
def test_notebook_runs(source):
  assert outputs(execute(source))
