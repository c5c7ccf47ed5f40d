"""What training is fed: adversaries within their budget, views, batches that repeat."""

import dataclasses
import threading

import keras
import numpy as np
import pytest

from vqunet_tf import backend, pixels
from vqunet_tf.config import AttackConfig, ClassifierConfig, Config, TrainingConfig
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.models import DefendedClassifier, VQUNet, classifiers
from vqunet_tf.recipes import preset
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, crafting, fit, selection
from vqunet_tf.training.augment import Augment, Views
from vqunet_tf.training.batches import AdaptiveBatches, ClassifierBatches, EncoderBatches, GrayBoxBatches
from vqunet_tf.training.callbacks import Epochs
from vqunet_tf.training.objectives import GrayBoxObjective


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, size=(40, 8, 8, 1), dtype="uint8")


@pytest.fixture
def guide():
    model = classifiers.build("residual", (8, 8, 1), 4, (4, 8), 1)
    model.trainable = False
    return classifiers.with_features(model, (8, 8, 1))


class TestAdversaries:
    config = AttackConfig(epsilon=0.1, max_steps=3, batch_size=16)

    def test_they_stay_within_the_budget_and_are_the_same_for_the_same_seed(self, guide, images):
        done = []
        crafted = adversaries.craft(guide, images, self.config, seed=1, progress=done.append)
        assert crafted.shape == images.shape and crafted.dtype == np.uint8 and sum(done) == 40
        moved = np.abs(crafted.astype(int) - images.astype(int))
        assert moved.max() <= 0.1 * 255 + 0.5
        assert (moved.reshape(40, -1).max(axis=1) > 0).all()
        np.testing.assert_array_equal(adversaries.craft(guide, images, self.config, seed=1), crafted)
        assert not np.array_equal(adversaries.craft(guide, images, self.config, seed=2), crafted)

    def test_no_radius_no_change(self, guide, images):
        nothing = dataclasses.replace(self.config, epsilon=0.0)
        np.testing.assert_array_equal(adversaries.craft(guide, images, nothing, seed=1), images)

    def test_they_move_the_logits_more_than_noise_of_the_same_size(self, guide, images, rng):
        crafted = adversaries.craft(guide, images, self.config, seed=1)
        noise = np.where(rng.random(images.shape) < 0.5, -1, 1) * (crafted.astype(int) - images)
        noisy = np.clip(images + noise, 0, 255).astype("uint8")
        clean = guide.predict_on_batch(images / 255.0)["logits"]
        distance = [np.abs(guide.predict_on_batch(x / 255.0)["logits"] - clean).mean() for x in (crafted, noisy)]
        assert distance[0] > 1.5 * distance[1]

    @pytest.mark.parametrize("kept", ["targeted", "untargeted", "features"])
    def test_each_aim_climbs_what_it_aims_at(self, kept, guide, images):
        """Alone, each aim moves its own quantity: the predicted class's share, another class's, the features."""
        others = tuple(name for name in ("targeted", "untargeted", "features") if name != kept)
        config = dataclasses.replace(self.config, leave_out=(*others, "single_step"), epsilon=0.2)
        crafted = adversaries.craft(guide, images, config, seed=1)
        before, after = (guide.predict_on_batch(x / 255.0) for x in (images, crafted))
        rows, predicted = np.arange(40), before["logits"].argmax(axis=1)

        def share(found):
            powers = np.exp(found["logits"])
            return powers / powers.sum(axis=1, keepdims=True)

        moved = share(after) - share(before)
        if kept == "untargeted":
            assert moved[rows, predicted].mean() < -0.005
        elif kept == "targeted":
            moved[rows, predicted] = -1.0
            assert moved.max(axis=1).mean() > 0.005
        else:
            rng = np.random.default_rng(0)
            noise = images + np.where(rng.random(images.shape) < 0.5, -1, 1) * (crafted.astype(int) - images)
            noisy = guide.predict_on_batch(np.clip(noise, 0, 255) / 255.0)
            distance = [np.square(found["features"] - before["features"]).mean() for found in (after, noisy)]
            assert distance[0] > 2 * distance[1]

    def test_steps_left_out_are_not_taken(self):
        rng = np.random.default_rng(0)

        def drawn(*left_out, **settings):
            config = AttackConfig(max_steps=4, leave_out=left_out, **settings)
            return {(steps, decay > 0) for steps, decay in (adversaries._steps(config, rng) for _ in range(200))}

        plain, momentum = {(n, False) for n in (2, 3, 4)}, {(n, True) for n in (2, 3, 4)}
        assert drawn() == {(1, False)} | plain | momentum
        assert drawn("single_step") == plain | momentum and drawn("momentum", "iterated") == {(1, False)}
        assert drawn(climbs=(1, 0, 2)) == {(1, False)} | momentum and drawn(climbs=(0, 1, 0)) == plain
        with pytest.raises(UserError, match="attack.climbs: expected a share above 0 that is not left out, got none"):
            AttackConfig(climbs=(0, 1, 0), leave_out=("iterated",))
        with pytest.raises(UserError, match="expected one of single_step, iterated, momentum to be left"):
            AttackConfig(leave_out=("single_step", "iterated", "momentum"))
        with pytest.raises(UserError, match="unknown family of training adversaries 'fgsm': expected one of features"):
            AttackConfig(leave_out=("fgsm",))

    def test_momentum_follows_the_running_mean_of_the_gradients(self, guide, images):
        """Two steps, recomputed: the second takes the sign of `decay` times the first gradient plus its own."""
        clean, decay, alpha = images[:3].astype("float32") / 255.0, np.float32(0.9), np.float32(0.02)
        radius = np.full((3, 1, 1, 1), 0.1, "float32")
        pull, distance = np.eye(4, dtype="float32")[[0, 1, 2]], np.zeros(3, "float32")
        reference = keras.ops.zeros_like(guide(clean)["features"])
        ascend = adversaries.ascent(guide)

        def step(x, velocity, kept):
            return map(np.array, ascend(x, velocity, kept, clean, radius, alpha, pull, distance, reference))

        nothing = np.zeros_like(clean)
        first, velocity = step(clean, nothing, decay)
        _, alone = step(first, nothing, np.float32(0.0))  # the second gradient by itself
        np.testing.assert_allclose(np.abs(alone).mean(axis=(1, 2, 3)), 1.0, rtol=1e-4)
        second, kept = step(first, velocity, decay)
        np.testing.assert_allclose(kept, 0.9 * velocity + alone, rtol=1e-4, atol=1e-4)
        expected = np.clip(np.clip(first + alpha * np.sign(kept), clean - 0.1, clean + 0.1), 0.0, 1.0)
        np.testing.assert_allclose(second, expected, atol=1e-6)
        assert np.any(np.sign(kept) != np.sign(alone))

    def test_pgd_for_validation_lowers_the_true_class_and_raises_another(self, guide, images):
        labels = guide.predict_on_batch(images / 255.0)["logits"].argmax(axis=1)
        for targeted in (False, True):
            crafted = adversaries.pgd(guide, images, labels, 0.3, 5, targeted, seed=0, batch_size=16)
            assert np.abs(crafted.astype(int) - images).max() <= 0.3 * 255 + 0.5
            found = guide.predict_on_batch(crafted / 255.0)["logits"].argmax(axis=1)
            assert np.mean(found == labels) < 0.7

    @pytest.mark.parametrize("first", [False, True])
    def test_an_image_may_stay_at_the_first_step_that_fools(self, first):
        """A victim that is wrong in a narrow band of grey only: the second of five steps lies in it, the last beyond."""

        def guide(x):
            grey = keras.ops.mean(x, axis=(1, 2, 3))
            wrong = keras.ops.stop_gradient(keras.ops.cast((grey > 0.565) & (grey < 0.59), "float32"))
            logits = keras.ops.stack([2.0 - grey - 3.0 * wrong, grey - 1.0], axis=-1)
            return {"logits": logits, "features": logits}

        images, labels = np.full((3, 8, 8, 1), 128, "uint8"), np.zeros(3, "int64")
        crafted = adversaries.pgd(guide, images, labels, 0.1, 5, False, seed=0, batch_size=2, first=first)
        right = np.asarray(guide(pixels.to_unit(crafted))["logits"]).argmax(axis=1) == 0
        np.testing.assert_array_equal(right, not first)


