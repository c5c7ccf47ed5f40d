"""Perturbations without gradients: what they are made of, computed again where there is a closed form."""

import numpy as np
import pytest

from vqunet_tf.training import patterns as module
from vqunet_tf.training.patterns import patterns


@pytest.mark.parametrize("shape", [(300, 20, 16, 3), (50, 2, 3, 1), (50, 8, 40, 2), (0, 8, 8, 1)])
def test_they_stay_within_one(shape, rng):
    drawn = patterns(shape, rng)
    assert drawn.dtype == np.float32 and drawn.shape == shape
    assert np.abs(drawn).max(initial=0.0) <= 1.0
    assert (np.abs(drawn).max(axis=(1, 2, 3)) > 0.0).all()


def test_the_same_generator_draws_the_same():
    first, again, other = (patterns((9, 8, 8, 1), np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_third_each_are_squares_over_stripes_squares_alone_and_coarse_noise(rng, monkeypatch):
    """The numbers of squares are log-uniform: the mean of ln(n + 1/2), since n was cut down to whole numbers."""
    numbers = {True: [], False: []}

    def add(image, number, rng):
        striped = np.abs(image).min() == 1.0
        assert striped or not image.any()
        numbers[striped].append(number)

    monkeypatch.setattr(module, "_add_squares", add)
    monkeypatch.setattr(module, "_coarse_noise", lambda shape, rng: np.full(shape, 0.5))
    drawn = patterns((3000, 6, 5, 1), rng)
    assert (drawn == 0.5).all(axis=(1, 2, 3)).sum() == pytest.approx(1000, abs=100)
    for striped, fewest in ((True, 1), (False, 8)):
        found = numbers[striped]
        assert len(found) == pytest.approx(1000, abs=100)
        assert min(found) == fewest and 240 <= max(found) < 256
        assert np.mean(np.log(np.add(found, 0.5))) == pytest.approx(np.log(fewest * 256) / 2, abs=0.15)


def test_stripes_are_one_pixel_wide_and_mostly_vertical(rng, monkeypatch):
    monkeypatch.setattr(module, "_add_squares", lambda image, number, rng: None)
    monkeypatch.setattr(module, "_coarse_noise", lambda shape, rng: np.zeros(shape))
    drawn = patterns((900, 9, 7, 2), rng)
    striped = drawn[drawn.any(axis=(1, 2, 3))]
    assert np.isin(striped, (-1.0, 1.0)).all()
    down = (striped == striped[:, :1]).all(axis=(1, 2, 3))
    across = (striped == striped[:, :, :1]).all(axis=(1, 2, 3))
    assert (down ^ across).all() and down.mean() == pytest.approx(0.75, abs=0.08)
    assert len({columns.tobytes() for columns in striped[down][:, 0]}) > 0.9 * down.sum()  # of 2^14
    assert (striped[..., 0] == striped[..., 1]).mean() == pytest.approx(0.5, abs=0.05)


def test_squares_become_smaller(rng):
    """A search that got all the way has 0.8 of the image at first and 0.8 / 2^9 at last; here it has got somewhere."""
    drawn = [module._sides(64, 48, 200, rng) for _ in range(300)]
    assert all((np.diff(sides) <= 0).all() for sides in drawn)
    assert {sides[0] for sides in drawn} <= {47, 48} | set(range(40, 47))  # 48 is all that fits; 49.6 is the first
    last = np.array([sides[-1] for sides in drawn])
    assert last.min() in (2, 3) and last.max() >= 46  # sqrt(0.8 * 64 * 48 / 512) = 2.2
    wanted = np.sqrt(0.8 * 64 * 48 * 0.5 ** (9 * 0.5 * 199.5 / 200))  # half way, in the middle
    assert np.median(last) == pytest.approx(wanted, rel=0.2)


def test_a_square_has_one_sign_in_each_channel(rng):
    alike = []
    for _ in range(200):
        image = np.zeros((12, 10, 3), np.float32)
        module._add_squares(image, 1, rng)
        rows, columns = np.nonzero(image[..., 0])
        side = rows.max() - rows.min() + 1
        assert columns.max() - columns.min() + 1 == side and len(rows) == side**2
        inside = image[rows, columns]
        assert (inside == inside[0]).all() and (np.abs(inside) == 1.0).all()
        alike.append(np.ptp(inside[0]) == 0)
    assert np.mean(alike) == pytest.approx(0.25, abs=0.1)


def test_later_squares_lie_on_top(rng, monkeypatch):
    monkeypatch.setattr(module, "_sides", lambda height, width, number, rng: np.array([6, 2]))
    for _ in range(20):
        image = np.zeros((6, 6, 1), np.float32)
        module._add_squares(image, 2, rng)
        assert len(np.unique(image)) == 1 or (image == image[image != np.median(image)][0]).sum() == 4


def test_coarse_noise_has_cells_with_sharp_or_blurred_edges(rng):
    kinds = []
    for _ in range(400):
        noise = module._coarse_noise((16, 12, 1), rng)[..., 0]
        rows, columns = len(np.unique(noise, axis=0)), len(np.unique(noise, axis=1)[0])
        sharp = rows <= 8 and columns <= 6
        signs = np.isin(noise, (-1.0, 1.0)).all() if sharp else np.abs(noise).max() == 1.0
        kinds.append((sharp, bool(signs)))
    shares = [kinds.count(kind) / 400 for kind in ((True, True), (True, False), (False, True), (False, False))]
    assert shares == pytest.approx([0.25] * 4, abs=0.08)


def test_grids_have_two_to_half_as_many_cells_as_pixels(rng, monkeypatch):
    asked = []
    places = module._places
    monkeypatch.setattr(module, "_places", lambda *given: asked.append(given[:2]) or places(*given))
    for _ in range(200):
        module._coarse_noise((16, 6, 1), rng)
    assert {cells for length, cells in asked if length == 16} == set(range(2, 9))
    assert {cells for length, cells in asked if length == 6} == {2, 3}


@pytest.mark.parametrize(("length", "cells"), [(8, 2), (9, 4), (7, 3)])
def test_places_are_those_of_numpy(length, cells):
    values = np.random.default_rng(0).normal(size=cells)
    sharp = module._places(length, cells, "nearest") @ values
    np.testing.assert_allclose(sharp, [values[int(cells * pixel / length)] for pixel in range(length)], rtol=1e-6)
    at = (np.arange(length) + 0.5) / length * cells - 0.5
    blurred = module._places(length, cells, "bilinear") @ values
    np.testing.assert_allclose(blurred, np.interp(at, np.arange(cells), values), rtol=1e-5, atol=1e-6)
