"""Exponential averages of a model's weights, beside the model: they often classify better than the last ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import numpy as np


class Averages(keras.callbacks.Callback):
    """Averages all floating-point weights of `model`, the moving statistics and code books included.

        a <- m a + (1 - m) w,    m = 1 - every / span,    a = w at the first step

    Read every few steps only (Polyak & Juditsky 1992). Span 0 averages nothing: `value` is the weights.

    Args:
        model: whose weights; trained inside a larger model.
        span: calls of the backend (of `steps_per_execution` training steps each) an average reaches back, about.
    """

    def __init__(self, model: keras.Model, span: float):
        super().__init__()
        self.averaged = model
        self.every = max(1, int(span // 20))
        self.momentum = max(0.0, 1.0 - self.every / span) if span else 0.0
        self.values: list[np.ndarray] | None = None
        self.seen = 0

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        del batch, logs
        self.seen += 1
        if self.momentum and self.seen % self.every == 0:
            now = self._weights()
            if self.values is None:
                self.values = now
            for average, value in zip(self.values, now, strict=True):
                if np.issubdtype(average.dtype, np.floating):
                    average += (1.0 - self.momentum) * (value - average)
                else:
                    average[...] = value

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has its averaged weights inside, and its own again afterwards."""
        own = self._weights()
        self.apply()
        try:
            yield
        finally:
            self._assign(own)

    def apply(self) -> None:
        """Gives the model its averaged weights for good."""
        if self.values is not None:
            self._assign(self.values)

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {"seen": np.array(self.seen), **{str(i): value for i, value in enumerate(self.values or ())}}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self.seen = int(state["seen"])
        self.values = [state[str(i)].copy() for i in range(len(state) - 1)] or None

    def _weights(self) -> list[np.ndarray]:
        _ = self.model  # under JAX, reading this property brings the weights up to date
        return [np.array(keras.ops.convert_to_numpy(weight)) for weight in self.averaged.weights]

    def _assign(self, values: list[np.ndarray]) -> None:
        for weight, value in zip(self.averaged.weights, values, strict=True):
            weight.assign(value)
