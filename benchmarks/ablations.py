"""Which part of the gray-box purifier makes the difference: short runs that differ from the preset in one thing each.

    python -m benchmarks.ablations --dataset=fashion_mnist --seeds=0,1,2 [--limit=20000] [--epochs=4] [--run_dir=runs/ablations]

Every (variant, seed) is a run folder of its own, trained by `vqunet_tf.training.fit`. All variants of a seed share one
classifier and, where they do not ask for others, one set of training adversaries. Each is measured on validation images, which
no training saw (the last epoch is kept): clean, gray-box PGD away from the label and towards a random other class, and each
family of training adversaries, all at the first radius of the preset. Prints JSON lines and writes ablations.json and
ablations.md, mean and standard deviation over the seeds, after every run. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from benchmarks import ablation_table
from vqunet_tf import data, errors, runs
from vqunet_tf.config import FAMILIES, Config
from vqunet_tf.models import DefendedClassifier, classifiers
from vqunet_tf.recipes import UNGATED, preset
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import adversaries, crafting, fit
from vqunet_tf.training.interruption import Interruption

BASE = "base"
CODES = (64, 128, 512, 2048)
_BATCH = 250


@dataclass(frozen=True)
class Variant:
    """One purifier: what it is in words, and the settings in which it differs from the preset.

    group: the question that it answers, a heading of the table.
    """

    name: str
    group: str
    what: str
    changes: dict[str, Any]


def variants(config: Config) -> list[Variant]:
    """All variants of a configuration, the unchanged one first."""
    depth = len(config.purifier.widths)
    found = [Variant(BASE, "", "as the preset", {})]

    def add(name: str, group: str, what: str, **changes: Any) -> None:
        found.append(Variant(name, group, what, {key.replace("__", "."): value for key, value in changes.items()}))

    for kept in range(depth, 0, -1):
        what = ablation_table.coarsest(kept, depth)
        chosen: dict[str, Any] = {"purifier__finest_skip": depth - kept}
        if kept == 1 and config.purifier.gated:
            # There is no skip connection left to close.
            chosen |= {key.replace(".", "__"): value for key, value in UNGATED.items()}
        if depth - kept != config.purifier.finest_skip:
            add(f"levels_{kept}", "levels", what, **chosen)
        add(f"unquantized_{kept}", "levels", f"{what}, without code books", **chosen, purifier__quantize=False)
    for size in CODES:
        if set(config.purifier.num_embeddings) != {size}:
            add(f"codes_{size}", "codes", f"{size} codes a level", purifier__num_embeddings=(size,))
    add("rotation", "gradient", "rotation", training__gradient="rotation")
    add("gradient_codebook", "codebook", "learned by the optimizer", purifier__codebook="gradient")
    no_guidance = {"training__guidance_weight": 0.0, "training__feature_weight": 0.0}
    add("no_guidance", "guidance", "off: pixels and code books alone", **no_guidance)
    for family in FAMILIES:
        add(f"without_{family}", "families", f"without {family}", attack__leave_out=(family,))
    return found


class Study:
    """All variants of one seed.

    Args:
        config: the preset with this seed.
        root: where the run folders of this seed lie, by the names of the variants.
        n: validation images to measure. steps: of PGD.
    """

    def __init__(self, config: Config, root: Path, n: int, steps: int):
        self.config, self.root, self.n, self.steps = config, root, n, steps
        self.base = RunFolder(root / BASE)

    @property
    def settings(self) -> dict[str, Any]:
        """Figures measured with other ones are measured again."""
        return {"n": self.n, "steps": self.steps, "epsilon": self.config.evaluation.epsilons[0]}

    def result(self, variant: Variant, say: Any) -> dict[str, Any]:
        """What is left behind this variant, trained if it is not yet: `accuracy` by what was done to the `n` images."""
        run, config = RunFolder(self.root / variant.name), self.config.replace(variant.changes)
        path = run.path / "ablation.json"
        if run.config.exists():
            run.create(config)  # refuses figures of another configuration
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["settings"] == self.settings:
                return known
        if not run.purifier.exists():
            if variant.name != BASE:
                self._begin(run, config)
            fit.train(config, run, say)
        accuracy = self._measure(run)
        found = {"settings": self.settings, "n": len(self._shown["clean"]), "accuracy": accuracy}
        runs.write_text(path, json.dumps(found, indent=1) + "\n")
        keras.utils.clear_session()
        return found

    def finish(self) -> None:
        """Removes the shared adversaries."""
        shutil.rmtree(self.root / "adversaries", ignore_errors=True)

    def _begin(self, run: RunFolder, config: Config) -> None:
        """Makes the folder of a run that was stopped after its classifier and, where they are shared, its adversaries."""
        known = self.base.load_config().data
        run.create(config.replace({"data.image_shape": known.image_shape, "data.class_names": known.class_names}))
        if not run.classifier.exists():
            _link(self.base.classifier, run.classifier)
        if config.attack == self.config.attack:
            for file in self._adversaries():
                _link(file, run.checkpoints / file.name)

    def _adversaries(self) -> list[Path]:
        """The training adversaries of this seed: those that the base crafted too, kept until `finish`."""
        kept = RunFolder(self.root / "adversaries")
        files = [kept.checkpoints / f"adversaries.0.{copy}.npy" for copy in range(self.config.attack.copies)]
        if not all(file.exists() for file in files):
            split = data.load(self.config.data, "train")
            with Interruption() as stop:
                crafting.Crafting(self.config, kept, split.images, lambda: self._guide, stop)(0)
        return files

    def _measure(self, run: RunFolder) -> dict[str, float]:
        defended = DefendedClassifier(run.load_purifier(), run.load_classifier())
        right = {
            kind: classifiers.logits_of(defended, images, _BATCH).argmax(axis=1) == self._validation.labels[: self.n]
            for kind, images in self._shown.items()
        }
        right["worst"] = right["clean"] & right["pgd_untargeted"] & right["pgd_targeted"]
        return {kind: float(np.mean(hits)) for kind, hits in right.items()}

    @functools.cached_property
    def _validation(self) -> data.Split:
        return data.load(self.config.data, "validation")

    @functools.cached_property
    def _guide(self) -> keras.Model:
        known = self.base.load_config()
        return classifiers.with_features(
            self.base.load_classifier(), known.data.image_shape, known.classifier.feature_layer
        )

    @functools.cached_property
    def _shown(self) -> dict[str, np.ndarray]:
        """The measured images uint8 [n, H, W, C] by what was done to them; of this seed's classifier alone."""
        images, labels = self._validation.images[: self.n], self._validation.labels[: self.n]
        seed, epsilon = self.config.training.seed, self.config.evaluation.epsilons[0]
        shown = {"clean": images}
        for name, targeted in (("pgd_untargeted", False), ("pgd_targeted", True)):
            shown[name] = adversaries.pgd(
                self._guide, images, labels, epsilon, self.steps, targeted, seed, min(_BATCH, len(images))
            )
        for number, family in enumerate(FAMILIES):
            aims, climbs = FAMILIES[:3], FAMILIES[3:]
            others = [each for each in (aims if family in aims else climbs) if each != family]
            attack = dataclasses.replace(
                self.config.attack,
                epsilon=epsilon,
                radius_power=0.0,  # every image at the full radius
                aims=(1.0, 1.0, 1.0),
                climbs=(1.0, 1.0, 1.0),
                max_steps=max(2, self.config.attack.max_steps),
                leave_out=tuple(others),
            )
            shown[f"family_{family}"] = adversaries.craft(self._guide, images, attack, (seed, 1, number))
        return shown


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name: the one can go and the other stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        beside = target.with_name(f"part.{target.name}")
        shutil.copyfile(source, beside)
        beside.replace(target)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--preset", default="", help="settings by name; without it the data set's own, the shortest")
    parser.add_argument("--seeds", default="0,1,2", help="one run of each variant for each")
    parser.add_argument("--variants", default="", help="which, besides base; without it all")
    parser.add_argument("--limit", type=int, default=0, help="training images at most; 0 is all")
    parser.add_argument("--epochs", type=int, default=0, help="of each purifier; 0 is the preset's")
    parser.add_argument("--set", action="append", default=[], help="a setting of all, training.batch_size=32")
    parser.add_argument("--num_examples", type=int, default=1000, help="validation images to measure")
    parser.add_argument("--steps", type=int, default=20, help="of PGD")
    parser.add_argument("--run_dir", default="runs/ablations")
    parser.add_argument("--output_dir", default="results/ablations")
    options = parser.parse_args(arguments)

    shorter = {"data.limit": options.limit, "training.epochs": options.epochs}
    short = {"fashion_mnist": "fashion_mnist_short"}  # the one with an encoder of its own takes hours
    config = preset(options.preset or short.get(options.dataset, ""), options.dataset).replace(
        {"training.selection": "last", **{key: value for key, value in shorter.items() if value}}
    )
    config = config.override(options.set)
    known = {variant.name: variant for variant in variants(config)}
    wanted = [errors.choice("variant", name, known) for name in filter(None, options.variants.split(","))]
    chosen = [known[name] for name in known if name == BASE or not wanted or name in wanted]
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        raise errors.UserError(f"--seeds: expected whole numbers such as 0,1,2, got {options.seeds!r}") from None

    table = ablation_table.Table(chosen, config, options)
    with tqdm(total=len(seeds) * len(chosen), unit="run", desc="ablations", dynamic_ncols=True) as bar:
        for seed in seeds:
            own = config.replace({"training.seed": seed})
            study = Study(own, Path(options.run_dir, f"seed_{seed}"), options.num_examples, options.steps)
            for variant in chosen:
                bar.set_description(f"seed {seed}, {variant.name}")
                found = study.result(variant, say=lambda line: bar.write(line, file=sys.stderr))
                table.add(variant, seed, found)
                table.write(Path(options.output_dir))
                print(json.dumps({"variant": variant.name, "seed": seed, **found["accuracy"]}), flush=True)
                bar.update()
            study.finish()


if __name__ == "__main__":
    errors.guard(main)()
