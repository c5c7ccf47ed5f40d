"""The layer: hand-made numbers, what may change when, and replicas that agree with one device."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf import VectorQuantizer


def placed(layer, codes):
    """Builds the layer with these codes, as if its first batch were behind it."""
    layer.build((None, np.shape(codes)[1]))
    layer.placed.assign(codes)
    layer.steps.assign(1.0)
    return layer


def test_a_case_by_hand():
    layer = placed(VectorQuantizer(2, 2, commitment_cost=0.5), [[0.0, 0.0], [4.0, 0.0]])
    inputs = np.array([[[1.0, 1.0], [3.0, 0.0], [5.0, 0.0]]], "float32")  # [1, 3, 2]
    result = layer(inputs)
    np.testing.assert_array_equal(result["indices"], [[0, 1, 1]])
    np.testing.assert_array_equal(result["quantized"], [[[0, 0], [4, 0], [4, 0]]])
    assert float(result["loss"]) == pytest.approx(0.5 * (1 + 1 + 1 + 1) / 6)  # squares 1+1, 1, 1 over 6 numbers
    assert float(result["perplexity"]) == pytest.approx(np.exp(-(np.log(1 / 3) / 3 + 2 * np.log(2 / 3) / 3)), rel=1e-5)


def test_the_update_by_hand_comes_after_the_quantization():
    layer = placed(VectorQuantizer(2, 1, decay=0.9), [[0.0], [10.0]])
    result = layer(np.array([[2.0], [4.0]], "float32"), training=True)
    np.testing.assert_array_equal(result["quantized"], [[0.0], [0.0]])  # the codes as they were
    weight = 0.9 * 1 + 0.1 * 2
    np.testing.assert_allclose(layer.codebook, [[0.1 * 6 / weight], [10.0]], rtol=1e-6)
    np.testing.assert_allclose(layer.weights_ema, [weight, 0.9], rtol=1e-6)


def test_evaluation_changes_nothing_and_training_does(rng):
    layer = VectorQuantizer(8, 4, revive_after=1)
    inputs = rng.normal(size=(64, 4)).astype("float32")
    layer(inputs)
    before = [np.array(weight) for weight in layer.weights]
    for _ in range(3):
        layer(inputs, training=False)
    for weight, old in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(weight, old)
    layer(inputs, training=True)
    assert not np.array_equal(layer.codebook, before[0])


def test_the_first_batch_places_the_codes(rng):
    clusters = rng.normal(size=(4, 3)) * 100
    inputs = (clusters[rng.integers(4, size=200)] + rng.normal(size=(200, 3))).astype("float32")
    layer = VectorQuantizer(4, 3)
    result = layer(inputs, training=True)
    assert len(np.unique(result["indices"])) == 4
    assert float(result["loss"]) < 2 * 0.25


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_a_dead_code_moves_onto_the_batch_only_in_training(kind, rng):
    layer = placed(VectorQuantizer(2, 2, revive_after=3, codebook=kind), [[0.0, 0.0], [1e3, 1e3]])
    inputs = rng.normal(size=(16, 2)).astype("float32")
    for step in range(3):
        np.testing.assert_array_equal(layer.codebook[1], [1e3, 1e3], err_msg=f"step {step}")
        layer(inputs, training=False)
        layer(inputs, training=True)
    assert any(np.allclose(layer.codebook[1], vector, atol=1e-3) for vector in inputs)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_gradients_equal_finite_differences(kind, rng):
    layer = placed(VectorQuantizer(5, 3, commitment_cost=0.7, codebook=kind), rng.normal(size=(5, 3)))
    inputs = tf.constant(rng.normal(size=(6, 3)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        result = layer(inputs)
    gradient = tape.gradient(result["loss"], inputs)
    chosen = result["quantized"]
    np.testing.assert_allclose(gradient, 0.7 * 2 * (inputs - chosen) / 18, rtol=1e-5, atol=1e-7)
    if kind == "gradient":
        with tf.GradientTape() as tape:
            loss = layer(inputs)["loss"]
        analytic = tape.gradient(loss, layer.learned.value)
        numeric = np.zeros((5, 3))
        for place in np.ndindex(5, 3):
            step = np.zeros((5, 3), "float32")
            step[place] = 1e-2

            def codebook_loss(offset):
                codes = np.asarray(layer.codebook) + offset
                return np.mean((np.asarray(inputs) - codes[np.asarray(result["indices"])]) ** 2)

            numeric[place] = (codebook_loss(step) - codebook_loss(-step)) / 2e-2
        np.testing.assert_allclose(analytic, numeric, atol=1e-4)


def test_cosine_counts_directions_only(rng):
    layer = placed(VectorQuantizer(2, 2, distance="cosine", decay=0.5), [[100.0, 0.0], [0.0, 0.1]])
    result = layer(np.array([[0.001, 0.0], [3.0, 4.0]], "float32"), training=True)
    np.testing.assert_array_equal(result["indices"], [0, 1])
    np.testing.assert_allclose(result["quantized"], [[1.0, 0.0], [0.0, 1.0]], atol=1e-6)
    expected = np.array([0.5 * 0.6, 0.5 * 1.0 + 0.5 * 0.8])  # weights 1 and 1: the mean of code and direction
    np.testing.assert_allclose(layer.codebook[1], expected / np.linalg.norm(expected), rtol=1e-5)
    for _ in range(50):
        layer(rng.normal(size=(32, 2)).astype("float32") * 1e3, training=True)
    assert np.linalg.norm(layer.placed, axis=1).max() <= 1.0 + 1e-5  # norms do not grow


def test_the_gradient_may_be_changed_and_identity_switches_the_quantizer_off(rng):
    layer = placed(VectorQuantizer(4, 3), rng.normal(size=(4, 3)))
    inputs = rng.normal(size=(5, 3)).astype("float32")
    hard = layer(inputs)["quantized"]
    for name in ("rotation", "soft"):
        layer.gradient = name
        np.testing.assert_array_equal(layer(inputs)["quantized"], hard)
    layer.gradient = "identity"
    np.testing.assert_array_equal(layer(inputs)["quantized"], inputs)
    with pytest.raises(ValueError, match="gradient.*rotation.*Received: 'sigmoid'"):
        layer.gradient = "sigmoid"


def test_groups_share_one_code_book(rng):
    """Three vectors side by side are quantized as three vectors: outputs, losses and the update."""
    z = rng.normal(size=(5, 6, 12)).astype("float32")
    grouped, plain = VectorQuantizer(8, 4, groups=3), VectorQuantizer(8, 4)
    found, expected = grouped(z, training=True), plain(z.reshape(5, 6, 3, 4), training=True)
    np.testing.assert_array_equal(found["indices"], expected["indices"])
    assert found["indices"].shape == (5, 6, 3)
    np.testing.assert_array_equal(found["quantized"], np.reshape(expected["quantized"], (5, 6, 12)))
    for name in ("loss", "perplexity"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-6)
    np.testing.assert_array_equal(grouped.codebook, plain.codebook)
    symbolic = grouped(keras.KerasTensor((None, 6, 12)))
    assert symbolic["indices"].shape == (None, 6, 3) and symbolic["quantized"].shape == (None, 6, 12)
    with pytest.raises(ValueError, match=r"groups=3 times embedding_dim=4. Received: shape=\(2, 4\)"):
        grouped(np.zeros((2, 4), "float32"))


def test_usage_counts_an_epoch_not_a_batch():
    layer = placed(VectorQuantizer(4, 1, revive_after=0), [[0.0], [1.0], [2.0], [3.0]])
    layer(np.array([[0.1]], "float32"), training=True)
    layer(np.array([[2.1]], "float32"), training=True)
    assert layer.usage() == 0.5
    layer.reset_usage()
    assert layer.usage() == 0.0


@pytest.mark.parametrize("kind", ["ema", "gradient"])
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_equal_one_device(kind, replicas, replica_results):
    """Losses, weights and code-book state after ten steps; and every replica holds the same state."""
    alone, together = replica_results[1], replica_results[replicas]
    names = [name for name in alone.files if name.startswith(kind)]
    assert len(names) > 10
    for name in names:
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert together[f"{kind} copies differ"] == 0.0


@pytest.fixture(scope="module")
def replica_results(tmp_path_factory):
    """Number of replicas -> what tests/replicas.py found; a process each, TensorFlow allows one group size a process."""
    folder = tmp_path_factory.mktemp("replicas")
    script = str(Path(__file__).with_name("replicas.py"))
    files = {count: folder / f"{count}.npz" for count in (1, 2, 3, 4)}
    running = [subprocess.Popen([sys.executable, script, str(count), str(file)]) for count, file in files.items()]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0, 0]
    return {count: np.load(file) for count, file in files.items()}


def test_float32_inside_under_mixed_precision(rng):
    codes = np.array([[1.0, 0.0], [1.001, 0.0], [-1.0, 0.0], [0.0, 3.0]])  # bfloat16 would merge the first two
    layer = placed(VectorQuantizer(4, 2, dtype="mixed_bfloat16"), codes)
    result = layer(keras.ops.cast(np.array([[1.25, 0.0], [-2.0, 0.5], [0.0, 2.0]]), "bfloat16"))
    np.testing.assert_array_equal(result["indices"], [1, 2, 3])
    assert keras.backend.standardize_dtype(result["quantized"].dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(result["loss"].dtype) == "float32"
    assert all(weight.dtype == "float32" for weight in layer.weights)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_config_and_file_round_trips(kind, tmp_path, rng):
    layer = VectorQuantizer(8, 4, 0.5, codebook=kind, decay=0.8, distance="cosine", gradient="rotation", init="uniform")
    assert VectorQuantizer.from_config(layer.get_config()).get_config() == layer.get_config()
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    x = rng.normal(size=(32, 4)).astype("float32")
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for name, value in model(x[:5]).items():
        np.testing.assert_array_equal(again(x[:5])[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_embeddings": 0, "embedding_dim": 2}, "num_embeddings.*Received: 0"),
        ({"num_embeddings": 2, "embedding_dim": 2.5}, "embedding_dim.*Received: 2.5"),
        ({"num_embeddings": 2, "embedding_dim": 2, "decay": 1.0}, "decay.*Received: 1.0"),
        ({"num_embeddings": 2, "embedding_dim": 2, "codebook": "adam"}, "codebook.*ema.*Received: 'adam'"),
        ({"num_embeddings": 2, "embedding_dim": 2, "distance": "l1"}, "distance.*cosine.*Received: 'l1'"),
        ({"num_embeddings": 2, "embedding_dim": 2, "temperature": 0.0}, "temperature.*Received: 0.0"),
        ({"num_embeddings": 2, "embedding_dim": 2, "init": "zeros"}, "init.*kmeans.*Received: 'zeros'"),
    ],
)
def test_wrong_arguments_say_expected_and_received(arguments, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**arguments)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((2, 4), "int32"), "float inputs.*int32"),
        (np.full((2, 4), np.nan, "float32"), "finite.*NaN"),
        (np.full((2, 4), np.inf, "float32"), "finite.*infinity"),
    ],
    ids=["integers", "nan", "infinity"],
)
def test_wrong_inputs_say_expected_and_received(inputs, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(8, 4)(inputs)


def test_a_wrong_width_says_expected_and_received():
    with pytest.raises(ValueError, match=r"embedding_dim=4.*Received: shape=\(2, 3\)"):
        VectorQuantizer(8, 4)(np.zeros((2, 3), "float32"))
