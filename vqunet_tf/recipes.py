"""Settings by name: what trains each data set well, and how that was found out."""

from __future__ import annotations

import dataclasses
from typing import Any

from vqunet_tf.config import (
    AttackConfig,
    ClassifierConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    PurifierConfig,
    TrainingConfig,
)
from vqunet_tf.errors import choice

_SMALL = PurifierConfig(widths=(8, 16), num_embeddings=(32,), embedding_dim=(8,))

# The encoder learns first, with a head, to say of clean and attacked images alike what the classifier says of the clean ones, and is
# kept; the decoder then draws what the encoder saw, and skip connections and pixels add details where the gate, which has learned
# before it, sees no attack. Epochs and batches are for a GPU, where all of it takes minutes; on two cores it takes hours. The released
# weights came in several trainings (docs/experiments.md); all in one has not been measured.
_DISTILLED = TrainingConfig(
    batch_size=512,
    learning_rate=3e-3,
    muon=2.5,
    adversarial=3.25,
    final_pixel_weight=0.5,
    feature_weight=0.5,
    head_weight=0.5,
    flip=True,
    # Almost none (1e-4) left a point less in the worst case of Fashion-MNIST; it may be chance (one run each).
    encoder_weight_decay=0.05,
    encoder_guidance=0.9,
    cutout=8,
    freeze_encoder=True,
    gate_epochs=20,
    certainty_epochs=3,
    selection="last",
    selection_examples=1000,
)

_FASHION_CLASSIFIER = ClassifierConfig(
    name="fast",
    widths=(32, 64, 128),
    epochs=18,
    learning_rate=3e-3,
    weight_decay=0.05,
    label_smoothing=0.1,
    flip=True,
)

