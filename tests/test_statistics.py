"""How outcomes are counted: the images that all met, Wilson's intervals, and what is more than chance."""

from __future__ import annotations

import numpy as np

from vqunet_tf.evaluation.findings import common, minimum
from vqunet_tf.evaluation.statistics import above, wilson


def test_arrays_of_fewer_images_are_the_first_ones():
    three, five = np.array([True, False, True]), np.array([True, True, False, False, True])
    assert [part.tolist() for part in common(five, three)] == [[True, True, False], three.tolist()]


def test_a_minimum_is_of_the_images_that_all_met_but_for_attacks_that_met_few():
    many, some, few = np.arange(300) % 2 > 0, np.arange(150) % 3 > 0, np.zeros(99, bool)
    for order in ([many, some, few], [few, many, some]):
        assert minimum(order).tolist() == (many[:150] & some).tolist()
    assert len(minimum([few, few[:50]])) == 99  # of the most that there is


def test_wilson_intervals_are_those_of_the_tables():
    np.testing.assert_allclose(wilson(0, 10), (0.0, 0.2775), atol=5e-4)
    np.testing.assert_allclose(wilson(5, 10), (0.2366, 0.7634), atol=5e-4)
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-4)  # Newcombe 1998, Table I
    assert wilson(0, 0) == (0.0, 1.0)


def test_equals_are_told_apart_by_chance_as_rarely_as_promised():
    rng = np.random.default_rng(0)
    draws = rng.random((2, 4000, 300)) < 0.7
    false_alarms = np.mean([above(a, b) for a, b in zip(*draws, strict=True)])
    assert 0.001 < false_alarms < 0.01  # once in 200
    assert above(np.arange(300) < 200, np.arange(300) < 180)
    assert not above(np.arange(300) < 200, np.arange(300) < 180, margin=0.07)
