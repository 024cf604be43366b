"""The comparison: from its command line to its files, and the rules of its comparison."""

import csv
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import comparison, configs, data, models, optimizers, training
from experiments.__main__ import as_flags, main, points_of
from experiments.benchmarks import peers
from experiments.runs import Row
from fop_optax.optimizers import common

ROOT = pathlib.Path(__file__).parents[1]


def run(*args, **env):
  """The command line in a process of its own: users have neither x64 nor eight devices."""
  return module("experiments", *args, **env)


def module(name, *args, **env):
  """`python -m name args` in a process of its own."""
  keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  return subprocess.run(
    [sys.executable, "-m", name, *args],
    cwd=ROOT,
    env={**keep, "JAX_PLATFORMS": "cpu", **env},
    capture_output=True,
    text=True,
    timeout=600,
  )


def rows(name, seed, accuracies, seconds=0.5):
  return [
    Row(name, 256, seed, i, 5 * i, seconds * i, 1.0, 1.0, 1.0, accuracy)
    for i, accuracy in enumerate(accuracies, start=1)
  ]


@pytest.mark.slow
def test_compare_runs_all_and_saves(tmp_path):
  done = run("compare", "--seeds", "2", "--epochs", "2", "--out", str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""  # no progress bar where there is no terminal
  names = configs.load("digits_mlp")[0].optimizers
  for name in names:
    assert optimizers.TABLE[name].title in done.stdout
  with (tmp_path / "digits_mlp/curves.csv").open() as file:
    curves = list(csv.DictReader(file))
  assert [(c["optimizer"], c["seed"], c["epoch"]) for c in curves] == [
    (n, s, e) for n in names for s in "01" for e in "12"
  ]
  assert all(np.isfinite(float(c["train_loss"])) for c in curves)
  for name in names:  # two epochs teach every optimizer something
    assert max(float(c["test_accuracy"]) for c in curves if c["optimizer"] == name) > 0.3
  summary = json.loads((tmp_path / "digits_mlp/summary.json").read_text())
  assert summary["seeds"] == [0, 1]
  assert summary["config"]["epochs"] == 2
  assert set(summary["config"]) >= set(names)
  assert summary["versions"]["jax"]
  assert (tmp_path / "digits_mlp/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_seed_gives_the_same_run_again(tmp_path):
  curves = []
  for folder in ("one", "two"):
    done = run(
      "compare", "--optimizers", "sgd", "--seeds", "1", "--first-seed", "3", "--epochs", "3",
      "--out", str(tmp_path / folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / folder / "digits_mlp/curves.csv").open() as file:
      curves.append([(c["seed"], c["train_loss"], c["test_loss"]) for c in csv.DictReader(file)])
  assert curves[0] == curves[1]
  assert len(curves[0]) == 3
  assert curves[0][0][0] == "3"


@pytest.mark.slow
def test_tune_ranks_the_grid():
  done = run("tune", "--optimizers", "sgd", "--seeds", "1", "--epochs", "2")
  assert done.returncode == 0, done.stderr
  _, grid = configs.load("digits_mlp")
  for values in grid["sgd"].values():
    assert all(f"{value:g}" in done.stdout for value in values)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["trian"], "unknown command 'trian'; did you mean 'train'"),
    (["compare", "cifar10_mlpp"], "unknown CONFIG 'cifar10_mlpp'; did you mean 'cifar10_mlp'"),
    (["compare", "moon"], "unknown CONFIG 'moon': one of c4_360m"),
    (["train", "--set", "batch_sise=3"], "batch-size"),
    (["compare", "--optimizers", "lion"], "unknown optimizers .'lion'.: any of sgd, adamw"),
    (["compare", "--epoch", "3"], "--epoch"),
    (["compare", "--batch-size", "5000"], "larger than the 1437 training examples"),
    (["compare", "--batch-sizes", "8", "7"], "--batch-size 7: FOP needs a multiple of 2, of"),
    (["tune", "--micro-batches", "3"], "--batch-size 256: SGD needs a multiple of 3"),
    (["train", "c4_360m"], "--dataset byte_pairs needs --files"),
  ],
)
def test_bad_command_lines(args, message, capsys):
  with pytest.raises(SystemExit) as caught:
    main(args)
  assert caught.value.code not in (0, None)
  assert re.search(message, f"{caught.value.code}\n{''.join(capsys.readouterr())}")


