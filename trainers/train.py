"""Trains a classifier (unless one is given) and the purifier in front of it, into a run folder.

    python -m trainers.train --dataset=cifar10 --run_dir=runs/cifar10

The same command again goes on where the last one stopped and, when all is done, does nothing and says so.
"""

from __future__ import annotations

from absl import flags

from trainers.flags import run as run_command
from vqunet_tf import config as configuration
from vqunet_tf.runs import RunFolder
from vqunet_tf.training import devices, fit

FLAGS = flags.FlagValues()

flags.DEFINE_string(
    "dataset",
    None,
    "digits (embedded), fashion_mnist, cifar10, any other TFDS image-classification set, "
    "or a folder DIR/{train,test}/<class>/*.png.",
    flag_values=FLAGS,
)
flags.DEFINE_string("data_dir", None, "Where prepared TFDS data sets lie; default $TFDS_DATA_DIR.", flag_values=FLAGS)
flags.DEFINE_string("run_dir", None, "Folder of this run; default runs/<dataset>.", flag_values=FLAGS)
flags.DEFINE_string("preset", "", "Settings by name; default the data set's own. smoke is a few steps.", flag_values=FLAGS)
flags.DEFINE_string("classifier", None, "A Keras classifier (.keras) giving logits, instead of training one.", flag_values=FLAGS)
flags.DEFINE_enum("objective", "gray_box", fit.OBJECTIVES, "What the purifier is trained for.", flag_values=FLAGS)
flags.DEFINE_enum("strategy", "auto", devices.STRATEGIES, "Devices: see vqunet_tf/training/devices.py.", flag_values=FLAGS)
flags.DEFINE_enum("precision", "float32", fit.PRECISIONS, "Arithmetic of the layers.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Decides weights, order, noise and adversaries.", flag_values=FLAGS)
flags.DEFINE_multi_string("set", [], "A setting, --set=training.epochs=3; may be repeated.", flag_values=FLAGS)
flags.mark_flag_as_required("dataset", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    del argv
    config = (
        configuration.preset(FLAGS.preset, FLAGS.dataset)
        .replace(
            {
                "data.data_dir": FLAGS.data_dir,
                "classifier.path": FLAGS.classifier,
                "training.objective": FLAGS.objective,
                "training.strategy": FLAGS.strategy,
                "training.precision": FLAGS.precision,
                "training.seed": FLAGS.seed,
            }
        )
        .override(FLAGS["set"].value)
    )
    run = RunFolder(FLAGS.run_dir or f"runs/{FLAGS.dataset.strip('/').split('/')[-1]}")
    fit.train(config, run, say=print)
    print(f"done: {run.path} (next: python -m trainers.evaluate --run_dir={run.path})")


def console() -> None:
    """Entry point of `vqunet-train`."""
    run_command(main, FLAGS)


if __name__ == "__main__":
    console()
