"""Turns a finished run into released weights: vqunet_tf/presets/<preset>/, which `from_preset` loads.

    python -m commands.release --run_dir=runs/fashion_mnist --preset=fashion_mnist

Weights are stored in the least room that leaves the answers alone: as float16 where purified images and logits, with and
without the purifier, stay within 1e-3 on 64 validation images (or random ones where the data are not at hand), else as
float32 with as few bits of mantissa as that allows. Either way a loaded model computes in float32. A preset `NAME_adaptive`
whose classifier is that of `NAME` shares its file. Measure what was written: python -m trainers.evaluate --preset=NAME.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from commands import compact, release_card
from commands.run import run
from vqunet_tf import checksums, data, pixels, runs
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.models import VQUNet, presets
from vqunet_tf.runs import RunFolder

LIMIT = 15_000_000  # bytes, of all presets together
TOLERANCE = 1e-3
STORAGE = {"auto": (10, 12, 14, 16, 18, 20, 23), "float16": (10,), "float32": (23,)}  # bits of mantissa, tried in turn

_EXAMPLES = 64
_CARD = "CARD.md"


@dataclass(frozen=True)
class Stored:
    """One model as it is stored.

    file: in the preset's folder, or `../other/classifier.keras`. bits: of mantissa; None if a file is shared or left.
    difference: the largest, of images and logits, to what the run's own files give.
    """

    file: str
    size: int
    bits: int | None
    difference: float


def release(run_folder: RunFolder, name: str, storage: str = "auto") -> tuple[list[Stored], list[str]]:
    """Writes the preset `name` from a finished run; returns what was stored, and sentences that a person must know.

    A `UserError` if the run is not finished, if the name is none, if all presets together would exceed `LIMIT`, or if
    another preset shares the classifier that would change, or for an unknown storage. Nothing is written then.

    storage: a key of `STORAGE` for both models, or two with a comma between them, of the classifier (if it is
        not shared) and of the purifier.
    """
    words = storage.split(",")
    if len(words) > 2 or not set(words) <= set(STORAGE):
        raise UserError(
            f"--storage={storage}: expected one of {', '.join(STORAGE)}, or two with a comma, for classifier and purifier"
        )
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name):
        raise UserError(f"--preset={name}: expected a name of small letters, digits and underscores, as fashion_mnist")
    config = run_folder.load_config()
    classifier, purifier = run_folder.load_classifier(), run_folder.load_purifier()
    if not isinstance(purifier, VQUNet):
        raise UserError(f"{run_folder.purifier}: expected a VQUNet, got a {type(purifier).__name__}")
    target, notes = presets.FOLDER / name, []
    images, kind = _images(config)
    if kind == "random":
        notes.append("the data are not at hand: compared on random images")
    answers = _Answers(classifier, purifier, images)
    with tempfile.TemporaryDirectory() as beside:
        part = Path(beside, name)
        part.mkdir()
        shared = _shared(run_folder.classifier, name, part)
        first = _classifier(answers, run_folder, part, target, STORAGE[words[0]], shared)
        second = _purifier(answers, run_folder, part, target, STORAGE[words[-1]], shared or part / first.file)
        moved, codes = answers.codes_moved(runs.load_model(part / second.file))
        public = _public(config, shared)
        given = bool(config.classifier.path) and not shared
        if given:
            notes.append("the classifier was given to this run: config.json does not tell how to train it")
        if config.training.start:
            notes.append(
                "the purifier began with the weights of another run: config.json does not tell how to train those"
            )
        runs.write_text(part / "config.json", public.to_json())
        if (target / _CARD).exists():
            notes.append(f"{target / _CARD} was left as it is: bring it up to date with what was released")
        else:
            notes.append(f"{target / _CARD} was begun: write what it leaves open")
            card = release_card.text(name, public, classifier, purifier, _counts(config), given)
            (part / _CARD).write_text(card, encoding="utf-8")
        _refuse(name, part, target, has_classifier=not shared)
        _put(part, target, [first.file, second.file, "config.json"])
    if max(first.difference, second.difference) > TOLERANCE:
        notes.append(
            f"outputs differ by more than {TOLERANCE:g} ({moved} of {codes} codes are others): only figures measured from "
            "these files hold for them"
        )
    return [first, second], notes


class _Answers:
    """What the run's own models say to a few images, to compare with."""

    def __init__(self, classifier: keras.Model, purifier: VQUNet, images: np.ndarray):
        self.images = np.asarray(keras.ops.convert_to_numpy(pixels.to_unit(images)))
        self.purified, self.codes = _call(purifier, self.images), purifier.codes(self.images)
        self.plain, self.defended = _call(classifier, self.images), _call(classifier, self.purified)

    def classifier_differs(self, classifier: keras.Model) -> float:
        """The largest difference of logits of clean and of purified images."""
        found = (_call(classifier, self.images) - self.plain, _call(classifier, self.purified) - self.defended)
        return max(_largest(part) for part in found)

    def chain_differs(self, classifier: keras.Model, purifier: keras.Model) -> float:
        """The largest difference of purified images and of the logits of both chains."""
        purified = _call(purifier, self.images)
        found = (purified - self.purified, _call(classifier, purified) - self.defended)
        return max(self.classifier_differs(classifier), *(_largest(part) for part in found))

    def codes_moved(self, purifier: VQUNet) -> tuple[int, int]:
        """How many codes of these images are others than those of the run's purifier, and of how many."""
        pairs = [(self.codes[level], codes) for level, codes in purifier.codes(self.images).items()]
        return sum(int(np.sum(one != other)) for one, other in pairs), sum(one.size for one, _ in pairs)


