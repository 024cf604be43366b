"""Two processes of `jax.distributed` on one machine, two devices each, train as one does."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import processes
import pytest

pytestmark = pytest.mark.slow


def test_two_processes_are_one(tmp_path):
  """K-FAC without and with owners, over whole and sharded parameters; one checkpoint of both."""
  pytest.importorskip("orbax.checkpoint")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  script = pathlib.Path(processes.__file__)
  flags = "--xla_force_host_platform_device_count=2"
  both = [
    subprocess.Popen(
      [sys.executable, script, str(number), str(port), str(tmp_path)],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  told = [process.communicate(timeout=240)[1] for process in both]
  assert [process.returncode for process in both] == [0, 0], told[0][-2000:]

  captured, tx = processes.make()
  params, x, y = processes.inputs()
  step, state = processes.step_of(captured, tx), tx.init(params)
  for batch in zip(x, y, strict=True):
    params, state = step(params, state, *batch)
  close = lambda ours: jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, dict(params)
  )
  for layout in processes.LAYOUTS:
    found = dict(np.load(tmp_path / f"{layout}.npz"))
    assert found.pop("compiled") == 1
    close(found)
  run = processes.Run("fsdp")  # the checkpoint goes on in one process, over its eight devices
  with jax.set_mesh(run.mesh):
    half = processes.STEPS // 2, processes.STEPS
    ours, _ = run.train(*processes.restored(run, tmp_path / "half"), range(*half))
    close(run.host(ours))
