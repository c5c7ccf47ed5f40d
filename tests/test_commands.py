"""The commands as a user types them: a smoke run of the whole chain on real data, and mistakes in one line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving import export
from trainers import evaluate, train
from vqunet_tf.runs import RunFolder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A smoke run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train.console(["train", "--dataset=digits", "--preset=smoke", f"--run_dir={folder}"])
    return folder


def refused(capsys, command, *flags):
    """What a mistake prints on stderr: one line, status 2, nothing of a traceback."""
    with pytest.raises(SystemExit) as ended:
        command(["command", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_train_evaluate_export(digits_run, tmp_path, capsys):
    assert {path.name for path in digits_run.iterdir()} == {
        "config.json",
        "images.sha256",
        "classifier.keras",
        "purifier.keras",
        "metrics.csv",
        "tensorboard",
    }
    evaluate.console(["evaluate", f"--run_dir={digits_run}", "--num_examples=16", "--attacks=fgsm,pgd"])
    report = json.loads((digits_run / "report.json").read_text())
    assert report["schema"] == 1 and {row["threat_model"] for row in report["rows"]} == {"gray_box", "white_box"}
    example = np.asarray(Image.open(digits_run / "plots" / "examples" / "0_gray_box.png"))
    assert example.shape == (32, 32) and example.dtype == np.uint8
    export.console(["export", f"--run_dir={digits_run}", f"--export_dir={tmp_path}"])
    assert (tmp_path / "1" / "saved_model.pb").exists()
    assert "parity" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["fashion_mnist", "cifar10"])
def test_a_smoke_run_on_the_real_images(dataset, tfds_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [f"--dataset={dataset}", f"--data_dir={tfds_dir}", "--preset=smoke", f"--run_dir={folder}"]
    train.console(["train", *flags])
    shape = RunFolder(folder).load_config().data.image_shape
    assert shape == {"fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[dataset]
    assert RunFolder(folder).load_purifier().purify(np.zeros(shape, "uint8")).shape == shape
    shown = capsys.readouterr().err
    assert "purifier: 100%" in shown and "img/s" in shown
    train.console(["train", *flags])
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=digits", "--preset=huge"], "unknown preset 'huge': expected one of .*digits"),
        (["--dataset=digits", "--strategy=fast"], r"auto\|none\|mirrored"),
        (["--dataset=digits", "--set=training.epoch=1"], "unknown configuration key.*epochs"),
        (["--dataset=nope", "--data_dir=/nonexistent"], "unknown data set 'nope'.*fashion_mnist"),
        (["--preset=smoke"], "missing --dataset"),
        (["--dataset=digits", "--sed=1"], "Unknown command line flag 'sed'"),
        (["--dataset=digits", "--classifier=missing.keras"], "missing.keras is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_training_are_one_line(flags, message, tmp_path, capsys):
    import re

    line = refused(capsys, train.console, *flags, f"--run_dir={tmp_path / 'run'}")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_cannot_be_evaluated_or_exported_and_stays(digits_run, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    run.create(RunFolder(digits_run).load_config())
    run.classifier.write_bytes((digits_run / "classifier.keras").read_bytes())
    for command, more in ((evaluate.console, []), (export.console, [f"--export_dir={tmp_path / 'exported'}"])):
        assert "purifier.keras is missing" in refused(capsys, command, f"--run_dir={run.path}", *more)
    run.purifier.write_bytes(run.classifier.read_bytes()[:1000])
    assert "purifier.keras is not a .keras file" in refused(capsys, evaluate.console, f"--run_dir={run.path}")
    assert run.classifier.exists() and not (tmp_path / "exported").exists()


def test_without_a_run_dir_each_objective_has_a_folder_of_its_own(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train.fit, "train", lambda config, folder, **rest: seen.append(folder.path.as_posix()))
    for flag in ("", "--objective=adaptive", "--run_dir=elsewhere"):
        train.console(["train", "--dataset=digits", *filter(None, [flag])])
    assert seen == ["runs/digits", "runs/digits_adaptive", "elsewhere"]
    assert "next: python -m trainers.evaluate --run_dir=runs/digits_adaptive" in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="jax is not installed")
def test_training_with_jax_starts_where_there_is_no_tensorflow(tmp_path):
    """As far as the images, which are not there: all that the command imports and checks before is at hand."""
    lines = [
        "from importlib.machinery import PathFinder as Finder",
        "find, hidden = Finder.find_spec, ('tensorflow', 'tensorflow_datasets')",
        "Finder.find_spec = lambda name, *rest: None if name.split('.')[0] in hidden else find(name, *rest)",
        "from trainers import train",
        f"train.console(['train', '--dataset=./nowhere', '--run_dir={tmp_path / 'run'}'])",
    ]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 2 and "nowhere" in found.stderr.splitlines()[-1], found.stderr
