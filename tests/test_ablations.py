"""The benchmark of the ablations: its table is that of its runs, and what is done is not done again."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from benchmarks import ablation_table, ablations
from vqunet_tf import VQUNet, data
from vqunet_tf.config import FAMILIES
from vqunet_tf.errors import UserError
from vqunet_tf.models import DefendedClassifier, classifiers
from vqunet_tf.recipes import preset
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, fit


def test_the_table_is_that_of_the_runs_and_nothing_is_trained_twice(tmp_path, capsys, monkeypatch):
    root, results = tmp_path / "runs", tmp_path / "results"
    flags = ["--dataset=digits", "--preset=smoke", "--seeds=0,1", "--variants=levels_1", "--limit=64", "--epochs=1"]
    flags += ["--num_examples=48", "--steps=2", f"--run_dir={root}", f"--output_dir={results}"]
    flags += ["--set=training.batch_size=32", "--set=attack.batch_size=64"]
    made, craft = [], adversaries.craft
    monkeypatch.setattr(adversaries, "craft", lambda *given: made.append(given[3]) or craft(*given))
    ablations.main(flags)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["variant"], row["seed"]) for row in printed] == [
        (name, seed) for seed in (0, 1) for name in ("base", "levels_1")
    ]
    # Of each seed: for training once by the base and once for all others, for measuring each family once.
    assert sorted(made) == sorted(
        each for seed in (0, 1) for each in [(seed, 0, 0)] * 2 + [(seed, 1, i) for i in range(len(FAMILIES))]
    )

    table = json.loads((results / "ablations.json").read_text())
    assert table["n"] == 48 and [row["variant"] for row in table["rows"]] == ["base", "levels_1"]
    held_out = data.load(preset("smoke", "digits").data, "validation")
    images, labels = held_out.images[:48], held_out.labels[:48]
    for row in table["rows"]:
        own = [line for line in printed if line["variant"] == row["variant"]]
        for kind, found in row["accuracy"].items():
            values = [line[kind] for line in own]
            assert found["values"] == values and found["mean"] == pytest.approx(np.mean(values))
            assert found["std"] == pytest.approx(np.std(values, ddof=1))
        for seed, clean in zip((0, 1), row["accuracy"]["clean"]["values"], strict=True):
            run = RunFolder(root / f"seed_{seed}" / row["variant"])
            assert (run.load_config().data.limit, run.load_config().training.seed) == (64, seed)
            defended = DefendedClassifier(run.load_purifier(), run.load_classifier())
            assert np.mean(classifiers.logits_of(defended, images).argmax(axis=1) == labels) == pytest.approx(clean)
    kept = {path.parent: path.read_bytes() for path in root.glob("seed_*/*/classifier.keras")}
    assert len(kept) == 4 and len(set(kept.values())) == 2  # one for each seed
    levels = {name: len(RunFolder(root / "seed_0" / name).load_purifier().quantizers) for name in ("base", "levels_1")}
    assert levels == {"base": 2, "levels_1": 1}
    assert not list(root.glob("seed_*/adversaries")) and not list(root.glob("seed_*/*/checkpoints"))

    shown, before = (results / "ablations.md").read_text(), (results / "ablations.json").read_text()
    clean = table["rows"][1]["accuracy"]["clean"]
    assert f"| the bottleneck, no skip connections | {100 * clean['mean']:.1f} ± {100 * clean['std']:.1f} |" in shown

    def never(*given):
        raise AssertionError("trained or crafted again")

    monkeypatch.setattr(fit, "train", never)
    monkeypatch.setattr(adversaries, "craft", never)
    monkeypatch.setattr(adversaries, "pgd", never)
    ablations.main(flags)
    assert (results / "ablations.json").read_text() == before
    with pytest.raises(UserError, match="training.batch_size is 32 there, 16 here"):
        ablations.main([*flags, "--set=training.batch_size=16"])


def test_every_variant_changes_one_thing_that_can_be_trained(tmp_path, rng):
    sizes = {"purifier.widths": (4, 4, 4), "purifier.num_embeddings": (512,), "purifier.embedding_dim": (2,)}
    config = preset("smoke", "digits").replace(sizes)
    found = {variant.name: variant for variant in ablations.variants(config)}
    assert {"codes_64", "codes_128", "codes_2048", "rotation", "gradient_codebook", "no_guidance"} <= set(found)
    assert "codes_512" not in found and {f"without_{family}" for family in FAMILIES} <= set(found)
    assert {variant.group for variant in found.values()} == {"", *ablation_table.GROUPS}
    for name, variant in found.items():
        assert (config.replace(variant.changes) == config) == (name == "base"), name
    images = rng.random((4, 16, 16, 1), dtype="float32")
    quantizers = {"base": 3, "levels_2": 2, "levels_1": 1, "gradient_codebook": 3}
    skips = {"unquantized_3": 0, "unquantized_2": 1, "unquantized_1": 2}
    assert {name: found[name].changes["purifier.finest_skip"] for name in skips} == skips and "levels_3" not in found
    quantizers |= dict.fromkeys(skips, 0)
    for name, count in quantizers.items():
        settings = config.replace(found[name].changes).purifier
        model = VQUNet(**dataclasses.asdict(settings), channels=1)
        assert len(model.quantizers) == count, name
        if name in ("levels_2", "gradient_codebook"):
            model.graph(images, training=True)
            model.save(tmp_path / f"{name}.keras")
            loaded = keras.models.load_model(tmp_path / f"{name}.keras")
            assert {quantizer.codebook_kind for quantizer in loaded.quantizers} == {settings.codebook}
            np.testing.assert_allclose(loaded.purify(images), model.purify(images), atol=1e-6)


def test_levels_that_are_left_out_reach_the_decoder_no_more(rng):
    """The purified image follows from the codes that remain: nothing of level 0 passes by them."""
    model = VQUNet((4, 6, 8), num_embeddings=4, embedding_dim=2, channels=1, finest_skip=1)
    assert set(model.codes(np.zeros((16, 16, 1), "uint8"))) == {"level_1", "level_2"}
    assert not any("codes_0" in layer.name for layer in model.graph.layers)
    with pytest.raises(ValueError, match="finest_skip from 0 to 2. Received: 3"):
        VQUNet((4, 6, 8), channels=1, finest_skip=3)


def test_one_seed_has_no_deviation_and_what_was_left_out_is_marked():
    row = {"what": "without targeted", "changes": {"attack.leave_out": ("targeted",)}}
    accuracy = {"family_targeted": {"mean": 0.5, "std": None}, "clean": {"mean": 0.875, "std": 0.0125}}
    columns = {"clean": "clean", "family_targeted": "targeted"}
    lines = ablation_table._table([{**row, "accuracy": accuracy}], columns)
    assert lines[-1] == "| without targeted | 87.5 ± 1.2 | **50.0** |"
