"""The commands of serving as a user types them: export, serve, ask, and mistakes in one line."""

import json
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import grpc
import numpy as np
import pytest
from exported import SIGNATURES, expected, refusal, run
from PIL import Image
from served import NAMES, SHAPE, random_images

from serving import client, export, images, server
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.runs import RunFolder, save_model

ROOT = Path(__file__).parents[1]


def test_export_serve_ask(models, tmp_path, image_file, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config().replace({"data.image_shape": SHAPE, "data.class_names": NAMES}))
    for model, path in zip(models, (folder.purifier, folder.classifier), strict=True):
        save_model(model, path)
    run(export.console, f"--run_dir={folder.path}", f"--export_dir={tmp_path / 'out'}", "--version=3")
    summary = capsys.readouterr().out
    assert str(tmp_path / "out" / "3") in summary
    assert all(name in summary for name, _, _ in SIGNATURES)
    assert "allowed 1e-05" in summary

    path, pixels = image_file
    grey = tmp_path / "longer_name.png"  # converted to the channels the model wants
    Image.fromarray(pixels).convert("L").save(grey)
    running = server.start(server.Options("tiny", tmp_path / "out", port=0))
    try:
        ask = [client.console, f"--server=localhost:{running.port}", "--model_name=tiny"]
        run(*ask, f"--image={path}", f"--image={grey}")
        lines = capsys.readouterr().out.splitlines()
        purified = tmp_path / "purified.png"
        run(*ask, f"--image={path}", "--signature=serve_uint8", f"--purified_out={purified}")
        (again,) = capsys.readouterr().out.splitlines()
    finally:
        running.stop(0)
    wanted = expected(models, "serving_default", pixels[None])
    label, probability = wanted["label"][0], wanted["probabilities"].max()
    for line in (lines[0], again):
        file, found, number, *_, unit = line.split()
        assert (file, found, unit) == (str(path), label, "ms")
        assert abs(float(number) - probability) < 1e-4
    assert len(lines) == 2 and lines[1].startswith(str(grey))
    assert lines[0].index(label) == len(str(grey)) + 2  # aligned
    kept = np.asarray(Image.open(purified), np.float32) / 255
    np.testing.assert_allclose(kept, expected(models, "purify", pixels[None])["purified"][0], atol=0.51 / 255)


@pytest.mark.parametrize("command", [export, server, client])
def test_wrong_flags(capsys, command):
    assert "Unknown command line flag 'colour'" in refusal(capsys, command.console, "--colour=red")
    assert "missing --" in refusal(capsys, command.console)
    assert "unexpected argument 'digits'" in refusal(capsys, command.console, "digits")
    with pytest.raises(SystemExit) as stopped:
        run(command.console, "--help")
    assert stopped.value.code == 0
    assert f"python -m {command.__name__} --" in capsys.readouterr().out


def test_wrong_values(capsys, base_path, tmp_path):
    export_to = f"--export_dir={base_path}"
    assert "not a run folder" in refusal(capsys, export.console, f"--run_dir={tmp_path}", f"--export_dir={tmp_path}")
    assert "--version=-1" in refusal(capsys, export.console, "--run_dir=a", export_to, "--version=-1")
    assert "--port=seven" in refusal(capsys, server.console, "--port=seven")
    assert "no version" in refusal(capsys, server.console, f"--model_base_path={tmp_path}", "--model_name=tiny")
    RunFolder(tmp_path / "run").create(Config())
    assert "--version=2" in refusal(capsys, export.console, f"--run_dir={tmp_path / 'run'}", export_to)


def test_no_server_and_late_server(capsys, image_file):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with client.Client(address, "tiny", timeout=0.3) as asking, pytest.raises(UserError, match="--timeout") as late:
            asking.signatures()
    assert late.value.__cause__.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    line = refusal(capsys, client.console, f"--server={address}", "--model_name=tiny", f"--image={image_file[0]}")
    assert f"no server answers at {address}" in line


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (
            "the queue is full: 8 images wait, 8 may",
            "answers UNAVAILABLE: the queue is full: 8 images wait, 8 may: try again",
        ),
        ("failed to connect to all addresses", "no server answers at localhost:1: start one"),
    ],
)
def test_a_busy_server_is_not_taken_for_none(details, words):
    class Unavailable(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.UNAVAILABLE

        def details(self):
            return details

    def method(request, timeout):
        raise Unavailable

    with client.Client("localhost:1", "tiny", retries=0) as asking, pytest.raises(UserError, match=words):
        asking._call(method, None)


def test_an_image_that_claims_to_be_huge_or_is_cut_is_one_line(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    for name, start in (("huge", header), ("cut", header[:-4])):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", b""))
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            images.read_image(str(tmp_path / name), SHAPE)


def test_process_says_what_it_does_and_stops_on_sigterm(base_path):
    command = [
        sys.executable,
        "-m",
        "serving.server",
        f"--model_base_path={base_path}",
        "--model_name=tiny",
        "--port=0",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline()
            assert ready.startswith("serving tiny version 1 at localhost:")
            with client.Client(ready.split()[-1], "tiny") as asking:
                assert asking.predict(random_images(2))["label"].shape == (2,)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert [json.loads(line)["event"] for line in err.splitlines()][-2:] == ["stopping", "stopped"]


def test_process_refuses_in_one_line():
    command = [sys.executable, "-m", "serving.export", "--run_dir=nowhere", "--export_dir=nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere is not a run folder") and done.stderr.count("\n") == 1
