"""The configuration of a run: frozen dataclasses, closed to unknown keys, with a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vqunet_tf.errors import UserError, choice


def _at_least(config: Any, lowest: float, *names: str) -> None:
    """Raises a `UserError` for the first of these settings that is too small; one that is None is not set."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) >= lowest:
            raise UserError(f"configuration {name}: expected at least {lowest:g}, got {getattr(config, name)!r}")


def _seed(config: Any) -> None:
    """Raises a `UserError` for a seed that NumPy does not take."""
    if not 0 <= config.seed < 2**32:
        raise UserError(f"configuration seed: expected a whole number from 0 to 2^32 - 1, got {config.seed!r}")


def _radii(name: str, epsilons: Iterable[float]) -> None:
    """Raises a `UserError` for the first radius that is not on the [0,1] scale."""
    for epsilon in epsilons:
        if not 0.0 <= epsilon <= 1.0:
            raise UserError(
                f"configuration {name}: expected radii on the [0,1] scale, such as 8/255 = 0.0314, got {epsilon:g}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from.

    dataset: `digits`, a TFDS name, or a folder `DIR/{train,test}/<class>/*.png`.
    data_dir: where prepared TFDS data sets lie; None is TFDS's own default.
    validation_fraction: share of the training set held out, in (0, 1).
    seed: decides which training images are held out, nothing else.
    limit: use at most this many training images; 0 means all.
    image_shape, class_names: filled in from the data when a run starts.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    validation_fraction: float = 0.1
    seed: int = 0
    limit: int = 0
    image_shape: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least(self, 0, "limit")
        _seed(self)
        if not 0.0 < self.validation_fraction < 1.0:
            raise UserError(
                f"configuration validation_fraction: expected between 0 and 1, got {self.validation_fraction}"
            )


@dataclass(frozen=True)
class ClassifierConfig:
    """The network to protect, trained only when the user brings none.

    path: the user's own `.keras` classifier, images in [0, 1] -> logits; with it only the next two are used.
    from_probabilities: that classifier gives probabilities; their logarithms stand for its logits.
    feature_layer: the layer whose output guides the purifier; without it what goes into the last dense layer.
    name: `residual`, `fast`, `resnet20`, or `defense_gan_a` to `defense_gan_d`.
    widths: channels per stage, each stage at half the resolution of the one before.
    blocks: residual blocks per stage.
    muon: its inner convolutions take Muon's step, at this multiple of the learning rate; 0 is AdamW for all.
    max_shift, flip, cutout: augmentation, in pixels, as a yes or no, and the side of a covered square in pixels.
    """

    path: str | None = None
    from_probabilities: bool = False
    feature_layer: str | None = None
    name: str = "residual"
    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 1
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 4e-3
    muon: float = 0.0
    weight_decay: float = 1e-2
    label_smoothing: float = 0.05
    max_shift: int = 2
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "blocks", "epochs", "batch_size")
        _at_least(self, 0, "max_shift", "cutout", "learning_rate", "muon", "weight_decay", "label_smoothing")


@dataclass(frozen=True)
class PurifierConfig:
    """Arguments of `vqunet_tf.VQUNet`, by the same names; one number in a list stands for all levels."""

    widths: tuple[int, ...] = (32, 64, 96)
    blocks: int = 1
    num_embeddings: tuple[int, ...] = (512,)
    embedding_dim: tuple[int, ...] = (16,)
    groups: tuple[int, ...] = (1,)
    stem: int = 2
    commitment_cost: float = 0.25
    decay: float = 0.99
    quantize: bool = True
    skips: bool = True
    normalize: bool = False
    finest_skip: int = 0
    codebook: str = "ema"
    decoder_widths: tuple[int, ...] | None = None
    decoder_blocks: int | None = None
    gated: bool = False
    pixel_share: float = 0.0
    tones: int = 64
    classes: int = 0


# Which weights a training keeps, in the words of the report.
SELECTIONS = {
    "best": "the epoch with the highest clean + worse of targeted and untargeted PGD accuracy on validation images",
    "worst": "the epoch with the highest clean + worst attacked accuracy on validation images, of targeted and untargeted PGD "
    "and a third attack (gray-box training: FGSM; adaptive: PGD through soft codes)",
    "last": "the last epoch",
}