def test_diagnostics_of_what_has_no_curvature(tmp_path, capsys):
  main(["train", "--optimizers", "sgd", "--epochs", "1", "--diagnostics", "--out", str(tmp_path)])
  assert "SGD keeps no curvature by layer" in capsys.readouterr().out


@pytest.mark.parametrize("name", configs.NAMES)
def test_a_configuration_says_what_it_is_and_builds_its_network(name):
  config, grid = configs.load(name)
  assert configs.described(name).endswith(".")
  assert set(config.optimizers) <= set(grid)
  classes = 100 if "100" in config.dataset else 65
  model = config.model.build((80, 80, 3), classes)
  params, _ = jax.eval_shape(lambda: model.init(0))
  assert models.parameter_count(params) > 1000


@pytest.mark.parametrize("name", ["digits_mlp", "cifar10_mlp", "fashion_mnist_mlp"])
def test_grids_are_of_one_size_and_hold_the_chosen_values(name):
  config, grid = configs.load(name)
  assert set(grid) == set(config.optimizers)
  sizes = {np.prod([len(values) for values in row.values()]) for row in grid.values()}
  assert len(sizes) == 1
  for optimizer, axes in grid.items():
    for field, values in axes.items():
      chosen = getattr(getattr(config, optimizer), field)
      assert chosen in values or (chosen is None and common.RELATIVE_DAMPING in values)


def test_digits():
  digits = data.load("digits")
  assert digits.train_images.shape == (1437, 8, 8, 1)
  assert digits.test_images.shape == (360, 8, 8, 1)
  assert set(digits.test_labels) == set(range(10))
  np.testing.assert_allclose(digits.mean, digits.train_images.mean(), rtol=1e-6)
  np.testing.assert_allclose(digits.std, digits.train_images.std(), rtol=1e-6)


def test_holdout_has_no_test_image():
  digits = data.load("digits")
  part = data.holdout(digits)
  assert len(part.test_labels) == 287
  assert len(part.train_labels) + len(part.test_labels) == len(digits.train_labels)
  images = np.concatenate([part.train_images, part.test_images])
  as_rows = lambda array: sorted(map(bytes, array))
  assert as_rows(images) == as_rows(digits.train_images)


def test_runs_that_never_arrive():
  epochs = comparison.curves(
    rows("sgd", 0, [0.1, 0.8, 0.9])
    + rows("sgd", 1, [0.1, 0.9, 0.7])
    + rows("adamw", 0, [0.9, 0.9, 0.9])
    + rows("adamw", 1, [0.1, 0.1, 0.8])
  )
  found = comparison.outcomes(epochs, ("test_accuracy", 0.9))
  np.testing.assert_array_equal(found.epochs, [3, 2, 1, np.nan])
  np.testing.assert_array_equal(found.steps, [15, 10, 5, np.nan])
  np.testing.assert_array_equal(found.seconds, [1.5, 1.0, 0.5, np.nan])
  np.testing.assert_array_equal(found.test_accuracy, [0.9, 0.7, 0.9, 0.8])
  sgd, adamw = comparison.summarize(found, "sgd").itertuples()
  assert sgd.seconds_per_epoch == 0.5
  assert comparison.reached(sgd, "epochs", 1) == "2.5 ± 0.7"
  assert sgd.speed_up == 1
  assert comparison.reached(adamw, "epochs", 1) == "– (1/2 reached)"
  assert np.isnan(adamw.speed_up)
  assert comparison.spread(1.0, np.nan, 2) == "1.00"
  # of a loss less is more
  by_loss = comparison.outcomes(epochs.assign(test_loss=epochs.epoch), ("test_loss", 1.5))
  assert by_loss.epochs.tolist() == [1] * 4


def test_intervals():
  """Student's t of 2 degrees of freedom is 4.303."""
  low, high = comparison.interval(5.0, 1.0, 3)
  np.testing.assert_allclose([low, high], [5 - 4.3027 / 3**0.5, 5 + 4.3027 / 3**0.5], rtol=1e-4)
  assert np.isnan(comparison.interval(5.0, 1.0, 2)[0])


