"""What the tables of a report say, looked up in its rows; and how numbers and names are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, WORST
from vqunet_tf.threat import ThreatModel

Row = dict[str, Any]
Budget = tuple[str, float]  # norm and epsilon

MISSING = "–"  # not measured
ATTACKERS = tuple(ThreatModel)

_GRADIENT = (ThreatModel.GRAY_BOX.value, ThreatModel.WHITE_BOX.value)
_LABELS = {
    "none": "no defence",
    "vqunet": "VQUNet",
    "jpeg": "JPEG",
    "bit_depth": "bit depth",
    "median": "median filter",
    "total_variation": "total variation",
    "unet": "U-Net, no codes",
    "vqvae": "VQ-VAE, no skips",
    "dae": "denoising autoencoder",
    "fgsm": "FGSM",
    "bim": "BIM",
    "pgd": "PGD",
    "pgd_targeted": "targeted PGD",
    "mim": "MIM",
    "cw_l2": "CW",
    "deepfool": "DeepFool",
    "apgd_ce": "APGD-CE",
    "apgd_dlr": "APGD-DLR",
    "square": "Square",
    "hopskipjump": "HopSkipJump",
    "transfer": "transfer",
    "noise": "random noise",
    "worst": "worst case",
}


@dataclass(frozen=True)
class Line:
    """One line of the first table: a defence within one budget; None is not measured."""

    defense: str
    clean: Row | None
    worst: dict[ThreatModel, Row | None]


def budgets(rows: Sequence[Row]) -> list[Budget]:
    """Norms and epsilons that were attacked with: linf before l2, small before large."""
    found = {(row["norm"], row["epsilon"]) for row in rows if row["attack"] != CLEAN}
    return sorted(found, key=lambda budget: (budget[0] != "linf", *budget))


def defenses(rows: Sequence[Row]) -> list[str]:
    """Names of the defences, in the order of the rows."""
    return list(dict.fromkeys(row["defense"] for row in rows))


def protagonist(names: Sequence[str]) -> str:
    """The defence that a report is about: `vqunet`, else the first that is one."""
    return "vqunet" if "vqunet" in names else next((name for name in names if name != UNDEFENDED), UNDEFENDED)


def measured(rows: Sequence[Row]) -> list[ThreatModel]:
    """Threat models that attacked anything."""
    asked = {row["threat_model"] for row in rows if row["attack"] != CLEAN}
    return [model for model in ATTACKERS if model.value in asked]


def attacks(rows: Sequence[Row], model: ThreatModel) -> list[str]:
    """Names of the attacks of one attacker, in the order of the rows: what a worst case is the worst of."""
    found = [row["attack"] for row in rows if row["threat_model"] == model.value]
    return [name for name in dict.fromkeys(found) if name not in (CLEAN, WORST)]


def clean(rows: Sequence[Row], defense: str) -> Row | None:
    """The row without an attack."""
    return next((row for row in rows if row["defense"] == defense and row["attack"] == CLEAN), None)


def find(rows: Sequence[Row], defense: str, attack: str, model: ThreatModel, budget: Budget) -> Row | None:
    """The row of one attack, or None.

    Without a defence there is no purifier to know: what follows its gradient counts for gray-box and
    white-box alike, whichever of the two it was measured as.
    """
    wanted = [model.value]
    if defense == UNDEFENDED and model.value in _GRADIENT:
        wanted += _GRADIENT
    here = [
        row
        for row in rows
        if (row["defense"], row["attack"]) == (defense, attack) and (row["norm"], row["epsilon"]) == budget
    ]
    return next((row for name in wanted for row in here if row["threat_model"] == name), None)


def headline(rows: Sequence[Row], budget: Budget) -> list[Line]:
    """Clean and worst-case rows of every defence within one budget."""
    return [
        Line(name, clean(rows, name), {model: find(rows, name, WORST, model, budget) for model in ATTACKERS})
        for name in defenses(rows)
    ]


def heat_map(rows: Sequence[Row], budget: Budget) -> dict[ThreatModel, list[tuple[str, dict[str, Row | None]]]]:
    """Attack × defence within one budget, attacker by attacker; the worst case is the last of each."""
    result, names = {}, defenses(rows)
    for model in measured(rows):
        here = [row for row in rows if row["threat_model"] == model.value and (row["norm"], row["epsilon"]) == budget]
        attacks = [name for name in dict.fromkeys(row["attack"] for row in here) if name not in (CLEAN, WORST)]
        if attacks:
            result[model] = [
                (attack, {name: find(rows, name, attack, model, budget) for name in names})
                for attack in (*attacks, WORST)
            ]
    return result


def curves(rows: Sequence[Row]) -> list[tuple[str, ThreatModel, dict[str, list[Row]]]]:
    """For each norm and attacker the worst-case rows of each defence by epsilon; the clean row stands for epsilon 0.

    Norms with fewer than two epsilons have no curve. The defence that the report is about comes last, to be drawn on top.
    """
    names, result = defenses(rows), []
    main = protagonist(names)
    order = sorted(names, key=lambda name: (name != UNDEFENDED, name == main))
    for norm in dict.fromkeys(norm for norm, _ in budgets(rows)):
        epsilons = [epsilon for other, epsilon in budgets(rows) if other == norm and epsilon > 0.0]
        for model in measured(rows) if len(epsilons) > 1 else ():
            lines = {}
            for name in order:
                worst = [find(rows, name, WORST, model, (norm, epsilon)) for epsilon in epsilons]
                if any(worst):
                    lines[name] = [row for row in (clean(rows, name), *worst) if row is not None]
            if lines:
                result.append((norm, model, lines))
    return result


def gradients(rows: Sequence[Row]) -> list[tuple[Row, dict[str, float], float]]:
    """White-box rows whose attack followed several gradients: what each left by name, and the least of them.

    (Variants of a transfer are surrogates.)
    """
    white = [row for row in rows if row["threat_model"] == ThreatModel.WHITE_BOX.value]
    found = [(row, row.get("variants") or {}) for row in white]
    return [(row, variants, min(variants.values())) for row, variants in found if len(variants) > 1]


def failed_first(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checks, those that failed on top."""
    return sorted(checks, key=lambda check: check["passed"])


