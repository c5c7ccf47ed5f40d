"""Exports the purifier and the classifier of a run as one SavedModel for TF Serving.

  python -m serving.export --run_dir=runs/digits --export_dir=exported/digits
  python -m serving.export --preset=fashion_mnist --export_dir=exported/fashion_mnist

The SavedModel is written beside its place, reloaded and compared with the Keras models, and only then renamed to
<export_dir>/<version>: what stands under a version number is whole and proven. A version is never overwritten. Where the
data of the run can be read, the threshold of its adversarial score is set on validation images.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import flags

from commands.run import run
from serving import calibration, card, parity, warmup
from serving.score import Score
from serving.signatures import add_endpoints, refuse_unportable
from vqunet_tf import data
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.models import presets
from vqunet_tf.runs import RunFolder


@dataclass(frozen=True)
class Exported:
    """What was exported.

    path: the SavedModel.
    image_shape: `(H, W, C)`.
    parity: largest |SavedModel - Keras| per signature and output.
    score: the adversarial score, with its threshold.
    through_c: largest difference between answers through TensorFlow's C API and in Python; None if not asked.
    """

    path: Path
    image_shape: tuple[int, ...]
    parity: dict[str, dict[str, float]]
    score: Score
    through_c: float | None = None

    @property
    def worst(self) -> float:
        """The largest difference of all."""
        return max(value for outputs in self.parity.values() for value in outputs.values())


def export(
    purifier: keras.Model,
    classifier: keras.Model,
    class_names: Sequence[str],
    destination: Path | str,
    image_shape: Sequence[int] = (),
    score: Score | None = None,
    model_card: str = "",
    check_c_api: bool = False,
) -> Exported:
    """Writes both models to `destination` as one SavedModel, proven equal to them on random images.

    purifier: images `[B,H,W,C]` float32 in [0,1] → images; classifier: images → logits `[B,K]`.
    class_names: K names, in the order of the logits.
    destination: `<base>/<version>`, the version a whole number, as TF Serving wants it.
    image_shape: `(H, W, C)`; may be left out if one of the models fixes it.
    score: from `serving.calibration.calibrate`; without it the adversarial score has no threshold.
    model_card: Markdown, becomes assets/MODEL_CARD.md.
    check_c_api: also ask it through TensorFlow's C API in a process of its own, as the command does; takes seconds.

    Raises a `UserError` if `destination` exists, if models, names and shape do not fit together, if a model cannot
    run in TF Serving, or if the SavedModel's answers differ by more than 1e-5; no version is left behind then.
    """
    destination, score = Path(destination), score or Score()
    if keras.backend.backend() != "tensorflow":
        raise UserError(f"expected Keras on TensorFlow, got {keras.backend.backend()}: set KERAS_BACKEND=tensorflow")
    if not destination.name.isdecimal():
        raise UserError(f"expected a destination that ends in a version number (exported/digits/1), got {destination}")
    _refuse_existing(destination)
    shape = _image_shape(purifier, classifier, tuple(image_shape))
    archive = keras.export.ExportArchive()
    add_endpoints(archive, purifier, classifier, class_names, shape, score)
    # TF Serving looks at folders named by a number, so nobody serves this one.
    beside = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        archive.write_out(beside, verbose=False)
        refuse_unportable(beside)
        found = parity.measure(beside, purifier, classifier, class_names, shape, score)
        parity.refuse_difference(found)
        through_c = parity.measure_through_c(beside, shape) if check_c_api else None
        proof = parity.to_json(found, through_c)
        _write_assets(beside / "assets", class_names, proof, score, model_card)
        warmup.write(beside, shape)
        _refuse_existing(destination)
        beside.rename(destination)
    except OSError as error:
        raise UserError(f"{destination} cannot be written ({error}): choose another --export_dir") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(destination, shape, found, score, through_c)


def _refuse_existing(destination: Path) -> None:
    if destination.exists():
        taken = [int(folder.name) for folder in destination.parent.iterdir() if folder.name.isdecimal()]
        free = max(taken, default=0) + 1
        raise UserError(f"{destination} exists and a version is never overwritten: export with --version={free}")


def _image_shape(purifier: keras.Model, classifier: keras.Model, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Returns `(H, W, C)`: as `wanted`, else as one of the models fixes it; a `UserError` if they disagree."""
    shape = wanted
    for kind, model in (("classifier", classifier), ("purifier", purifier)):
        own = tf.TensorShape(getattr(model, "input_shape", None))[1:]
        if not shape and own.is_fully_defined():
            shape = tuple(own)
        if shape and not own.is_compatible_with(shape):
            raise UserError(f"expected a {kind} for images of shape {list(shape)}, got one for {own}")
    if len(shape) != 3:
        raise UserError(f"expected an image shape (height, width, channels), got {shape}: the models leave it open")
    return shape


