"""Runs that are stopped, killed or out of disk: they go on at the exact step, and nothing is lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from test_runs import losses_of, silent, tiny

from vqunet_tf.errors import Interrupted, UserError, guard
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import averaging, checkpoints, fit, selection
from vqunet_tf.training.batches import Batches
from vqunet_tf.training.interruption import Interruption

ROOT = Path(__file__).resolve().parents[1]


def assert_same_weights(first, second):
    for mine, theirs in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(theirs.numpy(), mine.numpy(), atol=1e-5, err_msg=mine.path)


def stop_after(monkeypatch, calls):
    """The next run is asked to stop at that many questions whether it should: after each step and each crafted or answered batch."""
    asked = []

    def stop(self):
        asked.append(0)
        return "SIGTERM" if len(asked) >= calls else None

    monkeypatch.setattr(Interruption, "__call__", stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted: 2 epochs of 2 steps."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "whole")
    fit.train(small(), run, say=silent)
    return run


def small(**changes):
    """A classifier with dropout, averages over half of the steps, momentum of Muon: all must survive."""
    return tiny(**{"classifier.name": "defense_gan_d", "training.average": 0.5, "training.muon": 2.0, **changes})


# 64 images: the classifier takes 1 step, crafting 1 batch, its clean answers 1, the purifier 2 + 2 steps.
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 6], ids=lambda calls: f"asked_{calls}_times")
def test_a_stopped_run_goes_on_where_it_was(calls, whole, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    stop_after(monkeypatch, calls)
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit.train(small(), run, say=silent)
    assert not run.purifier.exists()
    monkeypatch.undo()
    fit.train(small(), run, say=silent)
    assert_same_weights(whole.load_classifier(), run.load_classifier())
    assert_same_weights(whole.load_purifier(), run.load_purifier())
    assert not run.checkpoints.exists()
    assert set(losses_of(run)) == set(losses_of(whole))
    said = []
    fit.train(small(), run, say=said.append)
    assert said == [f"nothing to do: {run.path} holds a finished run"]
    with pytest.raises(UserError, match="another configuration.*training.epochs is 2 there, 3 here"):
        fit.train(small(**{"training.epochs": 3}), run, say=silent)


# The encoder takes 2 + 2 steps, the purifier 2; for gray_box batches are crafted and answered first.
@pytest.mark.parametrize(
    ("objective", "calls"),
    [("adaptive", 1), ("adaptive", 3), ("adaptive", 4), ("adaptive", 5), ("gray_box", 5), ("gray_box", 7)],
)
def test_an_encoder_that_learns_alone_goes_on_where_it_was(objective, calls, whole, tmp_path, monkeypatch):
    config = small(
        **{
            "classifier.path": str(whole.classifier),
            "training.objective": objective,
            "training.head_weight": 1.0,
            **({"training.attack_on": "head"} if objective == "adaptive" else {}),
            "training.encoder_epochs": 2,
            "training.epochs": 1,
            "training.selection": "last",
        }
    )
    once, run = RunFolder(tmp_path / "once"), RunFolder(tmp_path / "run")
    fit.train(config, once, say=silent)
    stop_after(monkeypatch, calls)
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit.train(config, run, say=silent)
    monkeypatch.undo()
    assert run.checkpoints.exists()
    fit.train(config, run, say=silent)
    assert_same_weights(once.load_purifier(), run.load_purifier())
    assert set(losses_of(run)) == set(losses_of(once))
    assert {stage for stage, _, _ in losses_of(run)} == {"purifier_encoder", "purifier"}
    assert not run.checkpoints.exists()


@pytest.mark.parametrize("damage", ["truncated", "emptied", "all"])
def test_a_damaged_checkpoint_is_passed_over(damage, whole, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    config = small(**{"training.checkpoint_seconds": 0.0})
    stop_after(monkeypatch, 6)
    with pytest.raises(Interrupted):
        fit.train(config, run, say=silent)
    monkeypatch.undo()
    kept = sorted(run.checkpoints.glob("purifier.*"))
    assert [path.name for path in kept] == ["purifier.2", "purifier.3"]
    for path in kept if damage == "all" else kept[1:]:
        file = path / "model.weights.h5"
        os.truncate(file, 0 if damage == "emptied" else file.stat().st_size - 1000)
    said = []
    if damage == "all":
        with pytest.raises(UserError, match=r"no checkpoint of purifier in .* can be read: delete purifier\.\*"):
            fit.train(config, run, say=said.append)
        return
    fit.train(config, run, say=said.append)
    assert any("purifier.3 cannot be read (model.weights.h5 is damaged)" in line for line in said)
    assert_same_weights(whole.load_purifier(), run.load_purifier())


def test_a_run_killed_at_three_points_ends_like_one_that_was_not(tmp_path):
    """SIGKILL: in the classifier's training, and twice in the purifier's, wherever it is by then."""
    settings = ["data.limit=96", "classifier.epochs=2", "training.epochs=4", "training.checkpoint_seconds=0"]
    settings += ["classifier.batch_size=32", "training.batch_size=32", "training.deterministic=true"]
    command = [sys.executable, "-m", "trainers.train", "--dataset=digits", "--preset=smoke", "--seed=3"]
    command += [f"--set={setting}" for setting in settings]

    log = tmp_path / "log"

    def start(folder):
        with log.open("ab") as file:
            return subprocess.Popen([*command, f"--run_dir={folder}"], cwd=ROOT, stdout=file, stderr=file)

    started = [start(tmp_path / "whole")]
    killed = RunFolder(tmp_path / "killed")
    draw = random.Random()
    points = [
        ("classifier", draw.randint(1, 5)),
        *(("purifier", step) for step in sorted(draw.sample(range(1, 12), 2))),
    ]
    try:
        for stage, step in points:
            process = start(killed.path)
            started.append(process)
            deadline = time.monotonic() + 240
            while (
                not any(int(path.suffix[1:]) >= step for path in killed.checkpoints.glob(f"{stage}.*") if path.is_dir())
                and not (killed.path / f"{stage}.keras").exists()
            ):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.01)
            process.kill()
            process.wait()
        assert not killed.purifier.exists(), points
        started.append(start(killed.path))
        for process in (started[-1], started[0]):
            assert process.wait(timeout=240) == 0, (points, log.read_text()[-2000:])
    finally:
        for process in started:
            process.kill()
            process.wait()
    expected = RunFolder(tmp_path / "whole")
    steps = [float(run.load_purifier().quantizers[0].steps.numpy()) for run in (expected, killed)]
    assert steps[0] == steps[1] > 0, points
    assert_same_weights(expected.load_classifier(), killed.load_classifier())
    assert_same_weights(expected.load_purifier(), killed.load_purifier())


def test_calls_of_several_steps_stop_and_go_on_where_they_were(tmp_path, monkeypatch):
    """Two steps a call, three steps an epoch: the last call of an epoch is cut short."""
    changes = {"data.limit": 96, "training.steps_per_execution": 2, "training.epochs": 3}
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    fit.train(small(**changes), whole, say=silent)
    stop_after(
        monkeypatch, 8
    )  # once for the classifier, for 2 batches crafted and answered, for 2 calls of an epoch, then here
    with pytest.raises(Interrupted):
        fit.train(small(**changes), run, say=silent)
    monkeypatch.undo()
    left = sorted(path.name for path in run.checkpoints.glob("purifier.*"))
    assert left == ["purifier.3", "purifier.5"]
    fit.train(small(**changes), run, say=silent)
    assert_same_weights(whole.load_purifier(), run.load_purifier())
    assert float(run.load_purifier().quantizers[0].steps.numpy()) == float(
        whole.load_purifier().quantizers[0].steps.numpy()
    )


def test_other_batches_than_those_of_the_checkpoint_are_refused(tmp_path, monkeypatch):
    """As on 3 replicas, where 32 images become 30 and a step means something else."""
    run = RunFolder(tmp_path / "run")
    stop_after(monkeypatch, 4)
    with pytest.raises(Interrupted):
        fit.train(small(), run, say=silent)
    monkeypatch.undo()
    monkeypatch.setattr(fit.devices, "replicas", lambda name: 3)
    with pytest.raises(UserError, match="counts steps of 32 images, these devices take 30"):
        fit.train(small(), run, say=silent)


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    config = tiny(**{"training.checkpoint_seconds": 0.0})
    real, saved = np.savez, []

    def savez(path, **arrays):
        saved.append(path)
        if len(saved) > 6:  # the classifier's two files, three of the purifier's first checkpoint, one of its second
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        real(path, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(UserError, match=r"purifier\.\d cannot be written \(No space left on device\): the one before"):
        fit.train(config, run, say=silent)
    left = [path.name for path in run.checkpoints.iterdir()]
    assert "purifier.1" in left and not any(name.startswith("part.") for name in left)
    monkeypatch.undo()
    fit.train(config, run, say=silent)
    assert run.purifier.exists()


def test_any_file_that_cannot_be_written_is_one_line(capsys):
    def command():
        raise OSError(28, "No space left on device", "runs/mine/metrics.csv")

    with pytest.raises(SystemExit) as ended:
        guard(command)()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: runs/mine/metrics.csv: No space left on device: ")


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    batches = Batches(size=4, batch_size=2, seed=0)
    saver = checkpoints.Checkpoints(tmp_path, "purifier", batches, {})
    saver.set_model(model)
    saver.step = 1
    saver.save()
    model.layers[0].bias.assign([np.nan])
    saver.step = 2
    with pytest.raises(UserError, match="bias is not finite after step 2; the last checkpoint is kept"):
        saver.save()
    assert [path.name for path in tmp_path.iterdir()] == ["purifier.1"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_once_and_ends_a_command_with_its_status(number, status, capsys):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption() is None
        os.kill(os.getpid(), number)
        assert interruption() == signal.Signals(number).name
        assert signal.getsignal(number) == before  # a second one takes effect at once

    def command():
        raise Interrupted(interruption())

    with pytest.raises(SystemExit) as ended:
        guard(command)()
    assert ended.value.code == status
    line = capsys.readouterr().err
    assert line == f"error: interrupted by {interruption()}: all is saved, give the same command again to go on\n"


class TestAverages:
    def model(self):
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])

    def test_they_follow_the_closed_form(self):
        """Weight n at step n, momentum 1 - 1/4, begun at the first: a(n) = n - 3 + 3 (3/4)^(n-1)."""
        model = self.model()
        averages = averaging.Averages(model, span=4)
        for n in range(1, 8):
            model.layers[0].kernel.assign([[float(n)]])
            averages.on_train_batch_end(n)
        expected = 7 - 3 + 3 * 0.75**6
        with averages.applied():
            assert float(model.layers[0].kernel.numpy()[0, 0]) == pytest.approx(expected, rel=1e-6)
        assert float(model.layers[0].kernel.numpy()[0, 0]) == 7.0
        other = averaging.Averages(model, span=4)
        other.restore(averages.state())
        other.apply()
        assert float(model.layers[0].kernel.numpy()[0, 0]) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("span", [0, 0.3, 1])
    def test_no_span_keeps_the_weights(self, span):
        model = self.model()
        averages = averaging.Averages(model, span=span)
        model.layers[0].kernel.assign([[5.0]])
        averages.on_train_batch_end(0)
        model.layers[0].kernel.assign([[6.0]])
        averages.on_train_batch_end(1)
        averages.apply()
        assert float(model.layers[0].kernel.numpy()[0, 0]) == 6.0


def test_the_best_epoch_is_kept_by_clean_and_the_worse_of_both_attacks():
    """A classifier of one pixel: epoch by epoch another weight, and the one that scores best comes back."""

    class Passes(keras.layers.Layer):
        def build(self, shape):
            self.threshold = self.add_weight(name="threshold", shape=())

        def call(self, images, training=False):
            return images - self.threshold

    class Bright(keras.Model):
        def call(self, images, training=False):
            value = images[:, 0, 0, 0]
            return keras.ops.stack([-value, value], axis=-1)

    class Chain(keras.Model):
        def __init__(self):
            super().__init__()
            self.purifier, self.classifier = Passes(), Bright()

        def call(self, images, training=False):
            return self.classifier(self.purifier(images))

    levels = np.array([20, 100, 150, 240], "uint8")
    images, labels = levels[:, None, None, None], np.array([0, 0, 1, 1])
    hard = np.array([130, 130, 150, 240], "uint8")[:, None, None, None]
    attacks = {"untargeted": lambda: images, "targeted": lambda: hard}
    chain = Chain()
    chain(images / np.float32(255))
    chosen = selection.Selection(averaging.Averages(chain.purifier, 0), chain, images, labels, attacks)
    found = []
    for epoch, threshold in enumerate([0.45, 0.55, 0.9]):
        chain.purifier.threshold.assign(threshold)
        logs = {}
        chosen.on_epoch_end(epoch, logs)
        found.append(tuple(logs[f"validation_{name}"] for name in ("clean", "untargeted", "targeted")))
    assert found == [(1.0, 1.0, 0.5), (1.0, 1.0, 1.0), (0.75, 0.75, 0.75)]
    chain.purifier.threshold.assign(0.56)  # as good, and later
    chosen.on_epoch_end(3)
    chosen.apply()
    assert float(chain.purifier.threshold.numpy()) == pytest.approx(0.56)
    again = selection.Selection(chosen.averages, chain, images, labels, chosen.attacks)
    again.restore(chosen.state())
    chain.purifier.threshold.assign(0.0)
    again.apply()
    assert float(chain.purifier.threshold.numpy()) == pytest.approx(0.56) and again.score == 2.0