@dataclass(frozen=True)
class TrainingConfig:
    """How the purifier learns; strategy, precision, seed and what follows hold for the classifier too.

    objective: `gray_box` or `adaptive` (see `training/objectives.py`).
    max_shift, flip: augmentation of the purifier's images, in pixels and as a yes or no.
    clean, noisy, adversarial, nearest: relative shares of the inputs that are left alone, given random
        noise, or replaced by an adversarial image, or by the nearest one in l2 (gray_box).
    muon: the purifier's inner convolutions take Muon's step, at this multiple of the learning rate; 0 is AdamW for all.
    pixel_weight, guidance_weight, feature_weight, codebook_weight: weights of the parts of the loss.
    final_pixel_weight, pixel_fade: what the first of them has become, by equal factors a step, after that share of all
        steps; None leaves it as it is (gray_box).
    start: a purifier.keras to begin with, such as one attacked on its head, to be attacked on the chain. Its code books may be of another
        size, if embedding_dim times groups is the same.
    loop_epsilon: largest radius, on the [0,1] scale, of an attack in the loop that goes on from what the purifier is shown, clean,
        noisy or adversarial; 0 has none (gray_box; the adaptive objective always attacks, within `attack.epsilon`).
    attack_steps, attack_step_size: of the attack in the loop; a step is that share of its radius.
    gradient: what passes the quantizers while the purifier learns and is attacked in the loop.
    attack_gradients: what passes them in the attack in the loop and while its images are learned, each for its share of a
        batch; `identity` switches the quantizers off for its share; none is `gradient` (adaptive).
    head_weight: of the cross-entropy of a linear classifier on the bottleneck, which learns beside the purifier; 0 leaves it out.
    attack_on: `chain` or `head`, what the attack in the loop climbs (adaptive).
    encoder_epochs: before the others, in which the encoder and the head learn alone, with the quantizers off (gray_box: shown
        what the purifier is shown, shifted and flipped once more; adaptive: attacked on the head).
    encoder_learning_rate, encoder_weight_decay: theirs, where they are others.
    encoder_guidance: share of what an encoder that learns alone is asked for that is the classifier's answer to the clean image, not
        the label (distillation, Hinton et al. 2015, arXiv 1503.02531; gray_box).
    cutout: side in pixels of a square that is covered, anywhere, in what an encoder that learns alone is shown; 0 covers nothing
        (gray_box).
    gate_weight: of the cross-entropy of a gated purifier's gate, which learns what is adversarial, unless it learns alone (gray_box);
        0 keeps the gate of `start` as it is.
    gate_false_alarms: share of the clean validation images for which that gate is set to close, once it has learned (after the epochs are
        chosen, or before them where it learns alone); 0 leaves it as it learned (gray_box).
    gate_epochs: in which a gate learns alone before the decoder does, from clean and noisy images, adversaries of all radii, the
        nearest ones and patterns that need no gradient, and then stays as it is (gray_box).
    certainty_epochs: in which the head of a purifier with `classes` learns alone, after everything else, from what an encoder that
        learns alone is shown; all else stays as it is (gray_box).
    uncertain: share of the clean validation images of whose class that head is then set to be in doubt (gray_box).
    epochs: of all that is not frozen, through the classifier; 0 where a gate or that head alone is to go on from `start`.
    freeze_encoder: what leads to the bottleneck's quantizer stays as the encoder's own epochs, or `start`, left it. Baselines
        take over the purifier's and learn the rest.
    trades: weight of the clean-against-adversarial divergence (TRADES); 0 is cross-entropy on adversarial images (adaptive).
    epsilon_warmup: share of the steps over which the radius grows to `attack.epsilon`, of the encoder's where it has its own
        (adaptive).
    average: share of the steps over which weights are averaged, exponentially; 0 keeps the last ones.
    selection: which epoch is kept, by the names in SELECTIONS; always with averaged weights.
    selection_examples, selection_steps: validation images and PGD steps for it.
    steps_per_execution: training steps in one call of the backend.
    accumulate: batches whose gradients are averaged before the optimizer takes a step.
    checkpoint_seconds: most time between two checkpoints.
    deterministic: repeatable arithmetic where the backend can, at a loss of speed.
    """

    objective: str = "gray_box"
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    muon: float = 0.0
    warmup: float = 0.1
    max_shift: int = 0
    flip: bool = False
    clean: float = 1.0
    noisy: float = 0.5
    adversarial: float = 2.5
    nearest: float = 0.0
    pixel_weight: float = 1.0
    final_pixel_weight: float | None = None
    pixel_fade: float = 0.5
    guidance_weight: float = 1.0
    feature_weight: float = 0.0
    codebook_weight: float = 1.0
    start: str | None = None
    loop_epsilon: float = 0.0
    attack_steps: int = 2
    attack_step_size: float = 0.75
    gradient: str = "straight_through"
    attack_gradients: tuple[str, ...] = ()
    head_weight: float = 0.0
    attack_on: str = "chain"
    encoder_epochs: int = 0
    encoder_learning_rate: float | None = None
    encoder_weight_decay: float | None = None
    encoder_guidance: float = 0.0
    cutout: int = 0
    freeze_encoder: bool = False
    gate_weight: float = 1.0
    gate_epochs: int = 0
    gate_false_alarms: float = 0.02
    certainty_epochs: int = 0
    uncertain: float = 0.15
    trades: float = 0.0
    epsilon_warmup: float = 0.2
    average: float = 0.02
    selection: str = "best"
    selection_examples: int = 500
    selection_steps: int = 20
    strategy: str = "auto"
    precision: str = "float32"
    jit_compile: bool = False
    steps_per_execution: int = 1
    accumulate: int = 1
    checkpoint_seconds: float = 300.0
    deterministic: bool = False
    seed: int = 0

    @property
    def gate_beside_the_rest(self) -> float:
        """The weight of a gate's loss in the whole: 0 where the gate learns alone, or stays as it is."""
        return 0.0 if self.gate_epochs else self.gate_weight

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "attack_steps", "selection_examples", "selection_steps")
        _at_least(self, 1, "steps_per_execution", "accumulate")
        _at_least(
            self, 0, "clean", "noisy", "adversarial", "nearest", "learning_rate", "weight_decay", "warmup", "muon"
        )
        _seed(self)
        _at_least(
            self, 0, "pixel_weight", "guidance_weight", "feature_weight", "codebook_weight", "trades", "head_weight"
        )
        _at_least(self, 0, "max_shift", "attack_step_size", "epsilon_warmup", "average", "checkpoint_seconds")
        _at_least(
            self,
            0,
            "encoder_epochs",
            "encoder_learning_rate",
            "encoder_weight_decay",
            "cutout",
            "gate_weight",
            "gate_epochs",
            "epochs",
            "gate_false_alarms",
            "certainty_epochs",
            "uncertain",
        )
        if self.loop_epsilon:
            _radii("training.loop_epsilon", [self.loop_epsilon])
            if self.objective != "gray_box":
                raise UserError(
                    f"configuration training.loop_epsilon: expected 0 for the objective {self.objective}, which has an attack in the loop "
                    f"within attack.epsilon, got {self.loop_epsilon:g}"
                )
        choice("configuration training.selection", self.selection, SELECTIONS)
        choice("configuration training.attack_on", self.attack_on, ("chain", "head"))
        if self.attack_on == "head" and not self.head_weight:
            raise UserError(
                "configuration training.attack_on: expected chain where head_weight is 0, got head: there is none"
            )
        if self.encoder_epochs and not self.head_weight:
            raise UserError(
                f"configuration training.encoder_epochs: expected 0 where head_weight is 0, got {self.encoder_epochs}: "
                "without a head an encoder has nothing to learn alone"
            )
        if self.encoder_epochs and self.start and not self.epochs:
            raise UserError(
                f"configuration training.encoder_epochs: expected 0 with training.start where training.epochs is 0, got "
                f"{self.encoder_epochs}: its code books and its decoder belong to its encoder as it is"
            )
        if not 0.0 <= self.encoder_guidance <= 1.0:
            raise UserError(
                f"configuration training.encoder_guidance: expected a share from 0 to 1, got {self.encoder_guidance:g}"
            )
        if not self.gate_false_alarms < 1.0:
            raise UserError(
                f"configuration training.gate_false_alarms: expected a share below 1, got {self.gate_false_alarms:g}"
            )
        if not self.uncertain <= 1.0:
            raise UserError(f"configuration training.uncertain: expected a share from 0 to 1, got {self.uncertain:g}")
        if self.final_pixel_weight is not None and not min(self.final_pixel_weight, self.pixel_weight) > 0:
            raise UserError(
                "configuration training.final_pixel_weight: expected it and pixel_weight above 0, got "
                f"{self.final_pixel_weight:g} and {self.pixel_weight:g}"
            )
        if not 0.0 < self.pixel_fade <= 1.0:
            raise UserError(
                f"configuration training.pixel_fade: expected a share above 0, at most 1, got {self.pixel_fade:g}"
            )
        if not self.clean + self.noisy + self.adversarial + self.nearest > 0:
            raise UserError("configuration clean, noisy, adversarial: expected a share above 0, got none")


