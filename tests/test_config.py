"""The configuration: closed to unknown keys, typed, and equal after a round trip."""

import dataclasses

import pytest

from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.recipes import preset


@pytest.mark.parametrize(
    "name", ["digits", "fashion_mnist", "cifar10", "smoke", "default", "digits_adaptive", "default_adaptive"]
)
def test_json_round_trip(name):
    config = preset(name, "digits")
    assert Config.from_json(config.to_json()) == config


def test_a_data_set_has_its_own_preset_or_the_default():
    assert preset("", "fashion_mnist").classifier.flip
    other = preset("", "kmnist")
    assert other.data.dataset == "kmnist"
    assert dataclasses.replace(other, data=preset("default", "digits").data) == preset("default", "digits")


def test_overrides_are_typed():
    config = preset("smoke", "digits").override(
        ["training.epochs=3", "attack.epsilon=1", "purifier.widths=[4,8]", "data.data_dir=somewhere"]
    )
    assert config.training.epochs == 3
    assert config.attack.epsilon == 1.0 and isinstance(config.attack.epsilon, float)
    assert config.purifier.widths == (4, 8)
    assert config.data.data_dir == "somewhere"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.epoch=3", "unknown configuration key in 'training' 'epoch': expected one of .*epochs"),
        ("trainer.epochs=3", "unknown configuration section 'trainer'.*training"),
        ("training.epochs", "key=value"),
        ("training.epochs=many", "training.epochs: expected int, got 'many'"),
        ("training.epochs=1.5", "training.epochs: expected int, got 1.5"),
        ("training.jit_compile=1", "expected bool, got 1"),
        ("purifier.widths=8", "expected a list, got 8"),
        ("training.batch_size=0", "batch_size: expected at least 1, got 0"),
        ("training.seed=-1", r"seed: expected a whole number from 0 to 2\^32 - 1, got -1"),
        ("data.seed=4294967296", r"seed: expected a whole number from 0 to 2\^32 - 1, got 4294967296"),
        ("attack.epsilon=8", r"attack.epsilon: expected radii on the \[0,1\] scale, such as 8/255 = 0.0314, got 8"),
        ("evaluation.epsilons=[0.1,-0.1]", r"evaluation.epsilons: expected radii on the \[0,1\] scale.*got -0.1"),
        ("training.loop_epsilon=8", r"training.loop_epsilon: expected radii on the \[0,1\] scale.*got 8"),
        ("attack.copies=0", "copies: expected at least 1, got 0"),
        ("data.validation_fraction=1.5", "validation_fraction: expected between 0 and 1, got 1.5"),
        ('purifier.widths=[8,"a"]', "expected int, got 'a'"),
    ],
)
def test_wrong_overrides_are_one_line(assignment, message):
    with pytest.raises(UserError, match=message):
        Config().override([assignment])


def test_an_attack_in_the_loop_of_its_own_is_for_the_gray_box_objective():
    config = Config().override(["training.loop_epsilon=0.01"])
    with pytest.raises(UserError, match="loop_epsilon: expected 0 for the objective adaptive.*got 0.01"):
        config.override(["training.objective=adaptive"])


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown preset 'cifar'.*cifar10.*smoke"):
        preset("cifar", "cifar10")


def test_a_file_with_an_unknown_key_is_refused():
    with pytest.raises(UserError, match="training.epoch"):
        Config.from_json('{"training": {"epoch": 3}}')
    with pytest.raises(UserError, match="not JSON"):
        Config.from_json("{")