class TestAnswers:
    def make(self, images, guide, folder, stop=lambda: None):
        config = Config(attack=AttackConfig(batch_size=16, copies=2))
        return crafting.Crafting(config, RunFolder(folder), images, lambda: guide, stop)

    def test_the_classifier_is_asked_about_every_view(self, guide, images, tmp_path, monkeypatch):
        views = Views(images, 2, 2, True, seed=3)
        make = self.make(images, guide, tmp_path)
        answers = make.answers(views)
        batches = GrayBoxBatches(
            views, np.stack([images] * 2), TrainingConfig(batch_size=8), AttackConfig(), answers=answers
        )
        inputs = batches[3]
        for name, expected in guide.predict_on_batch(pixels.to_unit(inputs["clean"])).items():
            np.testing.assert_allclose(inputs[name], expected, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(crafting, "_MOST_ANSWERS", 2 * 40 * 4 * (4 + 8) - 1)
        few = make.answers(views)
        assert set(few) == {"logits"}
        np.testing.assert_array_equal(few["logits"], answers["logits"])
        monkeypatch.setattr(crafting, "_MOST_ANSWERS", 2 * 40 * 4 * 4 - 1)
        assert make.answers(views) is None

    def test_logits_alone_are_not_enough_to_guide_by(self, guide, images):
        """Features are then asked for at every step, and logits with them."""
        objective = GrayBoxObjective(
            VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1), guide, TrainingConfig()
        )
        inputs = {"seen": images[:4], "clean": images[4:8]}
        outputs = objective(inputs)
        said = guide(pixels.to_unit(images[4:8]))
        expected = float(objective.compute_loss({**inputs, **said}, None, outputs))
        wrong = {**inputs, "logits": np.zeros((4, 4), "float32")}
        assert float(objective.compute_loss(wrong, None, outputs)) == pytest.approx(expected, rel=1e-5)

    def test_it_stops_when_it_is_asked_to(self, guide, images, tmp_path):
        with pytest.raises(Interrupted):
            self.make(images, guide, tmp_path, stop=lambda: "SIGTERM").answers(Views(images, 2, 2, True, seed=3))


