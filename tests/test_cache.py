"""What is kept: an evaluation goes on where it stopped, and never with what belongs to another model."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from vqunet_tf import VQUNet
from vqunet_tf.attacks import FGSM, PGD
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import bench, cache, evaluate, suites
from vqunet_tf.evaluation.cache import Cache
from vqunet_tf.evaluation.suites import Plan, Suite
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.threat import Threat

SHAPE, CLASSES, N = (8, 8, 1), 3, 40
ATTACKS = [FGSM(threat=Threat("linf", 0.1)), PGD(threat=Threat("linf", 0.1), steps=3)]
VARIANTS = ("straight_through", "unquantized")
PLAN = Plan(ATTACKS, ATTACKS, suite=Suite(variants={"pgd": VARIANTS}))  # type: ignore[arg-type]


def _classifier(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(inputs)), name="linear")


def _purifier(seed: int) -> VQUNet:
    keras.utils.set_random_seed(seed)
    return VQUNet(widths=(4,), num_embeddings=8, embedding_dim=2, stem=1, channels=1, name="purifier")


@pytest.fixture(scope="module")
def models():
    return _classifier(0), _purifier(0)


@pytest.fixture(scope="module")
def data(models):
    rng = np.random.default_rng(0)
    images = rng.uniform(0.2, 0.8, (N, *SHAPE)).astype(np.float32)
    labels = models[0].predict(models[1].predict(images, verbose=0), verbose=0).argmax(axis=1)
    return images, np.where(np.arange(N) % 5, labels, (labels + 1) % CLASSES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of a few images, and no probes: they are measured elsewhere, and keep nothing."""
    monkeypatch.setattr(bench, "CHUNK", 16)
    monkeypatch.setattr("vqunet_tf.evaluation.probes.run", lambda *arguments: [])


@pytest.fixture
def attacked(monkeypatch):
    """What was really crafted: how many images, by attack and victim."""
    found: list[tuple[str, int]] = []
    real = bench.Bench._attack

    def spy(self, attack, target, part, start, words, work):
        found.append((words, part.stop - part.start))
        return real(self, attack, target, part, start, words, work)

    monkeypatch.setattr(bench.Bench, "_attack", spy)
    return found


def _evaluate(models, data, folder=None, fresh=False, plan=PLAN, **options):
    classifier, purifier = models
    kept = None if folder is None else Cache(folder, fresh)
    return evaluate(classifier, purifier, *data, attacks=plan, batch_size=8, keep=2, cache=kept, **options)


def _numbers(evaluation):
    return [{**row, "seconds": 0} for row in evaluation.rows]