def _write_assets(
    assets: Path, class_names: Sequence[str], proof: dict[str, Any], score: Score, model_card: str
) -> None:
    """What travels with the model: its labels, the proof, the score and the card."""
    texts = {
        "labels.txt": "".join(f"{name}\n" for name in class_names),  # in the order of `class_id`
        "parity.json": json.dumps(proof, indent=2) + "\n",
        "score.json": json.dumps(score.to_json(), indent=2) + "\n",
        "MODEL_CARD.md": card.with_score(model_card or "# Defended classifier", score),
    }
    assets.mkdir(exist_ok=True)
    for name, text in texts.items():
        (assets / name).write_text(text, encoding="utf-8")


def main(values: flags.FlagValues) -> None:
    if bool(values.run_dir) == bool(values.preset):
        raise UserError("expected one of --run_dir and --preset (--help lists the flags)")
    folder = RunFolder(_preset(values.preset) if values.preset else values.run_dir)
    config = folder.load_config()
    destination = Path(values.export_dir) / str(values.version)
    _refuse_existing(destination)
    purifier, classifier = folder.load_purifier(), folder.load_classifier()
    names, shape = config.data.class_names, config.data.image_shape
    score, remark = _score(purifier, classifier, config, values.data_dir)
    done = export(purifier, classifier, names, destination, shape, score, card.of_run(folder), check_c_api=True)
    print(f"exported    {done.path}")
    print(f"signatures  {', '.join(done.parity)}")
    print(f"images      [batch, {', '.join(map(str, done.image_shape))}], {len(names)} classes")
    print(f"parity      largest difference from the Keras models {done.worst:.1e}, allowed {parity.TOLERANCE:.0e}")
    if done.through_c is not None:
        print("portable    answers alike through TensorFlow's C API, without Python code of a model")
    print(f"score       {remark}")


def _preset(name: str) -> Path:
    try:
        return presets.folder(name)
    except ValueError as error:
        raise UserError(str(error)) from None


def _score(
    purifier: keras.Model, classifier: keras.Model, config: Config, data_dir: str | None
) -> tuple[Score | None, str]:
    """The calibrated score, or None where the run's data cannot be read; and a remark about it."""
    settings = dataclasses.replace(config.data, data_dir=data_dir or config.data.data_dir)
    try:
        split = data.load(settings, "validation")
        if split.images.shape[1:] != tuple(config.data.image_shape):
            got, wanted = list(split.images.shape[1:]), list(config.data.image_shape)
            raise UserError(f"{config.data.dataset} has images {got}, the run had {wanted}")
        score = calibration.calibrate(purifier, classifier, split, config)
    except UserError as error:
        return None, f"not calibrated, no threshold: {error}"
    alarms, found = score.report["false_alarms"], score.report["detected"]
    return score, (
        f"tampered with if above {score.threshold:.4g}: {alarms['measured']:.1%} of {alarms['n']} clean validation images, "
        f"{found['untargeted']:.0%} of gray-box PGD at epsilon {found['epsilon']:.4g}"
    )


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "the run folder with both trained models", flag_values=values)
    flags.DEFINE_string("preset", None, "released weights instead of a run folder", flag_values=values)
    flags.DEFINE_string("export_dir", None, "where the versions go, one folder per model", flag_values=values)
    flags.DEFINE_integer("version", 1, "the version number of this export", lower_bound=0, flag_values=values)
    flags.DEFINE_string("data_dir", None, "where prepared TFDS data sets lie; without it the run's", flag_values=values)
    run(main, values, str(__doc__), required=("export_dir",), argv=argv)


if __name__ == "__main__":
    console()
