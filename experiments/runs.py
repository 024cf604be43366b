"""One run on disk: its record, its numbers, its checkpoints; killed at any moment, it goes on.

A folder holds `metrics.jsonl`, whose first line says what the run is (config, versions, commit,
machine), each other one what an epoch came to, the last that it is done; `checkpoints/`, the last
and the best; where it is asked for `layers.jsonl` (`experiments.inspection`), and `tensorboard/`.
One process at a time works on it. Numbers are written before the checkpoint of their epoch: those
of an epoch without one are taken back and come again, bit for bit, as data and random numbers
follow from seed and step.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import datetime
import difflib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from experiments import inspection
from experiments.configs import AROUND, Config
from experiments.optimizers import TABLE
from experiments.tasks import Task
from experiments.training import Program, State, calls

PACKAGES = ("fop_optax", "jax", "jaxlib", "optax", "flax", "numpy", "orbax-checkpoint")


class Row(NamedTuple):
  """What one epoch of one run came to."""

  optimizer: str
  batch_size: int
  seed: int
  epoch: int
  step: int  # steps taken
  seconds: float  # of training so far, without compilation and evaluation
  examples_per_second: float  # of this epoch
  train_loss: float  # mean over the epoch's batches
  test_loss: float
  test_accuracy: float
  test_top5: float | None = None
  input_seconds: float | None = None  # of this epoch, in which batches were made or waited for


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on."""
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"
  return {"python": platform.python_version(), **found}


def commit() -> str | None:
  """The commit of the checkout, marked `-dirty` where files differ from it; None outside git."""
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


def hardware() -> dict[str, Any]:
  """The devices and the host's processor."""
  devices = jax.devices()
  return {
    "devices": [device.device_kind for device in devices],
    "platform": devices[0].platform,
    "cpus": os.cpu_count(),
  }


def peak_memory() -> int:
  """Bytes: the most that the devices held, or the process where they do not tell."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  if all("peak_bytes_in_use" in own for own in stats):
    return max(own["peak_bytes_in_use"] for own in stats)
  unit = 1 if sys.platform == "darwin" else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def identity(config: Config, name: str, seed: int) -> dict[str, Any]:
  """What makes a run this one: data, model, budget, its optimizer's values and its seed."""
  fields = dataclasses.asdict(config)
  shared = {key: value for key, value in fields.items() if key not in (*TABLE, *AROUND)}
  return json.loads(json.dumps(shared | {"optimizer": name, name: fields[name], "seed": seed}))


def folder_of(root: pathlib.Path, config: Config, name: str, seed: int) -> pathlib.Path:
  """Where a run has its files, by what is compared most."""
  return root / "runs" / name / f"batch-{config.batch_size}" / f"seed-{seed}"


class Log:
  """The lines of `metrics.jsonl`; each is on disk when `write` returns."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.lines: list[dict[str, Any]] = []
    if path.exists():
      for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
          self.lines.append(json.loads(text))

  def write(self, line: dict[str, Any]) -> None:
    self.lines.append(line)
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def keep(self, lines: list[dict[str, Any]]) -> None:
    """Takes back all other lines."""
    self.lines = lines
    new = self.path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    new.replace(self.path)

  @property
  def record(self) -> dict[str, Any] | None:
    return self.lines[0] if self.lines else None

  @property
  def done(self) -> bool:
    return bool(self.lines) and "done" in self.lines[-1]

  def rows(self) -> list[Row]:
    return [Row(**line) for line in self.lines if "epoch" in line]


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
  """Holds a folder for this process; however that ends, the system gives it free.

  Raises:
    SystemExit: if another process holds it.
  """
  try:
    import fcntl
  except ImportError:  # not POSIX
    yield
    return
  with (path / ".lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise SystemExit(f"Another process is at work in {path}: wait for it, or stop it.") from error
    yield


def scalars_to(path: pathlib.Path, step: int) -> Any:
  """A writer of TensorBoard's files from `step` on: what a killed run wrote beyond is dropped."""
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise SystemExit(
      "--tensorboard needs tensorboardX: pip install 'fop_optax[tensorboard]'."
    ) from error
  # Its files are named by the second: those of two starts within one would be the same.
  return SummaryWriter(str(path), purge_step=step, filename_suffix=f".{step}")


def check_same(record: dict[str, Any], run: dict[str, Any], path: pathlib.Path) -> None:
  """Raises SystemExit if a folder holds another run, naming what differs."""
  had, now = dict(_flat(record["run"])), dict(_flat(run))
  differing = [
    f"  {name}: {had.get(name)!r} there, {now.get(name)!r} now"
    for name in sorted(had.keys() | now.keys())
    if had.get(name) != now.get(name)
  ]
  if differing:
    raise SystemExit(
      f"{path} holds a run of another configuration:\n" + "\n".join(differing) + "\n"
      "Give another folder by --out, or delete this one."
    )


