"""report.md from report.json: the honest table first, then everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vqunet_tf.evaluation import summary
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED
from vqunet_tf.evaluation.summary import ATTACKERS, cell, failed_first, measured, percent, radius, words
from vqunet_tf.threat import ThreatModel


def render(report: dict[str, Any]) -> str:
    """Returns report.md for a report as in report.json."""
    return "\n".join(
        [
            *_head(report),
            "",
            *_banner(report),
            headline(report),
            "",
            *_meaning(report),
            *_heat_maps(report),
            *_gradients(report),
            *_checks(report),
            *_rows(report),
            *_again(report),
        ]
    )


def headline(report: dict[str, Any]) -> str:
    """The table a reader sees first: for each budget and defence, accuracy on clean images and the worst case by attacker.

    A dash is what was not measured.
    """
    lines = [["epsilon", "defence", "clean", *(f"{words(model)} worst" for model in ATTACKERS)]]
    for budget in summary.budgets(report["rows"]):
        for line in summary.headline(report["rows"], budget):
            worst = [_of(line.worst[model], line.clean) for model in ATTACKERS]
            lines.append([radius(budget), line.defense, cell(line.clean), *worst])
    return as_table(lines, numbers=1 + len(ATTACKERS))


def _of(row: dict[str, Any] | None, clean: dict[str, Any] | None) -> str:
    """An accuracy, with the number of images where it is of fewer than the clean one."""
    fewer = row is not None and clean is not None and row["n"] < clean["n"]
    return f"{cell(row)}, n = {row['n']}" if row is not None and fewer else cell(row)


def _head(report: dict[str, Any]) -> list[str]:
    classifier, purifier = report["classifier"], report["purifier"]
    n = max(row["n"] for row in report["rows"])
    split = report["split"]
    return [
        f"# {report['dataset']}: accuracy under attack",
        "",
        f"Accuracy in %, with its 95 % interval, on {n} {split} images. Purifier: {purifier['name']}, "
        f"objective `{report['objective']}`, {purifier['params']:,} parameters. Classifier: {classifier['name']}, "
        f"{classifier['params']:,} parameters.",
    ]


def _banner(report: dict[str, Any]) -> list[str]:
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    if not failed:
        return []
    names = ", ".join(f"`{name}`" for name in failed)
    return [
        f"> **{len(failed)} of {len(report['checks'])} checks failed** ({names}): do not rely on these numbers.",
        "",
    ]


def _meaning(report: dict[str, Any]) -> list[str]:
    found = measured(report["rows"])
    classifier, purifier = report["classifier"], report["purifier"]
    lines = [
        "**Gray-box accuracy is not robustness.** It says what happens to an attacker who never hears of the purifier; "
        "only the white-box column bears on one who does, and it is an upper bound: a stronger attack may find more.",
        "",
        *(
            f"- A {words(model)} attacker {model.knowledge}. Here: {', '.join(summary.attacks(report['rows'], model))}."
            for model in found
        ),
        "- Worst case: an image counts only if it is classified right untouched and under every attack of that kind. "
        "A white-box attacker may use the gray-box images too.",
        f"- `{UNDEFENDED}` is the bare classifier: there is no purifier to know, so both attackers get one number.",
    ]
    if ThreatModel.WHITE_BOX not in found:
        lines.append("- White-box attacks were **not measured** here: nothing in this report speaks of robustness.")
    lines += [f"- Note: {note}." for note in report.get("notes", [])]
    lines += [
        "",
        f"On all {classifier['n']} clean {report['split']} images: {classifier['accuracy']:.2%} without, "
        f"{purifier['clean_accuracy']:.2%} with the purifier.",
    ]
    if purifier["codebook_usage"]:
        shares = ", ".join(f"{share:.0%}" for share in purifier["codebook_usage"])
        lines.append(f"Codes in use, finest quantizer first: {shares}.")
    if "selection" in report:
        lines.append(f"Kept by the training: {report['selection']}, with averaged weights.")
    return [*lines, ""]


def _heat_maps(report: dict[str, Any]) -> list[str]:
    """Attack × defence, one table for each budget."""
    rows = report["rows"]
    names = summary.defenses(rows)
    lines = ["## Attack by attack", ""]
    for budget in summary.budgets(rows):
        table = [["attacker", "attack", *names]]
        for model, attacks in summary.heat_map(rows, budget).items():
            for attack, cells in attacks:
                shares = [summary.MISSING if row is None else percent(row["accuracy"]) for row in cells.values()]
                table.append([words(model), attack, *shares])
        lines += [f"Accuracy in %, epsilon {radius(budget)}:", "", as_table(table, numbers=len(names)), ""]
    return lines


def _gradients(report: dict[str, Any]) -> list[str]:
    """What each gradient through the quantizer left; nothing where only one was tried."""
    found = summary.gradients(report["rows"])
    if not found:
        return []
    names = list(dict.fromkeys(name for _, variants, _ in found for name in variants))
    table = [["defence", "attack", "epsilon", *names]]
    for row, variants, least in found:
        shares = {k: f"**{percent(share)}**" if share == least else percent(share) for k, share in variants.items()}
        cells = [shares.get(name, summary.MISSING) for name in names]
        table.append([row["defense"], row["attack"], radius((row["norm"], row["epsilon"])), *cells])
    return [
        "## White-box: which gradient",
        "",
        "Accuracy in % that each gradient leaves; the strongest counts for each image.",
        "",
        as_table(table, numbers=len(names)),
        "",
    ]


def _rows(report: dict[str, Any]) -> list[str]:
    lines = [["defence", "attacker", "attack", "epsilon", "steps", "n", "accuracy", "seconds"]]
    for row in report["rows"]:
        is_bare = row["defense"] == UNDEFENDED or row["attack"] == CLEAN
        attacker = summary.MISSING if is_bare else words(ThreatModel(row["threat_model"]))
        lines.append(
            [
                row["defense"],
                attacker,
                row["attack"],
                radius((row["norm"], row["epsilon"])),
                str(row["steps"]),
                str(row["n"]),
                cell(row),
                f"{row['seconds']:.1f}",
            ]
        )
    return ["## All rows", "", as_table(lines, numbers=4), ""]


def _checks(report: dict[str, Any]) -> list[str]:
    """Each check, the failed ones first."""
    found = failed_first(report["checks"])
    failed = sum(not check["passed"] for check in found)
    verdict = f"{failed} of {len(found)} failed: read the numbers above with that in mind." if failed else "All passed."
    lines = [["check", "", "what was seen"]]
    lines += [[f"`{check['name']}`", "passed" if check["passed"] else "**FAILED**", check["detail"]] for check in found]
    return ["## Does the evaluation trust itself?", "", verdict, "", as_table(lines), ""]


def _again(report: dict[str, Any]) -> list[str]:
    return [
        "## The same numbers again",
        "",
        f"    {report['command']}",
        "",
        f"Seed {report['seed']}; {'; '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
        f"Measured on {summary.machine(report['host'])}.",
        "",
    ]


def as_table(lines: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table that also reads well as plain text; the last `numbers` columns are set to the right."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    right = [i >= len(widths) - numbers for i in range(len(widths))]

    def text(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f"{'-' * (w + 1)}{':' if r else '-'}" for w, r in zip(widths, right, strict=True))
    return "\n".join([text(lines[0]), f"|{rule}|", *map(text, lines[1:])])
