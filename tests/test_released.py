"""Released weights give the released figures: 500 test images a preset, measured again. Minutes: `pytest -m slow`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vqunet_tf import attacks, data
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import sample
from vqunet_tf.evaluation.victims import Chain
from vqunet_tf.models import presets
from vqunet_tf.runs import RunFolder
from vqunet_tf.threat import Threat

RESULTS = Path(__file__).resolve().parents[1] / "results"
REPORTED = [name for name in presets.names() if (RESULTS / name / "report.json").exists()]
EXAMPLES = 500
QUICK = ("none", "fgsm", "pgd")  # gray-box, of the suite `quick`


def probability(right: int, examples: int, released: int, n: int) -> float:
    """How probable a count as far off as `right` of `examples` is, if these are a random part of n images of which `released`
    were right.

    The smaller sample is a part of the larger one (both are the first of one permutation), so that they are not independent
    and a test of two samples would be too lax: given the released count, the part's is hypergeometric. Two-sided, exact.
    """
    of_part = stats.hypergeom(n, released, examples)
    return min(1.0, 2.0 * float(min(of_part.cdf(right), of_part.sf(right - 1))))


@pytest.mark.parametrize(
    ("right", "examples", "released", "n", "expected"),
    [
        (1, 2, 2, 4, 1.0),  # of 4 images, 2 right, every pair but 2 of the 6 has one
        (2, 2, 2, 4, 2 / 6),
        (0, 2, 2, 4, 2 / 6),
        (500, 500, 500, 500, 1.0),  # all of the images: only the same count will do
        (499, 500, 500, 500, 0.0),
        (5, 500, 0, 1000, 0.0),  # more right in the part than in the whole
    ],
)
def test_the_probability_is_that_of_a_part(right, examples, released, n, expected):
    assert probability(right, examples, released, n) == pytest.approx(expected)


def test_a_part_varies_less_than_an_independent_sample():
    """450 of 500 where 475 of the other half were right: a chance for two samples of 500 and 1,000, not for a part."""
    table = [[450, 50], [925, 75]]
    assert stats.fisher_exact(table).pvalue > 0.05
    assert probability(450, 500, 925, 1000) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTED)
def test_500_images_agree_with_the_released_figures(name):
    """Each row of the report within its 95 % interval, and all of a preset together: 5 % is shared out (Bonferroni)."""
    report = json.loads((RESULTS / name / "report.json").read_text(encoding="utf-8"))
    run = RunFolder(presets.folder(name))
    config = run.load_config()
    if config.data.dataset != "digits" and not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("no prepared data sets: set TFDS_DATA_DIR")
    try:
        test = data.load(config.data, "test")
    except UserError as error:
        pytest.skip(str(error))
    first = min(row["epsilon"] for row in report["rows"] if row["attack"] == "pgd")
    rows = [
        row
        for row in report["rows"]
        if row["defense"] == "vqunet"
        and row["threat_model"] == "gray_box"
        and row["attack"] in QUICK
        and row["epsilon"] in (0.0, first)
    ]
    assert {row["attack"] for row in rows} == set(QUICK)

    part = sample(test, min(EXAMPLES, *(row["n"] for row in rows)))
    images, labels = part.images / np.float32(255.0), part.labels
    classifier = run.load_classifier()
    bare, defended = Chain(classifier), Chain(classifier, run.load_purifier())
    size, off = config.evaluation.batch_size, {}
    for row in rows:
        shown = images
        if row["attack"] != "none":
            attack = attacks.build(row["attack"], Threat(row["norm"], row["epsilon"]), row["steps"])
            shown = attack(bare.through(), images, labels, batch_size=size, seed=report["seed"])
        right = int(np.sum(defended.logits(shown, size).argmax(axis=1) == labels))
        chance = probability(right, len(labels), round(row["accuracy"] * row["n"]), row["n"])
        print(
            f"{name} {row['attack']} {row['epsilon']:.4g}: {right} of {len(labels)}, released {row['accuracy']:.1%}, p {chance:.3f}"
        )
        if chance < 0.05 / len(rows):
            off[row["attack"], row["epsilon"]] = (right / len(labels), row["accuracy"], chance)
    assert not off, f"measured, released, how probable that is: {off}"
