"""Data sets as arrays: the embedded digits, any TFDS image-classification set, or a folder of images."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vqunet_tf import _digits, _folder, _probe, backend
from vqunet_tf.config import DataConfig
from vqunet_tf.errors import UserError, choice

_BATCH = 500  # images decoded at a time
_TFDS_BUCKET = "https://storage.googleapis.com/tfds-data"  # where TFDS itself looks for prepared sets

Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Split:
    """Part of a data set: images uint8 `[N,H,W,C]`, labels int32 `[N]` in 0..K-1, K class names."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def load(config: DataConfig, split: str) -> Split:
    """Returns `train`, `validation` or `test` of the configured data set.

    Validation is held out of the training set by `config.seed`: the two are disjoint and together
    exactly the training set, in an order fixed by the seed. `config.limit` shortens both, never test.
    The test set is read only when it is asked for. A data set that cannot be used raises a `UserError`.
    """
    choice("split", split, ("train", "validation", "test"))
    images, labels, class_names = _check(config.dataset, _read(config, "test" if split == "test" else "train"))
    if split != "test":
        chosen = _part(config, split, len(images))
        images, labels = images[chosen], labels[chosen]
    return Split(images, labels.astype(np.int32), class_names)


def _read(config: DataConfig, split: str) -> Arrays:
    if config.dataset == "digits":
        return _digits.read(split)
    path = Path(config.dataset).expanduser()
    written_as_path = config.dataset.startswith((".", "~", os.sep)) or config.dataset.endswith(os.sep)
    if written_as_path or (path / "train").is_dir():
        return _folder.read(path, split)
    return _read_tfds(config, split)


def _part(config: DataConfig, split: str, count: int) -> np.ndarray:
    """The places in the training set, `[n]`, of its part `train` or `validation`."""
    held = max(1, round(count * config.validation_fraction))
    if held >= count:
        raise UserError(
            f"data.validation_fraction {config.validation_fraction} leaves none of {count} training images: make it smaller"
        )
    # RandomState's streams are frozen by NumPy's promise; a Generator's may change with its version.
    order = np.random.RandomState(config.seed).permutation(count)
    chosen = order[:held] if split == "validation" else order[held:]
    return chosen[: config.limit] if config.limit else chosen


def _check(dataset: str, arrays: Arrays) -> Arrays:
    """Returns the arrays if they are what `Split` promises."""
    images, labels, class_names = arrays
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"{dataset}: expected 8-bit images [N,H,W,C], got {images.dtype} {list(images.shape)}")
    if len(images) != len(labels) or not len(images):
        raise UserError(
            f"{dataset}: expected as many labels as images and at least one, got {len(labels)} and {len(images)}"
        )
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise UserError(
            f"{dataset}: expected labels in 0..{len(class_names) - 1}, got {labels.min()}..{labels.max()}: "
            "a split without labels cannot be used"
        )
    return arrays


