"""Trains a classifier (unless one is given) and the purifier in front of it, into a run folder.

    python -m trainers.train --dataset=cifar10 --run_dir=runs/cifar10

The same command again goes on where the last one stopped and, when all is done, does nothing and says so.

With --strategy=multi_worker give the same command on every machine, each with its own TF_CONFIG in the environment and
with a --run_dir on a file system that all of them share: worker 0 writes there, the others read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from commands.run import run
from vqunet_tf import recipes
from vqunet_tf.config import Config
from vqunet_tf.errors import UserError
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import devices, fit, given

# Flag → the setting that it changes when it is given.
SETTINGS = {
    "data_dir": "data.data_dir",
    "classifier": "classifier.path",
    "from_probabilities": "classifier.from_probabilities",
    "objective": "training.objective",
    "strategy": "training.strategy",
    "precision": "training.precision",
    "seed": "training.seed",
}


def main(values: flags.FlagValues) -> None:
    config = _settings(values)
    name = config.data.dataset.strip("/").split("/")[-1]
    ending = "_adaptive" if config.training.objective == "adaptive" else ""
    folder = RunFolder(values.run_dir or f"runs/{name}{ending}")
    fit.train(config, folder, say=print, baselines=values.baselines or ())
    for path, what in folder.contents().items():
        print(f"  {path.name:<18} {what}")
    print(f"done: {folder.path} (next: python -m trainers.evaluate --run_dir={folder.path})")


def _settings(values: flags.FlagValues) -> Config:
    """The configuration of the preset or of --config, with what the other flags change."""
    if values.config:
        config = _read(Path(values.config))
        if values.preset:
            raise UserError("expected --preset or --config, got both")
        # Filled in from the data again: those of another data set would refuse to go on with this run.
        config = config.replace({"data.image_shape": (), "data.class_names": ()})
        config = config.replace({"data.dataset": values.dataset} if values.dataset else {})
    elif values.dataset:
        config = recipes.preset(values.preset, values.dataset, values.objective or "gray_box")
    else:
        raise UserError("missing --dataset (--help lists the flags)")
    changed = {setting: values[flag].value for flag, setting in SETTINGS.items() if values[flag].value is not None}
    return config.replace(changed).override(values["set"].value or ())


def _read(path: Path) -> Config:
    try:
        return Config.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config {path} cannot be read ({getattr(error, 'strerror', 'it is no text')}): expected a run folder's config.json"
        ) from None


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()

    def text(name: str, help: str) -> None:
        flags.DEFINE_string(name, None, help, flag_values=values)

    def one_of(name: str, known: Sequence[str], help: str) -> None:
        flags.DEFINE_enum(name, None, known, help, flag_values=values)

    text(
        "dataset",
        "digits (embedded), fashion_mnist, cifar10, any other TFDS image-classification set, or a folder DIR/{train,test}/<class>/*.png",
    )
    text("data_dir", "where prepared TFDS data sets lie; without it $TFDS_DATA_DIR")
    text("run_dir", "the folder of this run; without it runs/<dataset>, or runs/<dataset>_adaptive")
    text("preset", "settings by name, without it the data set's own; smoke is a few steps")
    text("config", "settings from a file such as another run's config.json, instead of a preset")
    text("classifier", "a Keras classifier (.keras) giving logits, instead of training one")
    flags.DEFINE_bool(
        "from_probabilities", None, "that classifier gives probabilities: take their logarithms", flag_values=values
    )
    one_of("objective", given.OBJECTIVES, "what the purifier is trained for; without it gray_box")
    flags.DEFINE_list(
        "baselines",
        None,
        f"ablations to train beside the purifier, of {','.join(ABLATIONS)}; a finished run gets those it lacks; without it none",
        flag_values=values,
    )
    one_of(
        "strategy",
        devices.STRATEGIES,
        "auto (without it): all GPUs if several; mirrored: all devices; multi_worker: the machines in TF_CONFIG",
    )
    one_of("precision", given.PRECISIONS, "arithmetic of the layers; without it float32")
    flags.DEFINE_integer(
        "seed", None, "decides weights, order, noise and adversaries; without it 0", flag_values=values
    )
    flags.DEFINE_multi_string("set", [], "a setting, --set=training.epochs=3; may be repeated", flag_values=values)
    run(main, values, str(__doc__), argv=argv)


if __name__ == "__main__":
    console()
