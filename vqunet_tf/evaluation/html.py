"""report.html: one file that needs nothing else, from report.json and a few pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import keras
import numpy as np
from PIL import Image

from vqunet_tf import pixels
from vqunet_tf.evaluation import charts, palette, pictures, summary
from vqunet_tf.evaluation.classes import first
from vqunet_tf.evaluation.measure import Evaluation
from vqunet_tf.evaluation.pictures import CodeMaps, Strip
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, WORST
from vqunet_tf.evaluation.summary import Budget
from vqunet_tf.runs import write_text
from vqunet_tf.threat import ThreatModel

MOST_LINES = 12  # of the first table; with more it shows one budget at a time
MOST_PIXELS = 80  # of a picture's longer side: larger ones are shown smaller, so that the file stays small


@dataclass(frozen=True)
class ClassCell:
    """A share of one class, None for a class without images, and its distance from the bare clean one in points."""

    share: float | None
    change: float | None


@dataclass(frozen=True)
class ClassLine:
    """One class: name, images, and a cell for each column."""

    name: str
    n: int
    cells: list[ClassCell]


def write(
    folder: Path,
    report: dict[str, Any],
    evaluation: Evaluation,
    classifier: keras.Model,
    purifier: Any,
    class_names: Sequence[str],
) -> None:
    """Writes report.html into `folder`; readers see the old file or the new one."""
    strips = pictures.strips(evaluation, classifier, purifier, class_names)
    maps = pictures.code_maps(evaluation, purifier)
    write_text(folder / "report.html", render(report, class_names, strips, maps))


def render(
    report: dict[str, Any], class_names: Sequence[str], strips: Sequence[Strip] = (), maps: Sequence[CodeMaps] = ()
) -> str:
    """Returns the page for a report as in report.json. What it does not hold has no section; all text is escaped."""
    rows = report["rows"]
    names = summary.defenses(rows)
    counts = report["purifier"].get("code_counts", [])
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report,
        rows=rows,
        n=max(row["n"] for row in rows),
        split=report["split"],
        notes=report.get("notes", []),
        budgets=summary.budgets(rows),
        defenses=names,
        main=summary.protagonist(names),
        measured=summary.measured(rows),
        failed=[check for check in report["checks"] if not check["passed"]],
        panels=charts.curves(rows),
        colors=palette.lines(names, summary.protagonist(names)),
        histograms=charts.histograms(counts),
        strips=strips,
        maps=maps,
        class_tables=class_tables(report, class_names),
        is_long=len(names) * len(summary.budgets(rows)) > MOST_LINES,
        config=json.dumps(report.get("config", {}), indent=1),
    )


def class_tables(report: dict[str, Any], class_names: Sequence[str]) -> dict[Budget, tuple[list[str], list[ClassLine]]]:
    """For each budget the columns (clean without and with the purifier, each attacker's worst case) and a line per class."""
    found = report.get("per_class")
    if not found:
        return {}
    main = summary.protagonist(summary.defenses(report["rows"]))
    result: dict[Budget, tuple[list[str], list[ClassLine]]] = {}
    for budget in summary.budgets(report["rows"]):
        columns: dict[str, list[float | None]] = {}
        for row in found["rows"]:
            if row["attack"] == CLEAN:
                if row["defense"] in (UNDEFENDED, main):
                    columns["clean" if row["defense"] == UNDEFENDED else "purified"] = row["accuracy"]
            elif (row["attack"], row["defense"], row["norm"], row["epsilon"]) == (WORST, main, *budget):
                columns[summary.words(ThreatModel(row["threat_model"])) + first(row, found["n"])] = row["accuracy"]
        bare = columns.get("clean", [None] * len(found["n"]))
        lines = []
        for k, n in enumerate(found["n"]):
            cells = [ClassCell(shares[k], _points(shares[k], bare[k])) for shares in columns.values()]
            lines.append(ClassLine(str(class_names[k]) if k < len(class_names) else str(k), n, cells))
        result[budget] = list(columns), lines
    return result


def data_uri(image: np.ndarray) -> str:
    """A picture `[H,W,C]`, floats in [0,1] or uint8, as a `data:` address of a PNG."""
    levels = image if image.dtype == np.uint8 else pixels.to_uint8(image)
    picture = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    if max(picture.size) > MOST_PIXELS:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _points(share: float | None, bare: float | None) -> float | None:
    return None if share is None or bare is None else 100 * (share - bare)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vqunet_tf.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": summary.percent,
        "interval": summary.interval,
        "label": summary.label,
        "words": summary.words,
        "radius": lambda budget: summary.radius(("linf", budget[1])),  # the norm is written beside it
        "norm": {"linf": "ℓ∞", "l2": "ℓ2"}.get,
        "step": palette.step,
        "data_uri": data_uri,
    }
    environment.globals |= {
        "summary": summary,
        "palette": palette,
        "charts": charts,
        "ThreatModel": ThreatModel,
        "gain": pictures.GAIN,
    }
    return environment
