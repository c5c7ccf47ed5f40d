"""What reports say beside what was asked for, what the paper says, and what others have published."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from vqunet_tf.evaluation.figures import Measured, Report
from vqunet_tf.evaluation.findings import OURS
from vqunet_tf.evaluation.markdown import as_table
from vqunet_tf.evaluation.published import PUBLISHED, Near
from vqunet_tf.evaluation.rows import UNDEFENDED
from vqunet_tf.evaluation.summary import MISSING, Row, budgets, cell, find, label, percent, radius, words
from vqunet_tf.evaluation.targets import ABOVE, AT_LEAST, AT_MOST, BELOW, CLAIMS, TARGETS, Target
from vqunet_tf.recipes import ABLATIONS

Reports = Sequence[tuple[str, Report]]  # of presets, by their names

UNMEASURED = "not measured"
_RELATIONS = {AT_LEAST: operator.ge, ABOVE: operator.gt, AT_MOST: operator.le, BELOW: operator.lt}


def targets(dataset: str, reports: Reports) -> str:
    """Reach, measured, reached: one line for each target of a data set."""
    lines = [["reach", "measured", "reached?"]]
    lines += [[target.words, *judge(target, reports)] for target in TARGETS if target.dataset == dataset]
    return as_table(lines) if len(lines) > 1 else "No targets."


def claims(reports: Reports) -> str:
    """What the paper says, and whether the reports bear it out."""
    lines = [["the paper says", "data set", "found here", "holds here?"]]
    return as_table([*lines, *([claim.words, claim.dataset, *judge(claim, reports)] for claim in CLAIMS)])


def published(dataset: str, reports: Reports) -> str:
    """Published figures with their protocols, and beside each ours under the nearest protocol that a report has."""
    lines = [
        ["method", "protocol", "attacker", "clean", "attacked", "known", "our clean", "our attacked", "our protocol"]
    ]
    for row in PUBLISHED:
        if row.dataset == dataset:
            known = f"{row.known}: {row.source}"
            theirs = [row.method, row.protocol, row.threat, row.clean, row.attacked, known]
            lines.append([*theirs, *nearest(dataset, row.near, reports)])
    return as_table(lines) if len(lines) > 1 else "No published figures."


def judge(target: Target, reports: Reports) -> tuple[str, str]:
    """Returns what was measured, and whether it is what was asked for: `yes`, `no`, `open`, or a dash for unknown."""
    report = _report(target, reports)
    if report is None:
        return UNMEASURED, MISSING
    measured = target.figure.measure(_with_ablations(report, reports))
    answer = _answer(target, measured)
    if answer == "open" and measured.lacks:
        return f"{UNMEASURED} ({measured.lacks})", MISSING
    return measured.text, answer


def nearest(dataset: str, near: Near, reports: Reports) -> tuple[str, str, str]:
    """Returns our clean accuracy, our accuracy under attack and under which protocol.

    A white-box figure is the adaptive purifier's where there is one. Of the radii in a report the smallest counts that
    is not below the published one, so that ours is the harder problem; where there is none, the largest.
    """
    adaptive = near.model.value == "white_box"
    presets = [f"{dataset}_adaptive", dataset] if adaptive else [dataset]
    candidates = [
        (name, report)
        for name, report in reports
        if near.classifier and report["dataset"] == dataset and report["classifier"]["name"] == near.classifier
    ]
    candidates += [(name, report) for preset in presets for name, report in reports if name == preset]
    for name, report in candidates:
        row = _nearest_row(report["rows"], near)
        if row is not None:
            budget = (row["norm"], row["epsilon"])
            bare = find(report["rows"], UNDEFENDED, row["attack"], near.model, budget)
            attacked = f"{percent(bare['accuracy'])} → {cell(row)}" if bare else cell(row)
            protocol = f"`{name}`, {words(near.model)} {label(row['attack'])}, ε = {radius(budget)}, n = {row['n']}"
            return percent(report["purifier"]["clean_accuracy"]), attacked, protocol
    return MISSING, MISSING, UNMEASURED


def _report(target: Target, reports: Reports) -> Report | None:
    for name, report in reports:
        is_classifier = report["dataset"] == target.dataset and report["classifier"]["name"] == target.classifier
        if is_classifier if target.classifier else name == target.preset:
            return report
    return None


def _with_ablations(report: Report, reports: Reports) -> Report:
    """The report, and of each ablation that it lacks the rows of the first other report on the same classifier that has it."""
    rows, known = list(report["rows"]), {row["defense"] for row in report["rows"]}
    for _, other in reports:
        if (other["dataset"], other["classifier"]) == (report["dataset"], report["classifier"]):
            found = [row for row in other["rows"] if row["defense"] in ABLATIONS and row["defense"] not in known]
            rows += found
            known |= {row["defense"] for row in found}
    return {**report, "rows": rows}


def _answer(target: Target, measured: Measured) -> str:
    holds, threshold = _RELATIONS[target.relation], round(target.threshold, 6)
    answers = {
        holds(round(bound, 6) if math.isfinite(bound) else bound, threshold) for bound in (measured.low, measured.high)
    }
    if len(answers) > 1:
        return "open"
    near = measured.interval is not None and measured.interval[0] <= threshold <= measured.interval[1]
    return ("yes" if answers.pop() else "no") + (" (within chance)" if near else "")


def _nearest_row(rows: Sequence[Row], near: Near) -> Row | None:
    for attack in near.attacks:
        found = [
            row
            for budget in budgets(rows)
            if budget[0] == near.norm and (row := find(rows, OURS, attack, near.model, budget))
        ]
        harder = [row for row in found if row["epsilon"] >= near.epsilon - 1e-6]
        if found:
            return harder[0] if harder else found[-1]
    return None
