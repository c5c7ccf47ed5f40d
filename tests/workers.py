"""`trainers.train` as one worker, which sends itself a signal: `python workers.py SIGNAL STEP FLAG...` (none: `- 0`)."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainers import train
from vqunet_tf.training import checkpoints


def main(name: str, step: int, flags: list[str]) -> None:
    usual = checkpoints.Checkpoints.on_train_batch_end

    def hit(self, batch, logs=None):
        if self.stage == "purifier" and self.batches.steps_after(batch) == step:
            os.kill(os.getpid(), signal.Signals[name])
        usual(self, batch, logs)

    if name != "-":
        checkpoints.Checkpoints.on_train_batch_end = hit
    train.console(["train", *flags])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
