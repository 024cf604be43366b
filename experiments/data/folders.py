"""TFDS folders with ArrayRecord files: opening one, and what to do where it is not there."""

import hashlib
import os
import pathlib
from typing import Any

# What TFDS cannot download or does not know, and what to do about it.
BY_HAND = {
  "imagenet2012": """\
ImageNet is not downloaded by TFDS: first put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar
(from https://image-net.org, with an account) into `downloads/manual` of the data folder.
""",
  "caltech101_80px": """\
TFDS has no set of this name: these are Caltech-101's photographs, made smaller beforehand, in a
folder of TFDS's layout. Without it, `caltech101` gives the same kind of images from the originals.
""",
}


def root(data_dir: str | None = None) -> pathlib.Path:
  """Where data sets are: `data_dir`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
  chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(chosen).expanduser()


def open_source(name: str, split: str, data_dir: str | None = None) -> Any:
  """Records of one split, at random access: features as they are stored, images still encoded.

  Args:
    name: of a TFDS data set, or of a folder in TFDS's layout; `name:1.0.0` for a version.
    split: `"train"`, or in TFDS's notation a part of it.
    data_dir: see `root`.

  Returns:
    `tfds.data_source`: a sequence of dictionaries, with `dataset_info`. It can be pickled.

  Raises:
    SystemExit: with what to do, where the packages or the data are not there, or where the set is
      not of images (`image`) and classes (`label`).
  """
  try:
    import tensorflow_datasets as tfds

    # Never by TFDS's own download: it would fetch and prepare TFRECORD files, which need
    # TensorFlow to write and which `data_source` cannot read.
    options = {"data_dir": data_dir, "download": False}
    source = tfds.data_source(name, split=split, **options)
    missing = {"image", "label"} - set(source.dataset_info.features)
    if not missing:
      encoded = {"image": tfds.decode.SkipDecoding()}
      return tfds.data_source(name, split=split, decoders=encoded, **options)
  except ImportError as error:
    raise SystemExit(
      f"Reading {name!r} needs the packages of the `experiments` extra ({error}).\n"
      "Install them with: pip install 'fop_optax[experiments]'"
    ) from error
  # No folder of that name, no split in it, or files of another format than ArrayRecord.
  except (NotImplementedError, KeyError, ValueError, OSError) as error:
    raise SystemExit(_how_to_prepare(name, data_dir, error)) from error
  raise SystemExit(f"{name!r} is no set of images and classes: it has no {sorted(missing)}.")


def evaluation_split(source: Any) -> str:
  """The split to evaluate on: `"test"`; `"validation"` where there is none, or none with labels."""
  info = source.dataset_info
  return "validation" if info.name == "imagenet2012" or "test" not in info.splits else "test"


def key(source: Any, split: str) -> str:
  """A file name for what is made from `source`: data set, version, split, and which files.

  Files are told apart by their bytes' number and beginning: folders of one name and version differ
  by who prepared them.
  """
  info = source.dataset_info
  digest = hashlib.sha256()
  for name in info.splits[split].filepaths:
    path = pathlib.Path(name)
    digest.update(f"{path.name} {path.stat().st_size} ".encode())
    with path.open("rb") as file:
      digest.update(file.read(1 << 16))
  name = "-".join(filter(None, (info.name, info.config_name, str(info.version), split)))
  return "".join(c if c.isalnum() or c in "-._" else "_" for c in name) + (
    f"-{digest.hexdigest()[:12]}"
  )


def _how_to_prepare(name: str, data_dir: str | None, error: Exception) -> str:
  folder = "" if data_dir is None else f", data_dir={data_dir!r}"
  reason = (str(error).splitlines() or [""])[0]
  builder = name.replace("caltech101_80px", "caltech101")
  return f"""\
The data set {name!r} is not there as ArrayRecord files ({type(error).__name__}: {reason}).
{BY_HAND.get(name, "")}\
Prepare it once, with network access (TensorFlow is needed for this step alone):

  pip install 'fop_optax[experiments]' tensorflow
  python -c "import tensorflow_datasets as tfds; \\
    tfds.builder({builder!r}, file_format='array_record'{folder}).download_and_prepare()"

It is looked for in --data-dir, else in $TFDS_DATA_DIR, else in ~/tensorflow_datasets."""
