"""What the README says runs, and prints what it shows; doctests are run by `make doctest`."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A block of Python, and the block of text right below it, which then is what it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)
SEPARATOR = "=== next block"


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
def test_readme_runs_and_prints_what_it_shows(tmp_path):
  blocks = BLOCK.findall(README)
  assert len(blocks) >= 3
  script = tmp_path / "readme.py"
  script.write_text(f"print({SEPARATOR!r})\n".join(code for code, _ in blocks), encoding="utf-8")
  printed = run(str(script)).split(SEPARATOR + "\n")
  for (_, shown), output in zip(blocks, printed, strict=True):
    if shown:
      assert output == shown


def test_readme_names_make_targets_that_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
  named = set(re.findall(r"`?make ([a-z]+)", README))
  assert named
  assert named <= targets
