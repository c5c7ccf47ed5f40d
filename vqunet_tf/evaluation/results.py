"""The tables of RESULTS.md, from the reports of released presets and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import comparisons, summary
from vqunet_tf.evaluation.figures import UNTRAINED, Report, members
from vqunet_tf.evaluation.markdown import as_table
from vqunet_tf.evaluation.rows import UNDEFENDED, WORST
from vqunet_tf.evaluation.summary import ATTACKERS, MISSING, Budget, Row, cell, label, radius, words
from vqunet_tf.evaluation.targets import PRESETS
from vqunet_tf.threat import ThreatModel

SCHEMA = 1
_CURVES = "plots/curves.png"


@dataclass(frozen=True)
class Released:
    """The report of a preset, the folder it lies in as a link, and the files beside it that a table may link."""

    preset: str
    report: Report
    link: str
    files: frozenset[str] = frozenset()

    @property
    def suffix(self) -> str:
        """What tells its rows from those of the data set's first preset: `adaptive`, or nothing."""
        rest = self.preset.removeprefix(self.report["dataset"])
        return self.preset if rest == self.preset else rest.strip("_")


def load(folder: Path, link: str = "results") -> list[Released]:
    """Returns the reports `<folder>/<preset>/report.json`, the known presets first.

    link: how the folder is called in links. A report that cannot be read raises a `UserError`.
    """
    known = list(PRESETS)
    paths = sorted(folder.glob("*/report.json"), key=lambda path: path.parent.name)
    paths.sort(key=lambda path: known.index(path.parent.name) if path.parent.name in known else len(known))
    return [_read(path, f"{link}/{path.parent.name}") for path in paths]


def _read(path: Path, link: str) -> Released:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): make it again with trainers.evaluate") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or not report.get("rows"):
        raise UserError(f"{path} is no report of schema {SCHEMA}: make it again with trainers.evaluate")
    if report.get("split") != "test":
        raise UserError(
            f"{path} is of the {report.get('split')} split, which settings are chosen by: make it again with trainers.evaluate --split=test"
        )
    files = frozenset(name for name in ("report.md", _CURVES) if (path.parent / name).exists())
    return Released(path.parent.name, report, link, files)


def tables(released: Sequence[Released]) -> dict[str, Callable[[], str]]:
    """Returns what makes each table, by the name it has in the markers of RESULTS.md."""
    datasets = dict.fromkeys([*PRESETS.values(), *(each.report["dataset"] for each in released)])
    reports = [(each.preset, each.report) for each in released]
    result: dict[str, Callable[[], str]] = {}
    for dataset in datasets:
        own = [each for each in released if each.report["dataset"] == dataset]
        result[dataset] = partial(accuracy, dataset, own)
        result[f"targets {dataset}"] = partial(comparisons.targets, dataset, reports)
        result[f"published {dataset}"] = partial(comparisons.published, dataset, reports)
    return {**result, "claims": partial(comparisons.claims, reports), "commands": partial(commands, released)}


def accuracy(dataset: str, released: Sequence[Released]) -> str:
    """Every defence within every budget, the same image by image worst case of each attacker, and what they were."""
    if not released:
        return f"Not measured yet: no report of `{dataset}` lies in `results/`."
    lines = [["epsilon", "defence", "clean", *(f"{words(model)} worst" for model in ATTACKERS), "n"]]
    reports = [each.report["rows"] for each in released]
    for budget in summary.budgets([row for rows in reports for row in rows]):
        lines += _lines(released, budget)
    parts = [as_table(lines, numbers=2 + len(ATTACKERS))]
    parts += ["\n".join(_about(each)) for each in released]
    for each in released:
        if _CURVES in each.files:
            parts.append(f"![{each.preset}: accuracy against epsilon]({each.link}/{_CURVES})")
    return "\n\n".join(parts)


def commands(released: Sequence[Released]) -> str:
    """What gives the numbers of each report again, and where they were measured."""
    lines = [["preset", "command", "took", "measured on"]]
    reports = {each.preset: each.report for each in released}
    for preset in dict.fromkeys([*PRESETS, *reports]):
        report = reports.get(preset)
        if report is None:
            command = f"python -m trainers.evaluate --preset={preset} --suite=full"
            lines.append([f"`{preset}`", f"`{command}`", MISSING, "not measured yet"])
            continue
        seconds = report.get("seconds")
        took = MISSING if seconds is None else f"{seconds / 60:.0f} min"
        place = f"{summary.machine(report['host'])}; TensorFlow {report['versions']['tensorflow']}"
        lines.append([f"`{preset}`", f"`{report['command']}`", took, place])
    return as_table(lines)


