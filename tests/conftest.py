"""Set-up of tests: eight CPU devices, quick compilation, fixed seeds, double precision."""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once: compiling them takes the time, and of that LLVM's passes a quarter,
# the MLIR emitters of fusions a third.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  )
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later lines have no others
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis
import jax
import pytest


def pytest_configure(config):
  """Programs are compiled once for all workers and later runs: compiling them takes the time."""
  jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  # Of several programs over eight devices in flight on two cores one may wait for a thread that
  # another has, until XLA gives up: one at a time.
  jax.config.update("jax_cpu_enable_async_dispatch", False)


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


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
  """A cache of data sets of the test's own."""
  monkeypatch.setenv("FOP_OPTAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"
