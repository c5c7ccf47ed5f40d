"""A purifier that goes on with the images that nothing before it has learned by heart."""

import numpy as np
import pytest
from test_runs import save_linear, silent, tiny

from vqunet_tf import data
from vqunet_tf.errors import UserError
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import crafting, fit
from vqunet_tf.training.encoder import _encoder


@pytest.fixture
def first(tmp_path):
    """A finished run, with the settings with which another may go on from it."""
    save_linear(tmp_path / "mine.keras")
    run = RunFolder(tmp_path / "first")
    fit.train(tiny(**{"classifier.path": str(tmp_path / "mine.keras"), "training.selection": "last"}), run, say=silent)
    return {
        "classifier.path": str(run.classifier),
        "training.start": str(run.purifier),
        "training.selection": "last",
        "training.freeze_encoder": True,
        "training.held_out": True,
        "training.batch_size": 8,
    }


def test_it_learns_from_the_validation_images_and_keeps_the_encoder(first, tmp_path, monkeypatch):
    config, run, seen = tiny(**first), RunFolder(tmp_path / "second"), []
    made = crafting.Crafting.__call__
    monkeypatch.setattr(crafting.Crafting, "__call__", lambda self, turn: seen.append(self.images) or made(self, turn))
    fit.train(config, run, say=silent)
    np.testing.assert_array_equal(seen[0], data.load(config.data, "validation").images)
    assert not np.array_equal(seen[0], data.load(config.data, "train").images)

    before, after = RunFolder(tmp_path / "first").load_purifier(), run.load_purifier()
    for old, new in zip(_encoder(before).get_weights(), _encoder(after).get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    moved = [np.abs(a - b).max() for a, b in zip(before.get_weights(), after.get_weights(), strict=True)]
    assert max(moved) > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.start": None}, "training.start: expected a file with training.held_out, got none"),
        ({"classifier.path": None}, "classifier.path: expected a file with training.held_out, got none"),
        ({"training.selection": "best"}, "training.selection: expected last with training.held_out, got best"),
        (
            {"training.objective": "adaptive"},
            "training.objective: expected gray_box with training.held_out, got adaptive",
        ),
        (
            {"training.freeze_encoder": False},
            "training.freeze_encoder: expected true with training.held_out, got false",
        ),
    ],
    ids=str,
)
def test_what_it_needs_is_asked_for(change, message, tmp_path):
    path = str(tmp_path / "no.keras")
    settings = {
        "classifier.path": path,
        "training.start": path,
        "training.selection": "last",
        "training.freeze_encoder": True,
        "training.held_out": True,
    }
    with pytest.raises(UserError, match=message):
        fit.train(tiny(**{**settings, **change}), RunFolder(tmp_path / "run"), say=silent)