# Kinds of training adversaries: where they aim, how they climb.
FAMILIES = ("targeted", "untargeted", "features", "single_step", "iterated", "momentum")


@dataclass(frozen=True)
class AttackConfig:
    """Perturbations the purifier trains on: crafted against the classifier, each with random radius.

    epsilon: largest radius, on the [0,1] scale (linf).
    radius_power: a radius is epsilon u^radius_power, u uniform (from 0.2 to 1, for noise from 0): above 1 more small ones.
    aims: relative shares of targeted, untargeted and features.
    climbs: relative shares of single_step, iterated and momentum.
    copies: adversarial versions of every training image.
    max_steps: iterations of the longest attack in the family.
    leave_out: families that are not made, of targeted, untargeted, features, single_step, iterated, momentum.
    refresh: epochs of the purifier after which all are crafted anew; 0 crafts once for the run. An encoder or
        a head that learns alone sees the first.
    """

    epsilon: float = 0.1
    radius_power: float = 1.0
    aims: tuple[float, ...] = (1.0, 1.0, 1.0)
    climbs: tuple[float, ...] = (1.0, 1.0, 1.0)
    copies: int = 2
    max_steps: int = 8
    batch_size: int = 256
    leave_out: tuple[str, ...] = ()
    refresh: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "copies", "max_steps", "batch_size")
        _at_least(self, 0, "radius_power", "refresh")
        _radii("attack.epsilon", [self.epsilon])
        if self.max_steps == 1 and "single_step" in self.leave_out:
            raise UserError("configuration attack.max_steps: expected at least 2 where single_step is left out, got 1")
        for name in self.leave_out:
            choice("family of training adversaries", name, FAMILIES)
        for setting, kinds in (("aims", FAMILIES[:3]), ("climbs", FAMILIES[3:])):
            shares = getattr(self, setting)
            if len(shares) != 3 or min(shares) < 0:
                raise UserError(
                    f"configuration attack.{setting}: expected three shares of at least 0, got {list(shares)}"
                )
            if set(kinds) <= set(self.leave_out):
                raise UserError(f"configuration attack.leave_out: expected one of {', '.join(kinds)} to be left")
            if not sum(share for share, name in zip(shares, kinds, strict=True) if name not in self.leave_out) > 0:
                raise UserError(
                    f"configuration attack.{setting}: expected a share above 0 that is not left out, got none"
                )


