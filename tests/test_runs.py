"""Whole runs: folders, other people's classifiers, both objectives, what is kept, refused and written."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from vqunet_tf.config import Config, PurifierConfig, TrainingConfig
from vqunet_tf.errors import UserError
from vqunet_tf.models import VQUNet
from vqunet_tf.recipes import preset
from vqunet_tf.runs import RunFolder, load_model
from vqunet_tf.training import adversaries, devices, fit, given, optimizers
from vqunet_tf.training.encoder import EncoderObjective
from vqunet_tf.training.objectives import new_head


def tiny(**changes):
    settings = {"data.limit": 64, "training.epochs": 2, "training.batch_size": 32, "attack.batch_size": 64, **changes}
    return preset("smoke", "digits").replace(settings)


def silent(line):
    pass


def save_linear(path, shape=(32, 32, 1), classes=10, activation=None):
    """A classifier of somebody else's: one dense layer."""
    inputs = keras.Input(shape)
    outputs = keras.layers.Dense(classes, activation=activation)(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, outputs)
    model.save(path)
    return model


def losses_of(run):
    rows = [line.split(",") for line in run.metrics.read_text().splitlines()[1:]]
    return {(row[0], row[1], row[2]): float(row[3]) for row in rows}


def test_impossible_sizes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="configuration purifier: Expected num_embeddings.*each of the 2 levels"):
        fit.train(tiny(**{"purifier.num_embeddings": [8, 8, 8]}), RunFolder(tmp_path / "run"), say=print)
    with pytest.raises(UserError, match="unknown configuration training.gradient 'true'"):
        fit.train(tiny(**{"training.gradient": "true"}), RunFolder(tmp_path / "run"), say=print)
    with pytest.raises(UserError, match="unknown configuration training.gradient 'identity'"):
        fit.train(tiny(**{"training.gradient": "identity"}), RunFolder(tmp_path / "run"), say=print)
    with pytest.raises(UserError, match="attack_on: expected chain where head_weight is 0"):
        tiny(**{"training.attack_on": "head"})
    with pytest.raises(UserError, match="encoder_epochs: expected 0 where head_weight is 0, got 2"):
        tiny(**{"training.encoder_epochs": 2})
    with pytest.raises(
        UserError, match="encoder_epochs: expected 0 with training.start where training.epochs is 0, got 2"
    ):
        nothing_else = {"training.encoder_epochs": 2, "training.head_weight": 1.0, "training.epochs": 0}
        tiny(**{**nothing_else, "training.start": "purifier.keras"})
    with pytest.raises(UserError, match="attack_gradients: expected another beside identity"):
        alone = {"training.objective": "adaptive", "training.attack_gradients": ("identity",)}
        fit.train(tiny(**alone), RunFolder(tmp_path / "run"), say=print)
    with pytest.raises(
        UserError, match="batch_size: expected an image for each of 3 attack_gradients on each of 1 replicas, got 2"
    ):
        several = {"training.attack_gradients": ("identity", "soft", "rotation"), "training.batch_size": 2}
        fit.train(tiny(**{"training.objective": "adaptive", **several}), RunFolder(tmp_path / "run"), say=print)
    assert not (tmp_path / "run").exists()


def test_the_same_run_goes_on_elsewhere(tmp_path):
    """Where the data lie and which devices train do not make it another run."""
    run = RunFolder(tmp_path / "run")
    run.create(tiny())
    run.create(tiny(**{"data.data_dir": "elsewhere", "training.strategy": "mirrored"}))
    with pytest.raises(UserError, match="attack.copies is 1 there, 2 here"):
        run.create(tiny(**{"attack.copies": 2}))


def test_four_replicas_train_like_one_device(tmp_path):
    """The same losses over 20 steps, from the same given classifier: targets belong to their images."""
    save_linear(tmp_path / "mine.keras")
    losses = {}
    for strategy in ("none", "mirrored"):
        run = RunFolder(tmp_path / strategy)
        changes = {"classifier.path": str(tmp_path / "mine.keras"), "training.strategy": strategy}
        # A small rate: rounding that tips the choice of a code is a difference that grows.
        changes |= {"training.feature_weight": 0.5, "training.head_weight": 0.5, "training.encoder_epochs": 2}
        changes |= {"training.epochs": 10, "training.learning_rate": 5e-4}
        fit.train(tiny(**changes), run, say=silent)
        losses[strategy] = losses_of(run)
    assert set(losses["none"]) == set(losses["mirrored"])
    for place, value in losses["none"].items():
        assert losses["mirrored"][place] == pytest.approx(value, abs=2e-2 if "perplexity" in place[2] else 1e-4), place


