"""The beginning of a model card: all that a run's own files say, and headings for what only people know."""

from __future__ import annotations

import keras

from vqunet_tf.config import SELECTIONS, Config
from vqunet_tf.models import VQUNet
from vqunet_tf.models.operations import multiply_accumulates, of_layers

OPEN = "*to be written*"

_SETTING = {
    "gray_box": "VQUNet for the gray-box setting",
    "adaptive": "VQUNet trained against attackers who know it",
}
_HONEST = {
    "gray_box": "It is trained for an attacker who knows only the classifier and does not withstand one who knows the purifier: "
    "**do not call it robust**.",
    "adaptive": "It is trained on attacks that see the purifier and pays for that with clean accuracy; only white-box rows "
    "say what it withstands.",
}


def text(
    name: str, config: Config, classifier: keras.Model, purifier: VQUNet, counts: tuple[int, int] | None, given: bool
) -> str:
    """The card in Markdown; what it cannot know says so.

    classifier, purifier: the models of the run, whose configuration is `config`.
    counts: images trained on and held out, if that is known. given: whether somebody brought the classifier.
    """
    objective = config.training.objective
    facts = {
        "data": _data(config, counts),
        "classifier": _classifier(config, classifier, given),
        "purifier": _purifier(config, purifier),
        "recipe": _recipe(config),
        "optimizer steps": _steps(config, counts, given),
        "cost": f"{OPEN}: hours, hardware",
        "seeds": f"{config.training.seed} for weights, order and adversaries, {config.data.seed} for the held-out images",
        "kept and chosen": f"{SELECTIONS[config.training.selection]}; settings: {OPEN}",
    }
    lines = [
        f"# `{name}`: {_SETTING[objective]}",
        "",
        f"{OPEN}: what it is good for, in a sentence or two. {_HONEST[objective]}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        "## Measured on the test split",
        "",
        f"`python -m trainers.evaluate --preset={name}`; the whole report is in `results/{name}/`.",
        "",
        OPEN,
        "",
        "## Intended use and limits",
        "",
        f"{OPEN}. The images must be like those of {config.data.dataset}: {_shape(config)}, in [0, 1]. A purifier belongs to its "
        "classifier; in front of another one measure again.",
    ]
    return "\n".join(lines) + "\n"


def _data(config: Config, counts: tuple[int, int] | None) -> str:
    held = f"{config.data.validation_fraction:.0%} held out (seed {config.data.seed})"
    if counts:
        held = f"{counts[0]:,} training images, {counts[1]:,} held out (seed {config.data.seed})"
    return f"{config.data.dataset}, {held}, {_shape(config)}, {len(config.data.class_names)} classes"


def _classifier(config: Config, model: keras.Model, given: bool) -> str:
    settings = config.classifier
    cost = f"{model.count_params():,} parameters"
    if getattr(model, "inputs", None) and not any(isinstance(layer, keras.Model) for layer in model.layers):
        cost += f", {of_layers(model, config.data.image_shape) / 1e6:.2f} million multiply-accumulates an image"
    if given:
        return f"given, {cost}"
    kind = f"`{settings.name}`, widths {_listed(settings.widths)}"
    learned = f"{settings.epochs} epochs, shifts up to {settings.max_shift}{', flips' if settings.flip else ''}"
    learned += f", squares of {settings.cutout} cut out" if settings.cutout else ""
    return f"{kind}, {cost}; {learned}, label smoothing {settings.label_smoothing:g}"


