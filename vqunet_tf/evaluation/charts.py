"""The geometry of the drawings in report.html, in the units of their viewBox; the template only writes it down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vqunet_tf.evaluation import palette, summary
from vqunet_tf.evaluation.summary import Row
from vqunet_tf.threat import ThreatModel

WIDTH, HEIGHT, LOW = 360, 250, 160  # LOW: the height of a histogram
LEFT, RIGHT, TOP, BOTTOM = 34, 12, 10, 36
_LABEL_ROOM = 34  # between two labels of the axis


@dataclass(frozen=True)
class Point:
    """Where, and what a pointer on it is told."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Curve:
    """One defence: its points by epsilon, the path through them and the outline of their intervals."""

    defense: str
    color: str
    points: list[Point]
    path: str
    band: str


@dataclass(frozen=True)
class CurvePanel:
    """Worst-case accuracy against epsilon for one threat model and norm."""

    model: ThreatModel
    norm: str
    curves: list[Curve]
    ticks: list[tuple[float, str]]
    levels: list[tuple[float, str]] = field(default_factory=lambda: [(_y(s / 4), f"{25 * s}") for s in range(5)])


@dataclass(frozen=True)
class Histogram:
    """How often each code of a level is used, most used first."""

    level: int
    path: str
    codes: int
    used: int
    perplexity: float
    most: float


def curves(rows: Sequence[Row]) -> list[CurvePanel]:
    """A panel for each norm and threat model with at least two epsilons."""
    names = summary.defenses(rows)
    colors = palette.lines(names, summary.protagonist(names))
    panels = []
    for norm, model, lines in summary.curves(rows):
        epsilons = [epsilon for other, epsilon in summary.budgets(rows) if other == norm and epsilon > 0.0]
        drawn = [_curve(name, colors[name], line, epsilons[-1]) for name, line in lines.items()]
        panels.append(CurvePanel(model, norm, drawn, _ticks(norm, epsilons)))
    return panels


def histograms(counts: Sequence[Sequence[int]]) -> list[Histogram]:
    """One for each level, from how often each code was chosen."""
    return [_histogram(level, sorted(level_counts, reverse=True)) for level, level_counts in enumerate(counts)]


def perplexity(counts: Sequence[int]) -> float:
    """exp of the entropy of the shares: how many codes it would take if all were used alike."""
    total = sum(counts)
    return math.exp(-sum(k / total * math.log(k / total) for k in counts if k)) if total else 0.0


def _curve(name: str, color: str, line: Sequence[Row], largest: float) -> Curve:
    points = [
        Point(
            _x(row["epsilon"] / largest),
            _y(row["accuracy"]),
            f"{summary.label(name)}, ε = {row['epsilon']:.4g}: {summary.cell(row)} %",
        )
        for row in line
    ]
    xs = [point.x for point in points]
    low, high = ([_y(row["interval"][side]) for row in line] for side in (0, 1))
    outline = [*zip(xs, high, strict=True), *reversed(list(zip(xs, low, strict=True)))]
    return Curve(name, color, points, _path([(p.x, p.y) for p in points]), _path(outline) + "Z")


def _ticks(norm: str, epsilons: Sequence[float]) -> list[tuple[float, str]]:
    """0 and as many epsilons as there is room to label, the largest always."""
    largest = epsilons[-1]
    kept = [(_x(1.0), summary.radius((norm, largest)).partition(" ")[0])]
    for epsilon in reversed(epsilons[:-1]):
        x = _x(epsilon / largest)
        if kept[-1][0] - x >= _LABEL_ROOM and x - _x(0.0) >= _LABEL_ROOM / 2:
            kept.append((x, summary.radius((norm, epsilon)).partition(" ")[0]))
    return [(_x(0.0), "0"), *reversed(kept)]


def _histogram(level: int, counts: Sequence[int]) -> Histogram:
    most, total = max(counts, default=0), sum(counts)
    width = (WIDTH - LEFT - RIGHT) / max(len(counts), 1)
    corners = [(float(LEFT), _y(0.0, LOW))]
    for i, count in enumerate(counts):
        y = _y(count / most if most else 0.0, LOW)
        corners += [(LEFT + i * width, y), (LEFT + (i + 1) * width, y)]
    corners.append((WIDTH - RIGHT, _y(0.0, LOW)))
    used = sum(count > 0 for count in counts)
    return Histogram(level, _path(corners) + "Z", len(counts), used, perplexity(counts), most / total if total else 0.0)


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(share: float, height: int = HEIGHT) -> float:
    return round(TOP + (1.0 - share) * (height - TOP - BOTTOM), 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