def percent(share: float) -> str:
    """0.9125 → `91.2`."""
    return f"{100 * share:.1f}"


def interval(row: Row) -> str:
    """The 95 % interval, `88.1–93.6`."""
    low, high = row["interval"]
    return f"{percent(low)}–{percent(high)}"


def cell(row: Row | None) -> str:
    """`91.2 (88.1–93.6)`, or a dash for what was not measured."""
    return MISSING if row is None else f"{percent(row['accuracy'])} ({interval(row)})"


def radius(budget: Budget) -> str:
    """`0.1`, `8/255`, `0.5 (l2)`."""
    norm, epsilon = budget
    levels = round(255 * epsilon)
    is_level = norm == "linf" and levels and abs(255 * epsilon - levels) < 1e-6 and epsilon != round(epsilon, 2)
    text = f"{levels}/255" if is_level else f"{epsilon:.4g}"
    return text if norm == "linf" else f"{text} ({norm})"


def words(model: ThreatModel) -> str:
    """`gray-box`."""
    return model.value.replace("_", "-")


def label(name: str) -> str:
    """How a defence or an attack is called in running text; unknown names stay as they are."""
    return _LABELS.get(name, name)


def machine(host: dict[str, Any]) -> str:
    """One line about the machine."""
    return ", ".join([f"{host['processor']}, {host['cores']} cores", *host["accelerators"]])


def without_paths(tree: Any) -> Any:
    """A tree of settings in which a path has become its last part: where things lie is nobody's business."""
    if isinstance(tree, dict):
        return {key: without_paths(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_paths(value) for value in tree]
    if isinstance(tree, str) and re.search(r"[/\\]", tree):
        return PurePosixPath(tree.replace("\\", "/")).name
    return tree
