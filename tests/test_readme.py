"""The README's Python example runs as written, and its two commands exist."""

import re
from pathlib import Path

import numpy as np
import pytest

from vqunet_tf.models import presets

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["a batch of bytes", "one float image"])
def test_the_example_runs_as_written(kind, rng):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    batch = rng.integers(0, 256, size=(3, 28, 28, 1), dtype="uint8")
    images = batch if kind == "a batch of bytes" else (batch[0] / 255.0).astype("float32")
    names = {"images": images, "my_classifier": presets.load("fashion_mnist", "classifier")}
    exec(code, names)
    assert names["clean"].shape == images.shape and names["clean"].dtype == np.float32
    z = rng.normal(size=(8, 16)).astype("float32")
    assert set(names["layer"](z, training=True)) == {"quantized", "indices", "loss", "perplexity"}
    assert names["defended"].predict(batch / 255.0, verbose=0).shape == (3, 10)


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_relative_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_an_unknown_or_damaged_preset_says_so(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Unknown preset 'mnist'. Known: .*fashion_mnist"):
        presets.load("mnist", "purifier")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "purifier.keras").write_bytes(b"not the weights")
    (tmp_path / "broken" / "SHA256SUMS").write_text(f"{'0' * 64}  purifier.keras\n")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="is damaged: expected SHA-256 0000"):
        presets.load("broken", "purifier")
