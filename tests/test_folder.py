"""The folder of a run: one process at a time, the images it began with, and damage that is mended or named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vqunet_tf import data
from vqunet_tf.errors import UserError
from vqunet_tf.recipes import preset
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, crafting, fit, folder
from vqunet_tf.training.interruption import Interruption


def tiny(**changes):
    settings = {"data.limit": 64, "training.epochs": 1, "training.batch_size": 32, "attack.batch_size": 64, **changes}
    return preset("smoke", "digits").replace(settings)


def silent(line):
    pass


def test_a_second_process_is_kept_out_until_the_first_has_ended(tmp_path):
    run, split = RunFolder(tmp_path / "run"), data.load(tiny().data, "train")
    run.create(tiny(**{"data.image_shape": split.images.shape[1:], "data.class_names": split.class_names}))
    with folder.alone(run), pytest.raises(UserError, match="another process trains in .*run: wait"):
        fit.train(tiny(), run, say=silent)
    assert not run.classifier.exists()
    with folder.alone(run):
        pass


def test_a_run_goes_on_with_the_images_it_began_with_only(tmp_path, monkeypatch):
    run, config = RunFolder(tmp_path / "run"), tiny()
    fit.train(config, run, say=silent)
    whole, number = run.images.read_text(), len(data.load(config.data, "train").labels)
    assert whole.endswith(f" {number}\n") and run.images in run.contents()
    run.purifier.unlink()
    real = data.load

    def other(config, name):
        split = real(config, name)
        images = split.images.copy()
        images[0, 0, 0, 0] ^= 1  # one pixel, by one
        return dataclasses.replace(split, images=images)

    monkeypatch.setattr(data, "load", other)
    with pytest.raises(UserError, match=f"began with other training images \\({number} of them, here {number}\\)"):
        fit.train(config, run, say=silent)
    assert not run.purifier.exists()
    monkeypatch.undo()
    fit.train(config, run, say=silent)
    assert run.purifier.exists() and run.images.read_text() == whole


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "other"])
def test_a_damaged_copy_of_adversaries_is_crafted_again(damage, tmp_path, monkeypatch, capsys):
    run, config = RunFolder(tmp_path / "run"), tiny(**{"attack.copies": 2})
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 1), np.uint8)
    made = []
    monkeypatch.setattr(adversaries, "craft", lambda guide, shown, *rest: made.append(rest[1]) or shown)
    with Interruption() as stop:
        make = crafting.Crafting(config, run, images, lambda: None, stop)
        _, first = make(0)
        path = run.checkpoints / "adversaries.0.1.npy"
        if damage == "other":
            np.save(path, images[1:])
        else:
            path.write_bytes(damage)
        _, again = make(0)
    assert made == [(0, 0, 0), (0, 0, 1), (0, 0, 1)]
    np.testing.assert_array_equal(first, again)
    assert "adversaries.0.1.npy is damaged: that copy is crafted again" in capsys.readouterr().err


def test_images_too_small_for_the_depth_are_refused_before_anything_is_written(tmp_path):
    widths = {"purifier.widths": [4] * 7, "purifier.num_embeddings": [8], "purifier.embedding_dim": [2]}
    with pytest.raises(UserError, match=r"at least 64x64 pixels for a purifier of 7 levels and stem 2, got 32x32"):
        fit.train(tiny(**widths), RunFolder(tmp_path / "run"), say=silent)
    assert not (tmp_path / "run").exists()