def test_rates_of_batch_sizes():
  config, _ = configs.load("digits_mlp")
  config = dataclasses.replace(config, batch_sizes=(128, 512), scale_rate="linear")
  small, large = configs.by_batch_size(config)
  assert (small.batch_size, large.batch_size) == (128, 512)
  np.testing.assert_allclose(large.kfac.learning_rate, 2 * config.kfac.learning_rate)
  np.testing.assert_allclose(small.adamw.learning_rate, config.adamw.learning_rate / 2)


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "step", "constant"])
def test_schedules(name):
  """Up to the peak in a tenth of the steps, then down; the first step is not zero."""
  config, _ = configs.load("digits_mlp")
  rate = training.schedule_of(dataclasses.replace(config, schedule=name), 0.5, 100)
  values = np.array([rate(step) for step in range(100)])
  np.testing.assert_allclose(values[:11], 0.5 * np.arange(1, 12).clip(max=11) / 11, rtol=1e-5)
  assert np.all(np.diff(values[10:]) <= 1e-7)
  last = {"cosine": 1.5e-4, "linear": 5.56e-3, "exponential": 5.3e-3, "step": 5e-3, "constant": 0.5}
  np.testing.assert_allclose(values[-1], last[name], rtol=0.05)


def test_a_staircase():
  """Neumann's: 0.3 times the rate every so many epochs, after a warm-up."""
  config, _ = configs.load("imagenet_resnet50_neumann")
  rate = training.schedule_of(dataclasses.replace(config, epochs=90, warmup=0.0), 0.5, 900)
  values = np.array([rate(step) for step in (0, 399, 400, 799, 800, 899)])
  np.testing.assert_allclose(values, 0.5 * 0.3 ** np.array([0, 0, 1, 1, 2, 2]), rtol=1e-6)


def test_points_of_a_search():
  axes = {"learning_rate": (1e-3, 1e-1), "weight_decay": (0.0, 0.1)}
  assert len(points_of(axes, 0, 0)) == 4
  drawn = points_of(axes, 50, 0)
  assert drawn == points_of(axes, 50, 0) != points_of(axes, 50, 1)
  rates = np.array([point["learning_rate"] for point in drawn])
  assert rates.min() >= 1e-3 and rates.max() <= 1e-1
  assert 15 < np.sum(rates < 1e-2) < 35  # half of them, as their logarithms are uniform
  assert {point["weight_decay"] for point in drawn} == {0.0, 0.1}


def test_set_is_another_spelling_of_flags():
  args = ["--epochs", "3", "--set", "batch_size=5", "kfac.learning_rate=0.3", "--seeds", "1"]
  flags = ["--epochs", "3", "--batch-size", "5", "--kfac.learning-rate", "0.3", "--seeds", "1"]
  assert as_flags(args) == flags


@pytest.mark.slow
def test_report_is_one_page_of_all_runs(tmp_path):
  done = run(
    *("compare", "--optimizers", "sgd", "adamw", "--seeds", "1", "--epochs", "2"),
    *("--batch-sizes", "128", "256", "--out", str(tmp_path)),
  )
  assert done.returncode == 0, done.stderr
  again = run("compare", "--optimizers", "sgd", "--seeds", "1", "--epochs", "2",
              "--batch-sizes", "128", "256", "--out", str(tmp_path))  # fmt: skip
  assert again.returncode == 0, again.stderr
  done = run("report", str(tmp_path))
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "report.html").read_text()
  assert page.count("<td>128</td>") == page.count("<td>256</td>") == 2
  assert page.count("data:image/png;base64,") == 3  # a plot a batch size, and one over both
  assert "http" not in page.replace("https://", "")
  missing = run("report", str(tmp_path / "nothing"))
  assert missing.returncode == 1
  assert "holds no runs" in missing.stderr


def test_missing_data_says_how_to_get_it(tmp_path):
  done = run("compare", "cifar10_mlp", "--data-dir", str(tmp_path))
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert "file_format='array_record'" in done.stderr
  assert f"data_dir={str(tmp_path)!r}" in done.stderr
  assert "pip install 'fop_optax[experiments]' tensorflow" in done.stderr


def test_missing_package_says_which_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(SystemExit, match=r"fop_optax\[experiments\]"):
    data.load("cifar10")


needs_tfds = pytest.mark.skipif(
  "TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR names no folder of prepared data sets"
)