@pytest.fixture(scope="module")
def wanted(models, data):
    """The rows without any cache, in the same chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CHUNK", 16)
        patch.setattr("vqunet_tf.evaluation.probes.run", lambda *arguments: [])
        return _numbers(_evaluate(models, data))


def test_rows_recomputed_from_what_is_kept_equal_the_report(models, data, wanted, tmp_path):
    assert _numbers(_evaluate(models, data, tmp_path)) == wanted
    (classifier, purifier), (images, labels) = models, data
    defended = {"none": classifier, "vqunet": keras.Sequential([purifier, classifier])}
    right: dict[tuple[str, str, str], np.ndarray] = {}
    for path in tmp_path.glob("*/[0-9a-f]*.npz"):
        with np.load(path) as file:
            start, made = int(file["start"]), file["images"]
            assert "epsilon=0.1" in str(file["attack"]) and made.dtype == np.float32
            victim, name, variant = path.parent.name.partition("-")[0], str(file["name"]), str(file["variant"])
        assert np.abs(made - images[start : start + len(made)]).max() <= 0.1 + 1e-6
        for defense in ("vqunet",) if victim == "vqunet" else defended:
            key = (defense, "white_box" if victim == "vqunet" else "gray_box", name)
            answers = defended[defense].predict(made, verbose=0).argmax(axis=1)
            seen = right.setdefault(key, np.ones(N, bool))
            seen[start : start + len(made)] &= answers == labels[start : start + len(made)]  # variants: the minimum
            assert variant in (VARIANTS if victim == "vqunet" else ("",))
    assert len(right) == 2 * 3  # fgsm and pgd on none, and both ways on vqunet
    for (defense, model, name), seen in right.items():
        keys = {"defense": defense, "threat_model": model, "attack": name}
        (row,) = [row for row in wanted if keys.items() <= row.items()]
        assert row["accuracy"] == seen.mean()
    (white,) = [r for r in wanted if (r["attack"], r["threat_model"]) == ("pgd", "white_box")]
    assert set(white["variants"]) == set(VARIANTS)
    assert white["accuracy"] <= min(white["variants"].values())


def test_the_same_again_crafts_nothing(models, data, wanted, tmp_path, attacked):
    _evaluate(models, data, tmp_path)
    assert sum(count for _, count in attacked) == N * (2 + 3)  # gray: two attacks; white: pgd with two gradients
    attacked.clear()
    seen = []
    again = _evaluate(models, data, tmp_path, progress=lambda *state: seen.append(state))
    assert (_numbers(again), attacked) == (wanted, [])
    assert again.seconds > 0
    assert seen[-1][1] == seen[-1][2]
    for outcome, first in zip(again.outcomes, _evaluate(models, data).outcomes, strict=True):
        np.testing.assert_array_equal(outcome.adversarial, first.adversarial)
    assert sum(count for _, count in attacked) == N * 5  # without a cache
    attacked.clear()
    assert _numbers(_evaluate(models, data, tmp_path, fresh=True)) == wanted
    assert sum(count for _, count in attacked) == N * 5


def test_another_surrogate_under_the_same_name_is_asked_anew(models, data, tmp_path):
    def left(surrogate, folder):
        plan = suites.build("adaptive", ["transfer"], [Threat("linf", 0.3)], steps=3)
        found = _evaluate(models, data, folder, plan=plan, surrogates={"other": Chain(surrogate)})
        return {row["defense"]: row["accuracy"] for row in found.rows if row["attack"] == "transfer"}

    first, second = _classifier(7), models[0]
    wanted = [left(each, None) for each in (first, second)]
    assert wanted[0] != wanted[1]
    assert [left(each, tmp_path) for each in (first, second, second)] == [*wanted, wanted[1]]


def test_an_interrupted_evaluation_goes_on_in_the_middle_of_an_attack(models, data, wanted, tmp_path, attacked):
    def stop(running, done, total):
        if "unquantized" in running and done > at:
            raise KeyboardInterrupt

    work = []
    _evaluate(models, data, progress=lambda running, done, total: work.append((running, done)))
    at = next(done for running, done in work if "unquantized" in running) + 3 * 16  # 8 images, then two batches
    attacked.clear()
    with pytest.raises(KeyboardInterrupt):
        _evaluate(models, data, tmp_path, progress=stop)
    attacked.clear()
    assert _numbers(_evaluate(models, data, tmp_path)) == wanted
    assert attacked == [("white-box vqunet unquantized pgd 0.1", 16), ("white-box vqunet unquantized pgd 0.1", 8)]
    assert not list(tmp_path.glob("**/.*"))  # nothing half-written


def test_a_changed_model_invalidates_its_own_and_no_more(models, data, tmp_path, attacked):
    _evaluate(models, data, tmp_path)
    victims = {path.name.partition("-")[0]: path for path in tmp_path.iterdir()}
    other = models[0], _purifier(1)
    attacked.clear()
    found = _numbers(_evaluate(other, data, tmp_path))
    assert {words.partition(" ")[0] for words, _ in attacked} == {"white-box"}  # the classifier is the same
    assert found == _numbers(_evaluate(other, data))
    assert victims["none"].exists() and not victims["vqunet"].exists()  # of what is gone nothing is kept
    attacked.clear()
    third = _classifier(2), other[1]
    assert _numbers(_evaluate(third, data, tmp_path)) == _numbers(_evaluate(third, data))
    assert len({words.partition(" ")[0] for words, _ in attacked}) == 2


def test_other_settings_images_and_seeds_are_other_entries(models, data, tmp_path, attacked):
    images, labels = data
    _evaluate(models, data, tmp_path)
    longer = Plan(ATTACKS[:1], (), suite=Suite())  # type: ignore[arg-type]
    for options in ({"seed": 1}, {}):
        attacked.clear()
        _evaluate(models, data, tmp_path, plan=longer, threat_models=["gray_box"], **options)
        assert bool(attacked) == bool(options)
    attacked.clear()
    _evaluate(models, (images[:32], labels[:32]), tmp_path)
    assert attacked == []  # whole chunks of the same images
    _evaluate(models, (images[:20], labels[:20]), tmp_path, plan=longer, threat_models=["gray_box"])
    assert attacked == [("gray-box fgsm 0.1", 4)]
    _evaluate(models, (images[:16], (labels[:16] + 1) % CLASSES), tmp_path, plan=longer, threat_models=["gray_box"])
    assert attacked[1:] == [("gray-box fgsm 0.1", 16)]


def test_a_damaged_file_is_made_again(models, data, wanted, tmp_path, attacked):
    _evaluate(models, data, tmp_path)
    files = sorted(tmp_path.glob("*/*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"no archive")
    attacked.clear()
    assert _numbers(_evaluate(models, data, tmp_path)) == wanted
    assert all(np.load(path) for path in files)


def test_arrays_come_back_as_they_were(tmp_path, rng):
    kept = Cache(tmp_path)
    images = rng.normal(size=(3, 4, 4, 1)).astype(np.float32)
    assert kept.load("none-0", "a") is None
    kept.save("none-0", "a", {"images": images, "seconds": 1.5, "name": "pgd"})
    found = kept.load("none-0", "a")
    np.testing.assert_array_equal(found["images"], images)
    assert (float(found["seconds"]), str(found["name"])) == (1.5, "pgd")
    assert Cache(tmp_path, fresh=True).load("none-0", "a") is None
    assert cache.key(1, images) != cache.key(1, images.astype(np.float64)) != cache.key("1", images)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Cache(tmp_path / "file").save("none-0", "a", {})


def test_only_ones_own_folders_are_pruned(tmp_path):
    old, new = "a" * 64, "b" * 64
    names = [cache.place("vqunet", old), cache.place("vqunet", new), cache.place("none", old), "vqunet-notes", "vqunet"]
    for name in names:
        (tmp_path / name).mkdir()
    Cache(tmp_path).prune({"vqunet": new})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_rows_do_not_depend_on_how_many_images_there_are(models, data):
    """An image draws from a generator of its own, chunk by chunk: the first of many are those of few."""
    images, labels = data
    plan = Plan(ATTACKS, (), suite=Suite())  # type: ignore[arg-type]
    many = _evaluate(models, data, plan=plan)
    few = _evaluate(models, (images[:24], labels[:24]), plan=plan)
    for one, other in zip(many.outcomes, few.outcomes, strict=True):
        np.testing.assert_array_equal(one.correct[:24], other.correct)


def test_no_attack_is_given_more_than_a_chunk(models, data, attacked):
    _evaluate(models, data)
    assert max(count for _, count in attacked) == 16


def test_a_radius_of_zero_is_clean_accuracy_exactly(models, data):
    plan = suites.build("quick", ["fgsm", "pgd", "pgd_targeted", "mim"], [Threat("linf", 0.0)], steps=2)
    found = _evaluate(models, data, plan=plan)
    clean = {row["defense"]: row["accuracy"] for row in found.rows if row["attack"] == "none"}
    attacked = [row for row in found.rows if row["attack"] != "none"]
    assert len(attacked) == 3 * 5 and {row["epsilon"] for row in attacked} == {0.0}
    assert all(row["accuracy"] == clean[row["defense"]] for row in attacked)
    assert clean["vqunet"] == 0.8
