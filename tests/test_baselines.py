"""The ablations that are trained beside a purifier: same data, adversaries and budget, and they resume."""

import hashlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from test_interruption import assert_same_weights, stop_after
from test_runs import losses_of, save_linear, silent, tiny

from trainers import evaluate, train
from vqunet_tf import defenses
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.models import presets
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.runs import RunFolder, save_model
from vqunet_tf.training import adversaries, batches, checkpoints, fit

NAMES = ("unet", "vqvae", "dae")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two epochs of two steps, with averages over half of them, for a classifier of one layer."""
    path = tmp_path_factory.mktemp("given") / "mine.keras"
    save_linear(path)
    return tiny(**{"classifier.path": str(path), "training.average": 0.5, "training.selection": "last"})


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run with all three, in one go; and what was crafted and trained on on the way."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "whole")
    seen = {"crafted": [], "trained_on": []}
    craft, init = adversaries.craft, batches.GrayBoxBatches.__init__

    def crafting(*args):
        seen["crafted"].append(craft(*args))
        return seen["crafted"][-1]

    def beginning(self, views, adversarial, *args, **kwargs):
        seen["trained_on"].append(adversarial)
        init(self, views, adversarial, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversaries, "craft", crafting)
        patch.setattr(batches.GrayBoxBatches, "__init__", beginning)
        fit.train(small, run, say=silent, baselines=NAMES)
    return run, seen


def copied(run, folder, *lacking):
    """The same finished run without some of its baselines."""
    shutil.copytree(run.path, folder)
    copy = RunFolder(folder)
    for name in lacking:
        copy.baseline(name).unlink()
    return copy


def sums(run, *names):
    paths = [run.classifier, run.purifier, *map(run.baseline, names)]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_each_lacks_what_it_should_and_nothing_else(whole):
    run, _ = whole
    own = run.load_purifier().get_config()
    for name in NAMES:
        model = run.load_baseline(name)
        found = model.get_config()
        assert {key: value for key, value in found.items() if value != own[key] and key != "name"} == {
            key: value for key, value in ABLATIONS[name].items() if value != own[key]
        }
        layers = {layer.name for layer in model.graph.layers}
        assert [layer.name for layer in model.quantizers] == {"unet": [], "vqvae": ["quantizer_1"], "dae": []}[name]
        assert ("to_codes_0" in layers) == (name == "unet") and "to_codes_1" in layers
    assert {layer.name for layer in run.load_purifier().quantizers} == {"quantizer_0", "quantizer_1"}


def test_all_learn_from_the_same_adversaries_for_as_long(whole):
    run, seen = whole
    assert len(seen["crafted"]) == 1 and len(seen["trained_on"]) == 4
    for adversarial in seen["trained_on"]:
        np.testing.assert_array_equal(adversarial[0], seen["crafted"][0])
    rows = losses_of(run)
    for name in ("purifier", *NAMES):
        assert {epoch for stage, epoch, _ in rows if stage == name} == {"1", "2"}
        assert rows[name, "2", "loss"] < rows[name, "1", "loss"]
        assert (run.tensorboard / name).is_dir()
    assert ("unet", "1", "codes_used_0") not in rows and ("vqvae", "1", "codes_used_0") in rows
    assert not run.checkpoints.exists()
    said = []
    for baselines in ((), NAMES):
        fit.train(run.load_config(), run, say=said.append, baselines=baselines)
    assert said == 2 * [f"nothing to do: {run.path} holds a finished run"]


def test_one_that_was_stopped_goes_on_and_touches_nothing_else(small, whole, tmp_path, monkeypatch):
    expected, seen = whole
    run = copied(expected, tmp_path / "run", "vqvae")
    before = sums(run, "unet", "dae")
    stop_after(
        monkeypatch, 5
    )  # once for a batch crafted, once answered, twice for the first epoch, then inside the second
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit.train(small, run, say=silent, baselines=["vqvae"])
    monkeypatch.undo()
    assert not run.baseline("vqvae").exists()
    fit.train(small, run, say=silent)  # without it the run is finished, and the checkpoints can wait
    assert {path.name for path in run.checkpoints.iterdir()} == {"adversaries.0.0.npy", "vqvae.2", "vqvae.3"}
    crafted_anew = np.load(run.checkpoints / "adversaries.0.0.npy")
    np.testing.assert_array_equal(crafted_anew, seen["crafted"][0])
    fit.train(small, run, say=silent, baselines=["vqvae"])
    assert_same_weights(expected.load_baseline("vqvae"), run.load_baseline("vqvae"))
    assert sums(run, "unet", "dae") == before and not run.checkpoints.exists()
    assert set(losses_of(run)) == set(losses_of(expected))


def test_the_checkpoints_of_an_encoder_stay_until_its_purifier_is_done(tmp_path):
    names = ["purifier_encoder.2", "purifier.1", "unet_encoder.3", "adversaries.0.0.npy"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoints.remove(tmp_path / "checkpoints", unfinished=["unet"])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(names[2:])
    (tmp_path / "checkpoints" / names[3]).rmdir()
    checkpoints.remove(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_a_missing_one_says_how_to_train_it_and_that_works(whole, tmp_path, capsys):
    run = copied(whole[0], tmp_path / "run", "unet")
    purifier = run.load_purifier()
    assert defenses.available(run) == [*defenses.available(), "vqvae", "dae"]
    with pytest.raises(UserError, match="unet.keras is missing: train it with python -m trainers.train") as refused:
        defenses.build("unet", purifier, run)
    command = shlex.split(str(refused.value).partition("python -m ")[2])
    train.console(command)
    assert "baselines" in capsys.readouterr().out
    images = np.random.default_rng(0).random((2, 32, 32, 1), dtype="float32")
    defense = defenses.build("unet", purifier, run)
    np.testing.assert_allclose(defense(images), run.load_baseline("unet")(images), atol=1e-6)
    assert defense.differentiable and defenses.available(run) == list(defenses.DEFENSES)


def test_another_model_under_its_name_is_refused(whole, tmp_path):
    run = copied(whole[0], tmp_path / "run")
    save_model(run.load_purifier(), run.baseline("dae"))
    with pytest.raises(
        UserError,
        match="expected a dae with quantize=False, skips=False, gated=False, pixel_share=0.0, classes=0, channels=1, got ",
    ):
        defenses.build("dae", run.load_purifier(), run)
    save_model(run.load_classifier(), run.baseline("dae"))
    with pytest.raises(UserError, match="expected a dae, got a Functional"):
        defenses.build("dae", run.load_purifier(), run)


def test_those_of_a_like_run_are_measured_beside_other_weights(whole, tmp_path):
    beside = copied(whole[0], tmp_path / "beside", "dae")
    run = copied(whole[0], tmp_path / "run", *NAMES)
    changes = {"classifier.path": "mine", "evaluation.num_examples": 7}  # where it came from, and what is measured
    beside.config.write_text(beside.load_config().replace(changes).to_json())
    moved(beside, 0.01)  # as half precision does
    measure(run, beside)
    report = json.loads(run.report.read_text())
    assert {row["defense"] for row in report["rows"]} == {"none", "vqunet", "unet", "vqvae"}
    assert " --baselines_dir=beside" in report["command"]
    assert report["notes"] == [
        "unet, vqvae: trained in another run with the same settings, for the same classifier (`python -m trainers.train "
        f"--config={run.config} --classifier={run.classifier} --run_dir=beside --baselines=unet,vqvae`)"
    ]


@pytest.mark.parametrize(
    ("changes", "by", "words"),
    [
        ({"training.epochs": 3}, 0.0, "expected the settings of .*training.epochs is 3 there, 2 here: train them with"),
        ({"evaluation.epsilons": (0.05, 0.2)}, 0.0, r"evaluation.epsilons is \(0.05, 0.2\) there"),
        ({"classifier.feature_layer": "dense"}, 0.0, "classifier.feature_layer is 'dense' there"),
        ({}, 1.0, "expected the classifier of .* logits differ by up to 1: train them with"),
        ({}, np.nan, "logits differ by up to nan"),
        (None, 0.0, "expected one of .*unet.keras, .*, got none: train them with python -m trainers.train --config="),
    ],
)
def test_those_that_learned_something_else_are_refused(whole, tmp_path, capsys, changes, by, words):
    run = copied(whole[0], tmp_path / "run", *NAMES)
    beside = copied(whole[0], tmp_path / "beside", *(NAMES if changes is None else ()))
    beside.config.write_text(beside.load_config().replace(changes or {}).to_json())
    moved(beside, by)
    with pytest.raises(SystemExit) as ended:
        measure(run, beside)
    assert ended.value.code == 2 and not run.report.exists()
    assert re.search(words, capsys.readouterr().err)


def moved(run, by):
    """Logits of its classifier, moved."""
    model = run.load_classifier()
    model.layers[-1].bias.assign(model.layers[-1].bias + by)
    save_model(model, run.classifier)


def measure(run, beside):
    flags = [f"--run_dir={run.path}", f"--baselines_dir={beside.path}", "--attacks=fgsm", "--epsilons=0.1"]
    evaluate.console(["evaluate", *flags, "--num_examples=32"])


def test_a_missing_one_of_released_weights_is_trained_elsewhere():
    folder = RunFolder(presets.folder("digits"))
    with pytest.raises(UserError) as refused:
        defenses.build("unet", None, folder)
    preset = "vqunet_tf/presets/digits"
    assert str(refused.value).endswith(
        f"train it with python -m trainers.train --config={preset}/config.json --classifier={preset}/classifier.keras "
        "--run_dir=runs/digits --baselines=unet and give --baselines_dir=runs/digits"
    )


def test_they_begin_where_those_beside_the_first_purifier_ended(small, whole, tmp_path):
    first = copied(whole[0], tmp_path / "first", "dae")
    config = small.replace({"training.start": str(first.purifier), "data.image_shape": [32, 32, 1]})
    said = []
    found = {wanted.name: wanted for wanted in fit._missing(config, RunFolder(tmp_path / "second"), NAMES, said.append)}
    assert list(found) == ["purifier", *NAMES]
    assert_same_weights(first.load_purifier(), found["purifier"].start)
    assert_same_weights(first.load_baseline("unet"), found["unet"].start)
    assert found["dae"].start is None and len(said) == 1
    assert said[0].startswith("warning: dae begins with random weights, the purifier with ")
    other = config.replace({"purifier.widths": [8, 24]})
    with pytest.raises(UserError, match=r"purifier.keras: its widths is \(8, 16\), the configuration has \(8, 24\)"):
        fit._missing(other, RunFolder(tmp_path / "second"), NAMES, said.append)


def test_an_unknown_one_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.console(["train", "--dataset=digits", "--baselines=unet,hgd", f"--run_dir={tmp_path / 'run'}"])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == "error: unknown baseline 'hgd': expected one of dae, unet, vqvae\n"
