"""Releasing a run: what is stored answers alike, in the room that allows it, and nothing is written that may not be."""

import hashlib
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

import vqunet_tf
from commands import compact, release, release_card
from trainers import evaluate
from vqunet_tf.errors import UserError
from vqunet_tf.models import classifiers, presets
from vqunet_tf.recipes import preset
from vqunet_tf.runs import RunFolder, save_model

SHAPE = (16, 16, 1)
SIZES = {"widths": (8, 16), "num_embeddings": (32,), "embedding_dim": (8,)}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty place for presets."""
    folder = tmp_path / "presets"
    folder.mkdir()
    monkeypatch.setattr(presets, "FOLDER", folder)
    return folder


def finished(path, seed=0, classifier=None, scale=1.0, **changes):
    """A run folder with random models, as if trained: far from their initial values, with statistics of batches."""
    keras.utils.set_random_seed(seed)
    config = preset("smoke", "digits").replace(
        {
            "data.dataset": "nowhere",
            "data.image_shape": SHAPE,
            "data.class_names": tuple("abcd"),
            "data.data_dir": "somewhere/private",
            **changes,
        }
    )
    run = RunFolder(path)
    run.create(config)
    model = classifier or classifiers.build("residual", SHAPE, 4, (8, 16), 1)
    purifier = vqunet_tf.VQUNet(**SIZES, channels=1)
    rng = np.random.default_rng(seed)
    for weight in purifier.weights:
        weight.assign(scale * (weight + 0.1 * rng.normal(size=weight.shape)))
    for quantizer in purifier.quantizers:
        quantizer.weights_ema.assign(np.full(quantizer.weights_ema.shape, 1e6))  # beyond float16
    save_model(model, run.classifier)
    save_model(purifier, run.purifier)
    return run


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """The data set of these runs is nowhere, and nobody asks the network for it."""

    def load(config, split):
        raise UserError("nowhere")

    monkeypatch.setattr(release.data, "load", load)


def outputs(purifier, classifier, images):
    clean = images / np.float32(255.0)
    purified = purifier.purify(images)
    return purified, np.asarray(classifier(clean)), np.asarray(classifier(purified))


def test_a_release_answers_like_the_run_and_computes_in_float32(house, tmp_path, capsys):
    run = finished(tmp_path / "run")
    release.console(["release", f"--run_dir={run.path}", "--preset=tiny"])
    said = capsys.readouterr().out
    assert "compared on random images" in said and "all presets together" in said
    purifier, classifier = vqunet_tf.VQUNet.from_preset("tiny"), presets.load("tiny", "classifier")
    assert {str(weight.dtype) for model in (purifier, classifier) for weight in model.weights} == {"float32"}
    images = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), np.uint8)
    old = outputs(run.load_purifier(), run.load_classifier(), images)
    new = outputs(purifier, classifier, images)
    assert max(np.abs(a - b).max() for a, b in zip(old, new, strict=True)) <= 1e-3
    for quantizer in purifier.quantizers:
        np.testing.assert_array_equal(quantizer.weights_ema.numpy(), 1e6)
    for line in (house / "tiny" / "SHA256SUMS").read_text().splitlines():
        expected, file = line.split()
        assert hashlib.sha256((house / "tiny" / file).read_bytes()).hexdigest() == expected
    assert {path.name for path in (house / "tiny").iterdir()} == {
        "purifier.keras",
        "classifier.keras",
        "config.json",
        "SHA256SUMS",
        "CARD.md",
    }
    (house / "tiny" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is damaged"):
        presets.load("tiny", "purifier")


def test_what_is_written_names_no_place_and_the_card_says_what_it_knows(house, tmp_path):
    run = finished(tmp_path / "run", **{"training.start": "/home/me/x.keras", "classifier.path": "/home/me/c.keras"})
    _, notes = release.release(run, "tiny")
    for beginning in ("the classifier was given to this run", "the purifier began with the weights of another run"):
        assert any(note.startswith(beginning) for note in notes)
    config = RunFolder(house / "tiny").load_config()
    assert (config.data.data_dir, config.classifier.path, config.training.start) == (None, None, None)
    for path in (house / "tiny").glob("*[nd]"):  # config.json and CARD.md
        assert "/home" not in path.read_text() and "private" not in path.read_text()
    card = (house / "tiny" / "CARD.md").read_text()
    # By hand, 16x16x1, widths 8 and 16, stem 2: 4x4x8 at 8x8; two blocks of two 3x3x8x8 at 8x8; down 3x3x8x16 and two blocks
    # of two 3x3x16x16 at 4x4; to codes and back 2x8x8 and 2x16x8; up 16x32 at 4x4; head 3x3x8x4 at 8x8.
    layers = 64 * (128 + 4 * 576 + 128 + 288) + 16 * (1152 + 4 * 2304 + 256 + 512)
    search = (64 + 16) * 32 * 8
    assert f"{(layers + search) / 1e6:.2f} million multiply-accumulates" in card
    assert f"{run.load_purifier().count_params():,} parameters" in card
    settings = {"training.epochs": 3, "training.batch_size": 128, "training.accumulate": 2, "classifier.epochs": 2}
    config = config.replace({**settings, "classifier.batch_size": 300})
    models = run.load_classifier(), run.load_purifier()
    known = release_card.text("tiny", config, *models, counts=(1000, 50), given=False)
    assert "1,000 training images, 50 held out" in known and "| classifier 3, purifier 10 |" in known  # 6 / 2, 21 / 2
    alone = {"training.objective": "adaptive", "training.head_weight": 1.0, "training.encoder_epochs": 5}
    known = release_card.text("tiny", config.replace(alone), *models, counts=(1000, 50), given=True)
    assert "encoder kept" not in known and "VQUNet, widths" in known
    kept = release_card.text(
        "tiny", config.replace({**alone, "training.freeze_encoder": True}), *models, counts=None, given=True
    )
    assert "alone, learning rate up to 0.002; that encoder kept as it was; 3 epochs" in kept
    assert "first 5 epochs of the encoder with a linear head alone" in known and "| encoder 17, purifier 10 |" in known
    assert "not counted" in card and card.count("*to be written*") >= 4 and "## Intended use and limits" in card


def test_a_classifier_of_models_is_not_counted(house, tmp_path):
    run = finished(tmp_path / "run")
    wrapped = classifiers.with_logits(keras.Sequential([run.load_classifier(), keras.layers.Softmax()]), SHAPE)
    card = release_card.text("tiny", run.load_config(), wrapped, run.load_purifier(), counts=None, given=True)
    (line,) = [line for line in card.splitlines() if line.startswith("| classifier |")]
    assert line == f"| classifier | given, {wrapped.count_params():,} parameters |"


def test_a_card_that_is_there_is_left_alone(house, tmp_path):
    run = finished(tmp_path / "run")
    (house / "tiny").mkdir()
    (house / "tiny" / "CARD.md").write_text("mine")
    _, notes = release.release(run, "tiny")
    assert (house / "tiny" / "CARD.md").read_text() == "mine"
    assert any("CARD.md was left as it is: bring it up to date" in note for note in notes)


def test_bits_are_spent_only_where_they_are_needed(house, tmp_path):
    """Weights that float16 holds exactly are stored so; what moves the answers too far is not, unless that is asked for."""
    run = finished(tmp_path / "exact")
    for path in (run.classifier, run.purifier):
        model = keras.models.load_model(path, compile=False)
        for weight in model.weights:
            weight.assign(weight.numpy().astype("float16").astype("float32") if len(weight.shape) > 1 else weight)
        model.save(path)
    stored, _ = release.release(run, "exact")
    assert [(each.bits, each.difference) for each in stored] == [(10, 0.0), (10, 0.0)]
    assert {array.dtype for array in compact.read(house / "exact" / "purifier.keras").values() if array.ndim > 1} == {
        np.dtype("float16")
    }
    wild = finished(tmp_path / "wild", scale=2.0)
    (_, asked), _ = release.release(wild, "wild")
    assert asked.bits > 10 and asked.difference <= 1e-3
    (_, forced), notes = release.release(wild, "half", storage="float16")
    assert forced.bits == 10 and forced.difference > 1e-3 and forced.size < asked.size
    assert any("only figures measured from these files hold" in note for note in notes)
    (_, whole), _ = release.release(wild, "whole", storage="float32")
    assert (whole.bits, whole.difference) == (23, 0.0)
    stored, _ = release.release(wild, "both", storage="float32,float16")
    assert [each.bits for each in stored] == [23, 10] and stored[0].difference == 0.0


@pytest.mark.parametrize("storage", ["float8", "auto,", "auto,auto,auto"])
def test_an_unknown_storage_is_refused(house, tmp_path, storage):
    with pytest.raises(UserError, match="expected one of auto, float16, float32, or two with a comma"):
        release.release(finished(tmp_path / "run"), "none", storage=storage)
    assert not (house / "none").exists()


def test_an_adaptive_purifier_shares_the_classifier(house, tmp_path, monkeypatch):
    base = finished(tmp_path / "base", **{"classifier.epochs": 7})
    release.release(base, "tiny")
    before = (house / "tiny" / "SHA256SUMS").read_text()
    # Trained on the released classifier, as its path was given.
    adaptive = finished(
        tmp_path / "adaptive",
        seed=1,
        classifier=presets.load("tiny", "classifier"),
        **{"training.objective": "adaptive", "classifier.path": "/home/me/c.keras"},
    )
    stored, _ = release.release(adaptive, "tiny_adaptive")
    assert stored[0].file == "../tiny/classifier.keras" and stored[0].difference == 0.0
    assert not (house / "tiny_adaptive" / "classifier.keras").exists()
    run = RunFolder(presets.folder("tiny_adaptive"))
    assert run.load_config().classifier.epochs == 7  # what its own preset says of it
    shared, own = run.load_classifier(), presets.load("tiny", "classifier")
    for one, other in zip(shared.weights, own.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert evaluate.RunFolder(presets.folder("tiny_adaptive")).classifier.exists()
    np.testing.assert_array_equal(presets.load("tiny_adaptive", "classifier").weights[0], own.weights[0])

    release.release(base, "tiny")  # again: the same weights are the same bytes
    assert (house / "tiny" / "SHA256SUMS").read_text() == before
    other = finished(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="tiny_adaptive shares the classifier of tiny, which would change"):
        release.release(other, "tiny")
    assert (house / "tiny" / "SHA256SUMS").read_text() == before
    stored, _ = release.release(other, "tiny_adaptive")  # another classifier: its own file
    assert stored[0].file == "classifier.keras"
    presets.load("tiny_adaptive", "classifier")
    (house / "tiny" / "classifier.keras").unlink()
    with pytest.raises(ValueError, match="damaged: expected SHA-256 .*, got no file"):
        presets.load("tiny", "purifier")


def test_too_much_is_refused_and_nothing_written(house, tmp_path, monkeypatch):
    release.release(finished(tmp_path / "one"), "one")
    size = sum(path.stat().st_size for path in (house / "one").iterdir())
    monkeypatch.setattr(release, "LIMIT", int(1.5 * size))
    with pytest.raises(UserError, match=r"together would take .* MB \(one .*, two .*\), expected at most"):
        release.release(finished(tmp_path / "two", seed=1), "two")
    assert [path.name for path in house.iterdir()] == ["one"]
    release.release(finished(tmp_path / "three", seed=2), "one")  # in the place of another it fits
    with pytest.raises(UserError, match="expected a name of small letters"):
        release.release(finished(tmp_path / "four"), "../one")


def test_rounding_is_to_the_nearest_and_float16_agrees():
    values = np.array([[1.0, 1.0 + 2**-11, 1.0 + 3 * 2**-11, -1.0 - 2**-10, 3.14159274, 0.0]], np.float32)
    # Halves go to even: 1 + 2^-11 down, 1 + 3 2^-11 up.
    expected = [[1.0, 1.0, 1.0 + 2**-9, -1.0 - 2**-10, 3.140625, 0.0]]
    np.testing.assert_array_equal(compact.rounded(values, 10), np.array(expected, np.float32))
    np.testing.assert_array_equal(compact.rounded(values, 23), values)
    normal = np.random.default_rng(0).normal(size=(50, 50)).astype("float32")
    large = normal[np.abs(normal) > 2**-14][None]  # below lie float16's subnormal numbers
    np.testing.assert_array_equal(compact.rounded(large, 10), large.astype("float16").astype("float32"))


def test_only_what_has_several_axes_is_rounded(tmp_path):
    run = finished(tmp_path / "run")
    for bits in (10, 14):
        compact.rewrite(run.purifier, tmp_path / "small.keras", bits)
        old, new = compact.read(run.purifier), compact.read(tmp_path / "small.keras")
        assert old.keys() == new.keys()
        for name, array in old.items():
            assert np.array_equal(array, new[name]) == (array.ndim < 2 or not array.any()), name
    first = (tmp_path / "small.keras").read_bytes()
    compact.rewrite(run.purifier, tmp_path / "again.keras", 14)
    assert (tmp_path / "again.keras").read_bytes() == first and b"date_saved" not in first
    with zipfile.ZipFile(tmp_path / "again.keras") as archive, zipfile.ZipFile(run.purifier) as source:
        assert archive.namelist() == source.namelist()
        assert json.loads(archive.read("config.json")) == json.loads(source.read("config.json"))
        with h5py.File(archive.open("model.weights.h5")) as file:
            assert any(isinstance(each, h5py.Group) for each in file.values())
