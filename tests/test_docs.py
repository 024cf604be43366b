"""What the README and the pages say runs, and prints what they show.

Doctests are run by `make doctest`.
"""

import os
import re
import subprocess
import sys

import pages
import pytest

SEPARATOR = "=== next block"


def run(*args):
  """Python in a process of its own: readers have neither x64 nor eight devices."""
  keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
  done = subprocess.run(
    [sys.executable, *args],
    cwd=pages.ROOT,
    env={**keep, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", pages.pages(), ids=pages.name)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path):
  """All its blocks in their order, as one script."""
  blocks = [block for block in pages.blocks(page) if block.runs]
  assert blocks or page != pages.README
  script = tmp_path / "page.py"
  script.write_text(f"print({SEPARATOR!r})\n".join(b.code for b in blocks), encoding="utf-8")
  printed = run(str(script)).split(SEPARATOR + "\n") if blocks else []
  for block, output in zip(blocks, printed, strict=True):
    if block.shown:
      assert output == block.shown


PAGE = """
```python
x = 2
print(x)
```
```text
2
```

=== "There"

    ```python title="There: no_such_package"
    x = 3
    ```
    ```python title="There" linenums="1"
    x = 3
    ```
    ```py title="There: optax"
    y = 3
    ```

=== "Here"

    ```{ .python .annotate }
    if x:
      x = 4
    ```
"""


def test_blocks_of_a_page(tmp_path):
  """Those of packages that are not there do not run."""
  page = tmp_path / "page.md"
  page.write_text(PAGE, encoding="utf-8")
  assert pages.blocks(page) == [
    ("x = 2\nprint(x)\n", "2\n", True),
    ("x = 3\n", "", False),
    ("x = 3\n", "", False),
    ("y = 3\n", "", True),
    ("if x:\n  x = 4\n", "", True),
  ]
  assert pages.defining(page, "x") == 2


def test_readme_names_make_targets_that_exist():
  makefile = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
  targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
  named = set(re.findall(r"`?make ([a-z]+)", pages.text(pages.README)))
  assert named
  assert named <= targets


def test_tests_named_on_pages_exist():
  named = {
    own for page in pages.pages() for own in re.findall(r"`(\w+\.py)::(\w+)`", pages.text(page))
  }
  assert len(named) > 50
  for file, test in named:
    code = (pages.ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test}\(", code, re.MULTILINE), f"{file} has no {test}"


def test_links_between_pages_lead_somewhere():
  for page in pages.pages():
    for link in re.findall(r"\]\(([\w/.-]+\.md)(?:#[\w-]+)?\)", pages.text(page)):
      assert (page.parent / link).exists(), f"{pages.name(page)}: {link}"
