"""What an evaluation refuses or catches: unknown names, wrong labels, probabilities, answers that are no numbers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from fragile import CLASSES, THREATS, evaluated, failed, purifier_of

from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import checks, suites


def test_unknown_names_and_models_that_do_not_fit_are_refused(problem, averaging):
    classifier, images, labels = problem
    with pytest.raises(UserError, match="unknown threat model 'grey': expected one of black_box, gray_box, white_box"):
        evaluated(problem, averaging, threat_models=["grey"])
    with pytest.raises(UserError, match=r"no attack here is black_box \(only gray_box, white_box\).*--suite=adaptive"):
        evaluated(problem, averaging, threat_models=["black_box"])
    with pytest.raises(UserError, match="unknown defense 'jpg': expected one of .*none, .*vqunet"):
        evaluated(problem, averaging, defenses=["jpg"])
    with pytest.raises(UserError, match="unknown suite 'huge': expected one of adaptive, full, quick, standard"):
        suites.build("huge", [], THREATS, 3)
    with pytest.raises(UserError, match=r"labels 0\.\.3 for the 4 logits.*got labels 6\.\.9"):
        evaluated((classifier, images, labels + 6), averaging)
    with pytest.raises(UserError, match=r"labels \[60\].*one-hot.*argmax"):
        evaluated((classifier, images, np.eye(CLASSES)[labels]), averaging)
    with pytest.raises(UserError, match=r"got \[60, 1\]: give labels\[:, 0\]$"):
        evaluated((classifier, images, labels[:, None]), averaging)
    with pytest.raises(UserError, match="whole numbers"):
        evaluated((classifier, images, labels + 0.5), averaging)
    with pytest.raises(UserError, match=r"labels \[60\], one for each image, got \[59\]"):
        evaluated((classifier, images, labels[1:]), averaging)
    with pytest.raises(UserError, match=r"labels 0\.\.3.*got labels -1\.\.3"):
        evaluated((classifier, images, np.where(labels, labels, -1)), averaging)
    with pytest.raises(UserError, match=r"uint8 or floats in \[0,1\], got .* to \d\d\d"):
        evaluated((classifier, 255 * images, labels), averaging)


def test_a_classifier_that_gives_probabilities_is_refused(problem, averaging):
    classifier, images, labels = problem
    softmax = keras.Sequential([classifier, keras.layers.Softmax()])
    with pytest.raises(UserError, match="gives probabilities: expected logits"):
        evaluated((softmax, images, labels), averaging)
    assert checks.logits_not_probabilities(np.array([[0.5, 0.5], [2.0, 1.0]])).passed


def test_a_purifier_that_is_random_is_caught(problem):
    class Noise(keras.layers.Layer):
        def call(self, images):
            return images + 0.1 * keras.random.normal(keras.ops.shape(images))

    found = evaluated(problem, purifier_of(Noise()), names=["fgsm"], threats=THREATS[:1])
    assert "deterministic" in failed(found)


def test_answers_that_are_not_numbers_are_no_success(problem):
    classifier, images, labels = problem
    broken = purifier_of(keras.layers.Lambda(lambda x: x + float("nan")))
    zeros = np.zeros_like(labels)  # argmax of NaN is 0: every answer would be right
    found = evaluated((classifier, images, zeros), broken, names=["fgsm"], threats=THREATS[:1])
    assert {row["accuracy"] for row in found.rows if row["defense"] == "vqunet"} == {0.0}
