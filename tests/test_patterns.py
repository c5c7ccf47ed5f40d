"""Perturbations without gradients: what they are made of, computed again where there is a closed form."""

import numpy as np
import pytest

from vqunet_tf.training import patterns as module
from vqunet_tf.training.patterns import patterns


@pytest.fixture
def drawn(rng):
    return patterns((300, 20, 16, 3), rng)


def test_they_stay_within_one_and_reach_it(drawn):
    assert drawn.dtype == np.float32 and drawn.shape == (300, 20, 16, 3)
    assert np.abs(drawn).max() == 1.0 and (np.abs(drawn).max(axis=(1, 2, 3)) > 0.3).all()


def test_the_same_generator_draws_the_same():
    first, again, other = (patterns((9, 8, 8, 1), np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_third_are_stripes_under_squares_and_a_third_squares_alone(drawn):
    signs = np.isin(drawn, (-1.0, 1.0)).all(axis=(1, 2, 3))
    alone = np.isin(drawn, (-1.0, 0.0, 1.0)).all(axis=(1, 2, 3)) & ~signs
    # Squares alone cover all of some images, and half of the noise has signs only where its edges are sharp.
    assert 100 <= signs.sum() <= 215 and 35 <= alone.sum() <= 110


def test_stripes_run_along_one_axis_where_no_square_lies(rng, monkeypatch):
    monkeypatch.setattr(module, "_add_squares", lambda image, number, rng: None)
    drawn = patterns((200, 9, 7, 2), rng)
    striped = drawn[np.isin(drawn, (-1.0, 1.0)).all(axis=(1, 2, 3))]
    down = (striped == striped[:, :1]).all(axis=(1, 2, 3))
    across = (striped == striped[:, :, :1]).all(axis=(1, 2, 3))
    assert down.sum() > 2 * across.sum() > 0
    assert len({column.tobytes() for column in striped[down][:, 0]}) > 20  # of random signs


def test_a_square_has_one_sign_in_each_channel(rng):
    for _ in range(50):
        image = np.zeros((12, 10, 3), np.float32)
        module._add_squares(image, 1, rng)
        rows, columns = np.nonzero(image[..., 0])
        side = rows.max() - rows.min() + 1
        assert columns.max() - columns.min() + 1 == side and len(rows) == side**2
        inside = image[rows, columns]
        assert (inside == inside[0]).all() and (np.abs(inside) == 1.0).all()
        assert side**2 <= 1.3 * 0.8 * image.shape[0] * image.shape[1]  # a side is rounded


@pytest.mark.parametrize(("length", "cells"), [(8, 2), (9, 4), (7, 3)])
def test_places_are_those_of_numpy(length, cells):
    values = np.random.default_rng(0).normal(size=cells)
    sharp = module._places(length, cells, "nearest") @ values
    np.testing.assert_allclose(sharp, [values[int(cells * pixel / length)] for pixel in range(length)], rtol=1e-6)
    at = (np.arange(length) + 0.5) / length * cells - 0.5
    blurred = module._places(length, cells, "bilinear") @ values
    np.testing.assert_allclose(blurred, np.interp(at, np.arange(cells), values), rtol=1e-5, atol=1e-6)
