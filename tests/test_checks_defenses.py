"""Defences that cheat are caught, by the checks that ask them and by a whole evaluation; a sound one is not."""

from __future__ import annotations

import functools
import types

import keras
import numpy as np
import pytest
from fragile import SHAPE, N, Rounding, purifier_of
from invented import BLACK, outcome

from vqunet_tf import VectorQuantizer
from vqunet_tf.attacks.cleverhans import input_gradient
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import checks, evaluate, probes
from vqunet_tf.evaluation.suites import build
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.threat import Threat

_LARGE = {"large_epsilon_succeeds", "unbounded_attack_succeeds"}


def _layer(function) -> keras.layers.Layer:
    return keras.layers.Lambda(function, output_shape=SHAPE)


def _quantized() -> keras.Model:
    """2×2 averages, each replaced by the nearest of 17 grey levels in a code book."""
    images = keras.Input(SHAPE)
    quantizer = VectorQuantizer(17, 1)
    found = quantizer(keras.layers.AveragePooling2D(2)(images))["quantized"]
    model = keras.Model(images, keras.layers.UpSampling2D(2)(found), name="quantized")
    quantizer.placed.assign(np.linspace(0, 1, 17)[:, None])
    return model


def _suspicions(problem, purify, outcomes=None, **changes):
    """What fails for a defence: checks of gradients and answers, and all probes at epsilon 0.1."""
    classifier, images, labels = problem
    chains = {"none": Chain(classifier), "vqunet": Chain(classifier, purify)}
    bench = types.SimpleNamespace(victims=chains, images=images, labels=labels, batch_size=32, seed=0)
    twice = {name: tuple(chain.logits(images, 32) for _ in range(2)) for name, chain in chains.items()}
    chains["vqunet"].is_random = not checks.deterministic(twice).passed
    gradients = {name: input_gradient(chain.through(), images, labels) for name, chain in chains.items()}
    found = [
        checks.logits_not_probabilities({name: pair[0] for name, pair in twice.items()}),
        checks.deterministic(twice),
        checks.gradients_not_masked(gradients),
        *probes.run(bench, outcomes or [outcome(0.5, n=N)], **changes),
    ]
    return {check.name: check for check in found}


def _failed(found) -> set[str]:
    return {name for name, check in found.items() if not check.passed}


def test_a_sound_chain_raises_no_suspicion(problem):
    seen = []
    purify = functools.partial(_quantized(), training=False)
    found = _suspicions(problem, purify, advance=lambda words, work: seen.append(work))
    assert _failed(found) == set()
    assert {type(check.passed) for check in found.values()} == {bool}
    assert "after 1 steps" in found["more_steps_change_little"].detail
    assert set(found) == {
        "logits_not_probabilities",
        "deterministic",
        "gradients_not_masked",
        "more_steps_change_little",
        "noise_weaker_than_gradients",
        "large_epsilon_succeeds",
        "unbounded_attack_succeeds",
        "falls_without_quantizers",
        "quantizers_hide_nothing",
        "gradients_match_differences",
    }
    detail = found["gradients_match_differences"].detail
    assert "vqunet has no slope" in detail  # stairs
    assert "vqunet without quantizers 0." in detail
    bench = types.SimpleNamespace(victims=dict.fromkeys(("none", "vqunet")), images=problem[1])
    assert sum(seen) == probes.work(bench, steps=1) and min(seen) >= 0


@pytest.mark.parametrize(
    ("purifier", "caught"),
    [
        (
            purifier_of(_layer(keras.ops.stop_gradient)),
            {"gradients_not_masked", "gradients_match_differences", *_LARGE},
        ),
        (purifier_of(Rounding(4, straight_through=False)), {"gradients_not_masked", *_LARGE}),
        # A gradient is there, for the left half of the image only.
        (
            purifier_of(
                _layer(lambda x: keras.ops.concatenate([x[:, :, :4], keras.ops.stop_gradient(x[:, :, 4:])], 2))
            ),
            {"gradients_match_differences"},
        ),
        # A gradient is there and points the wrong way.
        (purifier_of(_layer(lambda x: keras.ops.stop_gradient(2 * x) - x)), {"gradients_match_differences", *_LARGE}),
    ],
    ids=["none", "rounding", "half", "reversed"],
)
def test_a_defence_that_masks_its_gradient_is_caught(problem, purifier, caught):
    assert caught <= _failed(_suspicions(problem, purifier))


def test_a_stand_in_for_a_gradient_that_leads_nowhere_is_no_mask(problem):
    def purify(images):
        return keras.ops.round(images * 16) / 16

    assert "large_epsilon_succeeds" in _failed(_suspicions(problem, purify))
    purify.differentiable = False
    found = _suspicions(problem, purify)
    assert _failed(found) == set()
    assert "vqunet" not in found["gradients_match_differences"].detail


def test_a_random_defence_is_caught(problem):
    class Noise(keras.layers.Layer):
        def call(self, images):
            return images + 0.1 * keras.random.normal(keras.ops.shape(images))

    assert "deterministic" in _failed(_suspicions(problem, purifier_of(Noise())))


def test_a_softmax_is_caught(problem):
    classifier, images, labels = problem
    softmax = keras.Sequential([classifier, keras.layers.Softmax()])
    with pytest.raises(UserError, match="gives probabilities: expected logits"):
        _suspicions((softmax, images, labels), _quantized())
    answers = {"none": Chain(classifier).logits(images, 32), "vqunet": Chain(softmax).logits(images, 32)}
    assert not checks.logits_not_probabilities(answers).passed


def test_quantizers_that_are_not_what_protects_are_found_out(problem):
    """Switched off they leave a network that a gradient still does not get through."""
    images = keras.Input(SHAPE)
    rounded = Rounding(8, straight_through=False)(images)
    quantizer = VectorQuantizer(17, 1)
    model = keras.Model(images, quantizer(rounded)["quantized"])
    quantizer.placed.assign(np.linspace(0, 1, 17)[:, None])
    assert "falls_without_quantizers" in _failed(_suspicions(problem, model))


def test_what_was_measured_is_not_asked_again(problem):
    classifier, images, labels = problem
    bench = types.SimpleNamespace(
        victims={"none": classifier, "vqunet": classifier}, images=images, labels=labels, batch_size=N, seed=0
    )
    noise = outcome(0.9, "noise", **BLACK, n=N)
    for outcomes, asked in (([outcome(0.5)], True), ([outcome(0.5), noise], False)):
        names = [check.name for check in probes.run(bench, outcomes)]
        assert ("noise_weaker_than_gradients" in names) is asked
        assert "falls_without_quantizers" not in names  # it has none
    assert probes.run(types.SimpleNamespace(victims={"none": None}, images=images), [outcome(0.5)]) == []
    assert probes.run(bench, [outcome(0.9, "none")]) == []  # no budget


def test_an_evaluation_catches_a_purifier_that_hides_its_gradient(problem):
    def failed(purifier):
        classifier, images, labels = problem
        attacks = build("quick", ["fgsm", "pgd"], [Threat("linf", 0.1), Threat("linf", 0.3)], steps=5)
        found = evaluate(classifier, purifier, images, labels, attacks=attacks, batch_size=32)
        return {check.name for check in found.checks if not check.passed}

    caught = {"gradients_not_masked", "white_box_beats_gray_box"}
    assert caught <= failed(purifier_of(Rounding(4, straight_through=False)))
    assert not caught & failed(purifier_of(Rounding(4, straight_through=True)))
