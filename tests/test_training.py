"""Training: adversaries within their budget, batches that repeat, the loss by hand, runs that resume."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from vqunet_tf import VQUNet, pixels
from vqunet_tf.config import AttackConfig, ClassifierConfig, TrainingConfig, preset
from vqunet_tf.errors import UserError
from vqunet_tf.models import classifiers
from vqunet_tf.runs import RunFolder, load_model
from vqunet_tf.training import adversaries, fit
from vqunet_tf.training.batches import ClassifierBatches, PurifierBatches
from vqunet_tf.training.objectives import ClassifierObjective, GrayBoxObjective


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, size=(40, 8, 8, 1), dtype="uint8")


@pytest.fixture
def classifier():
    model = classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1)
    model.trainable = False
    return model


class TestAdversaries:
    config = AttackConfig(epsilon=0.1, copies=2, max_steps=3, batch_size=16)

    def test_they_stay_within_the_budget_and_are_the_same_for_the_same_seed(self, classifier, images):
        crafted = adversaries.craft(classifier, images, self.config, seed=1)
        assert crafted.shape == (2, 40, 8, 8, 1) and crafted.dtype == np.uint8
        moved = np.abs(crafted.astype(int) - images.astype(int))
        assert moved.max() <= 0.1 * 255 + 0.5
        assert (moved.reshape(80, -1).max(axis=1) > 0).all()
        np.testing.assert_array_equal(adversaries.craft(classifier, images, self.config, seed=1), crafted)
        assert not np.array_equal(adversaries.craft(classifier, images, self.config, seed=2), crafted)

    def test_no_radius_no_change(self, classifier, images):
        nothing = dataclasses.replace(self.config, epsilon=0.0)
        np.testing.assert_array_equal(adversaries.craft(classifier, images, nothing, seed=1)[0], images)

    def test_they_move_the_logits_more_than_noise_of_the_same_size(self, classifier, images, rng):
        crafted = adversaries.craft(classifier, images, self.config, seed=1)[0]
        noise = np.where(rng.random(images.shape) < 0.5, -1, 1) * (crafted.astype(int) - images)
        noisy = np.clip(images + noise, 0, 255).astype("uint8")
        clean = classifiers.logits_of(classifier, images)
        distance = [np.abs(classifiers.logits_of(classifier, x) - clean).mean() for x in (crafted, noisy)]
        assert distance[0] > 1.5 * distance[1]


class TestBatches:
    def test_every_image_comes_once_an_epoch_in_an_order_of_the_epoch(self, images):
        labels = np.arange(40)
        batches = ClassifierBatches(images, labels, ClassifierConfig(batch_size=10, max_shift=0), seed=3)
        first = np.concatenate([batches[i][1] for i in range(len(batches))])
        assert sorted(first) == list(range(40))
        batches.start_epoch(1)
        second = np.concatenate([batches[i][1] for i in range(len(batches))])
        assert not np.array_equal(first, second)
        batches.start_epoch(0)
        np.testing.assert_array_equal(np.concatenate([batches[i][1] for i in range(4)]), first)
        np.testing.assert_array_equal(batches[0][0], images[first[:10]])  # no shift, no flip: the images themselves

    def test_shifts_are_crops_of_the_mirrored_border(self, images):
        batches = ClassifierBatches(
            images, np.arange(40), ClassifierConfig(batch_size=40, max_shift=2, flip=True), seed=3
        )
        shown, labels = batches[0]
        padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
        for image, label in zip(shown, labels, strict=True):
            crops = [padded[label, t : t + 8, s : s + 8] for t in range(5) for s in range(5)]
            assert any(np.array_equal(image, c) or np.array_equal(image, c[:, ::-1]) for c in crops)

    @pytest.mark.parametrize("kind", ["clean", "noisy", "adversarial"])
    def test_each_share_gives_its_kind_of_image(self, kind, images):
        shares = {"clean": 0.0, "noisy": 0.0, "adversarial": 0.0, kind: 1.0}
        adversarial = np.stack([images // 2, images // 3])
        settings = TrainingConfig(batch_size=20, **shares)
        batches = PurifierBatches(
            images, np.zeros((40, 4), "float32"), adversarial, settings, AttackConfig(epsilon=0.1)
        )
        inputs, logits = batches[0]
        again, _ = batches[0]
        np.testing.assert_array_equal(inputs["seen"], again["seen"])
        assert logits.shape == (20, 4)
        same = [np.array_equal(seen, clean) for seen, clean in zip(inputs["seen"], inputs["clean"], strict=True)]
        if kind == "clean":
            assert all(same)
        elif kind == "adversarial":
            halves = [np.array_equal(s, c // 2) for s, c in zip(inputs["seen"], inputs["clean"], strict=True)]
            thirds = [np.array_equal(s, c // 3) for s, c in zip(inputs["seen"], inputs["clean"], strict=True)]
            assert all(h or t for h, t in zip(halves, thirds, strict=True)) and any(halves) and any(thirds)
        else:
            assert not any(same)

    def test_batches_are_whole_shards(self, images):
        batches = ClassifierBatches(images, np.arange(40), ClassifierConfig(batch_size=16), seed=0, replicas=3)
        assert batches.batch_size == 15 and len(batches) == 2
        with pytest.raises(UserError, match="at least 3 images a batch"):
            ClassifierBatches(images[:2], np.arange(2), ClassifierConfig(batch_size=16), seed=0, replicas=3)


class TestObjectives:
    def test_the_classifier_loss_by_hand(self, classifier, images):
        objective = ClassifierObjective(classifier, label_smoothing=0.2)
        logits = np.array([[2.0, 0.0, 0.0, 0.0]], "float32")
        log_softmax = logits - np.log(np.exp(logits).sum())
        expected = -(np.array([0.85, 0.05, 0.05, 0.05]) * log_softmax).sum()
        assert float(objective.compute_loss(None, np.array([0]), logits)) == pytest.approx(expected, rel=1e-6)

    def test_the_gray_box_loss_by_hand(self, classifier, images):
        purifier = VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1)
        settings = TrainingConfig(pixel_weight=2.0, guidance_weight=3.0, codebook_weight=5.0)
        objective = GrayBoxObjective(purifier, classifier, settings)
        target = np.array([[1.0, 0.0, 0.0, 0.0]] * 4, "float32")
        inputs = {"seen": images[:4], "clean": images[4:8]}
        outputs = objective(inputs)
        p, q = keras.ops.softmax(target), keras.ops.softmax(classifier(purifier(pixels.to_unit(images[:4]))))
        guidance = np.mean(np.sum(np.asarray(p) * (np.log(p) - np.log(q)), axis=1))
        pixel = np.mean(np.abs(purifier.purify(images[:4]) - images[4:8] / 255.0))
        expected = 2 * pixel + 3 * guidance + 5 * float(outputs["codebook"])
        assert float(objective.compute_loss(inputs, target, outputs)) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_a_step_in_mixed_precision_is_about_the_one_in_float32(self, policy, images):
        losses = []
        for name in ("float32", policy):
            keras.utils.set_random_seed(0)
            keras.config.set_dtype_policy(name)
            try:
                model = classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1)
                purifier = VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1)
            finally:
                keras.config.set_dtype_policy("float32")
            objective = GrayBoxObjective(purifier, model, TrainingConfig())
            objective.compile(optimizer="sgd")
            inputs = {"seen": images, "clean": images}
            losses.append(objective.train_on_batch(inputs, np.zeros((40, 4), "float32")))
            assert purifier.purify(images).dtype == np.float32
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)

    def test_the_classifier_stays_frozen(self, classifier, images):
        objective = GrayBoxObjective(VQUNet(widths=(4, 4), num_embeddings=8, channels=1), classifier, TrainingConfig())
        before = [keras.ops.convert_to_numpy(weight) for weight in classifier.weights]
        objective.compile(optimizer="sgd")
        objective.train_on_batch({"seen": images, "clean": images}, np.zeros((40, 4), "float32"))
        for weight, old in zip(classifier.weights, before, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), old)


class Interrupted(Exception):
    """Stands for a kill between two epochs."""


def tiny(**changes):
    settings = {"data.limit": 64, "training.epochs": 2, "training.batch_size": 32, "attack.batch_size": 64, **changes}
    return preset("smoke", "digits").replace(settings)


class TestRuns:
    def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(self, tmp_path, monkeypatch):
        """Killed between the stages, then between two epochs of the second."""
        config = tiny()
        fit.train(config, RunFolder(tmp_path / "whole"), say=lambda line: None)
        usage, craft = fit.callbacks.Usage, fit.adversaries.craft

        class Stops(usage):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    raise Interrupted
                super().on_epoch_begin(epoch, logs)

        def stops(*args):
            raise Interrupted

        run = RunFolder(tmp_path / "resumed")
        monkeypatch.setattr(fit.adversaries, "craft", stops)
        with pytest.raises(Interrupted):
            fit.train(config, run, say=lambda line: None)
        assert run.classifier.exists() and not run.checkpoints.joinpath("adversaries.npy").exists()
        monkeypatch.setattr(fit.adversaries, "craft", craft)
        monkeypatch.setattr(fit.callbacks, "Usage", Stops)
        with pytest.raises(Interrupted):
            fit.train(config, run, say=lambda line: None)
        assert not run.purifier.exists()
        assert json.loads((run.checkpoints / "purifier.json").read_text())["epochs"] == 1
        with run.metrics.open("a") as file:
            file.write("purifier,2,loss,9\n")  # of an epoch whose checkpoint was never written
        monkeypatch.setattr(fit.callbacks, "Usage", usage)
        fit.train(config, run, say=lambda line: None)
        assert not run.checkpoints.exists()
        rows = [line.split(",")[:3] for line in run.metrics.read_text().splitlines()]
        assert rows.count(["purifier", "2", "loss"]) == 1 and "9" not in run.metrics.read_text().split(",")

        whole, resumed = (RunFolder(tmp_path / name).load_purifier() for name in ("whole", "resumed"))
        for mine, theirs in zip(whole.weights, resumed.weights, strict=True):
            np.testing.assert_allclose(theirs.numpy(), mine.numpy(), atol=1e-5, err_msg=mine.path)
        said = []
        fit.train(config, run, say=said.append)
        assert said == [f"nothing to do: {run.path} holds a finished run"]
        with pytest.raises(UserError, match="another configuration.*training.epochs is 2 there, 3 here"):
            fit.train(tiny(**{"training.epochs": 3}), run, say=said.append)

    def test_impossible_sizes_are_refused_before_anything_is_written(self, tmp_path):
        with pytest.raises(UserError, match="configuration purifier: Expected num_embeddings.*each of the 2 levels"):
            fit.train(tiny(**{"purifier.num_embeddings": [8, 8, 8]}), RunFolder(tmp_path / "run"), say=print)
        assert not (tmp_path / "run").exists()

    def test_the_same_run_goes_on_elsewhere(self, tmp_path):
        """Where the data lie and which devices train do not make it another run."""
        run = RunFolder(tmp_path / "run")
        run.create(tiny())
        run.create(tiny(**{"data.data_dir": "elsewhere", "training.strategy": "mirrored"}))
        with pytest.raises(UserError, match="attack.copies is 1 there, 2 here"):
            run.create(tiny(**{"attack.copies": 2}))

    def test_four_replicas_train_like_one_device(self, tmp_path):
        """The same losses, epoch by epoch, from the same given classifier: targets belong to their images."""
        inputs = keras.Input((32, 32, 1))
        keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs))).save(tmp_path / "mine.keras")
        losses = {}
        for strategy in ("none", "mirrored"):
            run = RunFolder(tmp_path / strategy)
            changes = {"classifier.path": str(tmp_path / "mine.keras"), "training.strategy": strategy}
            fit.train(tiny(**changes), run, say=lambda line: None)
            rows = [line.split(",") for line in run.metrics.read_text().splitlines()[1:]]
            losses[strategy] = {(row[1], row[2]): float(row[3]) for row in rows}
        assert set(losses["none"]) == set(losses["mirrored"])
        for place, value in losses["none"].items():
            assert losses["mirrored"][place] == pytest.approx(value, rel=1e-3), place

    def test_a_given_classifier_is_kept_as_it_is(self, tmp_path):
        inputs = keras.Input((32, 32, 1))
        mine = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs)))
        mine.save(tmp_path / "mine.keras")
        run = RunFolder(tmp_path / "run")
        fit.train(
            tiny(**{"classifier.path": str(tmp_path / "mine.keras"), "training.epochs": 1}), run, say=lambda line: None
        )
        for kept, weight in zip(run.load_classifier().weights, mine.weights, strict=True):
            np.testing.assert_array_equal(kept.numpy(), weight.numpy())

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
        self, shape, classes, activation, message, tmp_path
    ):
        inputs = keras.Input(shape)
        outputs = keras.layers.Dense(classes, activation=activation)(keras.layers.Flatten()(inputs))
        keras.Model(inputs, outputs).save(tmp_path / "mine.keras")
        run = RunFolder(tmp_path / "run")
        with pytest.raises(UserError, match=message):
            fit.train(tiny(**{"classifier.path": str(tmp_path / "mine.keras")}), run, say=lambda line: None)
        assert not run.path.exists()

    def test_a_broken_or_foreign_file_is_refused(self, tmp_path):
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

    def test_a_diverging_run_stops_and_says_where(self, tmp_path):
        config = tiny(**{"training.pixel_weight": float("nan")})
        with pytest.raises(UserError, match="diverged: .* is nan in epoch 1"):
            fit.train(config, RunFolder(tmp_path / "run"), say=lambda line: None)
        assert (tmp_path / "run" / "classifier.keras").exists()
