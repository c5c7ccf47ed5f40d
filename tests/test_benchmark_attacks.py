"""The benchmark of PGD: all contenders run the same attack, and it prints what it promises."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from benchmarks import attacks
from vqunet_tf.attacks import PGD
from vqunet_tf.threat import Threat


@pytest.fixture(scope="module")
def what() -> attacks.Victim:
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).random((12, 6, 6, 1), np.float32)
    classifier = keras.Sequential(
        [keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(8, "tanh"), keras.layers.Dense(10)]
    )
    return attacks.Victim(classifier, images, classifier.predict(images, verbose=0).argmax(axis=1).astype(np.int32))


def test_all_take_as_many_steps_of_one_length_within_one_budget(what):
    """Signs do not change in so small a ball: from every start the same corner is reached, whoever walks."""
    threat = Threat("linf", 1e-3)
    expected = PGD(threat=threat, steps=4)(what, what.images, what.labels)
    assert np.median(np.abs(expected - what.images)) > 0.99e-3
    runners = attacks.contenders(what, threat, 4, 6)
    assert set(runners) >= {"ours", "ours_until_fooled", "cleverhans", "art"}
    for name, run in runners.items():
        found = run(what.images, what.labels)
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=name)  # nobody is fooled: no image stops early


def test_it_prints_what_it_promises(what, capsys, monkeypatch):
    monkeypatch.setattr(attacks, "victim", lambda name, number: what)
    attacks.main(["--victims=small", "--steps=3", "--batch_size=6", "--turns=1"])
    first, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["victim"], first["n"], first["steps"], first["clean_accuracy"]) == ("small", 12, 3, 1.0)
    rows = {row["contender"]: row for row in rows if "missing" not in row}
    assert set(rows) >= {"ours", "ours_until_fooled", "cleverhans", "art"}
    for name, row in rows.items():
        assert 0.0 <= row["accuracy"] <= 1.0
        assert row["images_per_second"] > 0
        assert min(row[key] for key in row if "times" in key) > 0, name
    assert rows["ours"]["times_ours"] == rows["ours_until_fooled"]["times_ours_until_fooled"] == 1.0