def test_an_encoder_learns_alone_on_four_replicas_as_on_one(rng):
    """The same weights after one step of gradient descent on the same 32 images."""
    images = rng.integers(0, 256, size=(32, 8, 8, 1), dtype="uint8")
    batch = {
        "clean": images,
        "label": np.arange(32, dtype="int32") % 4,
        "start": rng.uniform(-0.1, 0.1, size=images.shape).astype("float32"),
        "epsilon": np.full((32, 1, 1, 1), 0.1, "float32"),
    }
    trained = {}
    for strategy in ("none", "mirrored"):
        keras.utils.set_random_seed(0)
        with devices.scope(strategy):
            purifier = VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1)
            objective = EncoderObjective(
                purifier, new_head(purifier, 4), TrainingConfig(attack_steps=1, head_weight=1.0)
            )
            objective.compile(optimizer=keras.optimizers.SGD(0.5))
            before = [weight.numpy() for weight in objective.learner.weights]
            objective.fit(batch, batch_size=32, epochs=1, verbose=0)
        assert devices.replicas(strategy) == (4 if strategy == "mirrored" else 1)
        trained[strategy] = [weight.numpy() for weight in objective.learner.weights]
        assert max(np.abs(new - old).max() for new, old in zip(trained[strategy], before, strict=True)) > 1e-2
    for one, four in zip(*trained.values(), strict=True):
        np.testing.assert_allclose(four, one, atol=1e-5)


