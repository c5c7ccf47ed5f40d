"""Published figures to stand beside ours, each with its protocol. Accuracy in %, epsilons on the [0,1] scale.

These are other people's numbers, as they were read or are remembered; none was measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vqunet_tf.evaluation.rows import WORST
from vqunet_tf.threat import ThreatModel

READ, MEMORY = "read in the source", "from memory"


@dataclass(frozen=True)
class Near:
    """Where our figure comes from: of these attacks the first that a report has, within its nearest radius.

    classifier: a report of this classifier is nearer than that of the preset.
    """

    model: ThreatModel
    attacks: tuple[str, ...]
    epsilon: float
    norm: str = "linf"
    classifier: str = ""


@dataclass(frozen=True)
class Published:
    """One published figure.

    protocol: classifier, attack and epsilon in words. threat: what the attacker knew, in our words.
    clean: accuracy on clean images with the defence. attacked: under attack, `without → with` where both are known.
    known: whether it was read in the source or is from memory. source: where.
    """

    dataset: str
    method: str
    protocol: str
    threat: str
    clean: str
    attacked: str
    known: str
    source: str
    near: Near


_GRAY, _WHITE = ThreatModel.GRAY_BOX, ThreatModel.WHITE_BOX
_FASHION, _CIFAR = "fashion_mnist", "cifar10"
_DG, _PIXEL = "Samangouei et al. 2018", "Song et al. 2018"

# Clean accuracy of the bare classifiers of Defense-GAN, and FGSM at 0.3: bare, Defense-GAN, MagNet, trained against FGSM.
_DEFENSE_GAN = {
    "a": ("93.4", "10.2", "87.9", "8.9", "79.7"),
    "b": ("74.7", "10.2", "62.9", "16.8", "13.6"),
    "c": ("93.3", "13.9", "89.6", "11.0", "80.4"),
    "d": ("89.2", "8.2", "87.5", "9.9", "69.8"),
}


_BY_DEFENSE_GAN = ("Defense-GAN", "MagNet, run for Defense-GAN", "training against FGSM, run for Defense-GAN")


def _defense_gan() -> list[Published]:
    """A row for each defence and classifier."""
    rows = []
    for k, method in enumerate(_BY_DEFENSE_GAN):
        for which, (clean, bare, *defended) in _DEFENSE_GAN.items():
            near = Near(_GRAY, ("fgsm",), 0.3, classifier=f"defense_gan_{which}")
            protocol = f"its classifier {which.upper()} ({clean} bare), FGSM, ε = 0.3"
            attacked = f"{bare} → {defended[k]}"
            rows.append(Published(_FASHION, method, protocol, "gray-box", "–", attacked, MEMORY, _DG, near))
    return rows


def _fashion(method: str, protocol: str, threat: str, clean: str, attacked: str, source: str, near: Near) -> Published:
    return Published(_FASHION, method, protocol, threat, clean, attacked, READ, source, near)


def _cifar(method: str, protocol: str, threat: str, clean: str, attacked: str, source: str, near: Near) -> Published:
    return Published(_CIFAR, method, protocol, threat, clean, attacked, READ, source, near)


def _pixel(attack: str, attacked: str, near: Near) -> Published:
    protocol = f"ResNet (93 bare), {attack}, ε = 25/255"
    return Published(_FASHION, "PixelDefend", protocol, "gray-box", "88", attacked, MEMORY, _PIXEL, near)


def _gray(*attacks: str, epsilon: float, norm: str = "linf") -> Near:
    return Near(_GRAY, attacks, epsilon, norm)


def _worst(epsilon: float) -> Near:
    return Near(_WHITE, (WORST,), epsilon)


_GCLN = "the GCLN paper (generative cleaning, quantised)"
_MMR = "Croce et al. 2019 (MMR), table 1"
_SMALL = "small CNN, several attacks, 1000 images, ε = 0.1"
_BOOST = "max-andr/provably-robust-boosting, table 3"
_ATTACK = "the DiffAttack paper (2023), tables 1 and 4"
_ATOP = "the AToP paper's open review"
_BENCH = "RobustBench, March 2025"
_AA, _AA_ALL = "AutoAttack, ε = 8/255", "AutoAttack through all, ε = 8/255"
_EOT = "PGD-200 with EOT-20, full gradient, 512 images, ε = 8/255"
_E8, _E25 = 8 / 255, 25 / 255

PUBLISHED: tuple[Published, ...] = (
    *_defense_gan(),
    *(
        Published(
            _FASHION,
            "Defense-GAN",
            f"its classifier {which.upper()}, CW l2: 100 steps of rate 10, one constant, no bound",
            "gray-box",
            "–",
            figure,
            MEMORY,
            _DG,
            Near(_GRAY, ("cw_l2",), math.inf, "l2", f"defense_gan_{which}"),
        )
        for which, figure in (("a", "89.6"), ("b", "65.6"), ("c", "89.6"), ("d", "87.5"))
    ),
    _pixel("FGSM", "24 → 74", _gray("fgsm", epsilon=_E25)),
    _pixel("BIM", "0 → 76", _gray("bim", "pgd", epsilon=_E25)),
    _pixel("the strongest of FGSM, BIM, DeepFool, CW", "0 → 74", _gray(WORST, epsilon=_E25)),
    Published(
        _FASHION,
        "training against BIM, run for PixelDefend",
        "ResNet, the strongest of FGSM, BIM, DeepFool, CW, ε = 25/255",
        "white-box",
        "91",
        "63",
        MEMORY,
        _PIXEL,
        _worst(_E25),
    ),
    _fashion(
        "U-shaped autoencoder (Mandal 2023)",
        "VGG16, PGD, ε = 0.15; trained on the attack of the test",
        "gray-box",
        "–",
        "29.4 → 72.9",
        "its repository",
        _gray("pgd", epsilon=0.15),
    ),
    _fashion(
        "purification by the ELBO of a VAE (AAAI 2024)",
        "a small network, PGD, ε = 50/255, 512 images",
        "gray-box",
        "–",
        "0 → 71.1",
        "its notebooks",
        _gray("pgd", epsilon=50 / 255),
    ),
    _fashion("none", _SMALL, "white-box", "90.5", "4.0", _MMR, _worst(0.1)),
    _fashion("training against PGD", _SMALL, "white-box", "88.46", "78.5", _MMR, _worst(0.1)),
    _fashion("MMR and training against PGD", _SMALL, "white-box", "85.5", "73.4", _MMR, _worst(0.1)),
    _fashion(
        "provable training (Wong & Kolter)",
        "CNN, ε = 0.1",
        "white-box",
        "78.27",
        "68.4; proven 65.5",
        _BOOST,
        _worst(0.1),
    ),
    _fashion(
        "robust boosted trees",
        "ε = 0.1",
        "any attack",
        "85.85",
        "proven 76.83",
        _BOOST,
        _worst(0.1),
    ),
    _fashion("linf-distance network", "ε = 0.1", "any attack", "–", "proven 79.23", "its repository", _worst(0.1)),
    _fashion(
        "training against PGD",
        "CNN, AutoAttack, ε = 0.3",
        "white-box",
        "77.76",
        "45.99 (PGD-100: 56.87)",
        "MTandHJ/PyTorch-Robust",
        _worst(0.3),
    ),
    _cifar(
        "PixelDefend",
        "ResNet, the strongest of its attacks, ε = 8/255",
        "gray-box",
        "90",
        "70",
        "the list of robust-ml.org",
        _gray(WORST, epsilon=_E8),
    ),
    _cifar("PixelDefend", "ResNet, BPDA, ε = 8/255", "white-box", "90", "9", "the list of robust-ml.org", _worst(_E8)),
    *(
        _cifar(
            "GCLN",
            f"its classifier (94.4 bare), {attack}, ε = 8/256",
            "gray-box (called white-box)",
            "91.7",
            figure,
            _GCLN,
            near,
        )
        for attack, figure, near in (
            ("FGSM", "75", _gray("fgsm", epsilon=8 / 256)),
            ("PGD-10", "86", _gray("pgd", epsilon=8 / 256)),
            ("BIM-10", "86", _gray("bim", "pgd", epsilon=8 / 256)),
        )
    ),
    _cifar("GCLN", "BPDA by its authors, 10 to 100 steps, ε = 0.031", "white-box", "91.7", "53", _GCLN, _worst(0.031)),
    _cifar(
        "MagNet",
        "its classifier (91 bare), CW l2, radius 0.5",
        "gray-box",
        "–",
        "83; 0 where the attacker knows it",
        "the list of robust-ml.org",
        _gray("cw_l2", epsilon=0.5, norm="l2"),
    ),
    _cifar("DiffPure", f"WRN-28-10, {_AA_ALL}", "white-box", "89.02", "70.64", _ATTACK, _worst(_E8)),
    _cifar("DiffPure", "WRN-28-10, DiffAttack, ε = 8/255", "white-box", "89.02", "46.88", _ATTACK, _worst(_E8)),
    _cifar("DiffPure", f"WRN-70-16, {_EOT}", "white-box", "92.50", "42.20", "the MAE-Pure submission", _worst(_E8)),
    _cifar("SOAP", f"WRN-28-10, {_EOT}", "white-box", "91.89", "4.56", "the MAE-Pure submission", _worst(_E8)),
    _cifar(
        "MimicDiffusion",
        "WRN-28-10, exact gradients, ε = 8/255",
        "white-box",
        "–",
        "2.73 (claimed 92.67)",
        "the DiffBreak paper (2025)",
        _worst(_E8),
    ),
    _cifar(
        "autoencoder as purifier", f"{_AA_ALL}; classifier not named", "white-box", "–", "44.73", _ATOP, _worst(_E8)
    ),
    _cifar(
        "autoencoder as purifier, fine-tuned adversarially (AToP)",
        f"{_AA_ALL}; classifier not named",
        "white-box",
        "–",
        "59.18",
        _ATOP,
        _worst(_E8),
    ),
    _cifar(
        "training against PGD (Madry et al. 2018)",
        "PGD, ε = 8/255",
        "white-box",
        "87",
        "46–47",
        "the list of robust-ml.org",
        _worst(_E8),
    ),
    _cifar(
        "training against PGD",
        f"ResNet-18, {_AA}",
        "white-box",
        "84.26",
        "46.82",
        "MTandHJ/PyTorch-Robust",
        _worst(_E8),
    ),
    _cifar(
        "Addepalli et al. 2022, no further data",
        f"ResNet-18, {_AA}",
        "white-box",
        "85.71",
        "52.48",
        _BENCH,
        _worst(_E8),
    ),
    _cifar(
        "Gowal et al. 2021, 100 M made images",
        f"PreActResNet-18, {_AA}",
        "white-box",
        "87.35",
        "58.50",
        _BENCH,
        _worst(_E8),
    ),
    _cifar(
        "Bartoldson et al. 2024, 300 M made images",
        f"WRN-94-16, {_AA}",
        "white-box",
        "93.68",
        "73.71",
        _BENCH,
        _worst(_E8),
    ),
)
