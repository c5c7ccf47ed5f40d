"""Export: the SavedModel gives what the Keras models give, and what cannot be served is refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import exported
import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import CLASSES
from served import NAMES, SHAPE, random_images
from tensorflow_serving.apis import prediction_log_pb2

from benchmarks import score as benchmark
from serving import c_api, card, export, parity, score, signatures, warmup
from vqunet_tf.config import Config
from vqunet_tf.data import Split
from vqunet_tf.errors import UserError
from vqunet_tf.models import presets
from vqunet_tf.models.vqunet import VQUNet
from vqunet_tf.runs import RunFolder, save_model

ROOT = Path(__file__).parents[1]
SCORED = CLASSES | {"adversarial_score"}


@pytest.fixture(scope="module")
def quantized(models):
    """A tiny VQUNet whose codes are far from its vectors, and the same classifier."""
    keras.utils.set_random_seed(2)
    return VQUNet(widths=(4, 8), num_embeddings=8, embedding_dim=4), models[1]


@pytest.fixture(scope="module")
def calibrated():
    """A score with decided, made-up coefficients."""
    return score.Score((-3.0, -2.0, -1.0), (2.0, 1.0, 1.0), (1.0, 0.5, 0.25), -0.5, 0.25, {"seed": 7})


@pytest.fixture(scope="module")
def saved(quantized, calibrated, tmp_path_factory):
    """The export of the tiny VQUNet."""
    path = tmp_path_factory.mktemp("quantized") / "1"
    export.export(*quantized, NAMES, path, SHAPE, calibrated, "# Card\n\nOf a test.")
    return path


def asked(images, dtype):
    """What is sent for images: PNG files where the signature takes strings."""
    return [tf.io.encode_png(image).numpy() for image in images] if dtype == "string" else images


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


def jensen_shannon(p, q):
    """To the base 2, by its definition."""
    middle = (p + q) / 2
    return sum((part * np.log2(part / middle)).sum(axis=-1) for part in (p, q)) / 2


def expected(models, signature, images):
    """The outputs of `signature` straight from the Keras models, everything after the logits in NumPy."""
    found = exported.expected(models, signature, images)
    if signature in ("purify", "undefended"):
        return found
    alone = exported.expected(models, "undefended", images)["probabilities"]
    return {**found, "adversarial_score": jensen_shannon(alone, found["probabilities"])}


def answer_of(path, signature, images):
    """What a reloaded SavedModel says, strings as text."""
    found = tf.saved_model.load(str(path)).signatures[signature](images=tf.constant(images))
    decode = np.vectorize(bytes.decode, otypes=[str])
    return {key: decode(value.numpy()) if value.dtype == tf.string else value.numpy() for key, value in found.items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], array)


SIGNATURES = [
    ("serving_default", "float32", SCORED),
    ("serve_uint8", "uint8", SCORED),
    ("serve_encoded", "string", SCORED),
    ("purify", "float32", {"purified"}),
    ("undefended", "float32", CLASSES),
]


@pytest.mark.parametrize(("name", "dtype", "outputs"), SIGNATURES)
def test_signature_has_stable_names_and_a_free_batch(base_path, name, dtype, outputs):
    loaded = tf.saved_model.load(str(base_path / "1")).signatures
    assert set(loaded) == {name for name, _, _ in SIGNATURES}
    shape = (None,) if dtype == "string" else (None, *SHAPE)
    assert loaded[name].structured_input_signature[1] == {"images": tf.TensorSpec(shape, dtype, name="images")}
    found = loaded[name].structured_outputs
    assert found.keys() == outputs
    assert all(spec.shape[0] is None for spec in found.values())
    if "class_id" in found:
        assert (found["class_id"].dtype, found["label"].dtype) == (tf.int64, tf.string)


@pytest.mark.parametrize("batch", [1, 19])
def test_saved_model_equals_keras(base_path, models, batch):
    for name, dtype, _ in SIGNATURES:
        images = random_images(batch, dtype)
        found = answer_of(base_path / "1", name, asked(images, dtype))
        assert_equal(found, expected(models, name, images))


def test_assets_hold_labels_and_parity(base_path):
    assets = base_path / "1" / "assets"
    assert (assets / "labels.txt").read_text(encoding="utf-8").splitlines() == list(NAMES)
    report = json.loads((assets / "parity.json").read_text())
    assert report["signatures"].keys() == {name for name, _, _ in SIGNATURES}
    for name, _, outputs in SIGNATURES:
        assert report["signatures"][name].keys() == outputs
        assert all(0 <= value <= 1e-5 for value in report["signatures"][name].values())


def test_parity_sees_another_model(base_path, models):
    """The proof of an export can fail: against other weights, names or scores the differences are not small."""
    purifier, classifier = models
    other = keras.models.clone_model(classifier)  # the same layers, freshly initialised
    steep = score.Score((0.0,) * 3, (1.0,) * 3, (1.0,) * 3)
    found = parity.measure(base_path / "1", purifier, other, NAMES[::-1], SHAPE, steep)
    assert found["purify"]["purified"] <= 1e-5
    assert found["undefended"]["probabilities"] > 1e-3
    assert found["serving_default"]["adversarial_score"] > 1e-3
    assert found["serve_encoded"]["label"] == 1.0
    with pytest.raises(UserError, match="differs by .* allowed 1e-05"):
        parity.refuse_difference(found)


def test_version_is_never_overwritten(base_path, models):
    before = (base_path / "1" / "saved_model.pb").read_bytes()
    with pytest.raises(UserError, match=r"never overwritten: export with --version=2"):
        export.export(*models, NAMES, base_path / "1")
    assert (base_path / "1" / "saved_model.pb").read_bytes() == before
    assert [path.name for path in base_path.iterdir()] == ["1"]


@keras.saving.register_keras_serializable("test_serving")
class Noise(keras.layers.Layer):
    """Wrong on purpose: random at inference."""

    def call(self, images):
        return images + keras.random.uniform(keras.ops.shape(images))


@keras.saving.register_keras_serializable("test_serving")
class Python(keras.layers.Layer):
    """Wrong on purpose: calls Python in the graph."""

    def call(self, images):
        return tf.ensure_shape(tf.py_function(lambda array: array, [images], tf.float32), images.shape)


@keras.saving.register_keras_serializable("test_serving")
class Compiled(keras.layers.Layer):
    """Wrong on purpose: asks for XLA on its own."""

    def call(self, images):
        return tf.function(lambda array: array * 1.0, jit_compile=True)(images)


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Noise, "random at inference"), (Python, "calls Python"), (Compiled, "jit_compile=True")],
)
def test_model_that_cannot_be_served_leaves_nothing(models, tmp_path, layer, message):
    purifier = keras.Sequential([keras.Input(SHAPE), layer()])
    with pytest.raises(UserError, match=message):
        export.export(purifier, models[1], NAMES, tmp_path / "1")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_together_is_refused(models, tmp_path):
    purifier, classifier = models
    with pytest.raises(UserError, match="4 logits, got 3 names"):
        export.export(purifier, classifier, NAMES[:3], tmp_path / "1")
    with pytest.raises(UserError, match=r"expected a classifier for images of shape \[8, 8, 3\]"):
        export.export(purifier, classifier, NAMES, tmp_path / "1", (8, 8, 3))
    with pytest.raises(UserError, match="version number"):
        export.export(purifier, classifier, NAMES, tmp_path / "latest")
    assert not list(tmp_path.iterdir())


def test_only_images_that_a_file_can_hold_are_decoded():
    assert "serve_encoded" not in signatures.specs((8, 8, 2))
    assert signatures.specs((8, 8, 1))["serve_encoded"] == tf.TensorSpec((None,), "string", name="images")


def test_score_of_a_quantized_purifier(saved, quantized, calibrated):
    """From the formulas of the three signs, the nearest codes found in NumPy."""
    purifier, classifier = quantized
    images = random_images(5)
    purified = np.asarray(purifier(images, training=False))
    errors = []
    for layer in purifier.quantizers:
        vectors = np.asarray(keras.Model(purifier.graph.input, layer.input)(images), np.float64)
        codes = np.asarray(layer.codebook, np.float64)
        distances = ((vectors[..., None, :] - codes) ** 2).sum(-1).min(-1)  # [B, h, w]
        errors.append(distances.sum((1, 2)) / (vectors**2).sum((1, 2, 3)))
    before, after = (softmax(classifier(part, training=False)) for part in (images, purified))
    signs = [jensen_shannon(before, after), np.abs(purified - images).mean((1, 2, 3)), np.mean(errors, axis=0)]
    assert min(errors[0]) > 0.01  # else a wrong error would not show
    z = (np.log(np.stack(signs, -1) + 1e-3) - calibrated.centre) / np.array(calibrated.scale)
    wanted = 1 / (1 + np.exp(-(z @ calibrated.weights + calibrated.bias)))
    found = answer_of(saved, "serving_default", images)["adversarial_score"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp(found) > 1e-3 and not np.any((found < 0.01) | (found > 0.99))


def test_out_of_range_and_not_a_number(saved):
    """The nearer end counts, and NaN is 0."""
    images = random_images(3)
    wild = images.copy()
    wild[0, 0], wild[0, 1], wild[1, 2, 3, 0] = 7.0, -np.inf, np.nan
    tame = images.copy()
    tame[0, 0], tame[0, 1], tame[1, 2, 3, 0] = 1.0, 0.0, 0.0
    found, wanted = (answer_of(saved, "serving_default", batch) for batch in (wild, tame))
    for key in ("probabilities", "adversarial_score"):
        np.testing.assert_array_equal(found[key], wanted[key])
    assert np.abs(found["probabilities"] - answer_of(saved, "serving_default", images)["probabilities"]).max() > 1e-4


def test_gradient_through_the_saved_model_is_that_in_memory(saved, quantized):
    """So that the artefact itself can be attacked by one who knows it."""
    purifier, classifier = quantized
    loaded = tf.saved_model.load(str(saved))
    images = tf.constant(random_images(4))
    mask = tf.one_hot([0, 1, 2, 3], len(NAMES))

    def gradient(probabilities):
        with tf.GradientTape() as tape:
            tape.watch(images)
            total = tf.reduce_sum(mask * probabilities(images))
        return tape.gradient(total, images).numpy()

    found = gradient(lambda x: loaded.signatures["serving_default"](images=x)["probabilities"])
    wanted = gradient(lambda x: tf.nn.softmax(classifier(purifier(x, training=False), training=False)))
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7 * np.abs(wanted).max())


def test_answers_through_the_c_api_without_python(saved, tmp_path):
    largest = parity.measure_through_c(saved, SHAPE)
    assert largest is None or largest <= 1e-5


def test_c_api_refuses_an_operation_that_tensorflow_does_not_bring(saved, tmp_path):
    """Seen to fail: the name of an operation in the graph is changed to one that nobody registered."""
    if not parity.c_libraries():
        pytest.skip("the installed TensorFlow has no C library")
    graph = (saved / "saved_model.pb").read_bytes()
    (tmp_path / "saved_model.pb").write_bytes(graph.replace(b"Softmax", b"Hardmax"))
    command = [sys.executable, c_api.__file__, str(parity.c_libraries()[0])]
    done = subprocess.run(command, input=pickle.dumps((str(tmp_path), [])), capture_output=True, check=False)
    assert done.returncode == 1
    assert b"Hardmax" in done.stderr


def test_warm_up_requests_are_answered(saved):
    """One per allowed batch size, each of them a request that the signature takes."""
    loaded = tf.saved_model.load(str(saved)).signatures
    found = {}
    for record in tf.data.TFRecordDataset(str(saved / "assets.extra" / "tf_serving_warmup_requests")):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        name = request.model_spec.signature_name
        images = tf.make_ndarray(request.inputs["images"])
        answer = loaded[name](images=tf.constant(images))
        assert all(len(value) == len(images) for value in answer.values())
        found.setdefault(name, []).append(len(images))
    assert found.pop("serving_default") == list(warmup.ALLOWED_BATCH_SIZES)
    assert found == dict.fromkeys(["serve_uint8", "serve_encoded", "purify", "undefended"], [1])


def test_score_and_card_travel_along(saved, base_path):
    known = json.loads((saved / "assets" / "score.json").read_text())
    assert (known["calibrated"], known["threshold"], known["seed"]) == (True, 0.25, 7)
    assert known["weights"] == [1.0, 0.5, 0.25]
    card = (saved / "assets" / "MODEL_CARD.md").read_text()
    assert card.startswith("# Card\n\nOf a test.\n") and "no defence against an attacker who knows" in card
    unknown = json.loads((base_path / "1" / "assets" / "score.json").read_text())
    assert (unknown["calibrated"], unknown["threshold"]) == (False, None)
    assert "there is no threshold" in (base_path / "1" / "assets" / "MODEL_CARD.md").read_text()


def test_card_of_a_run(tmp_path):
    released = card.of_run(RunFolder(presets.folder("fashion_mnist")))
    assert released.startswith("# `fashion_mnist`")
    folder = RunFolder(tmp_path / "digits")
    folder.create(Config().replace({"data.image_shape": SHAPE, "data.class_names": NAMES}))
    assert "python -m trainers.evaluate --run_dir=digits" in card.of_run(folder)
    row = {"defense": "vqunet", "threat_model": "white_box", "norm": "linf", "epsilon": 0.1, "n": 50}
    report = {
        "classifier": {"accuracy": 0.9, "n": 100},
        "purifier": {"clean_accuracy": 0.8},
        "rows": [{**row, "accuracy": 0.123, "worst_case": True}, {**row, "accuracy": 0.456, "worst_case": False}],
    }
    folder.report.write_text(json.dumps(report))
    text = card.of_run(folder)
    assert "| vqunet | white-box | linf | 0.1 | 50 | 12.3% |" in text and "45.6%" not in text
    assert "not robust" in text and str(tmp_path) not in text


def test_command_on_a_run_whose_data_do_not_fit(models, tmp_path, capsys):
    """It exports all the same, proves the C API, and says why the score has no threshold."""
    folder = RunFolder(tmp_path / "run")
    folder.create(Config().replace({"data.image_shape": SHAPE, "data.class_names": NAMES}))
    for model, path in zip(models, (folder.purifier, folder.classifier), strict=True):
        save_model(model, path)
    export.console(["export", f"--run_dir={folder.path}", f"--export_dir={tmp_path / 'out'}", "--version=3"])
    printed = capsys.readouterr().out
    assert "serving_default, serve_uint8, serve_encoded, purify, undefended" in printed
    assert "not calibrated, no threshold: digits has images [32, 32, 1], the run had [8, 12, 3]" in printed
    assert json.loads((tmp_path / "out" / "3" / "assets" / "parity.json").read_text())["signatures"].keys() == {
        name for name, _, _ in SIGNATURES
    }


def test_command_knows_every_layer_of_a_run_folder():
    """In a process of its own: a layer that nothing imports cannot be loaded from a .keras file."""
    code = "import serving.export, keras; print(keras.saving.get_registered_object('vqunet_tf>Whitening').__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "Whitening\n"


def test_benchmark_of_the_score(saved, quantized, tmp_path, capsys, monkeypatch):
    """It prints a row for each kind of image."""
    run = RunFolder(tmp_path / "run")
    run.create(Config().replace({"data.image_shape": SHAPE, "data.class_names": NAMES}))
    for model, path in zip(quantized, (run.purifier, run.classifier), strict=True):
        save_model(model, path)
    images = random_images(6, "uint8")
    labels = np.asarray(quantized[1](quantized[0](images / np.float32(255)))).argmax(-1)
    monkeypatch.setattr(benchmark.data, "load", lambda config, split: Split(images, labels, NAMES))
    benchmark.main([f"--export={saved}", f"--run_dir={run.path}", "--adaptive=4", "--steps=4"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["attack"] for row in rows] == ["none", *["gray_box pgd"] * 4, "white_box pgd, class and score"]
    assert (rows[0]["accuracy"], rows[0]["n"], rows[1]["n"], rows[-1]["n"]) == (1.0, 6, 3, 4)


@pytest.mark.parametrize(
    ("score_at", "epsilon", "beaten"),
    [(lambda mean: 0.0 * mean, 0.2, 1.0), (lambda mean: 0.0 * mean, 0.02, 0.0), (lambda mean: 1.0 - mean, 0.2, 0.0)],
)
def test_attack_on_class_and_score(score_at, epsilon, beaten):
    """On a model whose class is brightness above 1/2: 0.6 falls to 0.2, not to 0.02, and not where dark is flagged."""

    def signature(images):
        mean = tf.reduce_mean(images, axis=(1, 2, 3))
        probabilities = tf.nn.softmax(tf.stack([tf.zeros_like(mean), 20.0 * (mean - 0.5)], axis=-1))
        return {
            "probabilities": probabilities,
            "class_id": tf.argmax(probabilities, axis=-1),
            "adversarial_score": score_at(mean),
        }

    images = np.full((3, 8, 8, 1), 153, np.uint8)
    assert benchmark.adaptive(signature, images, np.array([1, 1, 1]), 0.45, epsilon, 10) == beaten