def say_if_older(record: dict[str, Any]) -> None:
  """Warns, once, that what is there was made by other code: it is not made again."""
  now = {"commit": commit(), **versions()}
  then = {"commit": record["commit"], **record["versions"]}
  differing = [
    f"{name} {then.get(name)}, now {own}" for name, own in now.items() if then.get(name) != own
  ]
  if differing:
    warnings.warn(
      f"Runs that are there already were made with {'; '.join(differing)}. They are kept and gone"
      " on with: for new ones give another folder by --out, or delete them.",
      stacklevel=2,
    )


def _flat(tree, path=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{path}{name}.")
    else:
      yield f"{path}{name}", value


def _checkpoints(path: pathlib.Path, metric: str) -> ocp.CheckpointManager:
  """The last and the best are kept; saved in the background."""
  sign = -1 if metric == "test_loss" else 1
  best = policies.BestN(get_metric_fn=lambda metrics: sign * metrics[metric], n=1)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
    cleanup_tmp_directories=True,
  )
  return ocp.CheckpointManager(path.absolute(), options=options)


def train(
  path: pathlib.Path,
  config: Config,
  name: str,
  seed: int,
  task: Task,
  build: Callable[[], Program],
  final: bool = False,
) -> Iterator[Row]:
  """Trains to the end of the budget from wherever the run in this folder stands; a row an epoch.

  Rows that are on disk come first. `build` is asked for the program if there is something to do;
  with `final` the last state is saved, whatever `config.checkpoint_seconds`.

  Raises:
    SystemExit: if the folder holds a run of another configuration.
  """
  path.mkdir(parents=True, exist_ok=True)
  with alone(path):
    log, run = Log(path / "metrics.jsonl"), identity(config, name, seed)
    if log.record is None:
      log.write({
        "run": run,
        "target": [config.metric, config.target],
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      })  # fmt: skip
    else:
      check_same(log.record, run, path)
      say_if_older(log.record)
    if log.done:
      yield from log.rows()
      return
    yield from _rest(path, log, config, name, seed, task, build(), final)
    log.write({"done": True, "peak_memory": peak_memory()})


def _rest(path, log, config, name, seed, task, program, final) -> Iterator[Row]:
  """The rows so far, and those of the epochs that are left."""
  with _checkpoints(path / "checkpoints", config.metric) as manager:
    state = program.init(seed)
    first = 1
    if (last := manager.latest_step()) is not None:
      state = manager.restore(last, args=ocp.args.StandardRestore(_abstract(state)))
      first = last + 1
    layers = Log(path / "layers.jsonl")
    for own in (log, layers):
      kept = [line for line in own.lines if line.get("epoch", 0) < first]
      if len(kept) < len(own.lines):
        own.keep(kept)
    yield from log.rows()
    writer = None
    if config.tensorboard:
      writer = scalars_to(path / "tensorboard", int(state.step) + 1)
    seconds = log.rows()[-1].seconds if log.rows() else 0.0
    saved = seconds
    for epoch in range(first, config.epochs + 1):
      state, row = _epoch(state, epoch, seconds, config, name, seed, task, program)
      if config.diagnostics:
        for line in inspection.readings(state.optimizer, program.layers, epoch):
          layers.write(line)
      log.write(row._asdict())
      if writer is not None:
        for key, value in row._asdict().items():
          if isinstance(value, float):
            writer.add_scalar(key, value, row.step)
        writer.flush()
      seconds = row.seconds
      due = seconds - saved >= config.checkpoint_seconds or (final and epoch == config.epochs)
      if due:
        manager.save(epoch, args=ocp.args.StandardSave(state), metrics=row._asdict())
        saved = seconds
      yield row
    if writer is not None:
      writer.close()


def _abstract(state: State) -> State:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def train_epoch(
  state: State, epoch: int, config: Config, seed: int, task: Task, program: Program
) -> tuple[State, jax.Array, float, float]:
  """The steps of one epoch: state, losses, seconds, and those of them that went into batches."""
  # The first is made before the clock starts, the others while the device is busy.
  feed = calls(config, task, seed, (epoch - 1) * task.steps, task.steps)
  fed, start = next(feed), jnp.uint32(seed)
  jax.block_until_ready((state, fed))
  clock, waited, losses = time.perf_counter(), 0.0, []
  while fed is not None:
    state, own = program.advance(state, task.arrays, fed, start, program.values)
    losses.append(own)
    begin = time.perf_counter()
    fed = next(feed, None)
    waited += time.perf_counter() - begin
  jax.block_until_ready(state)
  seconds = time.perf_counter() - clock
  return state, jnp.concatenate(losses), seconds, waited


def _epoch(state, epoch, seconds, config, name, seed, task, program):
  state, losses, own, waited = train_epoch(state, epoch, config, seed, task, program)
  numbers = {
    "train_loss": float(losses.mean()),
    **task.evaluate(program.evaluated(state), state.model),
    "input_seconds": waited,
  }
  examples = task.steps * config.batch_size
  row = Row(
    name, config.batch_size, seed, epoch, int(state.step), seconds + own, examples / own,
    **numbers,
  )  # fmt: skip
  return state, row


def nearest(name: str, names: tuple[str, ...]) -> str:
  """What was perhaps meant, for a message."""
  found = difflib.get_close_matches(name, names, n=1)
  return f"; did you mean {found[0]!r}?" if found else f": one of {', '.join(names)}"
