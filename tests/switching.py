"""Two quantizers on four logical CPUs, switched off and on again by every replica: `python switching.py`.

Replicas are traced in threads that take turns wherever they sum over one another, as a quantizer does in training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf

from vqunet_tf import VectorQuantizer
from vqunet_tf.models.vector_quantizer import passing


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    strategy = tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices("CPU")])
    rows = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    with strategy.scope():
        quantizers = [VectorQuantizer(4, 2), VectorQuantizer(4, 2)]
        for quantizer in quantizers:
            quantizer.build((None, 2))

    @tf.function
    def step():
        found = []
        for name in ("identity", "straight_through"):
            with passing(quantizers, name):
                found += [quantizer(rows, training=True)["quantized"] for quantizer in quantizers]
        return found

    results = [strategy.experimental_local_results(each) for each in strategy.run(step)]
    assert [len(each) for each in results] == [4] * 4
    for off, on in ((results[0], results[2]), (results[1], results[3])):
        for one, two in zip(off, on, strict=True):
            np.testing.assert_allclose(one, rows)
            assert np.abs(np.asarray(two) - rows).max() > 0.1
    assert {quantizer.gradient for quantizer in quantizers} == {"straight_through"}


if __name__ == "__main__":
    main()
