"""The probes of an evaluation, met by results that were made up: what they accept, what they find."""

from __future__ import annotations

import numpy as np
import pytest
from invented import WHITE, outcome

from vqunet_tf.evaluation import probes
from vqunet_tf.threat import Threat


def test_the_probed_budget_is_the_one_that_tells_most():
    budgets = [Threat("linf", epsilon) for epsilon in (0.1, 0.2, 0.3)]
    outcomes = [outcome(share, **WHITE, epsilon=e) for share, e in ((0.9, 0.1), (0.4, 0.2), (0.0, 0.3))]
    assert probes.telling(outcomes, "vqunet", budgets) == budgets[1]
    # Of several gradients the strongest: what is left of 0.4 and 0.1.
    weaker = [outcome(0.1, **WHITE, epsilon=0.2, variant="soft")]
    assert probes.telling([*outcomes, *weaker], "vqunet", budgets) == budgets[0]
    assert probes.telling([], "vqunet", budgets) == budgets[0]


class _Invented(probes.Probe):
    """A probe whose results are made up: which share is right, by the attack (and by whether the quantizers are off)."""

    def __init__(self, share):
        super().__init__(np.zeros((200, 1, 1, 1), np.float32), np.zeros(200, np.int32))
        object.__setattr__(self, "share", share)

    def right(self, victim, attack):
        off = (victim is _SUBJECT.unquantized,) if self.share.__code__.co_argcount > 1 else ()
        return np.arange(200) < 200 * self.share(attack, *off)

    def correct(self, victim, images):
        return np.ones(200, bool)


_SUBJECT = probes.Subject("vqunet", lambda x: x, lambda x: x)
_BUDGET = Threat("linf", 0.1)


@pytest.mark.parametrize(
    ("check", "arguments", "fine", "wrong"),
    [
        (
            probes.more_steps_change_little,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack: 0.5 - 0.01 * (attack.steps > 20),
            lambda attack: 0.5 - 0.1 * (attack.steps > 20),
        ),
        (
            probes.more_steps_change_little,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack: 0.5 - 0.02 * (attack.steps > 20),  # chance
            lambda attack: 0.5 + 0.1 * (attack.steps > 20),  # and steps do not repair
        ),
        (
            probes.noise_weaker_than_gradients,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack: 0.9 if attack.name == "noise" else 0.2,
            lambda attack: 0.1 if attack.name == "noise" else 0.2,
        ),
        (
            probes.large_epsilon_succeeds,
            ([_SUBJECT],),
            lambda attack: 0.12,  # up to 10 %, and chance
            lambda attack: 0.2,
        ),
        (
            probes.unbounded_attack_succeeds,
            ([_SUBJECT],),
            lambda attack: 0.0 if attack.threat.epsilon == 1.0 and attack.steps > 20 else 0.2,
            lambda attack: 0.005,  # one image
        ),
        (
            probes.falls_without_quantizers,
            ([_SUBJECT], _BUDGET),
            lambda attack: 0.5 if attack.threat == _BUDGET else 0.0,  # trained to resist, but not more
            lambda attack: 0.2,
        ),
        (
            probes.quantizers_hide_nothing,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack, off: 0.5 - 0.05 * off,
            lambda attack, off: 0.5 - 0.2 * off,
        ),
        (
            probes.quantizers_hide_nothing,
            ([(_SUBJECT, _BUDGET)], 20),
            lambda attack, off: 0.5 + 0.2 * off,  # more without them hides nothing
            lambda attack, off: 0.2 * (not off),
        ),
    ],
)
def test_each_probe_passes_what_is_fine_and_fails_what_is_not(check, arguments, fine, wrong):
    assert check(_Invented(fine), *arguments).passed
    failed = check(_Invented(wrong), *arguments)
    assert not failed.passed
    assert failed.name == check.__name__
    assert "vqunet" in failed.detail


def test_nothing_is_switched_off_where_there_are_no_quantizers():
    bare = probes.Subject("vqunet", lambda x: x)
    probe = _Invented(lambda attack: 0.0)
    assert probes.falls_without_quantizers(probe, [bare], _BUDGET) is None
    assert probes.quantizers_hide_nothing(probe, [(bare, _BUDGET)], 20) is None


def test_what_hides_is_seen_on_images_that_are_right_both_ways_and_with_all_gradients():
    def hidden(known, *outcomes):
        probe = _Invented(lambda attack, off: 0.2 * (not off))
        object.__setattr__(probe, "correct", lambda victim, images: known)
        return probes.quantizers_hide_nothing(probe, [(_SUBJECT, _BUDGET)], 20, outcomes)

    first, rest = np.arange(200) < 40, np.arange(200) >= 40
    assert not hidden(first).passed and not hidden(first | rest).passed
    assert hidden(rest).passed  # those that the quantizers keep were wrong without them from the start
    assert hidden(np.arange(200) < 19) is None
    found = outcome(0.0, **WHITE, epsilon=0.1, variant="soft", n=200)
    assert hidden(first, found).passed
    for other in ({"epsilon": 0.2}, {"n": 100}):
        assert not hidden(first, outcome(0.0, **{**WHITE, "epsilon": 0.1, "n": 200, **other})).passed