def _lines(released: Sequence[Released], budget: Budget) -> list[list[str]]:
    """The lines of one budget; what needs no training is shown once for each classifier."""
    result: dict[str, list[str]] = {}
    for each in released:
        for line in summary.headline(each.report["rows"], budget):
            rows = [line.clean, *(line.worst[model] for model in ATTACKERS)]
            if not any(rows[1:]):
                continue
            name = _name(line.defense, each, released)
            result.setdefault(name, [radius(budget), name, *map(cell, rows), _counts(rows)])
    return list(result.values())


def _name(defense: str, own: Released, released: Sequence[Released]) -> str:
    """`vqunet (adaptive)`; without the suffix where it is what another preset has too."""
    first = next(each for each in released if _classifier(each) == _classifier(own))
    shared = defense in (UNDEFENDED, *UNTRAINED)
    suffix = first.suffix if shared else own.suffix
    return f"{defense} ({suffix})" if suffix else defense


def _classifier(released: Released) -> tuple[Any, ...]:
    facts = released.report["classifier"]
    return facts["name"], facts["params"], facts["accuracy"]


def _counts(rows: Iterable[Row | None]) -> str:
    """How many images: one number, or one for each column."""
    found = [MISSING if row is None else str(row["n"]) for row in rows]
    numbers = {text for text in found if text != MISSING}
    return numbers.pop() if len(numbers) == 1 else " / ".join(found)


def _about(released: Released) -> list[str]:
    """What a report measured, in a list: its models, what is in each worst case, and whether its checks passed."""
    report = released.report
    classifier, purifier = report["classifier"], report["purifier"]
    main = summary.protagonist(summary.defenses(report["rows"]))
    name = f"`{released.preset}`"
    if "report.md" in released.files:
        name = f"[{name}]({released.link}/report.md)"
    lines = [
        f"{name}: classifier `{classifier['name']}`, {classifier['params']:,} parameters; purifier `{purifier['name']}`, "
        f"{purifier['params']:,} parameters, objective `{report['objective']}`; seed {report['seed']}. "
        f"On all {classifier['n']} clean test images {classifier['accuracy']:.2%} without, "
        f"{purifier['clean_accuracy']:.2%} with the purifier.",
        "",
    ]
    for model in ATTACKERS:
        made: dict[str, list[Budget]] = {}
        for budget in summary.budgets(report["rows"]):
            text = _composition(report["rows"], main, model, budget)
            if text:
                made.setdefault(text, []).append(budget)
        for text, several in made.items():
            lines.append(f"- {words(model)} worst, ε = {', '.join(map(radius, several))}: {text}")
        if not made:
            lines.append(f"- {words(model)}: not measured.")
    failed = [check for check in report["checks"] if not check["passed"]]
    total = len(report["checks"])
    told = "; ".join(f"`{check['name']}` ({check['detail']})" for check in failed)
    lines.append(
        f"- **{len(failed)} of {total} checks failed**: {told}." if failed else f"- All {total} checks passed."
    )
    return lines + [f"- Note: {note}." for note in report.get("notes", [])]


def _composition(rows: Sequence[Row], defense: str, model: ThreatModel, budget: Budget) -> str:
    """The attacks in one worst case and how many images they met; nothing if the attacker was not measured."""
    inside, beside = members(rows, defense, model, budget)
    worst = summary.find(rows, defense, WORST, model, budget)
    own = [row for row in inside if row["threat_model"] == model.value]
    if not own or worst is None:
        return ""
    parts = [_on_images(own)]
    for other in ATTACKERS:
        carried = [row for row in inside if row not in own and row["threat_model"] == other.value]
        if carried:
            parts.append(f"also the {words(other)} {_on_images(carried)}")
    if len({row["n"] for row in inside}) > 1:
        parts.append(f"counted on the {worst['n']} images that all of them met")
    if beside:
        parts.append(f"beside it, on too few images: {_on_images(beside)}")
    return "; ".join(parts) + "."


def _on_images(rows: Sequence[Row]) -> str:
    """`FGSM, PGD (40) on 1000 images; Square (1000) on 200`: grouped by how many images they met."""
    groups: dict[int, list[str]] = {}
    for row in rows:
        steps = f" ({row['steps']})" if row["steps"] > 1 else ""
        groups.setdefault(row["n"], []).append(f"{label(row['attack'])}{steps}")
    return ", ".join(f"{', '.join(names)} on {n} images" for n, names in groups.items())
