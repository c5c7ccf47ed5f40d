"""Data sets: the splits are disjoint, exhaustive and stable, the pixels right, and every bad input is named."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from vqunet_tf import _probe, backend, data
from vqunet_tf.config import DataConfig
from vqunet_tf.errors import UserError

DIGITS = DataConfig(dataset="digits")


# === What holds for every data set ===


def _keys(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 training and 6 test images, each of one grey value that says which it is."""
    root = tmp_path_factory.mktemp("numbered")
    for name, values in {"train": range(20), "test": range(200, 206)}.items():
        for value in values:
            _write(root / name / "ab"[value % 2] / f"{value:03}.png", np.full((4, 6), value, np.uint8))
    return root


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _values(split: data.Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def _load(root: Path, split: str, **settings: object) -> data.Split:
    return data.load(DataConfig(dataset=str(root), **settings), split)  # type: ignore[arg-type]


def test_train_and_validation_share_nothing_and_miss_nothing(numbered: Path):
    train, validation = _load(numbered, "train"), _load(numbered, "validation")
    assert len(train.images) == 18
    assert len(validation.images) == 2  # a tenth
    assert sorted(_values(train) + _values(validation)) == list(range(20))


def test_the_seed_decides_the_order_and_what_is_held_out(numbered: Path):
    for split in ("train", "validation"):
        assert _values(_load(numbered, split, seed=3)) == _values(_load(numbered, split, seed=3))
        assert set(_values(_load(numbered, split, seed=3))) != set(_values(_load(numbered, split, seed=4)))
    assert _values(_load(numbered, "train")) != sorted(_values(_load(numbered, "train")))


def test_the_held_out_images_are_these_for_ever(numbered: Path):
    """Released weights rely on it: another choice would train on what was held out."""
    assert _values(_load(numbered, "validation", seed=0, validation_fraction=0.2)) == [17, 2, 19, 16]


def test_labels_follow_their_images(numbered: Path):
    for split in ("train", "validation", "test"):
        part = _load(numbered, split)
        assert [value % 2 for value in _values(part)] == part.labels.tolist()


def test_validation_is_rounded_and_never_empty(numbered: Path):
    assert len(_load(numbered, "validation", validation_fraction=0.13).images) == 3
    assert len(_load(numbered, "validation", validation_fraction=0.001).images) == 1


def test_a_limit_keeps_the_first_and_spares_the_test_set(numbered: Path):
    whole = {
        split: _values(_load(numbered, split, validation_fraction=0.5)) for split in ("train", "validation", "test")
    }
    short = {split: _values(_load(numbered, split, validation_fraction=0.5, limit=4)) for split in whole}
    assert short == {"train": whole["train"][:4], "validation": whole["validation"][:4], "test": whole["test"]}


def test_the_test_set_is_not_touched_by_training(numbered: Path, tmp_path: Path):
    (tmp_path / "train").symlink_to(numbered / "train")
    assert len(_load(tmp_path, "train").images) == 18  # there is no test/ to read
    with pytest.raises(UserError, match="test is missing"):
        _load(tmp_path, "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 1.0}, "expected between 0 and 1, got 1.0"),
        ({"validation_fraction": 0.0}, "expected between 0 and 1, got 0.0"),
        ({"validation_fraction": 0.99}, "leaves none of 20 training images"),
        ({"limit": -1}, "limit: expected at least 0, got -1"),
        ({"seed": -1}, "seed: expected a whole number from 0 to 2"),
    ],
)
def test_settings_out_of_range_are_refused(numbered: Path, settings: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        _load(numbered, "train", **settings)


def test_an_unknown_split_lists_the_known(numbered: Path):
    with pytest.raises(UserError, match="unknown split 'valid': expected one of test, train, validation"):
        _load(numbered, "valid")


# === digits ===


def test_digits_are_all_there_once():
    parts = [data.load(DIGITS, split) for split in ("train", "validation", "test")]
    assert [part.images.shape for part in parts] == [(1257, 32, 32, 1), (140, 32, 32, 1), (400, 32, 32, 1)]
    assert all(part.images.dtype == np.uint8 and part.labels.dtype == np.int32 for part in parts)
    assert all(set(part.labels.tolist()) == set(range(10)) for part in parts)
    assert parts[0].class_names == tuple("0123456789")
    assert len(set().union(*(_keys(part.images) for part in parts))) == 1797  # no two scans are equal


def test_digits_test_set_depends_on_no_seed():
    one, other = (data.load(DataConfig(seed=seed), "test") for seed in (0, 1))
    np.testing.assert_array_equal(one.images, other.images)


def test_digits_are_the_scans_enlarged():
    """Averaging each 4×4 block gives the 8×8 scan back, nearly, on the full scale of a byte."""
    from sklearn.datasets import load_digits

    scans = {tuple(scan.ravel()): label for scan, label in zip(load_digits().images, load_digits().target, strict=True)}
    test = data.load(DIGITS, "test")
    assert test.images.min() == 0
    assert test.images.max() == 255
    blocks = test.images.reshape(400, 8, 4, 8, 4).mean(axis=(2, 4)) * 16 / 255  # [400, 8, 8]
    everything, labels = np.array(list(scans)), np.array(list(scans.values()))
    for block, label in zip(blocks[:50], test.labels[:50], strict=True):
        distances = np.abs(everything - block.ravel()).mean(axis=1)
        assert distances.min() < 1.0
        assert labels[distances.argmin()] == label


# === Folders ===


def test_a_colour_folder_comes_back_as_it_was_written(tmp_path: Path):
    rng = np.random.default_rng(0)
    written = rng.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
    for i, image in enumerate(written):
        _write(tmp_path / "test" / ("cat", "dog")[i // 3] / f"{i}.{('PNG', 'bmp')[i % 2]}", image)
    _write(tmp_path / "train" / "cat" / "0.png", written[0])
    _write(tmp_path / "train" / "dog" / "0.png", written[1])
    (tmp_path / "test" / "cat" / "notes.txt").write_text("not an image")
    read = _load(tmp_path, "test")
    np.testing.assert_array_equal(read.images, written)
    assert read.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert read.class_names == ("cat", "dog")


def test_grey_and_colour_together_become_colour(tmp_path: Path):
    _write(tmp_path / "train" / "a" / "grey.png", np.full((4, 4), 9, np.uint8))
    _write(tmp_path / "train" / "b" / "red.png", np.full((4, 4, 3), (200, 0, 0), np.uint8))
    train, validation = (_load(tmp_path, split, validation_fraction=0.5) for split in ("train", "validation"))
    pixels = {tuple(image[0, 0].tolist()) for image in (*train.images, *validation.images)}
    assert pixels == {(9, 9, 9), (200, 0, 0)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two grey classes of two images, 4 wide and 4 high; each test spoils it in one way."""
    for split in ("train", "test"):
        for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
            _write(tmp_path / split / name, np.zeros((4, 4), np.uint8))
    return tmp_path


def test_an_image_of_another_size_is_named(small: Path):
    _write(small / "train" / "b" / "1.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(UserError, match=r"train/b/1\.png is 5x4 pixels, expected 4x4"):
        _load(small, "train")


def test_test_images_follow_the_training_images(small: Path):
    _write(small / "test" / "a" / "1.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match=r"test/a/1\.png is 8x8 pixels, expected 4x4"):
        _load(small, "test")
    _write(small / "test" / "a" / "1.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"test/a/1\.png is a colour image \(RGB\), expected grey"):
        _load(small, "test")


def test_unreadable_images_are_named(small: Path):
    broken = small / "train" / "a" / "1.png"
    whole = broken.read_bytes()
    for content in (b"", b"not a png", whole[: len(whole) // 2]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"train/a/1\.png cannot be read as an image"):
            _load(small, "train")


def test_sixteen_bits_are_refused(small: Path):
    _write(small / "train" / "a" / "1.png", np.zeros((4, 4), np.uint16))
    with pytest.raises(UserError, match=r"train/a/1\.png has Pillow mode I;16, expected 8 bits per channel"):
        _load(small, "train")


def test_test_classes_are_the_training_classes(small: Path):
    _write(small / "test" / "c" / "0.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="same class folders in test/ as in train/, found only in one of them: c"):
        _load(small, "test")


def test_missing_and_empty_folders_are_named(small: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere/train is missing: expected an image folder"):
        _load(tmp_path / "nowhere", "train")
    for path in (small / "train" / "a").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"train/a holds no images: expected files ending in \.png"):
        _load(small, "train")
    (small / "train" / "a").rmdir()
    with pytest.raises(UserError, match="at least two classes, found b"):
        _load(small, "train")


# === TensorFlow Datasets ===


@pytest.mark.parametrize(
    ("name", "shape", "label", "mean"),
    [("fashion_mnist", (10000, 28, 28, 1), "Ankle boot", 73.1), ("cifar10", (10000, 32, 32, 3), "truck", 121.5)],
)
def test_prepared_sets_are_read_as_they_lie(tfds_dir: Path, name: str, shape: tuple[int, ...], label: str, mean: float):
    if not (tfds_dir / name).is_dir():
        pytest.skip(f"{name} is not prepared")
    test = data.load(DataConfig(dataset=name, data_dir=str(tfds_dir)), "test")
    assert test.images.shape == shape
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert test.class_names[9] == label
    assert abs(test.images.mean() - mean) < 0.1


def _prepare(
    data_dir: Path, name: str = "tiny", image=None, label=None, key: str = "label", sizes=(4, 4, 4, 4)
) -> None:
    """Writes a data set the way TFDS lays out a prepared one: image i is all of value i, of class i mod 2."""
    import tensorflow_datasets as tfds

    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    feature = image or tfds.features.Image(shape=(None, None, 1))
    features = tfds.features.FeaturesDict({"image": feature, key: label or tfds.features.ClassLabel(names=["a", "b"])})
    identity = tfds.core.dataset_info.DatasetIdentity(name, tfds.core.Version("1.0.0"), str(folder), module_name="")
    writer = tfds.core.SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=features), 100)
    writer.initialize_splits(["train"])
    kind = feature.np_dtype
    rows = [{"image": np.full((side, side, 1), i, kind), key: i % 2} for i, side in enumerate(sizes)]
    writer.add_examples({"train": rows})
    writer.close_all()


def test_any_prepared_set_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _prepare(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    train, validation = (data.load(DataConfig(dataset="tiny"), split) for split in ("train", "validation"))
    assert sorted(_values(train) + _values(validation)) == [0, 1, 2, 3]
    assert [value % 2 for value in _values(train)] == train.labels.tolist()
    assert train.class_names == ("a", "b")
    with pytest.raises(UserError, match="tiny has no split 'test': expected train and test, found train"):
        data.load(DataConfig(dataset="tiny"), "test")


def test_reading_a_prepared_set_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Inside a command absl shows notes, and TFDS has many."""
    _prepare(tmp_path)
    with caplog.at_level(logging.INFO, logger="absl"):
        data.load(DataConfig(dataset="tiny", data_dir=str(tmp_path)), "train")
        assert logging.getLogger("absl").level == logging.INFO
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("late", [False, True])
def test_tensorflow_leaves_the_gpu_to_another_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool):
    import tensorflow as tf

    hidden = []

    def hide(devices: list[str], kind: str) -> None:
        hidden.append((devices, kind))
        if late:
            raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", hide)
    _prepare(tmp_path)
    for tensorflow in (True, False):
        monkeypatch.setattr(backend, "is_tensorflow", lambda here=tensorflow: here)
        assert len(data.load(DataConfig(dataset="tiny", data_dir=str(tmp_path)), "train").images) == 3
        assert hidden == ([] if tensorflow else [([], "GPU")])


def test_sets_of_another_kind_are_refused(tmp_path: Path):
    import tensorflow_datasets as tfds

    cases = {
        "targets": ({"key": "target"}, "expected the features image and label, found image, target"),
        "numbers": ({"label": tfds.features.Scalar(np.int64)}, "label to be a ClassLabel, found Scalar"),
        "deep": ({"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16)}, "an 8-bit Image, found Image"),
        "uneven": ({"sizes": (4, 4, 5, 4)}, "uneven: expected images of one size"),
    }
    for name, (settings, message) in cases.items():
        _prepare(tmp_path, name, **settings)
        with pytest.raises(UserError, match=message):
            data.load(DataConfig(dataset=name, data_dir=str(tmp_path)), "train")


def test_damaged_sets_are_named(tmp_path: Path):
    _prepare(tmp_path)
    records = next((tmp_path / "tiny" / "1.0.0").glob("*.tfrecord*"))
    records.write_bytes(records.read_bytes()[:-20])
    with pytest.raises(UserError, match="tiny in .* cannot be read, remove and prepare it again"):
        data.load(DataConfig(dataset="tiny", data_dir=str(tmp_path)), "train")
    (tmp_path / "tiny" / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="tiny in .* cannot be read, remove and prepare it again"):
        data.load(DataConfig(dataset="tiny", data_dir=str(tmp_path)), "train")


def test_an_unknown_name_lists_close_ones(tmp_path: Path):
    with pytest.raises(
        UserError, match="unknown data set 'cifar11'.*did you mean .*cifar10.*a folder with train/ and test/"
    ):
        data.load(DataConfig(dataset="cifar11", data_dir=str(tmp_path)), "train")
    with pytest.raises(UserError, match="did you mean digits"):
        data.load(DataConfig(dataset="digit", data_dir=str(tmp_path)), "train")


def test_without_a_network_it_fails_fast_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(url: str, **_: object) -> None:
        raise requests.ConnectionError(url)

    monkeypatch.setattr(requests, "head", refuse)
    begin = time.monotonic()
    with pytest.raises(UserError, match="cifar10 is not prepared in .*--data_dir or TFDS_DATA_DIR.*tfds build cifar10"):
        data.load(DataConfig(dataset="cifar10", data_dir=str(tmp_path / "new")), "train")
    assert time.monotonic() - begin < 10  # one second here; TFDS alone takes minutes
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_leaves_no_half_made_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tensorflow_datasets as tfds

    class Failing:
        def download_and_prepare(self) -> None:
            (tmp_path / "cifar10" / "incomplete.3.0.2").mkdir(parents=True)
            raise OSError("the line\nwent dead")

    monkeypatch.setattr(_probe, "answers", lambda urls: True)
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Failing())
    with pytest.raises(UserError, match="cifar10 cannot be prepared in .*: the line went dead"):
        data.load(DataConfig(dataset="cifar10", data_dir=str(tmp_path)), "train")
    assert list(tmp_path.iterdir()) == []


def test_a_data_dir_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data_dir .*file is a file"):
        data.load(DataConfig(dataset="cifar10", data_dir=str(tmp_path / "file")), "train")


# === The probe ===


def _head(monkeypatch: pytest.MonkeyPatch, answer) -> None:
    """Replaces `requests.head` by a function of the URL that gives a status, raises or takes its time."""

    def head(url: str, timeout: float) -> requests.Response:
        response = requests.Response()
        response.status_code = answer(url)
        return response

    monkeypatch.setattr(requests, "head", head)


def test_any_answer_of_a_living_host_counts(monkeypatch: pytest.MonkeyPatch):
    for status, alive in {200: True, 302: True, 405: True, 503: False}.items():
        _head(monkeypatch, lambda url, status=status: status)
        assert _probe.answers(["https://one.invalid"]) is alive


def test_one_living_host_is_enough(monkeypatch: pytest.MonkeyPatch):
    def answer(url: str) -> int:
        if "dead" in url:
            raise requests.ConnectionError(url)
        return 200

    _head(monkeypatch, answer)
    assert _probe.answers(["https://dead.invalid", "https://living.invalid"])
    assert not _probe.answers(["https://dead.invalid", "https://dead.invalid"])


def test_silence_is_given_up_on(monkeypatch: pytest.MonkeyPatch):
    _head(monkeypatch, lambda url: time.sleep(1.0) or 200)
    begin = time.monotonic()
    assert not _probe.answers(["https://silent.invalid"], seconds=0.2)
    assert time.monotonic() - begin < 0.9
