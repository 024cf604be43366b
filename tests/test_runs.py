"""Runs on disk: killed at any moment they go on, and end as if nothing had happened."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from experiments import (
  configs,
  data,
  inspection,
  networks,
  optimizers,
  parts,
  report,
  runs,
  tasks,
  training,
)
from experiments.data import order
from experiments.data import text as texts
import fop_optax

ROOT = pathlib.Path(__file__).parents[1]
FINAL = ("checkpoints", "4")


def small(**changes):
  config, _ = configs.load("digits_mlp")
  own = {"model": networks.Mlp((16,), dropout=0.5), "epochs": 4, "checkpoint_seconds": 0.0}
  return dataclasses.replace(config, **(own | changes))


@functools.cache
def prepared(average=0.0):
  config = small(average=average)
  task = tasks.classification(config, data.load("digits"))
  return task, functools.cache(lambda: training.build(config, config.adamw, task))


def train(path, config, **options):
  task, build = prepared(config.average)
  return runs.train(path, config, "adamw", 0, task, build, final=True, **options)


def same(row):
  """All of a row but times."""
  return row._replace(seconds=0, examples_per_second=0, input_seconds=0)


def final_arrays(path):
  with ocp.CheckpointManager((path / "checkpoints").absolute()) as manager:
    step = manager.latest_step()
    return step, jax.tree.leaves(manager.restore(step, args=ocp.args.StandardRestore()))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_run_that_stops_anywhere_goes_on_and_ends_the_same(tmp_path, average):
  config = small(average=average)
  whole = list(train(tmp_path / "whole", config))
  for stop in (1, 3):
    path = tmp_path / f"stopped {stop}"
    rows = train(path, config)
    for _ in range(stop):
      next(rows)
    rows.close()
    # an epoch was written down, and its checkpoint was not; a line was cut off
    with (path / "metrics.jsonl").open("a") as file:
      file.write(json.dumps(whole[stop]._asdict()) + '\n{"epoch": 3, "st')
    again = list(train(path, config))
    assert list(map(same, again)) == list(map(same, whole))
    (end, got), (_, want) = final_arrays(path), final_arrays(tmp_path / "whole")
    assert end == config.epochs
    assert len(got) == len(want) > 8
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)
  # Done: nothing is trained any more.
  unused = lambda: pytest.fail("built again")
  task, _ = prepared(average)
  assert list(runs.train(path, config, "adamw", 0, task, unused)) == again


@pytest.mark.parametrize("dataset", ["mock", "shakespeare"])
def test_data_that_are_fed_go_on_too(dataset, tmp_path, monkeypatch):
  """Photographs that are decoded as they come, and windows of a text."""
  text = "To be, or not to be: that is the question. " * 50
  folder = tmp_path / "tiny_shakespeare" / "1.0.0"
  folder.mkdir(parents=True)
  (folder / "input.txt").write_text(text)
  own = {"dataset": dataset, "data_dir": str(tmp_path), "batch_size": 64, "looped": False}
  if dataset == "mock":
    pytest.importorskip("grain")
    own |= {"side": 16, "label_smoothing": 0.1, "mixup": 0.2, "workers": 0, "epochs": 3}
  else:
    network = networks.LanguageModel("0.2m")
    own |= {"model": network, "length": 8, "steps_per_epoch": 2, "metric": "test_loss", "epochs": 3}
  config = small(**own)
  task = tasks.load(config)
  build = functools.cache(lambda: training.build(config, config.adamw, task))
  train = lambda path: runs.train(path, config, "adamw", 1, task, build)
  whole = list(train(tmp_path / "whole"))
  assert whole[-1].train_loss < whole[0].train_loss
  rows = train(tmp_path / "stopped")
  next(rows)
  rows.close()
  assert list(map(same, train(tmp_path / "stopped"))) == list(map(same, whole))


@pytest.mark.parametrize("looped", [False, True])
def test_alternating_flips_go_on_too(looped, tmp_path):
  config = small(augmentation=("shift", "alternating_flip"), views="shifted", looped=looped)
  task = tasks.classification(config, data.load("digits"))
  build = functools.cache(lambda: training.build(config, config.adamw, task))
  train = lambda path: runs.train(path, config, "adamw", 1, task, build)
  whole = list(train(tmp_path / "whole"))
  assert whole[-1].train_loss < whole[0].train_loss
  rows = train(tmp_path / "stopped")
  next(rows)
  rows.close()
  assert list(map(same, train(tmp_path / "stopped"))) == list(map(same, whole))


def test_alternating_flips_of_batches():
  """Each image is seen mirrored or not in the first epoch, and the other way in each next one."""
  digits = data.load("digits")
  task = tasks.classification(small(augmentation=("alternating_flip",)), digits)
  plain = (digits.train_images - digits.mean) / digits.std
  for epoch in range(3):
    mirrored = order.mirrored(len(plain), 7, epoch)
    seen = list(task.feed(7, epoch * task.steps + 1, 2))  # from the middle of an epoch
    batches = order.epoch_batches(len(plain), 256, 7, epoch)[1:3]
    for fed, indices in zip(seen, batches, strict=True):
      images, _ = task.pick(task.arrays, fed, jax.random.key(epoch))
      flip = mirrored[indices, None, None, None]
      expected = np.where(flip, plain[indices, :, ::-1], plain[indices])
      np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("views", ["one", "mirrored", "shifted"])
def test_evaluation_is_of_the_mean_logits(views):
  digits = data.load("digits")
  task = tasks.classification(small(views=views), digits)
  params, state = task.model.init(0)
  x = jnp.asarray((digits.test_images - digits.mean) / digits.std, jnp.float32)
  logits = lambda images: task.model.apply(params, state, images, train=False)[0]
  both = lambda images: (logits(images) + logits(images[:, :, ::-1])) / 2
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
  mean = {
    "one": lambda: logits(x),
    "mirrored": lambda: both(x),
    "shifted": lambda: both(x) / 2 + both(padded[:, :8, :8]) / 4 + both(padded[:, 2:, 2:]) / 4,
  }[views]()
  losses = optax.softmax_cross_entropy_with_integer_labels(mean, digits.test_labels)
  right = np.mean(mean.argmax(-1) == digits.test_labels)
  found = task.evaluate(params, state)
  np.testing.assert_allclose(found["test_loss"], losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(found["test_accuracy"], right)


def test_fields_that_do_nothing_or_exclude_each_other_are_refused():
  with pytest.raises(SystemExit, match=r"--augmentation, --imbalance: not for photographs"):
    tasks.load(small(dataset="mock", side=16, augmentation=("flip",), imbalance=10.0))
  with pytest.raises(SystemExit, match=r"--views: not for photographs"):
    tasks.load(small(dataset="mock", side=16, views="mirrored"))
  with pytest.raises(ValueError, match="should have one of flip and alternating_flip, once"):
    small(augmentation=("flip", "alternating_flip"))
  for changes, words in (
    ({"stair": 0.1}, "--stair: not for a schedule that is linear"),
    ({"files": ("a.txt",), "length": 8}, "--files, --length: not for images"),
    ({"classes": ("cat",)}, "--classes: not for images that live on the device"),
    ({"dataset": "shakespeare", "vocabulary": 9}, "--vocabulary: not for a text that is given by"),
  ):
    with pytest.raises(SystemExit, match=words):
      tasks.load(small(schedule="linear", **changes))
  text = texts.characters("abc" * 100)
  with pytest.raises(SystemExit, match=r"--views, --mixup: not for text"):
    tasks.language(small(length=4, steps_per_epoch=2, mixup=0.1, views="shifted"), text)


def test_parts_need_filters():
  config = small(parts=parts.Parts())
  task = tasks.load(config)
  with pytest.raises(SystemExit, match="this one has no parameter of three or more axes"):
    training.build(config, config.adamw, task)


def test_the_last_and_the_best_checkpoint_are_kept(tmp_path):
  rows = list(train(tmp_path, small()))
  best = max(rows, key=lambda row: (row.test_accuracy, row.epoch)).epoch
  kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
  assert kept == {best, 4}


def test_the_record(tmp_path):
  list(train(tmp_path, small()))
  first, *rows, last = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  assert first["run"]["adamw"]["weight_decay"] == 1.0
  assert first["run"]["model"] == {"hidden": [16], "dropout": 0.5}
  assert set(first) == {"run", "target", "versions", "commit", "hardware", "date"}
  assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
  assert last["done"] and last["peak_memory"] > 1e6


def test_a_folder_of_another_run_is_refused(tmp_path):
  list(train(tmp_path, small()))
  config = small(adamw=dataclasses.replace(small().adamw, b1=0.5), epochs=5)
  with pytest.raises(SystemExit, match=r"(?s)adamw.b1: 0.9 there, 0.5 now\n  epochs: 4 there, 5"):
    list(train(tmp_path, config))
  # where and how often does not matter
  assert len(list(train(tmp_path, small(seeds=9, out="elsewhere", target=0.1)))) == 4


def test_runs_of_other_code_are_said(tmp_path, monkeypatch):
  first = list(train(tmp_path, small()))
  monkeypatch.setattr(runs, "commit", lambda: "abc")
  with pytest.warns(UserWarning, match=r"made with commit .*, now abc. They are kept"):
    assert list(train(tmp_path, small())) == first


@pytest.mark.slow
def test_killed_processes(tmp_path):
  """`kill -9` at moments of all kinds, also during a save; the same command again goes on."""
  args = (
    *("train", "digits_mlp", "--optimizers", "kfac", "--epochs", "40", "--model.hidden", "32"),
    *("--checkpoint-seconds", "0", "--out"),
  )
  keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  env = keep | {"JAX_PLATFORMS": "cpu"}
  start = lambda out: subprocess.Popen(
    [sys.executable, "-m", "experiments", *args, str(out)],
    cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  run = lambda out: out / "digits_mlp" / "runs" / "kfac" / "batch-256" / "seed-0"
  whole = start(tmp_path / "whole")
  path = run(tmp_path / "killed") / "metrics.jsonl"
  lines = lambda: len(path.read_text().splitlines()) if path.exists() else 0
  for more, delay in ((1, 0.0), (3, 0.03), (5, 0.1), (2, 0.01)):
    process, before = start(tmp_path / "killed"), lines()
    while lines() < before + more and process.poll() is None:
      time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
  last = start(tmp_path / "killed")
  assert last.wait() == 0, last.stderr.read()
  assert whole.wait() == 0, whole.stderr.read()
  rows = [runs.Log(run(tmp_path / out) / "metrics.jsonl").rows() for out in ("killed", "whole")]
  assert list(map(same, rows[0])) == list(map(same, rows[1]))
  (end, got), (_, want) = (final_arrays(run(tmp_path / out)) for out in ("killed", "whole"))
  assert end == 40
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_two_processes_do_not_work_on_one_run(tmp_path):
  rows = train(tmp_path, small())
  next(rows)
  with pytest.raises(SystemExit, match="Another process is at work in .*: wait for it, or stop it"):
    next(train(tmp_path, small()))
  rows.close()
  assert len(list(train(tmp_path, small()))) == 4


def test_layers_of_a_run_go_on_too(tmp_path):
  """A line a layer and epoch, none twice; and their pictures, in the report as well."""
  config = small(diagnostics=True)
  task, _ = prepared()
  program = training.build(config, config.fop, task)
  path = runs.folder_of(tmp_path / "own", config, "fop", 0)
  for stop in (2, 9):
    own = runs.train(path, config, "fop", 0, task, lambda: program, final=True)
    list(itertools.islice(own, stop))
    own.close()
  frame = inspection.frame_of(path / "layers.jsonl")
  assert frame.groupby("layer").epoch.apply(list).tolist() == [[1, 2, 3, 4]] * 2
  assert np.isfinite(frame[["beta", "eta", "rho2", "condition"]].to_numpy()).all()
  for line in frame.itertuples():
    for values in (line.spectrum_A, line.spectrum_G):
      assert values == sorted(values, reverse=True) and values[-1] >= 0
    high, low = line.spectrum_A[0], line.spectrum_A[-1]
    if low > 0:
      np.testing.assert_allclose(line.condition_A, high / low, rtol=1e-3)
  for picture in inspection.draw(path):
    assert picture.read_bytes().startswith(b"\x89PNG")
  page = report.write(tmp_path).read_text()
  assert "Layers of fop batch-256 seed-0" in page
  assert page.count("data:image/png;base64,") == 3
  # without curvature there are none
  assert inspection.readings(optax.adam(1e-3).init({"w": np.ones(2)}), program.layers, 1) == []


def test_tensorboard_has_the_numbers(tmp_path):
  pytest.importorskip("tensorboardX")
  config = small(tensorboard=True)
  list(train(tmp_path, config))
  (file,) = (tmp_path / "tensorboard").iterdir()
  content = file.read_bytes()
  for key in (b"train_loss", b"test_accuracy", b"examples_per_second"):
    assert content.count(key) == config.epochs


def test_tensorboard_drops_what_is_made_again(tmp_path):
  """A run that goes on says from which step: TensorBoard leaves out what was there from it on."""
  events = pytest.importorskip("tensorboardX.proto.event_pb2")
  run = train(tmp_path, small(tensorboard=True))
  next(run)
  run.close()  # killed after an epoch
  rows = list(train(tmp_path, small(tensorboard=True)))
  starts = []
  for file in (tmp_path / "tensorboard").iterdir():
    content, at = file.read_bytes(), 0
    while at < len(content):  # length, its checksum, an event, its checksum
      (length,) = struct.unpack_from("<Q", content, at)
      event = events.Event.FromString(content[at + 12 : at + 12 + length])
      starts += [event.step] if event.HasField("session_log") else []
      at += length + 16
  assert sorted(starts) == [1, rows[0].step + 1]


def test_tensorboard_says_what_it_needs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(SystemExit, match=r"pip install 'fop_optax\[tensorboard\]'"):
    list(train(tmp_path, small(tensorboard=True)))


def test_on_a_plateau_the_rate_is_halved():
  """Patience is two epochs; a rate of zero makes every epoch as bad as the first."""
  config = small(schedule="plateau", warmup=0.0, epochs=8, looped=True)
  task, _ = prepared()
  program = training.build(config, dataclasses.replace(config.sgd, learning_rate=0.0), task)
  state, start = program.init(0), np.uint32(0)
  scales = []
  for fed in training.calls(config, task, 0, 0, task.steps):
    for _ in range(8):
      state, _ = program.advance(state, task.arrays, fed, start, program.values)
      scales.append(float(optax.tree.get(state.optimizer, "scale")))
  # the first epoch is the best, then a halving for every two without a better one; dropout's noise
  # may make one better
  assert scales[0] == 1.0 and scales[-1] < 1.0
  assert set(scales) <= {0.5**i for i in range(5)} and scales == sorted(scales, reverse=True)


def test_neumann_is_evaluated_at_what_it_returns():
  config = small(looped=False)
  task, _ = prepared()
  hyper = optimizers.Neumann(0.05, sgd_epochs=0.2, reset_epochs=10.0)
  program = training.build(config, hyper, task)
  state, start = program.init(0), np.uint32(0)
  for fed in training.calls(config, task, 0, 0, 4):
    state, _ = program.advance(state, task.arrays, fed, start, program.values)
  want = fop_optax.neumann_eval_params(state.optimizer, state.params)
  got = program.evaluated(state)
  for a, b, trained in zip(*map(jax.tree.leaves, (got, want, state.params)), strict=True):
    np.testing.assert_array_equal(a, b)
    assert np.any(a != trained)