def _purifier(config: Config, model: VQUNet) -> str:
    codes = f"codes per level {_listed(model.num_embeddings)} of {_listed(model.embedding_dim)} numbers"
    groups = f", groups {_listed(model.groups)}" if set(model.groups) != {1} else ""
    cost = multiply_accumulates(model, config.data.image_shape) / 1e6
    blocks = f", {model.blocks} blocks a level" if model.blocks > 1 else ""
    if model.decoder_widths or model.decoder_blocks:
        other = model.decoder_blocks or model.blocks
        blocks += f" (decoder {_listed(model.decoder_widths or model.widths)}, {other} a level)"
    gated = ", gated" if model.gated else ""
    if model.pixel_share:
        gated += f" ({model.pixel_share:g} of the pixels in {model.tones} tones where the gate is open)"
    if model.classes:
        gated += ", closed too where a head on the bottleneck is certain of the class"
    return (
        f"VQUNet{gated}, widths {_listed(model.widths)}{blocks}, {codes}{groups}, stem {model.stem}, "
        f"{model.count_params():,} parameters, "
        f"{cost:.2f} million multiply-accumulates an image"
    )


def _recipe(config: Config) -> str:
    training, attack = config.training, config.attack
    optimizer = f"Muon at {training.muon:g} times AdamW's rate" if training.muon else "AdamW"
    parts = [
        "`config.json` beside this card",
        f"objective `{training.objective}`",
        f"{training.epochs} epochs of batches of {training.batch_size}",
        f"{optimizer}, learning rate up to {training.learning_rate:g}",
    ]
    if training.encoder_epochs:
        rate = f"learning rate up to {training.encoder_learning_rate or training.learning_rate:g}"
        parts.insert(2, f"first {training.encoder_epochs} epochs of the encoder with a linear head alone, {rate}")
    if not training.epochs:
        parts.remove(f"0 epochs of batches of {training.batch_size}")
    if training.gate_epochs and config.purifier.gated:
        parts.append(
            f"the gate alone for {training.gate_epochs} epochs, with the nearest adversaries, noise and patterns"
        )
    if training.nearest:
        parts.append("the nearest adversaries in l2 too")
    if training.certainty_epochs and config.purifier.classes:
        parts.append(
            f"last the head on the bottleneck for {training.certainty_epochs} epochs, set to be in doubt about {training.uncertain:.0%} of "
            "the clean images held out"
        )
    if training.start:
        parts.insert(1, f"begun with `{training.start}`")
    if training.freeze_encoder:
        parts.insert(3 if training.encoder_epochs else 2, "that encoder kept as it was")
    if training.objective == "adaptive":
        gradients = " and ".join(training.attack_gradients or (training.gradient,))
        on = "a linear head at the bottleneck" if training.attack_on == "head" else "the whole chain"
        parts.append(
            f"{training.attack_steps} attack steps in the loop on {on} through {gradients}, radius {attack.epsilon:.4g}"
        )
    else:
        parts.append(
            f"{attack.copies} adversaries an image, radii up to {attack.epsilon:.4g}, 1 to {attack.max_steps} steps"
        )
    return ": ".join([parts[0], "; ".join(parts[1:])])


def _steps(config: Config, counts: tuple[int, int] | None, given: bool) -> str:
    """Updates of the weights; what does not fill a batch waits for another epoch (see `training/batches.py`)."""
    if counts is None:
        return "not counted: the data were not at hand"
    training, settings = config.training, config.classifier
    parts = {} if given else {"classifier": (settings.epochs, settings.batch_size)}
    if training.encoder_epochs:
        parts["encoder"] = (training.encoder_epochs, training.batch_size)
    if training.gate_epochs and config.purifier.gated:
        parts["gate"] = (training.gate_epochs, training.batch_size)
    parts["purifier"] = (training.epochs, training.batch_size)
    if training.certainty_epochs and config.purifier.classes:
        parts["head"] = (training.certainty_epochs, training.batch_size)
    steps = {role: epochs * (counts[0] // min(size, counts[0])) for role, (epochs, size) in parts.items()}
    return ", ".join(f"{role} {count // training.accumulate:,}" for role, count in steps.items())


def _shape(config: Config) -> str:
    return "×".join(map(str, config.data.image_shape))


def _listed(numbers: tuple[int, ...]) -> str:
    return "/".join(map(str, dict.fromkeys(numbers))) if len(set(numbers)) == 1 else "/".join(map(str, numbers))
