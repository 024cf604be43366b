"""What the README and the pages say runs, and prints what they show.

Doctests are run by `make doctest`.
"""

import inspect
import os
import re
import subprocess
import sys

import pages
import pytest

import fop_optax
from notebooks import REPOSITORY, SITE, SOURCES

SEPARATOR = "=== next block"
WITH_CODE = [page for page in pages.pages() if pages.script(page)]


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
@pytest.mark.parametrize("page", WITH_CODE, ids=pages.name)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path):
  """All its blocks in their order, as one script."""
  blocks = pages.script(page)
  script = tmp_path / "page.py"
  script.write_text(f"print({SEPARATOR!r})\n".join(b.code for b in blocks), encoding="utf-8")
  printed = run(str(script)).split(SEPARATOR + "\n")
  for block, output in zip(blocks, printed, strict=True):
    if block.shown:
      assert output == block.shown


def test_readme_is_short_and_has_code():
  assert len(pages.text(pages.README).splitlines()) <= 250
  assert len(pages.script(pages.README)) >= 3


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


@pytest.mark.parametrize("page", [*pages.pages(), *SOURCES], ids=pages.name)
def test_links_lead_somewhere(page):
  """Within the repository, and to its files and pages where they will be published."""
  on_github = f"https://github.com/{REPOSITORY}/blob/main/"
  for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", pages.text(page)):
    if link.startswith(on_github):
      assert (pages.ROOT / link.removeprefix(on_github)).exists(), link
    elif link.startswith(SITE):
      assert (pages.PAGES / link.removeprefix(SITE)).with_suffix(".md").exists(), link
    elif "://" not in link:
      assert (page.parent / link).exists(), link


def test_reference_has_every_public_name():
  reference = "".join(map(pages.text, (pages.PAGES / "api").glob("*.md")))
  documented = re.findall(r"auto(?:class|function):: fop_optax\.(\w+)", reference)
  ours = lambda value: getattr(value, "__module__", "").startswith("fop_optax")
  public = [name for name, value in vars(fop_optax).items() if ours(value) and name[0] != "_"]
  assert sorted(documented) == sorted(public)


FUNCTIONS = {name: own for name, own in vars(fop_optax).items() if inspect.isfunction(own)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_and_show_it(name):
  """A direction alone says so by the optimizer that is made of it."""
  doc = inspect.getdoc(FUNCTIONS[name])
  assert ">>> " in doc
  parameters = list(inspect.signature(FUNCTIONS[name]).parameters)
  if name.startswith("scale_by_"):
    whole = name.removeprefix("scale_by_")
    assert f"See :func:`fop_optax.{whole}` for more details" in doc
    assert set(parameters) <= set(inspect.signature(FUNCTIONS[whole]).parameters)
    return
  arguments = re.search(r"^Args:\n(.*?)^\S", doc, re.MULTILINE | re.DOTALL).group(1)
  named = re.findall(r"^  (?:\*{0,2})(\w+): ", arguments, re.MULTILINE)
  assert named == parameters
  assert re.search("^Returns:", doc, re.MULTILINE)
  assert re.search("^Raises:", doc, re.MULTILINE)


def test_every_page_is_in_a_table_of_contents():
  listed = set()
  for page in pages.pages():
    for tree in re.findall(r"```\{toctree\}\n(.*?)```", pages.text(page), re.DOTALL):
      names = [line for line in tree.splitlines() if line and not line.startswith(":")]
      listed |= {(page.parent / name).resolve() for name in names}
  missing = {page.with_suffix("").resolve() for page in pages.pages()[1:]} - listed
  assert missing == {(pages.PAGES / "index").resolve()}