def test_the_attacks_that_choose_an_epoch(guide, images):
    """`worst` adds one step of the whole radius along the gradient, from the image itself."""
    labels = np.arange(40) % 4
    attacks = selection.fixed(guide, images, labels, 0.1, 3, 0, "worst")
    assert list(attacks) == ["untargeted", "targeted", "single_step"]
    assert list(selection.fixed(guide, images, labels, 0.1, 3, 0, "best")) == ["untargeted", "targeted"]
    once = attacks["single_step"]()
    assert once is attacks["single_step"]()  # crafted once
    moved = once.astype(int) - images
    inside = (images > 26) & (images < 229)
    assert set(np.unique(np.abs(moved[inside]))) <= {0, 25, 26} and np.mean(moved[inside] == 0) < 0.05


def test_an_adaptive_choice_looks_through_soft_codes_too(guide, images):
    classifier = keras.Model(guide.inputs, guide.outputs[0] if guide.outputs[0].shape[-1] == 4 else guide.outputs[1])
    purifier = VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1)
    purifier.graph(pixels.to_unit(images), training=True)  # places the codes
    chain = DefendedClassifier(purifier, classifier)
    attacks = selection.renewed(chain, images, np.arange(40) % 4, 0.1, 3, 0, "worst")
    assert list(attacks) == ["untargeted", "targeted", "soft"]
    assert list(selection.renewed(chain, images, np.arange(40) % 4, 0.1, 3, 0, "best")) == ["untargeted", "targeted"]
    untargeted, soft = attacks["untargeted"](), attacks["soft"]()
    assert (untargeted != soft).any() and {layer.gradient for layer in purifier.quantizers} == {"straight_through"}
    purifier.set_gradient("soft")
    np.testing.assert_array_equal(attacks["untargeted"](), soft)  # the same attack, but for what passes the quantizers


class TestViews:
    def test_a_view_is_a_crop_of_the_mirrored_border(self, images, rng):
        augment = Augment(images, max_shift=2, flip=True)
        chosen = np.arange(40)
        shown = augment(chosen, augment.draw(rng, 40))
        padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="symmetric")
        for image, source in zip(shown, chosen, strict=True):
            crops = [padded[source, t : t + 8, s : s + 8] for t in range(5) for s in range(5)]
            assert any(np.array_equal(image, c) or np.array_equal(image, c[:, ::-1]) for c in crops)

    def test_the_first_copy_is_the_image_and_the_others_are_always_the_same(self, images):
        views = Views(images, copies=3, max_shift=2, flip=True, seed=7)
        everything = np.arange(40)
        np.testing.assert_array_equal(views(np.zeros(40, int), everything), images)
        second = views(np.ones(40, int), everything)
        assert np.mean([np.array_equal(a, b) for a, b in zip(second, images, strict=True)]) < 0.2
        again = Views(images, copies=3, max_shift=2, flip=True, seed=7)
        np.testing.assert_array_equal(again(np.ones(5, int), everything[10:15]), second[10:15])