def _call(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(model(images, training=False)))


def _largest(difference: np.ndarray) -> float:
    return float(np.max(np.abs(difference))) if np.isfinite(difference).all() else float("inf")


def _classifier(
    answers: _Answers, run: RunFolder, part: Path, target: Path, steps: Sequence[int], shared: Path | None
) -> Stored:
    if shared:
        differs = answers.classifier_differs(runs.load_model(shared))
        return Stored(f"../{shared.parent.name}/{shared.name}", 0, None, differs)
    # Half of the tolerance, so that the purifier has the other half.
    return _smallest(run.classifier, part / "classifier.keras", target, steps, answers.classifier_differs, 2.0)


def _purifier(
    answers: _Answers, run: RunFolder, part: Path, target: Path, steps: Sequence[int], classifier: Path
) -> Stored:
    beside = runs.load_model(classifier)

    def differs(purifier: keras.Model) -> float:
        return answers.chain_differs(beside, purifier)

    return _smallest(run.purifier, part / "purifier.keras", target, steps, differs, 1.0)


def _smallest(source: Path, path: Path, target: Path, steps: Sequence[int], differs: Any, share: float) -> Stored:
    """Stores a model with the first number of bits whose answers stay within the tolerance, else with the last."""
    trial = runs.load_model(source)
    whole = [np.array(keras.ops.convert_to_numpy(weight)) for weight in trial.weights]
    for bits in steps:
        for weight, value in zip(trial.weights, whole, strict=True):
            weight.assign(compact.stored(value, bits).astype(value.dtype))
        if differs(trial) <= TOLERANCE / share:
            break
    compact.rewrite(source, path, bits)
    known = target / path.name
    if known.exists() and compact.same(known, path):  # another date or compression is no change
        shutil.copyfile(known, path)
    return Stored(path.name, path.stat().st_size, bits, differs(runs.load_model(path)))


def _shared(classifier: Path, name: str, part: Path) -> Path | None:
    """The classifier of the preset without `_adaptive`, if it is this one as it would be stored."""
    base = name.removesuffix("_adaptive")
    if base == name or base not in presets.names():
        return None
    try:
        known = checksums.path_of(presets.folder(base), "classifier.keras")
    except ValueError as error:
        raise UserError(str(error)) from None
    trial = part / "trial.keras"
    for bits in STORAGE["auto"]:
        compact.rewrite(classifier, trial, bits)
        found = compact.same(known, trial)
        trial.unlink()
        if found:
            return known
    return None