_PRESETS: dict[str, Config] = {
    # 1,397 training images, 140 of them held out; the figures are in the README, from `make demo`.
    "digits": Config(
        data=DataConfig(dataset="digits"),
        classifier=ClassifierConfig(epochs=15, batch_size=64, max_shift=2),
        purifier=PurifierConfig(widths=(24, 48, 64), num_embeddings=(128,)),
        # 140 validation images tell no epochs apart.
        training=TrainingConfig(epochs=24, batch_size=64, selection="last"),
        attack=AttackConfig(epsilon=0.25, copies=4),
        evaluation=EvaluationConfig(epsilons=(0.1, 0.2), num_examples=400),
    ),
    "fashion_mnist": Config(
        data=DataConfig(dataset="fashion_mnist"),
        classifier=_FASHION_CLASSIFIER,
        purifier=PurifierConfig(
            widths=(48, 80, 120),
            blocks=2,
            decoder_widths=(48, 64, 80),
            decoder_blocks=1,
            num_embeddings=(256,),
            embedding_dim=(8,),
            groups=(8, 4, 2),
            normalize=True,
            gated=True,
            pixel_share=0.5,
            classes=10,
        ),
        training=dataclasses.replace(
            _DISTILLED,
            encoder_epochs=124,
            epochs=31,
            max_shift=2,
            clean=1.75,
            noisy=0.25,
            pixel_weight=8.0,
            uncertain=0.08,
        ),
        # A quarter of the radii above 0.3, a quarter below 0.1. Away from the predicted class is the hardest to undo: more of it.
        attack=AttackConfig(
            epsilon=0.42,
            radius_power=1.6,
            aims=(0.35, 0.55, 0.1),
            climbs=(1.5, 1.0, 1.5),
            copies=16,
            max_steps=10,
            batch_size=1024,
        ),
        evaluation=EvaluationConfig(epsilons=(0.1, 0.3), pgd_steps=40),
    ),
    # The classifier is airbench94's, 118 million multiply-accumulates; the purifier has 60.
    "cifar10": Config(
        data=DataConfig(dataset="cifar10", validation_fraction=0.05),
        classifier=ClassifierConfig(
            name="fast",
            widths=(64, 256, 256),
            epochs=16,
            learning_rate=3e-3,
            muon=2.5,
            weight_decay=0.05,
            label_smoothing=0.1,
            max_shift=4,
            flip=True,
            cutout=8,
        ),
        purifier=PurifierConfig(
            widths=(44, 80, 120),
            blocks=2,
            decoder_widths=(32, 48, 64),
            decoder_blocks=1,
            num_embeddings=(64, 256, 256),
            embedding_dim=(4, 8, 8),
            groups=(12, 4, 2),
            normalize=True,
            gated=True,
            pixel_share=0.7,
            classes=10,
        ),
        training=dataclasses.replace(
            _DISTILLED,
            encoder_epochs=160,
            epochs=39,
            max_shift=4,
            clean=1.5,
            noisy=0.35,
            nearest=1.25,
            pixel_weight=10.0,
            uncertain=0.1,
        ),
        # A third of the radii above 8/255, a fifth below 2/255. Single steps and momentum are the hardest to undo: two fifths each.
        attack=AttackConfig(
            epsilon=16 / 255,
            radius_power=2.0,
            aims=(0.2, 0.7, 0.1),
            climbs=(2.0, 1.0, 2.0),
            copies=16,  # with fewer the encoder learns them by heart
            max_steps=10,
            batch_size=512,
        ),
        evaluation=EvaluationConfig(epsilons=(8 / 255,), pgd_steps=40),
    ),
    # An hour on two cores, the classifier with it; what `benchmarks.ablations` takes apart, in shorter runs still.
    "fashion_mnist_short": Config(
        data=DataConfig(dataset="fashion_mnist"),
        classifier=_FASHION_CLASSIFIER,
        purifier=PurifierConfig(widths=(48, 96, 128), groups=(2,), normalize=True),
        training=TrainingConfig(
            epochs=24,
            batch_size=64,
            muon=2.5,
            clean=2.0,
            noisy=0.25,
            adversarial=2.25,
            pixel_weight=4.0,
            feature_weight=0.5,
            selection_examples=1000,
        ),
        attack=AttackConfig(epsilon=0.2, aims=(0.25, 0.65, 0.1), copies=4),
        evaluation=EvaluationConfig(epsilons=(0.1, 0.3), pgd_steps=40),
    ),
    # For any other data set; sizes and epochs are a starting point, not a measured recipe.
    "default": Config(attack=AttackConfig(epsilon=12 / 255), evaluation=EvaluationConfig(epsilons=(8 / 255,))),
}

