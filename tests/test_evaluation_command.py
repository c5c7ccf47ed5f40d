"""`trainers.evaluate`: the report lies where it was told, and what cannot be measured is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from fragile import Rounding

from trainers import evaluate as command
from vqunet_tf import data, runs
from vqunet_tf.config import Config, DataConfig, EvaluationConfig
from vqunet_tf.evaluation import markdown
from vqunet_tf.models import VQUNet


@pytest.fixture
def run_folder(tmp_path):
    """A run on the digits with an untrained linear classifier: what is measured does not matter here."""
    config = Config(
        data=DataConfig(dataset="digits"),
        evaluation=EvaluationConfig(epsilons=(0.1, 0.2), pgd_steps=2, num_examples=8, batch_size=8),
    )
    run = runs.RunFolder(tmp_path / "run")
    run.create(config)
    shape = (32, 32, 1)
    keras.utils.set_random_seed(0)
    layers = [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(10)]
    runs.save_model(keras.Sequential(layers), run.classifier)
    runs.save_model(keras.Sequential([keras.Input(shape), Rounding(4)]), run.purifier)
    return run


def _main(*flags: str) -> None:
    command.console(["evaluate", *flags])


def test_the_command_writes_the_report_where_it_is_told(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    _main(f"--run_dir={run_folder.path}", "--epsilons=8/255,0.2", "--attacks=fgsm,pgd", f"--output_dir={out}")
    found = json.loads((out / "report.json").read_text())
    assert {row["epsilon"] for row in found["rows"]} == {0.0, 8 / 255, 0.2}
    assert {row["attack"] for row in found["rows"]} == {"none", "fgsm", "pgd", "worst"}
    assert found["command"] == (
        f"python -m trainers.evaluate --run_dir=run --suite=quick --attacks=fgsm,pgd --epsilons={8 / 255},0.2 "
        "--threat_models=gray_box,white_box --defenses=none,vqunet --output_dir=out --num_examples=8 --seed=0"
    )
    assert str(tmp_path) not in (out / "report.md").read_text() + (out / "report.json").read_text()
    assert (out / "plots" / "pictures.png").stat().st_size > 10_000
    assert (out / "plots" / "curves.png").exists()
    printed = capsys.readouterr().out
    assert markdown.headline(found) in printed
    assert f"done: {out} holds" in printed

    _main(f"--run_dir={run_folder.path}", "--num_examples=5", "--threat_models=gray_box")  # all else is the run's
    found = json.loads(run_folder.report.read_text())
    assert {row["epsilon"] for row in found["rows"]} == {0.0, 0.1, 0.2}
    assert {row["n"] for row in found["rows"]} == {5}
    assert {row["steps"] for row in found["rows"]} == {0, 1, 2}

    assert (run_folder.path / "plots" / "curves.png").exists()
    _main(f"--run_dir={run_folder.path}", "--iterated_examples=100", "--epsilons=0.1", "--white_box_attacks=fgsm")
    found = json.loads(run_folder.report.read_text())
    assert "--iterated_examples=100 --num_examples=8" in found["command"]
    assert " --white_box_attacks=fgsm " in found["command"]
    made = {(row["threat_model"], row["attack"]) for row in found["rows"] if not row["worst_case"]}
    assert made >= {("gray_box", "pgd"), ("white_box", "fgsm")} and ("white_box", "pgd") not in made

    _main(f"--run_dir={run_folder.path}", "--attacks=square", "--queries=3", "--epsilons=0.1")
    found = json.loads(run_folder.report.read_text())
    assert "--queries=3" in found["command"]
    assert {row["steps"] for row in found["rows"] if row["attack"] == "square"} == {3}
    _main(f"--run_dir={run_folder.path}", "--epsilons=0.1", "--attacks=fgsm")
    assert not (run_folder.path / "plots" / "curves.png").exists()  # one epsilon is no curve, and the old one is wrong


def test_settings_are_chosen_on_validation_images(run_folder, tmp_path):
    flags = (
        f"--run_dir={run_folder.path}",
        "--epsilons=0.1",
        "--attacks=fgsm",
        "--threat_models=gray_box",
        "--num_examples=140",
    )
    _main(*flags)
    tested = run_folder.report.read_text()
    _main(*flags, "--split=validation")
    assert run_folder.report.read_text() == tested
    found = json.loads((run_folder.path / "validation" / "report.json").read_text())
    assert found["split"] == "validation" and "--split=validation" in found["command"]
    text = (run_folder.path / "validation" / "report.md").read_text()
    assert "on 140 validation images" in text and "On all 140 clean validation images" in text
    held_out = data.load(run_folder.load_config().data, "validation")
    answers = run_folder.load_classifier().predict(held_out.images / np.float32(255), verbose=0).argmax(axis=1)
    (clean,) = [row["accuracy"] for row in found["rows"] if (row["attack"], row["defense"]) == ("none", "none")]
    assert clean == pytest.approx(np.mean(answers == held_out.labels))
    assert {row["n"] for row in json.loads(tested)["rows"]} == {140}


def test_the_command_refuses_what_cannot_be_measured(run_folder, tmp_path, capsys):
    def refused(message: str, *flags: str) -> None:
        with pytest.raises(SystemExit) as ended:
            _main(*flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.search(message, line), line

    flag = f"--run_dir={run_folder.path}"
    refused(r"between 1 and .* examples.*got 100000", flag, "--num_examples=100000")
    refused(r"\[0,1\] scale.*got 8.0", flag, "--epsilons=8")
    refused("is not a run folder", f"--run_dir={tmp_path / 'nothing'}")
    refused("unknown suite 'huge': expected one of adaptive, full, quick, standard", flag, "--suite=huge")
    refused("unknown attack 'pdg': expected one of apgd_ce, .*square", flag, "--attacks=pdg")
    refused("unknown defense 'jpg': expected one of .*jpeg, .*vqunet", flag, "--defenses=jpg")
    refused("unknown threat model 'grey'", flag, "--threat_models=grey")
    refused("no attack here is black_box", flag, "--threat_models=black_box")
    refused("deepfool knows the norm l2, not 'linf'", flag, "--attacks=pgd,deepfool", "--norm=linf")
    refused("linf|l2", flag, "--norm=l1")
    refused("is the evaluated run itself", flag, "--attacks=transfer", f"--surrogate={run_folder.path}")
    refused("--seed=-1", flag, "--seed=-1")
    refused("transfer needs models to carry images over from: give --surrogate", flag, "--attacks=transfer")
    layers = [keras.Input((32, 32, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
    runs.save_model(keras.Sequential(layers), run_folder.classifier)
    refused("the data has 10 classes", flag)
    assert not run_folder.report.exists()


def test_a_run_folder_whose_models_and_config_disagree_is_refused(run_folder, capsys):
    def refused(message: str, changes: dict) -> None:
        run_folder.config.write_text(Config.from_json(text).replace(changes).to_json())
        with pytest.raises(SystemExit) as ended:
            _main(f"--run_dir={run_folder.path}")
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.search(message, line), line

    text = run_folder.config.read_text()
    again = "they are of different runs"
    refused(
        rf"config.json is for images \[28, 28, 1\], classifier.keras takes \[32, 32, 1\]: {again}", _shape(28, 28, 1)
    )
    refused(rf"names 3 classes, classifier.keras gives 10 logits: {again}", {"data.class_names": ["a", "b", "c"]})
    runs.save_model(VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=1), run_folder.purifier)
    sizes = {"purifier.widths": [4, 4], "purifier.num_embeddings": [8], "purifier.embedding_dim": [2]}
    refused(
        rf"config.json says purifier.num_embeddings \[16, 16\], purifier.keras has \[8, 8\]: {again}",
        {**sizes, "purifier.num_embeddings": [16]},
    )
    refused(r"purifier.skips False, purifier.keras has True", {**sizes, "purifier.skips": False})
    runs.save_model(VQUNet(widths=(4, 4), num_embeddings=8, embedding_dim=2, channels=3), run_folder.purifier)
    refused(r"images \[32, 32, 1\], purifier.keras takes \[any, any, 3\]", {**sizes, **_shape(32, 32, 1)})


def _shape(*sides: int) -> dict:
    return {"data.image_shape": list(sides)}


def test_strict_ends_with_status_3_where_a_check_failed(run_folder, capsys):
    runs.save_model(
        keras.Sequential([keras.Input((32, 32, 1)), Rounding(4, straight_through=False)]), run_folder.purifier
    )
    flags = (f"--run_dir={run_folder.path}", "--attacks=fgsm", "--epsilons=0.1")
    _main(*flags)
    line = "check failed: gradients_not_masked: vqunet gives 100.0% of images no gradient"
    assert line in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        _main(*flags, "--strict")
    assert ended.value.code == 3
    assert line in capsys.readouterr().err and run_folder.report.exists()


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "trainers.evaluate", "--run_dir=x", "--epsilon=0.1"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.splitlines() == [
        "error: Unknown command line flag 'epsilon'. Did you mean: epsilons ? (--help lists the flags)"
    ]
