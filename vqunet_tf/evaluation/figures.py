"""Figures that are asked of a report: where each is found in it, and what is certain where it is not there as such."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vqunet_tf.evaluation.findings import OURS
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, WORST, enough
from vqunet_tf.evaluation.statistics import wilson
from vqunet_tf.evaluation.summary import Budget, Row, budgets, defenses, find, label, radius
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.threat import ThreatModel

Report = dict[str, Any]

UNTRAINED = ("jpeg", "bit_depth", "median", "total_variation")
_SINGLE = ("fgsm", "cw_l2", "deepfool", "square", "hopskipjump", "transfer", "noise")  # no count of steps to ask for


@dataclass(frozen=True)
class Measured:
    """What a report says of a figure: it lies between `low` and `high`, which are equal where it is known.

    text: the figure in words. interval: of 95 %, where there is one; of two bounds, from the lower one's to the upper
        one's. lacks: what is missing to know it, or nothing.
    """

    text: str
    low: float
    high: float
    interval: tuple[float, float] | None = None
    lacks: str = ""


class Figure(Protocol):
    """Something that can be looked up in a report."""

    def measure(self, report: Report) -> Measured:
        """Returns what the report says of it; what it does not say is in `lacks`."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the whole clean test split. of: `classifier`, or `purifier` for both in a row."""

    of: str

    def measure(self, report: Report) -> Measured:
        facts = report[self.of]
        share, n = facts["accuracy" if self.of == "classifier" else "clean_accuracy"], facts["n"]
        low, high = wilson(round(share * n), n)
        return Measured(f"{_percent(share, n)} {_between(low, high)}, n = {n}", share, share, (low, high))


