"""Several workers: real processes over loopback that train like one, stop together, and end when one is lost."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from vqunet_tf import runs
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import devices, fit, rendezvous, workers

SCRIPT = str(Path(__file__).with_name("workers.py"))
SETTINGS = {
    "data.limit": 64,
    "classifier.widths": [8],
    "classifier.epochs": 1,
    "classifier.batch_size": 32,
    "purifier.widths": [4, 8],
    "purifier.num_embeddings": [8],
    "purifier.embedding_dim": [4],
    "training.epochs": 2,
    "training.batch_size": 32,
    "training.feature_weight": 1.0,
    "training.selection_examples": 32,
    "training.selection_steps": 2,
    "attack.copies": 1,
    "attack.max_steps": 2,
    "attack.batch_size": 64,
}
STEPS = 4  # of the purifier: two epochs of 64 images, 32 a step


def pair(folder: Path, hit: str = "-", step: int = 0) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of two workers; the second one gets the signal `hit` after that step of the purifier."""
    cluster = {"worker": free(2)}
    flags = [f"--set={name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    flags += ["--dataset=digits", "--preset=smoke", f"--run_dir={folder}", "--strategy=multi_worker"]
    processes = []
    try:
        for index in range(2):
            task = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
            processes.append(
                subprocess.Popen(
                    [sys.executable, SCRIPT, *((hit, str(step)) if index == 1 else ("-", "0")), *flags],
                    env={**os.environ, "TF_CONFIG": task, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [process.communicate(timeout=300) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def free(count: int) -> list[str]:
    """Addresses on this machine that nobody listens at."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(count)]
        return [f"localhost:{server.getsockname()[1]}" for server in servers]


def rows(run: RunFolder) -> dict[tuple[str, ...], float]:
    lines = [line.split(",") for line in run.metrics.read_text().splitlines()[1:]]
    assert len({tuple(line[:3]) for line in lines}) == len(lines)
    return {tuple(line[:3]): float(line[3]) for line in lines}


def assert_same_weights(found: keras.Model, expected: keras.Model) -> None:
    assert len(found.weights) == len(expected.weights)
    for mine, theirs in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), atol=1e-4, err_msg=mine.path)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> RunFolder:
    """The same run in one process."""
    run = RunFolder(tmp_path_factory.mktemp("alone") / "run")
    fit.train(config, run, say=lambda line: None)
    return run


@pytest.fixture(scope="module")
def config(stopped) -> Config:
    """The settings of the pair, for one process."""
    return stopped[0].load_config().replace({"training.strategy": "none"})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[RunFolder, list[tuple[int, str, str]]]:
    """Two workers of which the second got SIGTERM after the third step."""
    run = RunFolder(tmp_path_factory.mktemp("pair") / "run")
    return run, pair(run.path, "SIGTERM", 3)


class TestTwoWorkers:
    def test_a_signal_to_one_stops_both_at_the_same_step(self, stopped):
        run, results = stopped
        for status, _, error in results:
            assert status == 128 + signal.SIGTERM, error
            assert error.splitlines()[-1].startswith("error: interrupted by SIGTERM: all is saved"), error
        assert (run.checkpoints / "purifier.3").is_dir() and not (run.checkpoints / "purifier.4").exists()
        assert "worker 1 of 2: waiting for the others" in results[1][1]
        assert "purifier: 32 images a step on 2 replicas (16 each), learning rate up to 0.002" in results[0][1]

    def test_they_train_like_one_process_across_that_stop(self, stopped, alone, tmp_path):
        """The classifier's batch normalisation, the quantizers, the losses: as if one process saw whole batches."""
        run = RunFolder(tmp_path / "run")
        shutil.copytree(stopped[0].path, run.path)
        results = pair(run.path)
        assert [status for status, *_ in results] == [0, 0], results
        assert sorted(path.name for path in run.path.iterdir()) == sorted(path.name for path in alone.path.iterdir())
        found, expected = rows(run), rows(alone)
        assert set(found) == set(expected)
        losses = ("loss", "pixel", "guidance", "feature", "codebook")  # in the second row: since the stop
        for place, value in expected.items():
            if place[:2] == ("purifier", "2") and place[2] in losses:
                continue
            assert found[place] == pytest.approx(value, rel=1e-3), place
        assert_same_weights(run.load_classifier(), alone.load_classifier())
        assert_same_weights(run.load_purifier(), alone.load_purifier())

    def test_a_lost_worker_ends_the_other_and_one_process_goes_on(self, stopped, alone, config, tmp_path):
        run = RunFolder(tmp_path / "run")
        shutil.copytree(stopped[0].path, run.path)
        (status, _, error), (killed, _, _) = pair(run.path, "SIGKILL", STEPS)
        assert killed == -signal.SIGKILL
        assert status == 2, error
        line = error.splitlines()[-1]
        assert line.startswith("error: another worker is gone") and "same command again on all workers" in line
        assert "Traceback" not in error and str(run.checkpoints) in line
        assert (run.checkpoints / "purifier.3").is_dir() and not run.purifier.exists()
        fit.train(config, run, say=lambda text: None)
        assert_same_weights(run.load_purifier(), alone.load_purifier())


class TestTheCluster:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "expects TF_CONFIG in the environment, got none"),
            ("{", "TF_CONFIG is not JSON"),
            ("[]", "cluster.worker to list host:port of every worker, got None"),
            ('{"cluster": {"worker": ["a"]}}', r"list host:port of every worker, got \['a'\]"),
            ('{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}}', "a cluster of workers alone, got ps, worker"),
            ('{"cluster": {"worker": ["a:1", "a:1"]}}', "another host:port for every worker"),
            ('{"cluster": {"worker": ["a:1", "b:1"]}}', 'task {"type": "worker", "index": 0 to 1}, got {}'),
            ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', '"index": 0 to 0}, got'),
            ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', "got .*chief"),
        ],
    )
    def test_a_bad_one_is_refused_before_anything_is_written(self, text, message, tmp_path, monkeypatch):
        monkeypatch.delenv("TF_CONFIG", raising=False)
        if text is not None:
            monkeypatch.setenv("TF_CONFIG", text)
        run = RunFolder(tmp_path / "run")
        with pytest.raises(UserError, match=message) as error:
            fit.train(Config().replace({"training.strategy": "multi_worker"}), run, say=print)
        assert "\n" not in str(error.value) and not run.path.exists()

    def test_it_is_read(self):
        assert workers.described(workers.EXAMPLE) == workers.Worker(0, ("host-a:2222", "host-b:2222"))

    def test_workers_meet_whoever_comes_first(self):
        addresses = free(3)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            waits = [pool.submit(rendezvous.meet, index, addresses, 20.0) for index in (2, 0)]
            assert concurrent.futures.wait(waits, timeout=0.5).done == set()
            with socket.create_connection(("localhost", int(addresses[0].rpartition(":")[2]))) as stranger:
                stranger.sendall(b"GET /\n")
            rendezvous.meet(1, addresses, 20.0)
            for wait in waits:
                wait.result(timeout=20)

    @pytest.mark.parametrize(("index", "missing"), [(0, 1), (1, 0)])
    def test_a_worker_that_does_not_come_is_named(self, index, missing):
        addresses = free(2)
        with pytest.raises(UserError, match=f"worker {index} waited 0.3 s for {addresses[missing]}"):
            rendezvous.meet(index, addresses, 0.3)

    def test_a_port_in_use_is_named(self):
        with socket.create_server(("", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
            with pytest.raises(UserError, match=f"cannot listen at {address} .*: end what uses that port"):
                rendezvous.meet(0, (address, "localhost:1"), 1.0)

    def test_other_backends_refuse(self, monkeypatch):
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        with pytest.raises(UserError, match="expects the Keras backend tensorflow, got jax"):
            devices.start("multi_worker")

    def test_a_process_of_its_own_is_the_chief_and_waits_for_nobody(self):
        devices.start("none")
        assert devices.is_chief()
        workers.wait()
        workers.same("anything", 3)
        assert workers.agreed(lambda: "SIGTERM")() == "SIGTERM"

    def test_a_run_folder_that_is_not_shared_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workers, "is_chief", lambda: False)
        monkeypatch.setattr(workers, "_FILE_SECONDS", 0.0)
        with pytest.raises(UserError, match="config.json, which worker 0 wrote, .* file system that all workers share"):
            workers.appears(tmp_path / "config.json")
        runs.write_text(tmp_path / "config.json", "")
        workers.appears(tmp_path / "config.json")
