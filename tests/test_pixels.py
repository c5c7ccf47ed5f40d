"""Bytes to numbers and back: the scale is 255, exactly once."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from vqunet_tf import pixels


def test_bytes_become_the_unit_interval():
    unit = keras.ops.convert_to_numpy(pixels.to_unit(np.array([0, 51, 255], np.uint8)))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [0.0, 0.2, 1.0], rtol=1e-6)


def test_floats_are_not_scaled_again():
    unit = keras.ops.convert_to_numpy(pixels.to_unit(np.array([0.0, 0.2, 1.0], np.float64)))
    assert unit.dtype == np.float32
    np.testing.assert_array_equal(unit, np.array([0.0, 0.2, 1.0], np.float32))


def test_every_byte_survives_the_round_trip():
    every = np.arange(256, dtype=np.uint8)
    back = pixels.to_uint8(pixels.to_unit(every))
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, every)


def test_to_uint8_rounds_and_clips():
    np.testing.assert_array_equal(pixels.to_uint8(np.array([-1.0, 0.4 / 255, 0.6 / 255, 2.0])), [0, 0, 1, 255])


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="expected images as uint8.*got int64"):
        pixels.to_unit(np.array([0, 255], np.int64))