@dataclass(frozen=True)
class EvaluationConfig:
    """What `trainers.evaluate` measures when its flags say nothing else.

    epsilons: linf radii.
    l2_epsilons: radii of attacks that know l2 only; none is 2.0 for gray images and 0.5 for colour.
    """

    epsilons: tuple[float, ...] = (0.1,)
    l2_epsilons: tuple[float, ...] = ()
    pgd_steps: int = 20
    num_examples: int = 500
    batch_size: int = 100

    def __post_init__(self) -> None:
        _at_least(self, 1, "pgd_steps", "num_examples", "batch_size")
        if not self.epsilons:
            raise UserError("configuration evaluation.epsilons: expected at least one radius such as 0.1, got none")
        _radii("evaluation.epsilons", self.epsilons)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; `config.json` in the run folder is this and nothing else."""

    data: DataConfig = field(default_factory=DataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    purifier: PurifierConfig = field(default_factory=PurifierConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_json(self) -> str:
        """Indented JSON; `Config.from_json` gives an equal configuration back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Config:
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"the configuration is not JSON ({error}): expected what a run folder's config.json holds"
            ) from None
        return _from_tree(Config, tree, "")

    def replace(self, changes: Mapping[str, Any]) -> Config:
        """Returns a copy with dotted keys changed, `{"training.epochs": 3}`; unknown keys raise a `UserError`."""
        tree = dataclasses.asdict(self)
        for key, value in changes.items():
            section, _, name = key.partition(".")
            choice("configuration section", section, tree, hint=" (keys look like training.epochs)")
            choice(f"configuration key in {section!r}", name, tree[section])
            tree[section][name] = value
        return _from_tree(Config, tree, "")

    def override(self, assignments: Iterable[str]) -> Config:
        """`replace` for command-line text: `["training.epochs=3", "purifier.widths=[16,32]"]`."""
        changes: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise UserError(f"--set expects key=value such as training.epochs=3, got {assignment!r}")
            try:
                changes[key.strip()] = json.loads(text)
            except json.JSONDecodeError:
                changes[key.strip()] = text  # a bare word is a string
        return self.replace(changes)


def _from_tree(kind: Any, tree: Any, path: str) -> Any:
    """Builds dataclass `kind` from nested dicts, checking every key and every type."""
    if not isinstance(tree, Mapping):
        raise UserError(f"configuration {path or 'file'}: expected an object with keys, got {tree!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        choice("configuration key", path + key, [path + name for name in hints])
        hint = hints[key]
        where = path + key
        values[key] = (
            _from_tree(hint, value, f"{where}.") if dataclasses.is_dataclass(hint) else _typed(hint, value, where)
        )
    return kind(**values)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Returns `value` as the annotated type: integers may stand for floats, lists for tuples."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"configuration {where}: expected a list, got {value!r}")
        return tuple(_typed(typing.get_args(hint)[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"configuration {where}: expected {hint.__name__}, got {value!r}")
    return value
