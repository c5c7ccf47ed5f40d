"""The pictures of a report as PNG files; report.html draws its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from vqunet_tf import pixels
from vqunet_tf.evaluation import charts, palette, summary
from vqunet_tf.evaluation.classes import first, per_class, truth
from vqunet_tf.evaluation.measure import Evaluation
from vqunet_tf.evaluation.pictures import CodeMaps, Strip, code_maps, shown, strips
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED
from vqunet_tf.evaluation.summary import ATTACKERS, Row, label, percent, radius, words
from vqunet_tf.threat import ThreatModel

_RIGHT, _WRONG, _INK, _FAINT, _RULE = "#1a7f37", "#c62828", palette.INK[palette.LIGHT], "#5f6368", "#e4e6ea"
_RAMP = LinearSegmentedColormap.from_list("accuracy", palette.ramp(palette.LIGHT))
_MOST_CLASSES = 30  # more do not fit on a picture


def write(
    folder: Path,
    evaluation: Evaluation,
    classifier: keras.Model,
    purifier: Any,
    class_names: Sequence[str],
    report: dict[str, Any] | None = None,
) -> None:
    """Writes the pictures into `folder`; one of an earlier report goes if there is none now.

    pictures.png, heat_map.png; curves.png with two epsilons; code_maps.png with a code book; code_usage.png with
    the `report`; classes.png if the evaluation kept all true classes. examples/ holds the images of pictures.png one
    by one, clean and as a gray-box attack left them: for a served model.
    """
    rows, found = evaluation.rows, truth(evaluation)
    by_class = None
    if found is not None and len(class_names) <= _MOST_CLASSES:
        by_class = per_class(evaluation.outcomes, found, evaluation.threat_models, len(class_names))
    examples(evaluation, folder / "examples")
    figures = {
        "pictures": pictures(strips(evaluation, classifier, purifier, class_names)),
        "curves": curves(rows),
        "heat_map": heat_map(rows),
        "code_maps": codes(code_maps(evaluation, purifier)),
        "code_usage": code_usage((report or {}).get("purifier", {}).get("code_counts", [])),
        "classes": classes(by_class, class_names) if by_class else None,
    }
    for name, figure in figures.items():
        if figure is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
        else:
            save(figure, folder / f"{name}.png")


def examples(evaluation: Evaluation, folder: Path, count: int = 3) -> None:
    """Saves the first images as `0_clean.png`, `0_gray_box.png` and so on, pixel by pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    found = (shown(evaluation.outcomes, UNDEFENDED, model) for model in ATTACKERS)
    outcome = next(outcome for outcome in found if outcome is not None)
    for i in range(min(count, len(evaluation.images))):
        for name, images in (("clean", evaluation.images), ("gray_box", outcome.adversarial)):
            image = pixels.to_uint8(images[i])
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{i}_{name}.png")


def pictures(found: Sequence[Strip]) -> Figure | None:
    """Images in rows from clean to purified; under an image the classifier's answer, green if right, and how sure it is."""
    if not found:
        return None
    lines = [("clean", found[0].panels[0])]
    for strip in found:
        threat = strip.outcome.threat
        kind = f"{words(strip.outcome.threat_model)}\n{label(strip.outcome.attack)}, ε = {threat.epsilon:.3g}\n"
        lines += [(panel.title if i else kind + panel.title, panel) for i, panel in enumerate(strip.panels[1:])]
    columns = len(found[0].panels[0].images)
    figure = _figure(10, 1.55 * len(lines) * 6 / max(columns, 4) + 0.3)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for line, (title, panel) in zip(axes, lines, strict=True):
        line[0].text(-0.12, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=11, color=_INK)
        for i, axis in enumerate(line):
            _draw(axis, panel.images[i])
            if panel.answers:
                answer = panel.answers[i]
                text = f"{answer.name} · {answer.confidence:.0%}"
                color = _RIGHT if answer.right else _WRONG
                axis.set_xlabel(text, fontsize=10 if len(text) < 15 else 8.5, color=color, labelpad=3)
    legend = "Under an image: the classifier's answer and how sure it is, green if right. Differences from clean around grey."
    figure.text(0.99, 0.006, legend, ha="right", fontsize=9, color=_FAINT)
    figure.subplots_adjust(left=0.16, right=0.99, top=0.985, bottom=0.035, wspace=0.12, hspace=0.22)
    return figure


