"""The maths of quantization, against NumPy and closed forms."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from vqunet_tf.models import quantize


def brute_force(vectors, codebook):
    distances = ((vectors[:, None].astype("float64") - codebook[None].astype("float64")) ** 2).sum(-1)
    return distances.argmin(axis=1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 1), (200, 16, 64), (65, 5, 33)], ids=str)
def test_nearest_codes_equal_brute_force(shape, rng):
    count, width, codes = shape
    vectors = rng.normal(size=(count, width)).astype("float32")
    codebook = rng.normal(size=(codes, width)).astype("float32")
    found = keras.ops.convert_to_numpy(quantize.nearest_codes(vectors, codebook))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, brute_force(vectors, codebook))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4, 1e12])
def test_huge_and_tiny_norms(scale, rng):
    """Far from 1 the same codes win as in double precision."""
    vectors = (rng.normal(size=(100, 8)) * scale).astype("float32")
    codebook = (rng.normal(size=(32, 8)) * scale).astype("float32")
    found = keras.ops.convert_to_numpy(quantize.nearest_codes(vectors, codebook))
    np.testing.assert_array_equal(found, brute_force(vectors, codebook))


def test_one_code_is_always_the_nearest(rng):
    assert not np.any(quantize.nearest_codes(rng.normal(size=(9, 3)).astype("float32"), np.ones((1, 3), "float32")))


def test_the_lowest_index_wins_a_tie():
    codebook = np.array([[3.0, 3.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], "float32")
    found = quantize.nearest_codes(np.array([[1.0, 0.0], [0.0, 0.0]], "float32"), codebook)
    np.testing.assert_array_equal(found, [1, 1])


def test_no_vectors_no_codes():
    assert quantize.nearest_codes(np.zeros((0, 4), "float32"), np.ones((3, 4), "float32")).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 53])
def test_tiles_and_unknown_batch_sizes_change_nothing(count, rng):
    vectors = rng.normal(size=(count, 4)).astype("float32")
    codebook = rng.normal(size=(6, 4)).astype("float32")
    tiles_of_ten = 10 * 4 * len(codebook)
    compiled = tf.function(
        lambda v: quantize.nearest_codes(v, codebook, max_bytes=tiles_of_ten),
        input_signature=[tf.TensorSpec((None, 4), tf.float32)],
    )
    expected = brute_force(vectors, codebook)
    np.testing.assert_array_equal(quantize.nearest_codes(vectors, codebook, max_bytes=tiles_of_ten), expected)
    np.testing.assert_array_equal(compiled(vectors), expected)


def test_straight_through_is_exact_forward_and_the_identity_backward(rng):
    vectors = tf.constant(rng.normal(size=(5, 3)), tf.float32)
    quantized = tf.constant(rng.normal(size=(5, 3)) * 1e-3, tf.float32)
    weight = tf.constant(rng.normal(size=(5, 3)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([vectors, quantized])
        result = quantize.straight_through(vectors, quantized)
        total = tf.reduce_sum(weight * result)
    to_vectors, to_quantized = tape.gradient(total, [vectors, quantized])
    np.testing.assert_array_equal(result, quantized)  # z + (q - z) would round
    np.testing.assert_array_equal(to_vectors, weight)
    np.testing.assert_array_equal(to_quantized, np.zeros((5, 3)))


def gradient_of(function, vectors, weight):
    """(value, gradient with respect to the vectors of the weighted sum)."""
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        value = function(vectors)
        total = tf.reduce_sum(weight * value)
    return value.numpy(), tape.gradient(total, vectors).numpy()


def test_the_rotation_turns_the_gradient_as_the_vector_onto_its_code(rng):
    vectors, codes, weight = (rng.normal(size=(6, 4)).astype("float32") for _ in range(3))
    value, gradient = gradient_of(lambda v: quantize.rotation(v, tf.constant(codes)), tf.constant(vectors), weight)
    np.testing.assert_array_equal(value, codes)
    for z, q, g, found in zip(vectors, codes, weight, gradient, strict=True):
        a, b = z / np.linalg.norm(z), q / np.linalg.norm(q)
        r = (a + b) / np.linalg.norm(a + b)
        matrix = np.linalg.norm(q) / np.linalg.norm(z) * (np.eye(4) - 2 * np.outer(r, r) + 2 * np.outer(b, a))
        np.testing.assert_allclose(matrix @ z, q, atol=1e-5)  # it is the map it says
        np.testing.assert_allclose(found, matrix.T @ g, rtol=1e-4, atol=1e-5)


def test_the_rotation_is_the_identity_where_none_is_defined():
    vectors = tf.constant([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    codes = tf.constant([[1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]])
    weight = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "float32")
    _, gradient = gradient_of(lambda v: quantize.rotation(v, codes), vectors, weight)
    np.testing.assert_array_equal(gradient, weight)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_soft_codes_have_the_gradient_of_the_soft_assignment(temperature, rng):
    vectors, weight = (tf.constant(rng.normal(size=(5, 3)), tf.float32) for _ in range(2))
    codebook = tf.constant(rng.normal(size=(7, 3)), tf.float32)
    chosen = tf.gather(codebook, quantize.nearest_codes(vectors, codebook))

    def soft(v):
        distances = tf.reduce_sum((v[:, None] - codebook[None]) ** 2, axis=-1)
        return tf.nn.softmax(-distances / temperature) @ codebook

    _, expected = gradient_of(soft, vectors, weight)
    value, gradient = gradient_of(lambda v: quantize.soft_codes(v, chosen, codebook, temperature), vectors, weight)
    np.testing.assert_array_equal(value, chosen)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_lookup_has_the_dense_gradient_of_a_gather(rng):
    codebook = tf.constant(rng.normal(size=(4, 3)), tf.float32)
    indices = np.array([2, 0, 2], "int32")
    weight = tf.constant(rng.normal(size=(3, 3)), tf.float32)
    value, gradient = gradient_of(lambda c: quantize.lookup(c, indices), codebook, weight)
    np.testing.assert_array_equal(value, codebook.numpy()[indices])
    expected = np.zeros((4, 3))
    np.add.at(expected, indices, weight.numpy())
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_code_sums_by_hand():
    vectors = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "float32")
    counts, sums = quantize.code_sums(keras.ops.array(vectors), np.array([2, 0, 2], "int32"), 4)
    np.testing.assert_array_equal(counts, [1, 0, 2, 0])
    np.testing.assert_array_equal(sums, [[3, 4], [0, 0], [6, 8], [0, 0]])


def test_two_ema_steps_equal_the_closed_form():
    decay, e0 = 0.9, np.array([[2.0], [7.0]])
    n1, s1, n2, s2 = np.array([3.0, 0.0]), np.array([[6.0], [0.0]]), np.array([1.0, 0.0]), np.array([[10.0], [0.0]])
    codebook, weights = e0.astype("float32"), np.ones(2, "float32")
    for n, s in ((n1, s1), (n2, s2)):
        codebook, weights = quantize.ema_update(codebook, weights, n.astype("float32"), s.astype("float32"), decay)
    counts = decay**2 * 1 + decay * (1 - decay) * n1 + (1 - decay) * n2
    sums = decay**2 * e0 + decay * (1 - decay) * s1 + (1 - decay) * s2
    np.testing.assert_allclose(weights, counts, rtol=1e-6)
    np.testing.assert_allclose(codebook, sums / counts[:, None], rtol=1e-6)


def test_a_code_nobody_chooses_stays_exactly_where_it_is():
    start = np.array([[0.1, -123.456]], "float32")
    codebook, weights = keras.ops.array(start), keras.ops.ones(1)
    nothing = keras.ops.zeros(1), keras.ops.zeros((1, 2))
    for _ in range(300):  # far beyond where decay ** n is zero in float32
        codebook, weights = quantize.ema_update(codebook, weights, *nothing, decay=0.5)
    np.testing.assert_array_equal(codebook, start)


def test_candidate_rows_of_replicas_add_up_to_those_of_one_device(rng):
    vectors = rng.normal(size=(24, 3)).astype("float32")
    for step in (0, 1, 17, 10**6):
        whole = keras.ops.convert_to_numpy(quantize.candidate_rows(vectors, 10, step))
        for replicas in (2, 3, 4):
            shares = np.split(vectors, replicas)
            parts = [quantize.candidate_rows(share, 10, step, i, replicas) for i, share in enumerate(shares)]
            np.testing.assert_array_equal(sum(np.asarray(part) for part in parts), whole)
        assert all(any((row == vector).all() for vector in vectors) for row in whole)
        assert len(np.unique(whole, axis=0)) == 10
    np.testing.assert_array_equal(quantize.candidate_rows(np.zeros((0, 3), "float32"), 2, 0), np.zeros((2, 3)))


@pytest.mark.parametrize("step", [0, 1, 30_000, 10**6, 10**7])
def test_candidate_rows_are_all_different_however_long_the_training(step):
    vectors = np.arange(32768, dtype="float32")[:, None]
    assert len(np.unique(quantize.candidate_rows(vectors, 512, float(step)))) == 512


def test_kmeans_finds_separate_clusters(rng):
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres[np.arange(60) % 3] + rng.normal(size=(60, 2)) * 0.1).astype("float32")
    found = keras.ops.convert_to_numpy(quantize.kmeans(points, 3))
    expected = [points[i::3].mean(axis=0) for i in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_perplexity_counts_the_codes_in_use():
    assert float(quantize.perplexity(np.array([5.0, 0.0, 0.0], "float32"))) == pytest.approx(1.0)
    assert float(quantize.perplexity(np.array([2.0, 2.0, 2.0, 2.0], "float32"))) == pytest.approx(4.0)
    share = np.array([0.5, 0.25, 0.25])
    expected = np.exp(-(share * np.log(share)).sum())
    assert float(quantize.perplexity((8 * share).astype("float32"))) == pytest.approx(expected, rel=1e-5)