# === TensorFlow Datasets ===


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the progress notes TFDS logs inside absl's commands; warnings pass."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet()
def _read_tfds(config: DataConfig, split: str) -> Arrays:
    """Reads a prepared data set as it lies; one that is not there is downloaded and prepared first."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    if not backend.is_tensorflow():
        # Reading needs none, and TensorFlow would take the memory that training needs; if it has one already, it is too late.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    builder = _prepared(config) or _prepare(config)
    name = config.dataset
    features, splits = builder.info.features, builder.info.splits
    found = sorted(features) if isinstance(features, tfds.features.FeaturesDict) else [str(features)]
    if not {"image", "label"} <= set(found):
        raise UserError(
            f"{name} is not an image-classification set: expected the features image and label, found {', '.join(found)}"
        )
    image, label = features["image"], features["label"]
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise UserError(f"{name}: expected the feature image to be an 8-bit Image, found {image!r}")
    if not isinstance(label, tfds.features.ClassLabel):
        raise UserError(f"{name}: expected the feature label to be a ClassLabel, found {label!r}")
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}: expected train and test, found {', '.join(splits)}")

    images, labels = [], []
    try:
        # A fixed number of calls: letting tf.data tune it costs half as much again on two cores.
        reading = tfds.ReadConfig(num_parallel_calls_for_decode=4, try_autocache=False)
        dataset = builder.as_dataset(split=split, read_config=reading).map(lambda row: (row["image"], row["label"]))
        for some_images, some_labels in dataset.batch(_BATCH).prefetch(2).as_numpy_iterator():
            images.append(some_images)
            labels.append(some_labels)
    except tf.errors.InvalidArgumentError as error:  # unequal shapes cannot be batched
        raise UserError(f"{name}: expected images of one size: {_line(error)}") from None
    except (OSError, tf.errors.OpError) as error:
        raise UserError(
            f"{name} in {builder.data_path} cannot be read, remove and prepare it again: {_line(error)}"
        ) from None
    shapes = {array.shape[1:] for array in images}
    if len(shapes) != 1:
        raise UserError(
            f"{name}: expected images of one size, found {', '.join(map(str, sorted(shapes))) or 'no images'}"
        )
    return np.concatenate(images), np.concatenate(labels), tuple(label.names)


def _data_dir(config: DataConfig) -> Any:
    """`config.data_dir`, else $TFDS_DATA_DIR, else TFDS's own default, as a path that may be on gs:// too."""
    import tensorflow_datasets as tfds

    given = config.data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
    return tfds.core.Path(given).expanduser()


def _prepared(config: DataConfig) -> Any:
    """The builder of a data set that lies prepared, else None; never touches the network."""
    import tensorflow_datasets as tfds

    data_dir = _data_dir(config)
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is a file: expected the folder where TFDS data sets lie")
    try:
        return tfds.core.read_only_builder.builder_from_files(config.dataset, data_dir=str(data_dir))
    except ValueError:  # not found, or not a name at all
        return None
    except Exception as error:  # a corrupted description raises all kinds
        raise UserError(
            f"{config.dataset} in {data_dir} cannot be read, remove and prepare it again: {_line(error)}"
        ) from None


def _prepare(config: DataConfig) -> Any:
    """Downloads and prepares a data set; without a network it fails in seconds, where TFDS alone retries for minutes."""
    import tensorflow_datasets as tfds

    data_dir, name = _data_dir(config), config.dataset
    known = tfds.list_builders(with_community_datasets=False)
    bare = name.partition("/")[0].partition(":")[0]
    if bare not in known:
        close = difflib.get_close_matches(bare, ["digits", *known])
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(
            f"unknown data set {name!r} (nor is it prepared in {data_dir}): {meant}"
            "expected digits, fashion_mnist, cifar10, any TFDS name, or a folder with train/ and test/"
        )
    urls = [*_download_urls(bare), _TFDS_BUCKET]
    if not _probe.answers(urls):
        hosts = " nor ".join(dict.fromkeys(urlsplit(url).netloc for url in urls))
        raise UserError(
            f"{name} is not prepared in {data_dir} (no {bare}/<version>/dataset_info.json there) and cannot be downloaded (no answer from "
            f"{hosts}): give --data_dir or TFDS_DATA_DIR where it lies prepared, or run 'tfds build {name}' on a machine with a network"
        )
    folder = data_dir / bare
    is_new = not folder.exists()
    try:
        builder = tfds.builder(name, data_dir=str(data_dir))
        builder.download_and_prepare()
    except Exception as error:  # data set scripts raise all kinds
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)  # half-made; finished downloads are kept elsewhere
        raise UserError(f"{name} cannot be prepared in {data_dir}: {_line(error)}") from error
    return builder


def _download_urls(name: str) -> list[str]:
    """One of the data set's own addresses, if it declares any."""
    import tensorflow_datasets as tfds

    try:
        return list(tfds.builder_cls(name).url_infos or {})[:1]
    except ImportError:  # its script needs a package that is absent: preparing will say which
        return []


def _line(error: Exception) -> str:
    """The start of a long message, on one line."""
    return " ".join(str(error).split())[:300]
