"""What README and site say runs, and prints what it shows; doctests are run by `make doctest`."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import fop_optax
from notebooks import REPOSITORY, SITE, SOURCES

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
SITE_PAGES = ROOT / ".docs" / "pages"
PAGES = [README, *(page for page in sorted(SITE_PAGES.glob("**/*.md")) if not page.is_symlink())]
# A block of Python, and the block of text right below it, which then is what it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)
AFTER = re.compile(r"<!-- after: (.*) -->")  # the page whose blocks come before
SEPARATOR = "=== next block"


def read(page):
  return page.read_text(encoding="utf-8")


def name(page):
  return str(page.relative_to(ROOT))


def blocks(page):
  """Code and what it prints, of the page that it follows too."""
  after = AFTER.search(read(page))
  before = blocks(SITE_PAGES / after.group(1)) if after else []
  return before + BLOCK.findall(read(page))


def run(*args):
  """Python in a process of its own: readers have neither x64 nor eight devices."""
  keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
  done = subprocess.run(
    [sys.executable, *args],
    cwd=ROOT,
    env={**keep, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_page_runs_and_prints_what_it_shows(page, tmp_path):
  found = blocks(page)
  script = tmp_path / "page.py"
  script.write_text(f"print({SEPARATOR!r})\n".join(code for code, _ in found), encoding="utf-8")
  printed = run(str(script)).split(SEPARATOR + "\n")
  for (_, shown), output in zip(found, printed, strict=True):
    if shown:
      assert output == shown


def test_readme_is_short():
  assert len(read(README).splitlines()) <= 250


def test_readme_names_make_targets_that_exist():
  targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.MULTILINE))
  named = set(re.findall(r"`?make ([a-z]+)", read(README)))
  assert named
  assert named <= targets


@pytest.mark.parametrize("page", PAGES + list(SOURCES), ids=name)
def test_links_lead_somewhere(page):
  """Within the repository, and to its files and pages where they will be published."""
  for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(page)):
    for address, folder in ((f"https://github.com/{REPOSITORY}/blob/main/", ROOT), (SITE, None)):
      if link.startswith(address) and folder:
        assert (folder / link.removeprefix(address)).exists(), link
      elif link.startswith(address):
        page_of_site = link.removeprefix(address).removesuffix(".html") + ".md"
        assert (SITE_PAGES / page_of_site).exists(), link
    if "://" not in link:
      assert (page.parent / link).exists(), link


def test_reference_has_every_public_name():
  pages = "".join(map(read, (SITE_PAGES / "api").glob("*.md")))
  documented = re.findall(r"auto(?:class|function):: fop_optax\.(\w+)", pages)
  public = [
    name
    for name, value in vars(fop_optax).items()
    if getattr(value, "__module__", "").startswith("fop_optax") and not name.startswith("_")
  ]
  assert sorted(documented) == sorted(public)


def test_every_page_is_in_a_table_of_contents():
  listed = set()
  for page in SITE_PAGES.glob("**/*.md"):
    for tree in re.findall(r"```\{toctree\}\n(.*?)```", read(page), re.DOTALL):
      names = [line for line in tree.splitlines() if line and not line.startswith(":")]
      listed |= {(page.parent / name).resolve() for name in names}
  missing = {page.with_suffix("").resolve() for page in PAGES[1:]} - listed
  assert missing == {(SITE_PAGES / "index").resolve()}
