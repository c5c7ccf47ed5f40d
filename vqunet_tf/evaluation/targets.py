"""What the released weights are to reach, and what the paper says: each with the figure that decides it.

No measured number stands here: figures are found in `results/<preset>/report.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqunet_tf.evaluation.figures import Accuracy, Ahead, Attacked, Cost, Figure, Loss
from vqunet_tf.threat import ThreatModel

# Released presets and their data sets, in the order of the tables.
PRESETS = {
    "fashion_mnist": "fashion_mnist",
    "fashion_mnist_adaptive": "fashion_mnist",
    "cifar10": "cifar10",
    "cifar10_adaptive": "cifar10",
    "digits": "digits",
}

# Reports of released weights against the attacks that a target names and no others, which leave no bounds; and their data sets.
NAMED = {"fashion_mnist_named": "fashion_mnist", "cifar10_named": "cifar10"}

AT_LEAST, ABOVE, AT_MOST, BELOW = ">=", ">", "<=", "<"

# The same attack on anything: what counts as the white-box attacker at the very least.
_WHITE_BOX = ("pgd", "apgd_ce", "apgd_dlr")
_FASHION = ("fgsm", "pgd", "pgd_targeted", "mim")
_CIFAR = ("fgsm", "bim", "pgd", "pgd_targeted", "mim")
_GRAY, _WHITE = ThreatModel.GRAY_BOX, ThreatModel.WHITE_BOX


@dataclass(frozen=True)
class Target:
    """A figure that is to stand in a relation to a threshold.

    preset: whose report decides, or one of NAMED. classifier: instead, any report of the data set with this classifier.
    words: what is asked for, in full. threshold: a share, or what the figure counts.
    """

    dataset: str
    preset: str
    words: str
    figure: Figure
    relation: str
    threshold: float
    classifier: str = ""


def _defense_gan(which: str, percent: float) -> Target:
    """FGSM on one of the classifiers of Defense-GAN."""
    return Target(
        "fashion_mnist",
        "",
        f"gray-box FGSM, ε = 0.3, on Defense-GAN's classifier {which.upper()}: above {percent}",
        Attacked(_GRAY, ("fgsm",), epsilon=0.3, together=False),
        ABOVE,
        percent / 100,
        f"defense_gan_{which}",
    )


TARGETS: tuple[Target, ...] = (
    Target("fashion_mnist", "fashion_mnist", "classifier at least 93.5", Accuracy("classifier"), AT_LEAST, 0.935),
    Target(
        "fashion_mnist",
        "fashion_mnist",
        "clean accuracy behind the gray-box purifier within 0.5 points of the classifier",
        Loss(),
        AT_MOST,
        0.005,
    ),
    Target(
        "fashion_mnist",
        "fashion_mnist_named",
        "gray-box worst of FGSM, PGD-40, targeted PGD-40, MIM, ε = 0.1: at least 91",
        Attacked(_GRAY, _FASHION, epsilon=0.1, steps=40),
        AT_LEAST,
        0.91,
    ),
    Target(
        "fashion_mnist",
        "fashion_mnist",
        "gray-box FGSM, ε = 0.3: at least 89.6 (the best row of Defense-GAN)",
        Attacked(_GRAY, ("fgsm",), epsilon=0.3, together=False),
        AT_LEAST,
        0.896,
    ),
    Target(
        "fashion_mnist",
        "fashion_mnist_named",
        "gray-box worst of FGSM, PGD-40, targeted PGD-40, MIM, ε = 0.3: at least 88",
        Attacked(_GRAY, _FASHION, epsilon=0.3, steps=40),
        AT_LEAST,
        0.88,
    ),
    Target(
        "fashion_mnist",
        "fashion_mnist",
        "gray-box CW and DeepFool (l2), each at least 92",
        Attacked(_GRAY, ("cw_l2", "deepfool"), norm="l2", together=False),
        AT_LEAST,
        0.92,
    ),
    _defense_gan("a", 87.9),
    _defense_gan("b", 62.9),
    _defense_gan("c", 89.6),
    _defense_gan("d", 87.5),
    Target(
        "fashion_mnist",
        "fashion_mnist_adaptive",
        "adaptive purifier, white-box worst case, ε = 0.1: at least 78.5 (an adversarially trained network)",
        Attacked(_WHITE, _WHITE_BOX, epsilon=0.1, others=True),
        AT_LEAST,
        0.785,
    ),
    Target(
        "fashion_mnist",
        "fashion_mnist_adaptive",
        "adaptive purifier, clean: at least 88",
        Accuracy("purifier"),
        AT_LEAST,
        0.88,
    ),
    Target(
        "fashion_mnist",
        "fashion_mnist",
        "gray-box worst case above every untrained defence and every ablation, at every ε",
        Ahead(),
        ABOVE,
        0.0,
    ),
    Target("cifar10", "cifar10", "classifier at least 93", Accuracy("classifier"), AT_LEAST, 0.93),
    Target(
        "cifar10",
        "cifar10",
        "clean accuracy behind the gray-box purifier within 1 point of the classifier",
        Loss(),
        AT_MOST,
        0.01,
    ),
    Target(
        "cifar10",
        "cifar10_named",
        "gray-box worst of FGSM, BIM, PGD-40, targeted PGD-40, MIM, ε = 8/255: at least 86",
        Attacked(_GRAY, _CIFAR, epsilon=8 / 255, steps=40),
        AT_LEAST,
        0.86,
    ),
    Target(
        "cifar10",
        "cifar10",
        "gray-box CW and DeepFool (l2), each at least 90",
        Attacked(_GRAY, ("cw_l2", "deepfool"), norm="l2", together=False),
        AT_LEAST,
        0.90,
    ),
    *(
        Target(
            "cifar10",
            "cifar10_adaptive",
            f"adaptive purifier, white-box worst case, ε = 8/255: {words}",
            Attacked(_WHITE, _WHITE_BOX, epsilon=8 / 255, others=True),
            AT_LEAST,
            threshold,
        )
        for words, threshold in (
            ("at least 30", 0.30),
            ("aim at 44.7 (an autoencoder as purifier)", 0.447),
            ("aim at 59.2 (the same, fine-tuned adversarially)", 0.592),
        )
    ),
    Target(
        "cifar10",
        "cifar10",
        "one forward pass of at most 60 million multiply-accumulates an image",
        Cost(),
        AT_MOST,
        60.0,
    ),
    Target(
        "cifar10",
        "cifar10",
        "gray-box worst case above every untrained defence and every ablation, at every ε",
        Ahead(),
        ABOVE,
        0.0,
    ),
)

# What the abstract of the paper says (He & Singhal 2024, arXiv 2406.03117).
CLAIMS: tuple[Target, ...] = tuple(
    claim
    for dataset in ("fashion_mnist", "cifar10")
    for claim in (
        Target(dataset, dataset, "purifying costs less than 1 % of clean accuracy", Loss(), BELOW, 0.01),
        Target(
            dataset,
            dataset,
            "better than other defences that remove noise, under various attacks; here: the gray-box worst case",
            Ahead(),
            ABOVE,
            0.0,
        ),
    )
)
