"""Reads the sources of notebooks and executes them."""

import os
import pathlib

import jupytext
import nbclient
import nbformat

# Else capture's reasons would name the kernel's temporary files.
SET = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "IPYKERNEL_CELL_NAME": "<cell>"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def read(source: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook of a source, without outputs; the same one each time."""
  notebook = jupytext.read(source)
  for number, cell in enumerate(notebook.cells):
    cell.id, cell.metadata = f"cell-{number}", {}
  notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
  notebook.nbformat, notebook.nbformat_minor = 4, 5
  return notebook


def execute(source: pathlib.Path, timeout: int = 600) -> nbformat.NotebookNode:
  """The notebook of a source with its outputs, in a process that has none of our set-up.

  Raises:
    nbclient.exceptions.CellExecutionError: where a cell raises.
  """
  notebook = read(source)
  own = {key: os.environ.pop(key) for key in list(os.environ) if _ours(key)}
  os.environ |= SET
  try:
    client = nbclient.NotebookClient(
      notebook,
      timeout=timeout,
      coalesce_streams=True,
      resources={"metadata": {"path": str(source.parent)}},
    )
    client.execute()
  finally:
    for key in SET:
      os.environ.pop(key)
    os.environ |= own
  notebook.metadata = read(source).metadata  # without what the kernel says of itself
  for cell in notebook.cells:
    cell.metadata = {}  # nor when it ran
  return notebook


def _ours(key: str) -> bool:
  return key in SET or key.startswith(("JAX_", "XLA_", "PYTEST_"))