@dataclass(frozen=True)
class Loss:
    """How much clean accuracy the purifier costs, on the whole test split. It has no interval: a report does not say
    on which images the two disagree."""

    def measure(self, report: Report) -> Measured:
        bare, kept, n = report["classifier"]["accuracy"], report["purifier"]["clean_accuracy"], report["purifier"]["n"]
        text = f"{100 * (bare - kept):.2f} points ({_percent(bare, n)} → {_percent(kept, n)}), n = {n}"
        return Measured(text, bare - kept, bare - kept)


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of the purifier for one image, in millions."""

    def measure(self, report: Report) -> Measured:
        count = report["purifier"].get("multiply_accumulates")
        if count is None:
            return _unknown("the report has no operation count")
        return Measured(f"{count / 1e6:.1f} million", count / 1e6, count / 1e6)


@dataclass(frozen=True)
class Attacked:
    """Accuracy that attacks leave of the classifier behind the purifier.

    attacks: their names. together: counted image by image; else each for itself, and the lowest counts.
    epsilon: None is the largest radius that was measured. steps: what an iterated attack must have had.
    others: whether more attacks in the report's worst case belong to the figure; else they only bound it from below.
    """

    model: ThreatModel
    attacks: tuple[str, ...]
    norm: str = "linf"
    epsilon: float | None = None
    steps: int = 1
    together: bool = True
    others: bool = False

    def measure(self, report: Report) -> Measured:
        rows = report["rows"]
        budget = self._budget(rows)
        if budget is None:
            return _unknown("no such radius" if self.epsilon is not None else f"no {self.norm} attack")
        found = {name: row for name in self.attacks if (row := find(rows, OURS, name, self.model, budget))}
        if not found:
            return _unknown(f"no {', '.join(map(label, self.attacks))}")
        lowest = min(found.values(), key=lambda row: row["accuracy"])
        if not self.together:
            lacks = self._lacks(found, found)
            text = "; ".join(f"{label(name)} {_cell(row)}" for name, row in found.items()) if len(found) > 1 else ""
            place = f", radius {radius(budget)}" if self.epsilon is None else ""
            return _bounded(lowest, lowest, lacks, (text or _cell(lowest)) + place)
        worst = find(rows, OURS, WORST, self.model, budget)
        inside = members(rows, OURS, self.model, budget)[0]
        own = [row["attack"] for row in inside if row["threat_model"] == self.model.value]
        lacks = self._lacks(found, own) or ("" if worst else "no worst case")
        further = dict.fromkeys(label(row["attack"]) for row in inside if row["attack"] not in self.attacks)
        more = [] if self.others else list(further)
        if worst is None or (lacks and more):
            return _bounded(lowest, None, lacks)
        if not more:
            return _bounded(worst, worst, lacks)
        text = f"at least {_cell(worst)}, with {', '.join(more)} in it too"
        # An attack that met more images than all of them together says nothing of those.
        alike = [row for row in found.values() if row["n"] == worst["n"]]
        if not alike:
            return Measured(text, worst["accuracy"], 1.0, (worst["interval"][0], 1.0))
        lowest = min(alike, key=lambda row: row["accuracy"])
        at_most = _percent(lowest["accuracy"], lowest["n"])
        span = worst["interval"][0], lowest["interval"][1]
        return Measured(f"{text}; at most {at_most}", worst["accuracy"], lowest["accuracy"], span)

    def _budget(self, rows: Sequence[Row]) -> Budget | None:
        known = [budget for budget in budgets(rows) if budget[0] == self.norm]
        if self.epsilon is None:
            return max(known, key=lambda budget: budget[1], default=None)
        return next((budget for budget in known if math.isclose(budget[1], self.epsilon, abs_tol=1e-6)), None)

    def _lacks(self, found: dict[str, Row], inside: Collection[str]) -> str:
        """Which attacks were not made, or not as asked for."""
        absent = [label(name) for name in self.attacks if name not in inside]
        few = {row["steps"] for name, row in found.items() if name not in _SINGLE and row["steps"] < self.steps}
        texts = [f"no {', '.join(absent)}"] if absent else []
        return "; ".join([*texts, *(f"{steps} steps, not {self.steps}" for steps in sorted(few))])


@dataclass(frozen=True)
class Ahead:
    """By how much the purifier's gray-box worst case lies above that of every other defence, at every linf radius;
    the least difference counts."""

    over: tuple[str, ...] = (*UNTRAINED, *ABLATIONS)

    def measure(self, report: Report) -> Measured:
        rows = report["rows"]
        absent = [f"`{name}`" for name in self.over if name not in defenses(rows)]
        lacks = f"no {', '.join(absent)}" if absent else ""
        pairs = []
        for budget in budgets(rows):
            ours = find(rows, OURS, WORST, ThreatModel.GRAY_BOX, budget) if budget[0] == "linf" else None
            for name in self.over if ours else ():
                theirs = find(rows, name, WORST, ThreatModel.GRAY_BOX, budget)
                if ours and theirs:
                    pairs.append((ours["accuracy"] - theirs["accuracy"], name, budget, ours, theirs))
        if not pairs:
            return _unknown(lacks or "no gray-box worst case")
        least, name, budget, ours, theirs = min(pairs, key=lambda pair: pair[0])
        # Of intervals that overlap nothing follows; paired differences would say more, but no report holds them.
        interval = ours["interval"][0] - theirs["interval"][1], ours["interval"][1] - theirs["interval"][0]
        text = f"{100 * least:+.1f} points to `{name}` at {radius(budget)}, the least of {len(pairs)} differences"
        return Measured(text, -1.0 if lacks else least, least, interval, lacks)


def members(rows: Sequence[Row], defense: str, model: ThreatModel, budget: Budget) -> tuple[list[Row], list[Row]]:
    """The rows of which the worst case of a report is the worst, and those of the same attacker that stand beside it.

    The rules are those of `rows.attackers` and `rows.worst_case`.
    """
    here = [
        row
        for row in rows
        if row["defense"] == defense and row["attack"] not in (CLEAN, WORST) and (row["norm"], row["epsilon"]) == budget
    ]
    own = [row for row in here if row["threat_model"] == model.value]
    counted = own
    if model is ThreatModel.WHITE_BOX and defense != UNDEFENDED:
        least = min([row["n"] for row in own if row["n"] >= enough(row["n"] for row in own)], default=0)
        counted = own + [row for row in here if row not in own and row["n"] >= least]
    least = enough(row["n"] for row in counted)
    return [row for row in counted if row["n"] >= least], [row for row in own if row["n"] < least]


def _bounded(high: Row, low: Row | None, lacks: str, text: str = "") -> Measured:
    """What one row says: the figure, or with something lacking only that it is no higher."""
    text = text or _cell(high)
    if lacks or low is None:
        return Measured(f"at most {text} ({lacks})", 0.0, high["accuracy"], tuple(high["interval"]), lacks)
    return Measured(text, low["accuracy"], high["accuracy"], tuple(high["interval"]))


def _unknown(lacks: str) -> Measured:
    return Measured("", -math.inf, math.inf, None, lacks)


def _cell(row: Row) -> str:
    return f"{_percent(row['accuracy'], row['n'])} {_between(*row['interval'])}, n = {row['n']}"


def _between(low: float, high: float) -> str:
    return f"({100 * low:.1f}–{100 * high:.1f})"


def _percent(share: float, n: int) -> str:
    """As exact as n images allow."""
    return f"{100 * share:.{1 if n <= 1000 else 2}f}"
