"""Code blocks of the README and of the site's pages: what runs, and what it should print.

A block of Python runs, and a block of text right below it is what it prints. One with the title
`There` is other people's code and does not run; with `There: PACKAGE` it does where that package is
installed. A page with the line `<!-- after: index.md -->` takes the blocks of that one for granted.
"""

import functools
import importlib.util
import pathlib
import re
import textwrap
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = ROOT / ".docs" / "pages"
# Indented in a tab or a note; with a title and other options, or in braces.
BLOCK = re.compile(
  r"^( *)```\s*(?:\{ *\.)?(?:python|py)\b([^\n]*)\n(.*?)^\1```[ ]*\n(?:\n*\1```text\n(.*?)\1```)?",
  re.DOTALL | re.MULTILINE,
)
AFTER = re.compile(r"<!-- after: (.*) -->")
THERE = re.compile(r"title=\"There(?:: ([\w.]+))?")


class Block(NamedTuple):
  code: str
  shown: str  # empty where nothing is
  runs: bool


def pages() -> list[pathlib.Path]:
  own = (page for page in sorted(PAGES.glob("**/*.md")) if not page.is_symlink())
  return [README, *own]


def name(page: pathlib.Path) -> str:
  return str(page.relative_to(ROOT))


def text(page: pathlib.Path) -> str:
  return page.read_text(encoding="utf-8")


def blocks(page: pathlib.Path) -> list[Block]:
  found = BLOCK.findall(text(page))
  return [
    Block(textwrap.dedent(code), textwrap.dedent(shown), _runs(options))
    for _, options, code, shown in found
  ]


def script(page: pathlib.Path) -> list[Block]:
  """Those that run, with those of the page that it follows before them."""
  after = AFTER.search(text(page))
  before = script(PAGES / after[1]) if after else []
  own = [block for block in blocks(page) if block.runs]
  return before + own if own else []


def _runs(options: str) -> bool:
  there = THERE.search(options)
  return there is None or bool(there[1] and importlib.util.find_spec(there[1]))


@functools.cache
def defining(page: pathlib.Path, wanted: str) -> Any:
  """What a page's blocks, run in order up to the one that defines it, say a name is."""
  namespace: dict[str, Any] = {}
  for block in blocks(page):
    if block.runs:
      exec(compile(block.code, str(page), "exec"), namespace)
    if wanted in namespace:
      return namespace[wanted]
  raise AssertionError(f"no block of {name(page)} defines {wanted}")


def tables(page: pathlib.Path) -> list[list[list[str]]]:
  """Tables as rows of cells, the header first and without the line below it."""
  found = re.findall(r"(?:^\|.*\|\n)+", text(page), re.MULTILINE)
  cells = lambda line: [cell.strip() for cell in line.strip().strip("|").split("|")]
  return [[cells(line) for i, line in enumerate(table.splitlines()) if i != 1] for table in found]
