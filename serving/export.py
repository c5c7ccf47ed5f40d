"""Exports the purifier and the classifier of a run as one SavedModel for TF Serving.

  python -m serving.export --run_dir=runs/digits --export_dir=exported/digits

The SavedModel is written beside its place, reloaded and compared with the Keras models, and only then renamed to
<export_dir>/<version>: what stands under a version number is whole and proven. A version is never overwritten.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags

from commands.run import run
from serving.signatures import SIGNATURES, add_endpoints, refuse_unportable
from vqunet_tf.errors import UserError
from vqunet_tf.pixels import to_unit
from vqunet_tf.runs import RunFolder

TOLERANCE = 1e-5
BATCH_SIZES = (1, 7)
SEED = 0


@dataclass(frozen=True)
class Exported:
    """What was exported.

    path: the SavedModel.
    image_shape: `(H, W, C)`.
    parity: largest |SavedModel - Keras| per signature and output.
    """

    path: Path
    image_shape: tuple[int, ...]
    parity: dict[str, dict[str, float]]

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
) -> Exported:
    """Writes both models to `destination` as one SavedModel, proven equal to them on random images.

    purifier: images `[B,H,W,C]` float32 in [0,1] → images; classifier: images → logits `[B,K]`.
    class_names: K names, in the order of the logits.
    destination: `<base>/<version>`, the version a whole number, as TF Serving wants it.
    image_shape: `(H, W, C)`; may be left out if one of the models fixes it.

    Raises a `UserError` if `destination` exists, if models, names and shape do not fit together, if a model cannot
    run in TF Serving, or if the SavedModel's answers differ by more than 1e-5; no version is left behind then.
    """
    destination = Path(destination)
    if keras.backend.backend() != "tensorflow":
        raise UserError(f"expected Keras on TensorFlow, got {keras.backend.backend()}: set KERAS_BACKEND=tensorflow")
    if not destination.name.isdecimal():
        raise UserError(f"expected a destination that ends in a version number (exported/digits/1), got {destination}")
    _refuse_existing(destination)
    shape = _image_shape(purifier, classifier, tuple(image_shape))
    archive = keras.export.ExportArchive()
    add_endpoints(archive, purifier, classifier, class_names, shape)
    # TF Serving looks at folders named by a number, so nobody serves this one.
    beside = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        archive.write_out(beside, verbose=False)
        refuse_unportable(beside)
        parity = measure_parity(beside, purifier, classifier, class_names, shape)
        _refuse_difference(parity)
        _write_assets(beside / "assets", class_names, parity)
        _refuse_existing(destination)
        beside.rename(destination)
    except OSError as error:
        raise UserError(f"{destination} cannot be written ({error}): choose another --export_dir") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(destination, shape, parity)


def measure_parity(
    path: Path, purifier: keras.Model, classifier: keras.Model, class_names: Sequence[str], image_shape: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Returns max |SavedModel - Keras| per signature and output, over random images in batches of 1 and 7.

    Every batch is asked twice: a SavedModel carries the Keras random state along, so that a layer that is random at
    inference agrees the first time.

    For `class_id` it is the Keras probability lost by that class against the best one, 0 where they agree, so that
    a tie is no difference. A `label` that is not the name of its `class_id` counts as 1.
    """
    signatures = tf.saved_model.load(str(path)).signatures
    generator = np.random.default_rng(SEED)
    parity: dict[str, dict[str, float]] = {name: {} for name in SIGNATURES}
    for batch in BATCH_SIZES:
        pixels = generator.integers(0, 256, (batch, *image_shape), dtype=np.uint8)
        floats = generator.random((batch, *image_shape), dtype=np.float32)
        for name, dtype in SIGNATURES.items():
            images = pixels if dtype == "uint8" else floats
            unit = keras.ops.convert_to_tensor(to_unit(images))
            kept = unit if name == "undefended" else keras.ops.cast(purifier(unit, training=False), "float32")
            wanted = kept if name == "purify" else keras.ops.cast(classifier(kept, training=False), "float32")
            for _ in range(2):
                answer = {key: value.numpy() for key, value in signatures[name](images=tf.constant(images)).items()}
                for key, value in _differences(answer, keras.ops.convert_to_numpy(wanted), class_names).items():
                    parity[name][key] = float(np.maximum(parity[name].get(key, 0.0), value))  # keeps a NaN
    return parity


def _differences(answer: dict[str, np.ndarray], wanted: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Compares an answer with what Keras gives: `purified` with images, the rest with logits `[B,K]`."""
    if "purified" in answer:
        return {"purified": float(np.abs(answer["purified"] - wanted).max())}
    powers = np.exp(wanted.astype(np.float64) - wanted.max(axis=-1, keepdims=True))
    expected = powers / powers.sum(axis=-1, keepdims=True)  # [B, K]
    chosen = np.take_along_axis(expected, answer["class_id"][:, None], axis=-1)[:, 0]  # [B]
    names = [class_names[index].encode() for index in answer["class_id"]]
    return {
        "probabilities": float(np.abs(answer["probabilities"] - expected).max()),
        "class_id": float((expected.max(axis=-1) - chosen).max()),
        "label": float(answer["label"].tolist() != names),
    }


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


def _refuse_difference(parity: dict[str, dict[str, float]]) -> None:
    for name, outputs in parity.items():
        for key, value in outputs.items():
            if not value <= TOLERANCE:  # a NaN fails too
                raise UserError(
                    f"{key} of {name} differs by {value:.1e} between the SavedModel and the Keras models, "
                    f"allowed {TOLERANCE:.0e}: is a layer random at inference, or does it keep a state?"
                )


def _write_assets(assets: Path, class_names: Sequence[str], parity: dict[str, dict[str, float]]) -> None:
    """labels.txt, a name per line in the order of `class_id`; parity.json, what was compared and how."""
    report = {
        "tolerance": TOLERANCE,
        "batch_sizes": list(BATCH_SIZES),
        "seed": SEED,
        "signatures": parity,
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
    }
    assets.mkdir(exist_ok=True)
    (assets / "labels.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    (assets / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main(values: flags.FlagValues) -> None:
    folder = RunFolder(values.run_dir)
    data = folder.load_config().data
    destination = Path(values.export_dir) / str(values.version)
    _refuse_existing(destination)
    done = export(folder.load_purifier(), folder.load_classifier(), data.class_names, destination, data.image_shape)
    print(f"exported    {done.path}")
    print(f"signatures  {', '.join(done.parity)}")
    print(f"images      [batch, {', '.join(map(str, done.image_shape))}], {len(data.class_names)} classes")
    print(f"parity      largest difference from the Keras models {done.worst:.1e}, allowed {TOLERANCE:.0e}")


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "the run folder with both trained models", flag_values=values)
    flags.DEFINE_string("export_dir", None, "where the versions go, one folder per model", flag_values=values)
    flags.DEFINE_integer("version", 1, "the version number of this export", lower_bound=0, flag_values=values)
    run(main, values, str(__doc__), required=("run_dir", "export_dir"), argv=argv)


if __name__ == "__main__":
    console()