def test_accumulated_batches_equal_one_large_one(tmp_path):
    """Four batches of 16 before each step of the optimizer, or one of 64: the same losses, epoch by epoch."""
    save_linear(tmp_path / "mine.keras")
    losses = []
    for size, count in ((64, 1), (16, 4)):
        run = RunFolder(tmp_path / str(size))
        changes = {"classifier.path": str(tmp_path / "mine.keras"), "training.batch_size": size}
        changes |= {"training.noisy": 0.0, "training.adversarial": 0.0, "training.accumulate": count}
        changes |= {"purifier.quantize": False, "training.selection": "last", "training.epochs": 3}
        fit.train(tiny(**changes), run, say=silent)
        losses.append([losses_of(run)["purifier", str(epoch), "loss"] for epoch in (1, 2, 3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][2] < losses[0][0]


def test_a_given_classifier_is_kept_as_it_is(tmp_path):
    mine = save_linear(tmp_path / "mine.keras")
    run = RunFolder(tmp_path / "run")
    fit.train(tiny(**{"classifier.path": str(tmp_path / "mine.keras"), "training.epochs": 1}), run, say=silent)
    for kept, weight in zip(run.load_classifier().weights, mine.weights, strict=True):
        np.testing.assert_array_equal(kept.numpy(), weight.numpy())


def test_both_stages_take_the_steps_asked_for(tmp_path, monkeypatch):
    taken, build = [], optimizers.build

    def spy(schedule, weight_decay, muon=0.0, accumulate=1):
        taken.append(muon)
        return build(schedule, weight_decay, muon, accumulate)

    monkeypatch.setattr(optimizers, "build", spy)
    changes = {"classifier.muon": 2.0, "training.muon": 3.0, "training.epochs": 1}
    fit.train(tiny(**changes), RunFolder(tmp_path / "run"), say=silent)
    assert taken == [2.0, 3.0]


def test_what_was_trained_in_half_precision_computes_in_full(tmp_path):
    """Whoever loads it, to serve it or to take its gradient, gets float32, and the precision of others is left alone."""
    run = RunFolder(tmp_path / "run")
    fit.train(tiny(**{"training.precision": "mixed_bfloat16", "training.epochs": 1}), run, say=silent)
    assert keras.config.dtype_policy().name == "float32"
    for model in (run.load_classifier(), run.load_purifier().graph):
        assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}


def test_a_classifier_of_probabilities_is_wrapped_on_request_with_a_warning(tmp_path):
    mine = save_linear(tmp_path / "mine.keras", activation="softmax")
    run, said = RunFolder(tmp_path / "run"), []
    changes = {"classifier.path": str(tmp_path / "mine.keras"), "classifier.from_probabilities": True}
    fit.train(tiny(**changes, **{"training.epochs": 1}), run, say=said.append)
    assert said[0].startswith("warning: the logarithms of the classifier's probabilities")
    images = np.random.default_rng(0).random((5, 32, 32, 1), dtype="float32")
    np.testing.assert_allclose(keras.ops.softmax(run.load_classifier()(images)), mine(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "classes", "activation", "message"),
    [
        ((32, 32, 1), 10, "softmax", "gives probabilities: expected logits"),
        ((28, 28, 1), 10, None, r"expects images of shape \(28, 28, 1\), the data has \(32, 32, 1\)"),
        ((32, 32, 1), 7, None, r"\(7,\), the data has 10 classes"),
    ],
    ids=["probabilities", "shape", "classes"],
)
def test_a_classifier_that_does_not_fit_is_refused_before_anything_is_written(
    shape, classes, activation, message, tmp_path
):
    save_linear(tmp_path / "mine.keras", shape, classes, activation)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        fit.train(tiny(**{"classifier.path": str(tmp_path / "mine.keras")}), run, say=silent)
    assert not run.path.exists()


def test_the_adaptive_objective_starts_from_a_purifier_and_writes_curves(tmp_path):
    """Warm start: with no step taken the weights are those of the first run; the events name what is measured."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    fit.train(tiny(), first, say=silent)
    changes = {
        "training.objective": "adaptive",
        "training.start": str(first.purifier),
        "classifier.path": str(first.classifier),
        "training.learning_rate": 0.0,
        "training.attack_steps": 1,
        "training.weight_decay": 0.0,
    }
    fit.train(tiny(**changes), second, say=silent)
    for old, new in zip(first.load_purifier().trainable_weights, second.load_purifier().trainable_weights, strict=True):
        np.testing.assert_allclose(new.numpy(), old.numpy(), atol=1e-6)
    found = losses_of(second)
    assert {name for _, _, name in found} >= {"classification", "attacked_accuracy", "validation_targeted"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(second.tensorboard / "purifier"))
    events.Reload()
    assert {"epoch/loss", "epoch/codes_used_0", "epoch/validation_clean"} <= set(events.Tags()["tensors"])
    assert "before and after" in events.Tags()["tensors"]
    with pytest.raises(UserError, match=r"its widths is \(8, 16\), the configuration has \(8, 24\)"):
        other = tiny(**changes, **{"purifier.widths": [8, 24]})
        fit.train(other, RunFolder(tmp_path / "third"), say=silent)


def test_a_purifier_to_begin_with_may_get_other_code_books(tmp_path):
    """As many numbers at each place: all layers but the code books are taken over, those are placed by the first batch."""
    old = VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=8, groups=(2, 1), channels=1)
    old.graph(np.random.default_rng(0).random((4, 8, 8, 1), "float32"), training=True)
    old.save(tmp_path / "old.keras")
    settings = PurifierConfig(widths=(4, 4), num_embeddings=(16,), embedding_dim=(2,), groups=(8, 4))
    new = given.start_of(tmp_path / "old.keras", settings, 1)
    assert [quantizer.num_embeddings for quantizer in new.quantizers] == [16, 16]
    assert all(float(quantizer.steps) == 0.0 for quantizer in new.quantizers)
    layers = {layer.name: layer.get_weights() for layer in old.graph.layers}
    for layer in new.graph.layers:
        if not layer.name.startswith("quantizer"):
            for one, two in zip(layer.get_weights(), layers[layer.name], strict=True):
                np.testing.assert_array_equal(one, two)
    with pytest.raises(UserError, match=r"\(16, 8\) numbers pass.* the configuration has \(8, 8\)"):
        given.start_of(tmp_path / "old.keras", dataclasses.replace(settings, groups=(4, 4)), 1)
    with pytest.raises(UserError, match=r"decoder_widths is None.* give --set=purifier.decoder_widths=null"):
        given.start_of(tmp_path / "old.keras", dataclasses.replace(settings, decoder_widths=(2, 4)), 1)
    with pytest.raises(UserError, match=r"give --set=purifier.widths=\[4,4\]"):
        given.start_of(tmp_path / "old.keras", dataclasses.replace(settings, widths=(2, 4)), 1)


def test_adversaries_are_crafted_anew_when_asked(tmp_path):
    run = RunFolder(tmp_path / "run")
    made = []
    real = adversaries.craft

    def craft(*args):
        made.append(args[3])
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversaries, "craft", craft)
        fit.train(tiny(**{"attack.refresh": 1, "training.epochs": 2}), run, say=silent)
    assert made == [(0, 0, 0), (0, 1, 0)]


def test_the_configuration_of_a_run_makes_it_again(tmp_path):
    run = RunFolder(tmp_path / "run")
    fit.train(tiny(**{"training.epochs": 1}), run, say=silent)
    again = RunFolder(tmp_path / "again")
    fit.train(Config.from_json(run.config.read_text()), again, say=silent)
    assert losses_of(again).keys() == losses_of(run).keys()
    for place, value in losses_of(run).items():
        assert losses_of(again)[place] == pytest.approx(value, rel=1e-3), place


def test_a_broken_or_foreign_file_is_refused(tmp_path):
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"PK not really")
    with pytest.raises(UserError, match="broken.keras is not a .keras file"):
        load_model(broken)
    with pytest.raises(UserError, match="missing.keras is missing"):
        load_model(tmp_path / "missing.keras")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoints").write_text("of another project")
    with pytest.raises(UserError, match="holds files but no run"):
        RunFolder(tmp_path / "mine").create(tiny())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: expected a folder"):
        RunFolder(tmp_path / "file").create(tiny())


def test_a_diverging_run_stops_and_says_where(tmp_path):
    config = tiny(**{"training.pixel_weight": float("inf")})
    with pytest.raises(UserError, match="diverged: loss is inf at step 1, epoch 1"):
        fit.train(config, RunFolder(tmp_path / "run"), say=silent)
    assert (tmp_path / "run" / "classifier.keras").exists()


def test_each_replica_switches_its_quantizers_off_for_itself():
    """In a process of its own: what other tests leave in TensorFlow's runtime can cancel a function on several devices."""
    script = Path(__file__).with_name("switching.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
