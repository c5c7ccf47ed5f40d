"""report.md from report.json: the honest table first, then everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, WORST
from vqunet_tf.threat import ThreatModel

Row = dict[str, Any]


def render(report: dict[str, Any]) -> str:
    """Returns report.md for a report as in report.json."""
    return "\n".join(
        [*_head(report), "", headline(report), "", *_meaning(report), *_rows(report), *_checks(report), *_again(report)]
    )


def headline(report: dict[str, Any]) -> str:
    """The table a reader sees first: accuracy, one line for each epsilon and threat model.

    Each line is the worst case over all attacks; a column is a defence.
    """
    rows = report["rows"]
    defenses = list(dict.fromkeys(row["defense"] for row in rows))
    lines = [["epsilon", "attacker", "attack", *defenses]]
    lines.append(["0", "nobody", CLEAN, *(_cell(_find(rows, defense, attack=CLEAN)) for defense in defenses)])
    attacked = [row for row in rows if row["attack"] != CLEAN]
    for norm, epsilon in dict.fromkeys((row["norm"], row["epsilon"]) for row in attacked):
        for model in ThreatModel:
            here = [row for row in attacked if (row["norm"], row["epsilon"]) == (norm, epsilon)]
            if not any(row["threat_model"] == model.value for row in here):
                continue
            cells = []
            for defense in defenses:
                # Without a defence there is one kind of attacker, whatever it is called.
                threat_model = None if defense == UNDEFENDED else model.value
                cells.append(_cell(_find(here, defense, attack=WORST, threat_model=threat_model)))
            names = dict.fromkeys(row["attack"] for row in here if row["attack"] != WORST)
            lines.append([_radius(norm, epsilon), _words(model), f"worst of {', '.join(names)}", *cells])
    return _table(lines, numbers=len(defenses))


def _head(report: dict[str, Any]) -> list[str]:
    classifier, purifier = report["classifier"], report["purifier"]
    n = report["rows"][0]["n"]
    return [
        f"# {report['dataset']}: accuracy under attack",
        "",
        f"Accuracy in %, with its 95 % interval, on {n} test images. Purifier: {purifier['name']}, "
        f"objective `{report['objective']}`, {purifier['params']:,} parameters. Classifier: {classifier['name']}, "
        f"{classifier['params']:,} parameters.",
    ]


def _meaning(report: dict[str, Any]) -> list[str]:
    asked = {row["threat_model"] for row in report["rows"]}
    measured = [model for model in ThreatModel if model.value in asked]
    classifier, purifier = report["classifier"], report["purifier"]
    lines = [
        "**Gray-box accuracy is not robustness.** It says what happens to an attacker who never hears of the purifier; "
        "only the white-box lines bear on one who does, and they are an upper bound: a stronger attack may find more.",
        "",
        *(f"- A {_words(model)} attacker {model.knowledge}." for model in measured),
        "- `worst`: an image counts only if it is classified right untouched and under every attack of the line. "
        "A white-box attacker may use the gray-box images too.",
        f"- `{UNDEFENDED}` is the bare classifier: there is no purifier to know, so both attackers get one number.",
    ]
    if ThreatModel.WHITE_BOX not in measured:
        lines.append("- White-box attacks were **not measured** here: nothing in this report speaks of robustness.")
    lines += [
        "",
        f"On all {classifier['n']} clean test images: {classifier['accuracy']:.2%} without, "
        f"{purifier['clean_accuracy']:.2%} with the purifier.",
    ]
    if purifier["codebook_usage"]:
        shares = ", ".join(f"{share:.0%}" for share in purifier["codebook_usage"])
        lines.append(f"Codes in use, finest quantizer first: {shares}.")
    lines.append(f"Kept by the training: {report['selection']}, with averaged weights.")
    return [*lines, ""]


def _rows(report: dict[str, Any]) -> list[str]:
    lines = [["defence", "attacker", "attack", "epsilon", "steps", "n", "accuracy", "seconds"]]
    for row in report["rows"]:
        is_bare = row["defense"] == UNDEFENDED or row["attack"] == CLEAN
        attacker = "–" if is_bare else _words(ThreatModel(row["threat_model"]))
        radius = _radius(row["norm"], row["epsilon"])
        lines.append(
            [
                row["defense"],
                attacker,
                row["attack"],
                radius,
                str(row["steps"]),
                str(row["n"]),
                _cell(row),
                f"{row['seconds']:.1f}",
            ]
        )
    return ["## All rows", "", _table(lines, numbers=4), ""]


def _checks(report: dict[str, Any]) -> list[str]:
    """Each check, the failed ones first."""
    found = sorted(report["checks"], key=lambda check: check["passed"])
    failed = sum(not check["passed"] for check in found)
    verdict = f"{failed} of {len(found)} failed: read the numbers above with that in mind." if failed else "All passed."
    lines = [["check", "", "what was seen"]]
    lines += [[f"`{check['name']}`", "passed" if check["passed"] else "**FAILED**", check["detail"]] for check in found]
    return ["## Does the evaluation trust itself?", "", verdict, "", _table(lines), ""]


def _again(report: dict[str, Any]) -> list[str]:
    host = report["host"]
    machine = ", ".join([f"{host['processor']}, {host['cores']} cores", *host["accelerators"]])
    return [
        "## The same numbers again",
        "",
        f"    {report['command']}",
        "",
        f"Seed {report['seed']}; {'; '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
        f"Measured on {machine}.",
        "",
    ]


def _find(rows: Iterable[Row], defense: str, attack: str, threat_model: str | None = None) -> Row | None:
    for row in rows:
        if row["defense"] == defense and row["attack"] == attack and threat_model in (None, row["threat_model"]):
            return row
    return None


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _radius(norm: str, epsilon: float) -> str:
    levels = round(255 * epsilon)
    is_level = norm == "linf" and levels and abs(255 * epsilon - levels) < 1e-6 and epsilon != round(epsilon, 2)
    text = f"{levels}/255" if is_level else f"{epsilon:.4g}"
    return text if norm == "linf" else f"{text} ({norm})"


def _words(model: ThreatModel) -> str:
    return model.value.replace("_", "-")


def _table(lines: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table that also reads well as plain text; the last `numbers` columns are set to the right."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    right = [i >= len(widths) - numbers for i in range(len(widths))]

    def text(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f"{'-' * (w + 1)}{':' if r else '-'}" for w, r in zip(widths, right, strict=True))
    return "\n".join([text(lines[0]), f"|{rule}|", *map(text, lines[1:])])