def _images(config: Config) -> tuple[np.ndarray, str]:
    try:
        return data.load(config.data, "validation").images[:_EXAMPLES], "validation"
    except UserError:
        shape = (_EXAMPLES, *config.data.image_shape)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8), "random"


def _counts(config: Config) -> tuple[int, int] | None:
    """How many images were trained on and held out; None where the data are not at hand."""
    try:
        return len(data.load(config.data, "train").labels), len(data.load(config.data, "validation").labels)
    except UserError:
        return None


def _public(config: Config, shared: Path | None) -> Config:
    """The configuration without places on this machine; of a shared classifier, what its own preset says."""
    if shared:
        of_base = RunFolder(shared.parent).load_config().classifier
        config = dataclasses.replace(config, classifier=of_base)
    dataset = (
        config.data.dataset.rstrip("/").split("/")[-1] if Path(config.data.dataset).is_dir() else config.data.dataset
    )
    nowhere = dict.fromkeys(("data.data_dir", "classifier.path", "training.start"))
    return config.replace({**nowhere, "data.dataset": dataset})


def _refuse(name: str, part: Path, target: Path, has_classifier: bool) -> None:
    """Raises a `UserError` if the new files may not take their place."""
    sizes = {path.parent.name: 0 for path in presets.FOLDER.glob(f"*/{checksums.NAME}") if path.parent != target}
    for other in sizes:
        sizes[other] = _size(presets.FOLDER / other)
        uses = f"../{name}/classifier.keras"
        expected = checksums.read(presets.FOLDER / other).get(uses)
        if expected and (not has_classifier or checksums.of(part / "classifier.keras") != expected):
            raise UserError(
                f"the preset {other} shares the classifier of {name}, which would change: delete "
                f"{presets.FOLDER / other}, release {name}, then {other} again"
            )
    sizes[name] = _size(part) + _size(target, only=(_CARD,))
    total = sum(sizes.values())
    if total > LIMIT:
        listed = ", ".join(f"{preset} {size / 1e6:.2f}" for preset, size in sorted(sizes.items()))
        raise UserError(
            f"all presets together would take {total / 1e6:.2f} MB ({listed}), expected at most {LIMIT / 1e6:g}: train "
            "smaller models, or give --storage=float16 (auto,float16 leaves the classifier as it is) and measure what it leaves"
        )


def _size(folder: Path, only: Sequence[str] = ()) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file() and (not only or path.name in only))


def _put(part: Path, target: Path, files: list[str]) -> None:
    """Moves everything to its place; the list of sums comes last, so that half a release is a damaged one."""
    target.mkdir(parents=True, exist_ok=True)
    (target / checksums.NAME).unlink(missing_ok=True)
    if "classifier.keras" not in files:
        (target / "classifier.keras").unlink(missing_ok=True)
    for path in part.iterdir():
        shutil.move(path, target / path.name)
    checksums.write(target, sorted(files))


def main(values: flags.FlagValues) -> None:
    stored, notes = release(RunFolder(values.run_dir), values.preset, values.storage)
    for each in stored:
        how = "shared" if each.bits is None else f"{each.size / 1e6:.2f} MB, {compact.words(each.bits)}"
        print(f"  {each.file}: {how}; largest difference {each.difference:.2g}")
    total = sum(_size(path.parent) for path in presets.FOLDER.glob(f"*/{checksums.NAME}"))
    print(f"all presets together: {total / 1e6:.2f} of {LIMIT / 1e6:g} MB")
    for note in notes:
        print(f"note: {note}")
    print(f"done: {presets.FOLDER / values.preset} (next: python -m trainers.evaluate --preset={values.preset})")


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "folder of a finished training run", flag_values=values)
    flags.DEFINE_string("preset", None, "name of the preset", flag_values=values)
    flags.DEFINE_string(
        "storage",
        "auto",
        "auto: the least room within the tolerance; float16: whatever it does to the answers; float32: nothing lost; two "
        "of them with a comma (auto,float16): the classifier's and the purifier's",
        flag_values=values,
    )
    run(main, values, str(__doc__), required=("run_dir", "preset"), argv=argv)


if __name__ == "__main__":
    console()