def curves(rows: Sequence[Row]) -> Figure | None:
    """Worst-case accuracy against epsilon, a panel for each norm and threat model; None with fewer than two epsilons."""
    found = summary.curves(rows)
    if not found:
        return None
    names = summary.defenses(rows)
    main = summary.protagonist(names)
    colors = palette.lines(names, main)
    figure = _figure(4.2 * len(found) + 0.4, 3.9)
    for axis, (norm, model, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for name, line in lines.items():
            epsilons, width = [row["epsilon"] for row in line], 2.4 if name == main else 1.4
            low, high = (100 * np.array([row["interval"][side] for row in line]) for side in (0, 1))
            if name == main:
                axis.fill_between(epsilons, low, high, color=colors[name], alpha=0.15, linewidth=0)
            shares = [100 * row["accuracy"] for row in line]
            axis.plot(epsilons, shares, "o-", color=colors[name], linewidth=width, markersize=4, label=label(name))
        axis.set(xlabel=f"epsilon ({norm})", ylim=(-2, 102))
        axis.set_xlim(left=0)
        axis.set_title(words(model), loc="left", fontsize=11, color=_INK)
        axis.grid(color=_RULE)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy, worst of all attacks (%)")
    figure.axes[0].legend(frameon=False, fontsize=9)
    # The first point of each line is the clean image, which may have been seen more often.
    met = sorted({row["n"] for _, _, lines in found for line in lines.values() for row in line[1:]})
    many = " to ".join(map(str, dict.fromkeys((met[0], met[-1]))))
    figure.text(0.99, 0.01, f"band: 95 % interval, n = {many}", ha="right", fontsize=9, color=_FAINT)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def heat_map(rows: Sequence[Row]) -> Figure:
    """Attack × defence, a panel for each budget: accuracy in %, empty where nothing was measured."""
    names, budgets = summary.defenses(rows), summary.budgets(rows)
    maps = [
        {(model, attack): cells for model, lines in summary.heat_map(rows, budget).items() for attack, cells in lines}
        for budget in budgets
    ]
    attacks = list(dict.fromkeys(key for found in maps for key in found))
    attacks.sort(key=lambda key: ATTACKERS.index(key[0]))
    titles = [f"{words(model)} {label(attack)}" for model, attack in attacks]
    figure = _figure(2.2 + (0.62 * len(names) + 0.3) * len(budgets), 1.3 + 0.3 * len(attacks))
    for axis, budget, found in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, maps, strict=True):
        cells = [[found.get(key, {}).get(name) for name in names] for key in attacks]
        _share_table(axis, [[None if row is None else row["accuracy"] for row in line] for line in cells])
        axis.set_xticks(range(len(names)), [label(name) for name in names], rotation=45, ha="right", fontsize=9)
        axis.set_yticks(range(len(titles)), titles if axis is figure.axes[0] else [""] * len(titles), fontsize=9)
        axis.set_title(f"ε = {radius(budget)}", fontsize=10, color=_INK)
    figure.tight_layout()
    return figure


def codes(found: Sequence[CodeMaps]) -> Figure | None:
    """Code maps, a row for each level: the first images clean and attacked; close colours are close codes."""
    if not found:
        return None
    names = list(found[0].maps)
    count = len(found[0].maps["clean"])
    figure = _figure(1.5 * len(names) * count + 0.6, 1.6 * len(found) + 0.4)
    axes = figure.subplots(len(found), len(names) * count, squeeze=False)
    for line, level in zip(axes, found, strict=True):
        line[0].set_ylabel(f"level {level.level}", fontsize=10)
        for i in range(count):
            for j, name in enumerate(names):
                axis = line[i * len(names) + j]
                _draw(axis, level.maps[name][i] / 255.0)
                if level is found[0]:
                    axis.set_title(name.replace("_", "-"), fontsize=10, color=_INK)
    figure.tight_layout(pad=0.6)
    return figure


def code_usage(counts: Sequence[Sequence[int]]) -> Figure | None:
    """How often each code is used, most used first, a panel for each level."""
    if not counts:
        return None
    figure = _figure(3.6 * len(counts) + 0.4, 2.6)
    axes = figure.subplots(1, len(counts), squeeze=False)[0]
    for axis, level, histogram in zip(axes, counts, charts.histograms(counts), strict=True):
        shares = 100 * np.sort(level)[::-1] / max(sum(level), 1)
        axis.bar(range(len(shares)), shares, width=1.0, color=palette.lines(["vqunet"], "vqunet")["vqunet"])
        text = f"level {histogram.level}: {histogram.used} of {histogram.codes} used, perplexity {histogram.perplexity:.0f}"
        axis.set_title(text, fontsize=10, color=_INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("code, most used first")
    axes[0].set_ylabel("share of places (%)")
    figure.tight_layout()
    return figure


def classes(found: dict[str, Any], class_names: Sequence[str]) -> Figure:
    """Accuracy by class behind the defence the report is about: clean without it, clean with it, and each worst case."""
    main = summary.protagonist(list(dict.fromkeys(row["defense"] for row in found["rows"])))
    kept = {}
    for row in found["rows"]:
        if row["attack"] == CLEAN:
            kept["clean" if row["defense"] == UNDEFENDED else "purified"] = row["accuracy"]
        elif row["defense"] == main:
            title = f"{words(ThreatModel(row['threat_model']))} {radius((row['norm'], row['epsilon']))}"
            title += first(row, found["n"])
            kept[title] = row["accuracy"]
    names = [f"{name} ({n})" for name, n in zip(class_names, found["n"], strict=False)]
    figure = _figure(2.0 + 0.75 * len(kept), 1.2 + 0.3 * len(names))
    axis = figure.subplots()
    _share_table(axis, [[shares[k] for shares in kept.values()] for k in range(len(names))])
    axis.set_xticks(range(len(kept)), list(kept), rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    figure.tight_layout()
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG beside and renames; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part.png")
    figure.savefig(beside)
    beside.replace(path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _share_table(axis: Any, shares: Sequence[Sequence[float | None]]) -> None:
    """Accuracies as coloured cells with their number in %."""
    table = np.array([[np.nan if share is None else share for share in line] for line in shares], float)
    axis.imshow(table, cmap=_RAMP, vmin=0.0, vmax=1.0, aspect="auto")
    for (i, j), share in np.ndenumerate(table):
        text = summary.MISSING if np.isnan(share) else percent(share)
        axis.text(j, i, text, ha="center", va="center", fontsize=8.5, color=_INK)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _draw(axis: Any, image: np.ndarray) -> None:
    """One image `[H,W,C]` in [0,1], one channel as grey."""
    image = np.clip(image, 0.0, 1.0)
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="#c9ccd1", linewidth=0.8)