@needs_tfds
@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "shape"), [("cifar10", (50000, 32, 32, 3)), ("fashion_mnist", (60000, 28, 28, 1))]
)
def test_tfds_folders(name, shape):
  read = data.load(name)
  assert read.train_images.shape == shape
  assert read.train_images.dtype == np.uint8
  assert read.test_images.shape == (10000, *shape[1:])
  assert (np.bincount(read.train_labels) == shape[0] // 10).all()
  mean = read.train_images.mean((0, 1, 2))
  np.testing.assert_allclose(read.mean, mean, rtol=1e-6)
  np.testing.assert_allclose(read.std, read.train_images.std((0, 1, 2)), rtol=1e-6)


@pytest.mark.slow
@needs_tfds
@pytest.mark.parametrize("name", ["cifar10_mlp", "fashion_mnist_mlp"])
def test_compare_on_tfds_folders(name, tmp_path):
  done = run(
    *("compare", name, "--optimizers", "kfac", "--seeds", "1", "--epochs", "1"),
    *("--model.hidden", "32", "--out", str(tmp_path)),
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / name / "curves.png").exists()


BENCHMARKS = {
  "step_cost": (
    ["--cases", "mlp-16", "--optimizers", "fop", "--rounds", "1", "--period", "2"],
    "mlp-16 .* sgd .* fop .* refresh .* every 2",
  ),
  "update_cost": (
    ["--cases", "16", "--methods", "SOAP", "Neumann", "--rounds", "1"],
    "AdamW .* 1.00 .* SOAP .* Neumann",
  ),
  "linear_algebra": (
    ["--sides", "16", "--batch", "1", "--rounds", "1", "--steps", "1"],
    "products .* moments .* inverses .* bases .* eigenvectors .* eigh",
  ),
  "compile_time": (
    ["--networks", "gru", "--rounds", "1"],
    "conditionals .* gru .* adamw .* 1.00 .* kfac .* fop",
  ),
  "scaling": (
    ["--devices", "1", "2", "--methods", "SOAP", "--blocks", "1"],
    "strong .* SOAP .* replicated .* owned .* weak .* saved results/scaling/scaling.csv",
  ),
  "loop": (["digits_mlp", "--optimizers", "sgd"], "digits_mlp, sgd .* step .* loop .* input"),
  "curvature_fraction": (["--batch", "256", "--fractions", "1", "0.5"], "1/1 .* 1.0000 .* 1/2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_print_a_table(name):
  args, table = BENCHMARKS[name]
  out = module(f"experiments.benchmarks.{name}", *args)
  assert out.returncode == 0, out.stderr
  assert re.search(table.replace(" .* ", r"(?s:.*)"), out.stdout), out.stdout


def test_unknown_case_of_a_benchmark():
  out = module("experiments.benchmarks.step_cost", "--cases", "rnn-16")
  assert out.returncode and "unknown case 'rnn-16': one of mlp-BATCH" in out.stderr


@pytest.mark.slow
def test_defaults(tmp_path):
  """The sweep over one workload: every method, its files, and the summary."""
  arguments = ("--workloads", "mlp-digits", "--seeds", "1", "--out", str(tmp_path))
  done = module("experiments.benchmarks.defaults", *arguments)
  assert done.returncode == 0, done.stderr
  with (tmp_path / "runs.csv").open(encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  assert {row["method"] for row in rows} == {"AdamW", "Muon", "K-FAC", "FOP"}
  assert len(rows) == 14 and all(row["diverged"] == "False" for row in rows)
  assert all(len(row["curve"].split()) == 80 for row in rows)
  table = (tmp_path / "table.md").read_text(encoding="utf-8")
  assert "K-FAC: 0 of 3 runs diverged" in table
  assert (tmp_path / "losses.png").stat().st_size > 10_000

  *kept, lost = (tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()
  (tmp_path / "runs.csv").write_text("\n".join([*kept, ""]), encoding="utf-8")
  done = module("experiments.benchmarks.defaults", *arguments)
  assert done.returncode == 0, done.stderr
  *again, made = (tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()
  assert again == kept  # seconds too: these runs were not made again
  assert made.split(",")[:6] == lost.split(",")[:6]

  done = module("experiments.benchmarks.defaults", "--methods", "LBFGS")
  assert done.returncode != 0 and "unknown: LBFGS; methods are AdamW" in done.stderr


def test_update_cost_of_an_optimizer_that_a_file_makes(tmp_path):
  own = tmp_path / "theirs.py"
  own.write_text(
    "import optax\nLIKE = 'SOAP'\ndef optimizer(period):\n  return optax.sgd(1.0 / period)\n"
  )
  make, like = peers.from_file(own, 4)
  updates, _ = make().update(1.0, make().init(0.0))
  assert (float(updates), like) == (-0.25, "SOAP")
  own.write_text("")
  with pytest.raises(SystemExit, match=r"theirs\.py has no function optimizer\(period\)"):
    peers.from_file(own, 4)
