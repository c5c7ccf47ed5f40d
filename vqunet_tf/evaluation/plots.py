"""The two pictures of a report: what happens to a few images, and accuracy against epsilon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vqunet_tf import defenses, pixels
from vqunet_tf.evaluation.measure import Evaluation
from vqunet_tf.evaluation.rows import CLEAN, UNDEFENDED, WORST, Outcome
from vqunet_tf.threat import ThreatModel

_RIGHT, _WRONG, _INK, _FAINT = "#1a7f37", "#c62828", "#202124", "#5f6368"
_COLORS = {"none": "#8a8f98", ThreatModel.GRAY_BOX: "#2b6cb0", ThreatModel.WHITE_BOX: "#c05621"}
_GAIN = 3  # of the differences shown, less where that would leave the scale


def write(
    folder: Path, evaluation: Evaluation, classifier: keras.Model, purifier: keras.Model, class_names: Sequence[str]
) -> None:
    """Writes pictures.png, curves.png and examples/ into `folder`; curves of an earlier report go if there are none now.

    examples/ holds the images of pictures.png one by one, clean and as a gray-box attack left them: for a served model.
    """
    save(pictures(evaluation, classifier, purifier, class_names), folder / "pictures.png")
    examples(evaluation, folder / "examples")
    figure = curves(evaluation.rows)
    if figure is None:
        (folder / "curves.png").unlink(missing_ok=True)
    else:
        save(figure, folder / "curves.png")


def examples(evaluation: Evaluation, folder: Path, count: int = 3) -> None:
    """Saves the first images as `0_clean.png`, `0_gray_box.png` and so on, pixel by pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = _shown(evaluation.outcomes, UNDEFENDED, evaluation.threat_models[0])
    for i in range(min(count, len(evaluation.images))):
        for name, images in (("clean", evaluation.images), ("gray_box", outcome.adversarial)):
            image = pixels.to_uint8(images[i])
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{i}_{name}.png")


def pictures(
    evaluation: Evaluation, classifier: keras.Model, purifier: keras.Model, class_names: Sequence[str], count: int = 6
) -> Figure:
    """The first images of the sample, whichever way they went, in rows from clean to purified.

    Under an image: what the bare classifier makes of it, in green if right, and how sure it is. For each
    threat model: the PGD image at the largest epsilon, its purified version, and what the attack added.
    """
    images, labels = evaluation.images[:count], evaluation.labels[:count]
    defense = next((outcome.defense for outcome in evaluation.outcomes if outcome.defense != UNDEFENDED), UNDEFENDED)
    purify = defenses.build(defense, purifier)

    panels: list[tuple[str, np.ndarray, bool]] = [("clean", images, True)]
    for model in evaluation.threat_models:
        outcome = _shown(evaluation.outcomes, defense, model)
        adversarial = outcome.adversarial[:count]
        kind = f"{model.value.replace('_', '-')}\n{outcome.attack}, ε = {outcome.threat.epsilon:.3g}"
        panels.append((f"{kind}\nadversarial", adversarial, True))
        if defense != UNDEFENDED:
            panels.append(("purified", np.asarray(purify(adversarial)), True))
        added = adversarial - images
        gain = min(_GAIN, 0.5 / max(float(np.abs(added).max()), 1e-6))
        panels.append((f"added by the\nattack, × {gain:.2g}", 0.5 + gain * added, False))

    columns = len(images)
    figure = Figure(figsize=(10, 1.55 * len(panels) * 6 / max(columns, 4) + 0.3), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for line, (title, shown, is_classified) in zip(axes, panels, strict=True):
        probabilities = _softmax(np.asarray(classifier(shown, training=False), np.float64)) if is_classified else None
        line[0].text(-0.12, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=11, color=_INK)
        for i, axis in enumerate(line):
            _draw(axis, shown[i])
            if probabilities is not None:
                best = int(probabilities[i].argmax())
                color = _RIGHT if best == labels[i] else _WRONG
                text = f"{class_names[best]} · {probabilities[i, best]:.0%}"
                axis.set_xlabel(text, fontsize=10 if len(text) < 15 else 8.5, color=color, labelpad=3)
    legend = "Under an image: the classifier's answer and how sure it is, green if right. Grey: no difference."
    figure.text(0.99, 0.006, legend, ha="right", fontsize=9, color=_FAINT)
    figure.subplots_adjust(left=0.16, right=0.99, top=0.985, bottom=0.035, wspace=0.12, hspace=0.22)
    return figure


def curves(rows: Sequence[dict[str, Any]], norm: str = "linf") -> Figure | None:
    """Worst-case accuracy against epsilon for each defence and threat model; None with fewer than two epsilons."""
    worst = [row for row in rows if row["attack"] == WORST and row["norm"] == norm]
    if len({row["epsilon"] for row in worst}) < 2:
        return None
    figure = Figure(figsize=(10, 5.2), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for defense, model in dict.fromkeys((row["defense"], row["threat_model"]) for row in worst):
        clean = next(row for row in rows if row["defense"] == defense and row["attack"] == CLEAN)
        line = [clean, *(row for row in worst if (row["defense"], row["threat_model"]) == (defense, model))]
        line.sort(key=lambda row: row["epsilon"])
        epsilons = [row["epsilon"] for row in line]
        is_bare = defense == UNDEFENDED
        color = _COLORS["none"] if is_bare else _COLORS[ThreatModel(model)]
        label = "no defence" if is_bare else f"{defense}, {model.replace('_', '-')}"
        low, high = zip(*(row["interval"] for row in line), strict=True)
        axis.fill_between(epsilons, 100 * np.array(low), 100 * np.array(high), color=color, alpha=0.15, linewidth=0)
        axis.plot(epsilons, [100 * row["accuracy"] for row in line], "o-", color=color, linewidth=2, label=label)
    axis.set(xlabel=f"epsilon ({norm})", ylabel="accuracy, worst of all attacks (%)", ylim=(-2, 102))
    axis.set_xlim(left=0)
    axis.grid(color="#e4e6ea")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=11)
    axis.set_title(f"band: 95 % interval, n = {worst[0]['n']}", loc="right", fontsize=10, color=_FAINT)
    figure.tight_layout()
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG beside and renames; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part.png")
    figure.savefig(beside)
    beside.replace(path)


def _shown(outcomes: Sequence[Outcome], defense: str, model: ThreatModel) -> Outcome:
    """PGD at the largest epsilon if it was run, else whatever was strongest there."""
    here = [o for o in outcomes if o.defense == defense and o.threat_model is model and o.attack != CLEAN]
    largest = max(outcome.threat.epsilon for outcome in here)
    here = [outcome for outcome in here if outcome.threat.epsilon == largest]
    return min(here, key=lambda outcome: (outcome.attack != "pgd", outcome.accuracy))


def _draw(axis: Any, image: np.ndarray) -> None:
    """One image `[H,W,C]` in [0,1], one channel as grey."""
    image = np.clip(image, 0.0, 1.0)
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="#c9ccd1", linewidth=0.8)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