def gray_box(images, crafted, **settings):
    views = Views(images, len(crafted), 0, False, 0)
    return GrayBoxBatches(views, crafted, TrainingConfig(batch_size=20, **settings), AttackConfig(epsilon=0.1))


class TestBatches:
    def test_cutout_covers_one_square_with_the_mean_colour(self, images):
        config = ClassifierConfig(batch_size=40, max_shift=0, cutout=3)
        batches = ClassifierBatches(images, np.arange(40), config, seed=3)
        shown, labels = batches[0]
        places = set()
        for image, source in zip(shown, images[labels], strict=True):
            covered = np.argwhere((image != source).any(axis=-1))
            top, left = covered.min(axis=0)
            assert (covered.max(axis=0) - (top, left) < 3).all() and len(covered) > 4
            where = np.argwhere((image == round(images.mean())).all(axis=-1))
            assert {tuple(place) for place in covered} <= {tuple(place) for place in where}
            places.add((top, left))
        assert len(places) > 10
        np.testing.assert_array_equal(shown, batches[0][0])  # the same for the same seed and step
        np.testing.assert_array_equal(batches.augment.padded, images)  # the data set itself is not covered

    def test_every_image_comes_once_an_epoch_in_an_order_of_the_epoch(self, images):
        labels = np.arange(40)
        batches = ClassifierBatches(images, labels, ClassifierConfig(batch_size=10, max_shift=0), seed=3)
        first = np.concatenate([batches[i][1] for i in range(len(batches))])
        assert sorted(first) == list(range(40))
        batches.start(1)
        second = np.concatenate([batches[i][1] for i in range(len(batches))])
        assert not np.array_equal(first, second)
        batches.start(0)
        np.testing.assert_array_equal(np.concatenate([batches[i][1] for i in range(4)]), first)
        np.testing.assert_array_equal(batches[0][0], images[first[:10]])  # no shift, no flip: the images themselves

    def test_an_epoch_begun_in_the_middle_goes_on_with_the_same_batches(self, images):
        batches = ClassifierBatches(images, np.arange(40), ClassifierConfig(batch_size=10, flip=True), seed=3)
        batches.start(2)
        whole = [batches[i] for i in range(len(batches))]
        batches.start(2, first=3)
        assert len(batches) == 1
        for part, expected in zip(batches[0], whole[3], strict=True):
            np.testing.assert_array_equal(part, expected)

    @pytest.mark.parametrize("kind", ["clean", "noisy", "adversarial"])
    def test_each_share_gives_its_kind_of_image(self, kind, images):
        shares = {"clean": 0.0, "noisy": 0.0, "adversarial": 0.0, kind: 1.0}
        batches = gray_box(images, np.stack([images // 2, images // 3]), **shares)
        inputs = batches[0]
        np.testing.assert_array_equal(inputs["seen"], batches[0]["seen"])
        same = [np.array_equal(seen, clean) for seen, clean in zip(inputs["seen"], inputs["clean"], strict=True)]
        if kind == "clean":
            assert all(same)
        elif kind == "adversarial":
            halves = [np.array_equal(s, c // 2) for s, c in zip(inputs["seen"], inputs["clean"], strict=True)]
            thirds = [np.array_equal(s, c // 3) for s, c in zip(inputs["seen"], inputs["clean"], strict=True)]
            assert all(h or t for h, t in zip(halves, thirds, strict=True)) and any(halves) and any(thirds)
        else:
            assert np.mean(same) < 0.2  # a radius below half a grey level changes nothing

    def test_an_adversary_comes_with_the_view_it_was_made_of(self, images):
        views = Views(images, 2, 2, True, 0)
        shown = np.stack([views(np.full(40, i), np.arange(40)) for i in (0, 1)])
        settings = TrainingConfig(batch_size=40, clean=0, noisy=0, adversarial=1)
        inputs = GrayBoxBatches(views, 255 - shown, settings, AttackConfig())[0]
        np.testing.assert_array_equal(inputs["seen"], 255 - inputs["clean"])

    def test_an_encoder_sees_what_the_purifier_will_moved_once_more(self, images):
        """Each image as the purifier is shown it, with its label, as any of 25 crops of the mirrored border, or that mirrored."""
        views = Views(images, 2, 2, True, 0)
        shown = np.stack([255 - views(np.full(40, i), np.arange(40)) for i in (0, 1)])
        settings = TrainingConfig(batch_size=40, max_shift=2, flip=True, pixel_weight=2.0, final_pixel_weight=1.0)
        whole = GrayBoxBatches(views, shown, settings, AttackConfig(), labels=np.arange(40))
        batches = EncoderBatches(whole, settings)
        assert len(batches) == len(whole) == 1
        found, expected = batches[0], whole[0]
        assert set(found) == {"seen", "label"} and set(expected) == {
            "seen",
            "clean",
            "label",
            "attacked",
            "pixel_weight",
        }
        np.testing.assert_array_equal(found["label"], expected["label"])
        assert sorted(found["label"]) == list(range(40))
        padded = np.pad(expected["seen"], [(0, 0), (2, 2), (2, 2), (0, 0)], mode="symmetric")
        for image, source in zip(found["seen"], padded, strict=True):
            crops = [source[t : t + 8, s : s + 8] for t in range(5) for s in range(5)]
            assert any(np.array_equal(image, c) or np.array_equal(image, c[:, ::-1]) for c in crops)
        assert np.mean([np.array_equal(a, b) for a, b in zip(found["seen"], expected["seen"], strict=True)]) < 0.3
        np.testing.assert_array_equal(found["seen"], batches[0]["seen"])  # the same for the same seed and step
        still = EncoderBatches(whole, dataclasses.replace(settings, max_shift=0, flip=False))
        np.testing.assert_array_equal(still[0]["seen"], expected["seen"])

    def test_the_weight_of_the_pixels_fades_by_equal_factors(self, images):
        """Two batches an epoch, four epochs, half of the eight steps: from 16 to 1 in four steps, then it stays."""
        settings = {"epochs": 4, "pixel_weight": 16.0, "final_pixel_weight": 1.0, "pixel_fade": 0.5}
        batches, seen = gray_box(images, images[None], **settings), []
        for epoch in range(4):
            batches.start(epoch)
            seen += [batches[i]["pixel_weight"] for i in range(2)]
        assert {weights.shape for weights in seen} == {(20,)}
        np.testing.assert_allclose([weights.max() for weights in seen], [16, 8, 4, 2, 1, 1, 1, 1], rtol=1e-6)
        batches.start(1, first=1)
        assert float(batches[0]["pixel_weight"].min()) == pytest.approx(2.0)
        assert "pixel_weight" not in gray_box(images, images[None])[0]
        with pytest.raises(UserError, match="final_pixel_weight: expected it and pixel_weight above 0, got 0 and 16"):
            TrainingConfig(pixel_weight=16.0, final_pixel_weight=0.0)

    def test_an_attack_in_the_loop_begins_within_its_radius(self, images):
        """Half of the radii are below loop_epsilon / sqrt 2; what is seen stays as it is without it."""
        plain, looped = (gray_box(images, images[None] // 2, loop_epsilon=radius) for radius in (0.0, 0.1))
        radii = []
        for epoch in range(50):
            for batches in (plain, looped):
                batches.start(epoch)
            inputs = looped[1]
            np.testing.assert_array_equal(inputs["seen"], plain[1]["seen"])
            assert inputs["start"].dtype == inputs["epsilon"].dtype == np.float32
            assert (np.abs(inputs["start"]) <= inputs["epsilon"]).all()
            assert (np.abs(inputs["start"]).max(axis=(1, 2, 3)) > 0.8 * inputs["epsilon"][:, 0, 0, 0]).all()
            radii += list(inputs["epsilon"].ravel())
        assert max(radii) <= 0.1 and np.mean(np.array(radii) < 0.1 / np.sqrt(2)) == pytest.approx(0.5, abs=0.06)
        assert set(inputs) - set(plain[1]) == {"epsilon", "start"}

    def test_the_radius_grows_step_by_step(self, images):
        """Two batches an epoch, four epochs, a warm-up of half of the eight steps: a quarter more each step."""
        settings = TrainingConfig(batch_size=20, epochs=4, epsilon_warmup=0.5)
        batches = AdaptiveBatches(images, np.arange(40) % 4, settings, AttackConfig(epsilon=0.2))
        seen = []
        for epoch in range(4):
            batches.start(epoch)
            for i in range(2):
                batch = batches[i]
                seen.append(float(batch["epsilon"].max()))
                assert np.abs(batch["start"]).max() <= seen[-1] and batch["label"].dtype == np.int32
                np.testing.assert_array_equal(batch["clean"], images[batches.order[20 * i : 20 * i + 20]])
        np.testing.assert_allclose(seen, [0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
        batches.start(1, first=1)
        assert float(batches[0]["epsilon"].max()) == pytest.approx(0.2)

    @pytest.mark.parametrize("tensorflow", [True, False], ids=["tf.data", "threads"])
    def test_fit_sees_every_batch_of_each_epoch_in_order(self, images, monkeypatch, tensorflow):
        monkeypatch.setattr(backend, "is_tensorflow", lambda: tensorflow)
        batches = ClassifierBatches(images, np.arange(40), ClassifierConfig(batch_size=2, flip=True), seed=3)
        seen = []

        class Seeing(keras.Model):
            def train_step(self, data):
                seen.append(np.array(data[1]))
                return {"loss": keras.ops.zeros(())}

        model = Seeing()
        model.compile(run_eagerly=True)
        for epoch, first in ((0, 0), (1, 5)):
            seen.clear()
            batches.start(epoch, first)
            model.fit(
                backend.feed(batches),
                epochs=2,
                verbose=0,
                shuffle=False,
                callbacks=[Epochs(batches)],
                initial_epoch=epoch,
            )
            expected = [batches.order[2 * i : 2 * i + 2] for i in range(first, 20)]
            np.testing.assert_array_equal(seen[-len(expected) :], expected)
            assert len(seen) == (40 if epoch == 0 else 15)

    def test_other_backends_get_batches_that_were_made_ahead(self, images, monkeypatch):
        """In threads; what goes wrong in there comes out of the batch that was asked for."""
        monkeypatch.setattr(backend, "is_tensorflow", lambda: False)
        asked, known = [], {threading.get_ident()}

        class Failing(ClassifierBatches):
            def __getitem__(self, index):
                asked.append((index, threading.get_ident() in known))
                if index == 5:
                    raise OSError("no sixth batch")
                return super().__getitem__(index)

        batches = Failing(images, np.arange(40), ClassifierConfig(batch_size=5), seed=3)
        fed = backend.feed(batches)
        assert len(fed) == 8
        np.testing.assert_array_equal(fed[0][1], batches.order[:5])
        np.testing.assert_array_equal(fed[1][1], batches.order[5:10])
        assert set(fed.made) == {2, 3, 4} and not any(here for _, here in asked)
        batches.start(1)
        np.testing.assert_array_equal(fed[0][1], batches.order[:5])
        with pytest.raises(OSError, match="no sixth batch"):
            [fed[i] for i in range(8)]

    def test_every_stage_is_fed_so(self, tmp_path, monkeypatch):
        fed, feed = [], backend.feed
        monkeypatch.setattr(backend, "feed", lambda batches: fed.append(type(batches)) or feed(batches))
        smoke = preset("smoke", "digits").replace(
            {"data.limit": 64, "training.batch_size": 32, "attack.batch_size": 64}
        )
        fit.train(smoke, RunFolder(tmp_path / "run"), say=lambda line: None)
        assert fed == [ClassifierBatches, GrayBoxBatches]

    def test_an_epoch_ends_without_waiting_for_the_tuning_of_tf_data(self, images):
        """A thread of it sleeps for up to a minute, longer after longer epochs; an epoch of milliseconds cannot show it."""
        batches = ClassifierBatches(images, np.arange(40), ClassifierConfig(batch_size=10), seed=3)
        assert backend.feed(batches).options().autotune.enabled is False

    def test_batches_are_whole_shards(self, images):
        batches = ClassifierBatches(images, np.arange(40), ClassifierConfig(batch_size=16), seed=0, replicas=3)
        assert batches.batch_size == 15 and len(batches) == 2
        with pytest.raises(UserError, match="at least 3 images a batch"):
            ClassifierBatches(images[:2], np.arange(2), ClassifierConfig(batch_size=16), seed=0, replicas=3)
