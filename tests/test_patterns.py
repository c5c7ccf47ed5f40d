"""Perturbations without gradients: what they are made of, computed again where there is a closed form."""

import numpy as np
import pytest

from vqunet_tf.training import patterns as module
from vqunet_tf.training.patterns import patterns, search


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

    def add(image, sides, rng):
        striped = np.abs(image).min() == 1.0
        assert striped or not image.any()
        numbers[striped].append(len(sides))

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
    monkeypatch.setattr(module, "_add_squares", lambda image, sides, rng: None)
    monkeypatch.setattr(module, "_coarse_noise", lambda shape, rng: np.zeros(shape))
    drawn = patterns((900, 9, 7, 2), rng)
    striped = drawn[drawn.any(axis=(1, 2, 3))]
    assert np.isin(striped, (-1.0, 1.0)).all()
    down = (striped == striped[:, :1]).all(axis=(1, 2, 3))
    across = (striped == striped[:, :, :1]).all(axis=(1, 2, 3))
    assert (down ^ across).all() and down.mean() == pytest.approx(0.75, abs=0.08)
    assert len({columns.tobytes() for columns in striped[down][:, 0]}) > 0.9 * down.sum()  # of 2^14
    assert (striped[..., 0] == striped[..., 1]).mean() == pytest.approx(0.5, abs=0.05)


def test_squares_become_smaller(rng, monkeypatch):
    """A search that got all the way has 0.8 of the image at first and 0.8 / 2^9 at last; here it has got somewhere."""
    drawn = []
    monkeypatch.setattr(module, "_add_squares", lambda image, sides, rng: drawn.append(sides))
    monkeypatch.setattr(module, "_coarse_noise", lambda shape, rng: np.zeros(shape))
    patterns((1500, 64, 48, 1), rng)
    assert all((np.diff(sides) <= 0).all() for sides in drawn)
    last = np.array([sides[-1] for sides in drawn if len(sides) > 100])
    assert len(last) > 100
    assert last.min() in (2, 3) and last.max() >= 46  # sqrt(0.8 * 64 * 48 / 512) = 2.2; 49.6 is the first, 48 fits
    assert np.median(last) == pytest.approx(np.sqrt(0.8 * 64 * 48 * 0.5**4.5), rel=0.25)  # half way, in the middle


def test_sides_by_hand():
    """Half of 0.8 of 20 x 40 pixels are 320, a quarter 160, and 800 pixels do not fit into 20 columns."""
    np.testing.assert_array_equal(module._sides(20, 40, np.array([0.0, 1.0, 2.0, 20.0])), [20, 18, 13, 1])


def test_a_square_has_one_sign_in_each_channel(rng):
    alike = []
    for _ in range(200):
        image = np.zeros((12, 10, 3), np.float32)
        module._add_squares(image, rng.integers(1, 11, 1), rng)
        rows, columns = np.nonzero(image[..., 0])
        side = rows.max() - rows.min() + 1
        assert columns.max() - columns.min() + 1 == side and len(rows) == side**2
        inside = image[rows, columns]
        assert (inside == inside[0]).all() and (np.abs(inside) == 1.0).all()
        alike.append(np.ptp(inside[0]) == 0)
    assert np.mean(alike) == pytest.approx(0.25, abs=0.1)


def test_later_squares_lie_on_top(rng):
    for _ in range(20):
        image = np.zeros((6, 6, 1), np.float32)
        module._add_squares(image, np.array([6, 2]), rng)
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


class TestSearch:
    def test_it_finds_what_it_looks_for_within_the_radius(self, rng):
        """A gate that sees nothing but brightness: a search makes all it can dark, in few squares."""
        images = rng.uniform(0.3, 0.7, (6, 12, 10, 2)).astype("float32")
        radii = np.linspace(0.05, 0.2, 6, dtype="float32").reshape(6, 1, 1, 1)
        asked = []

        def ask(seen):
            asked.append(len(seen))
            return seen.mean(axis=(1, 2, 3))

        found = search(ask, images, radii, 60, rng)
        assert asked == [6] * 61
        change = (found - images) / radii
        np.testing.assert_allclose(np.abs(change), 1.0, atol=1e-4)
        assert (change.mean(axis=(1, 2, 3)) < -0.6).all()

    def test_it_keeps_what_is_better_alone(self, rng):
        images = np.full((3, 8, 8, 1), 0.5, np.float32)
        answers = iter([np.array([3.0, 3.0, 3.0]), np.array([2.0, 4.0, 3.0]), np.array([2.5, 1.0, 3.0])])
        seen = []

        def ask(shown):
            seen.append(shown.copy())
            return next(answers)

        found = search(ask, images, np.full((3, 1, 1, 1), 0.1, np.float32), 2, rng)
        np.testing.assert_array_equal(found, np.stack([seen[1][0], seen[2][1], seen[0][2]]))
        np.testing.assert_array_equal(seen[0], np.repeat(seen[0][:, :1], 8, axis=1))  # stripes

    def test_it_stays_in_the_unit_range(self, rng):
        images = rng.choice([0.0, 1.0], (4, 8, 8, 3)).astype("float32")
        found = search(lambda seen: seen.sum(axis=(1, 2, 3)), images, np.full((4, 1, 1, 1), 0.3, np.float32), 5, rng)
        assert found.min() >= 0.0 and found.max() <= 1.0
