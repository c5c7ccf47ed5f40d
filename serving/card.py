"""The model card that travels with an export: what the model is, what was measured, what it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serving.score import RULE, Score
from vqunet_tf.runs import RunFolder

_ROBUST = {
    "gray_box": "Trained for attackers who know only the classifier: **not robust** against one who knows the purifier.",
    "adaptive": "Trained against attackers who know the purifier too: the white-box rows say what that bought.",
}


def of_run(folder: RunFolder) -> str:
    """The card of a run, in Markdown: CARD.md of its folder, else one made of its configuration and report.json."""
    own = folder.path / "CARD.md"
    if own.exists():
        return own.read_text(encoding="utf-8")
    config = folder.load_config()
    data, shape = config.data, "×".join(map(str, config.data.image_shape))
    epochs = f"{config.training.epochs} epochs"
    if config.training.encoder_epochs:
        epochs = f"{config.training.encoder_epochs} epochs of the encoder alone, then {epochs}"
    widths = config.purifier.decoder_widths
    decoder = f" (decoder {_listed(widths)})" if widths else ""
    kind = "VQUNet, gated" if config.purifier.gated else "VQUNet"
    if config.purifier.classes:
        kind += f", all but about {config.training.uncertain:.0%} of clean images drawn from the bottleneck alone"
    rows = {
        "data": f"{data.dataset}, images {shape}, {len(data.class_names)} classes",
        "classifier": config.classifier.path or f"{config.classifier.name}, widths {_listed(config.classifier.widths)}",
        "purifier": f"{kind}, widths {_listed(config.purifier.widths)}{decoder}, codes {_listed(config.purifier.num_embeddings)}",
        "objective": f"`{config.training.objective}`, {epochs}, radii up to {config.attack.epsilon:.4g}",
        "seed": str(config.training.seed),
    }
    lines = [
        f"# {data.dataset}: defended classifier",
        "",
        _ROBUST.get(config.training.objective, ""),
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([*lines, "", "## Measured", "", *_measured(folder)]) + "\n"


def with_score(card: str, score: Score) -> str:
    """The card with a section on the adversarial score."""
    lines = ["## Adversarial score", ""]
    if score.threshold is None:
        lines.append(
            "Not calibrated: the disagreement of the classifier before and after purification; there is no threshold."
        )
    else:
        lines.append(f"An image is {RULE}; the threshold is {score.threshold:.4g}.")
    if "detected" in score.report:
        alarms, found = score.report["false_alarms"], score.report["detected"]
        lines.append(
            f"Above it lie {alarms['measured']:.1%} of {alarms['n']} clean validation images and, of gray-box PGD-{found['steps']} "
            f"images at epsilon {found['epsilon']:.4g} (n = {found['n']} each), {found['untargeted']:.1%} untargeted and "
            f"{found['targeted']:.1%} targeted ones."
        )
    lines.append("It is no defence against an attacker who knows of it.")
    return "\n".join([card.rstrip(), "", *lines]) + "\n"


def _measured(folder: RunFolder) -> list[str]:
    """Clean accuracy and worst cases, from report.json."""
    if not folder.report.exists():
        return [f"Nothing yet: `python -m trainers.evaluate --run_dir={folder.path.name}` attacks it."]
    report: Mapping[str, Any] = json.loads(folder.report.read_text(encoding="utf-8"))
    classifier, purifier = report["classifier"], report["purifier"]
    lines = [
        f"On {classifier['n']} clean test images: {classifier['accuracy']:.2%} without, "
        f"{purifier['clean_accuracy']:.2%} with the purifier.",
        "Under attack, the worst case over the attacks of each line:",
        "",
        "| defence | attacker | norm | epsilon | n | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if row["worst_case"]:
            attacker = "any" if row["defense"] == "none" else row["threat_model"].replace("_", "-")
            cells = [row["defense"], attacker, row["norm"], f"{row['epsilon']:.4g}", row["n"], f"{row['accuracy']:.1%}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, "", "Gray-box accuracy is not robustness."]


def _listed(numbers: tuple[int, ...]) -> str:
    return "/".join(map(str, numbers))
