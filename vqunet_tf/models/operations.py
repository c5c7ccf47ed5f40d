"""How many multiply-accumulates an image costs: those of convolutions, dense layers and the search for codes."""

from __future__ import annotations

import keras
import numpy as np

from vqunet_tf.models.vqunet import VQUNet


def multiply_accumulates(model: VQUNet, shape: tuple[int, ...]) -> int:
    """Of one image: the convolutions and the search for the nearest codes."""
    return of_layers(model.graph, shape) + of_search(model, shape)


def of_layers(model: keras.Model, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image in the convolutions and dense layers of a functional model, not of models inside it."""
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]
    if not layers:
        return 0
    outputs = keras.Model(model.inputs[0], [layer.output for layer in layers])(np.zeros((1, *shape), "float32"))
    places = [int(np.prod(output.shape[1:-1])) for output in outputs]
    return sum(place * int(np.prod(layer.kernel.shape)) for place, layer in zip(places, layers, strict=True))


def of_search(model: VQUNet, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image in the search for the nearest codes."""
    maps = [codes for _, codes in sorted(model.codes(np.zeros((1, *shape), "float32")).items())]
    return sum(m.size * q.num_embeddings * q.embedding_dim for m, q in zip(maps, model.quantizers, strict=True))