# All that a gate needs, and what needs a gate, left out.
UNGATED: dict[str, Any] = {
    "purifier.gated": False,
    "purifier.pixel_share": 0.0,
    "purifier.classes": 0,
    "training.gate_epochs": 0,
    "training.certainty_epochs": 0,
}
_ADAPTIVE: dict[str, Any] = {
    **UNGATED,
    # None with three levels: through skip connections perturbations pass the decoder, to a classifier that never learned to
    # resist. So `vqvae` is the same network, and `unet` the one with all skip connections.
    "purifier.finest_skip": 2,
    # Fine code books, 3.5 bits a number: with coarse ones (9 bits for 8 or 16 numbers) a small step of the attacker makes the
    # decoder's input jump, and one of many jumps fools.
    "purifier.num_embeddings": (128,),
    "purifier.embedding_dim": (2,),
    "training.objective": "adaptive",
    "training.cutout": 0,
    "training.encoder_guidance": 0.0,
    "training.freeze_encoder": False,
    "training.nearest": 0.0,
    "training.learning_rate": 1e-3,
    "training.guidance_weight": 1.0,
    "training.pixel_weight": 1.0,
    "training.final_pixel_weight": None,
    "training.feature_weight": 0.0,
    # Where encoder_epochs are set the encoder learns alone first, at a third of the cost; what then passes decoder and
    # classifier has to be attacked there.
    "training.head_weight": 1.0,
    "training.encoder_learning_rate": 3e-3,
    "training.encoder_weight_decay": None,
    # Attacked through its quantizers alone it learned to make that gradient useless: with them off it was hardly more robust
    # than before.
    "training.attack_gradients": ("identity", "straight_through"),
    "training.selection": "last",
}
# Two blocks a level for the encoder, which has to resist, and fewer channels for the decoder, which draws what is left. Epochs and
# batches for a GPU: there these take minutes, on two cores hours (docs/experiments.md has the recipes of half an hour).
_DEEP: dict[str, Any] = {
    "purifier.groups": (16,),
    "purifier.blocks": 2,
    "purifier.decoder_widths": (32, 48, 64),
    "purifier.decoder_blocks": 1,
    "training.batch_size": 256,
}
# Each as its gray-box preset but for these and for the groups: 32 numbers (16 for digits) pass the bottleneck.
_PRESETS |= {
    "digits_adaptive": _PRESETS["digits"].replace(
        {**_ADAPTIVE, "purifier.groups": (8,), "training.epochs": 20, "attack.epsilon": 0.1}
    ),
    "fashion_mnist_adaptive": _PRESETS["fashion_mnist_short"].replace(
        {
            **_ADAPTIVE,
            **_DEEP,
            "purifier.widths": (48, 80, 120),
            "training.encoder_epochs": 60,
            "training.epochs": 40,
            "training.attack_steps": 4,
            "training.attack_step_size": 0.4,
            "training.flip": True,
            "training.max_shift": 1,
            "attack.epsilon": 0.1,
        }
    ),
    "cifar10_adaptive": _PRESETS["cifar10"].replace(
        {
            **_ADAPTIVE,
            **_DEEP,
            "purifier.widths": (48, 80, 128),
            "training.encoder_epochs": 28,
            "training.epochs": 25,
            "training.learning_rate": 1.5e-3,
            "training.max_shift": 2,
            "attack.radius_power": 0.7,
            "training.attack_steps": 3,
            "training.attack_step_size": 0.5,
            "attack.epsilon": 8 / 255,
        }
    ),
    "default_adaptive": _PRESETS["default"].replace({**_ADAPTIVE, "purifier.groups": (8,), "attack.epsilon": 8 / 255}),
}

# Purifiers with which VQUNet is compared, by what makes them differ from it.
ABLATIONS: dict[str, dict[str, Any]] = {
    "unet": {"quantize": False, "skips": True, "finest_skip": 0, "gated": False, "pixel_share": 0.0, "classes": 0},
    "vqvae": {"quantize": True, "skips": False, "gated": False, "pixel_share": 0.0, "classes": 0},
    "dae": {"quantize": False, "skips": False, "gated": False, "pixel_share": 0.0, "classes": 0},
}


def ablation(name: str, purifier: PurifierConfig) -> PurifierConfig:
    """Returns the settings of the ablation `name` of this purifier; all sizes stay."""
    return dataclasses.replace(purifier, **ABLATIONS[choice("baseline", name, ABLATIONS)])


def preset(name: str, dataset: str, objective: str = "gray_box") -> Config:
    """Returns the preset `name` for `dataset`; an empty name means the data set's own, or `default`.

    Those for the adaptive objective end in `_adaptive`. The preset `smoke` is a few steps of everything on 512 images,
    to see that all parts run.
    """
    if name == "smoke":
        return Config(
            classifier=ClassifierConfig(widths=(8, 16), epochs=1),
            purifier=_SMALL,
            training=TrainingConfig(objective=objective, epochs=1, selection_steps=2, selection_examples=64),
            attack=AttackConfig(copies=1, max_steps=2),
            evaluation=EvaluationConfig(pgd_steps=2, num_examples=64, batch_size=64),
            data=DataConfig(dataset=dataset, limit=512),
        )
    ending = "_adaptive" if objective == "adaptive" else ""
    choice("preset", name or "default", [*_PRESETS, "smoke"])
    config = _PRESETS.get(name or dataset + ending, _PRESETS["default" + ending])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=dataset))
