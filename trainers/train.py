"""Trains a classifier (unless one is given) and the purifier in front of it, into a run folder.

    python -m trainers.train --dataset=cifar10 --run_dir=runs/cifar10

The same command again goes on where the last one stopped and, when all is done, does nothing and says so.

With --strategy=multi_worker give the same command on every machine, each with its own TF_CONFIG in the environment and
with a --run_dir on a file system that all of them share: worker 0 writes there, the others read.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from commands.run import run
from vqunet_tf import config as configuration
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import devices, fit


def main(values: flags.FlagValues) -> None:
    config = (
        configuration.preset(values.preset, values.dataset)
        .replace(
            {
                "data.data_dir": values.data_dir,
                "classifier.path": values.classifier,
                "training.objective": values.objective,
                "training.strategy": values.strategy,
                "training.precision": values.precision,
                "training.seed": values.seed,
            }
        )
        .override(values["set"].value or ())
    )
    folder = RunFolder(values.run_dir or f"runs/{values.dataset.strip('/').split('/')[-1]}")
    fit.train(config, folder, say=print)
    print(f"done: {folder.path} (next: python -m trainers.evaluate --run_dir={folder.path})")


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    data = "digits (embedded), fashion_mnist, cifar10, any other TFDS image-classification set, or a folder DIR/{train,test}/<class>/*.png"
    flags.DEFINE_string("dataset", None, data, flag_values=values)
    flags.DEFINE_string(
        "data_dir", None, "where prepared TFDS data sets lie; without it $TFDS_DATA_DIR", flag_values=values
    )
    flags.DEFINE_string("run_dir", None, "the folder of this run; without it runs/<dataset>", flag_values=values)
    flags.DEFINE_string(
        "preset", "", "settings by name, without it the data set's own; smoke is a few steps", flag_values=values
    )
    flags.DEFINE_string(
        "classifier", None, "a Keras classifier (.keras) giving logits, instead of training one", flag_values=values
    )
    flags.DEFINE_enum("objective", "gray_box", fit.OBJECTIVES, "what the purifier is trained for", flag_values=values)
    flags.DEFINE_enum(
        "strategy",
        "auto",
        devices.STRATEGIES,
        "auto: all GPUs if several; mirrored: all devices; multi_worker: the machines in TF_CONFIG, on a shared --run_dir",
        flag_values=values,
    )
    flags.DEFINE_enum("precision", "float32", fit.PRECISIONS, "arithmetic of the layers", flag_values=values)
    flags.DEFINE_integer("seed", 0, "decides weights, order, noise and adversaries", flag_values=values)
    flags.DEFINE_multi_string("set", [], "a setting, --set=training.epochs=3; may be repeated", flag_values=values)
    run(main, values, str(__doc__), required=("dataset",), argv=argv)


if __name__ == "__main__":
    console()
