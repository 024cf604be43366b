"""Test set-up: eight CPU devices, fixed seeds, double precision where a module asks for it."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
  "default",
  deadline=None,
  derandomize=True,
  max_examples=25,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module")
def x64():
  """Double precision for a module: `pytestmark = pytest.mark.usefixtures("x64")`."""
  with jax.enable_x64(True):
    yield
