"""The vector-quantizer layer: a code book that follows the data, and its state."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
from keras import ops

from vqunet_tf import backend
from vqunet_tf.models import quantize

CODEBOOKS = ("ema", "gradient")
DISTANCES = ("euclidean", "cosine")
GRADIENTS = ("straight_through", "rotation", "soft", "identity")
INITS = ("kmeans", "uniform")

# Layer → the estimator that it passes for now. Not an attribute of the layer: replicas are traced in threads that take turns.
_PASSING: contextvars.ContextVar[Mapping[int, str] | None] = contextvars.ContextVar("passing", default=None)

_SAMPLES_PER_CODE = 4  # rows of the first batch per code, for k-means


@keras.saving.register_keras_serializable("vqunet_tf")
class VectorQuantizer(keras.layers.Layer):
    """Replaces each vector by the nearest entry of a learned code book (van den Oord et al. 2017, arXiv 1711.00937).

    With z the inputs, e the code book and k the nearest code of each vector:

        quantized = e_k                                   gradient to z: the identity (straight-through)
        loss      = commitment_cost * mean |z - sg(e_k)|^2                       codebook="ema"
                  + mean |sg(z) - e_k|^2                                         codebook="gradient" adds this

    Under `training=True` the layer quantizes first and updates its code book afterwards; otherwise nothing changes.
    The first training batch places the codes (`init="kmeans"`). A code that was not chosen for `revive_after` training
    steps is moved onto a vector of the current batch. Under `tf.distribute` all replicas keep one and the same code
    book, equal to that of a single device on the concatenated batch.

    Args:
        num_embeddings: number of codes K, at least 1.
        embedding_dim: width of a code D.
        commitment_cost: weight of the commitment loss.
        codebook: "ema" (moving averages) or "gradient" (learned by the optimizer).
        decay: of the moving averages, in [0, 1).
        distance: "euclidean", or "cosine" (inputs and codes count by their direction only).
        gradient: what reaches the inputs: "straight_through", "rotation", "soft" (of softened codes), or "identity",
            which lets the inputs (for the cosine distance their directions) through unquantized. May be set on a built layer
            before it is compiled into anything: attacks that know the purifier try them all.
        temperature: of the soft codes, a squared distance.
        revive_after: training steps without a hit until a code is moved; 0 never moves one.
        init: "kmeans" (from the first training batch) or "uniform".
        groups: vectors G that lie side by side in the last axis of the inputs, each replaced on its own by a code of the one
            code book (product quantization, Jegou et al. 2011): G times the bits at the same place.

    Call arguments:
        inputs: float [..., G D].
        training: whether the code book may change.

    Returns:
        A dict: `quantized` [..., G D], `indices` int32 [...] ([..., G] for G > 1), `loss` and `perplexity` float32 scalars.

    Raises:
        ValueError: another last axis than `groups * embedding_dim`, inputs that are no floats; NaN or infinity where the values
            can be looked at (outside compiled functions).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment_cost: float = 0.25,
        codebook: str = "ema",
        decay: float = 0.99,
        distance: str = "euclidean",
        gradient: str = "straight_through",
        temperature: float = 1.0,
        revive_after: int = 100,
        init: str = "kmeans",
        groups: int = 1,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        for name, value in {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "groups": groups,
        }.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected {name} to be an integer of at least 1. Received: {value!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Expected decay in [0, 1). Received: {decay!r}")
        if commitment_cost < 0 or revive_after < 0:
            raise ValueError(
                "Expected commitment_cost and revive_after of at least 0. "
                f"Received: {commitment_cost!r} and {revive_after!r}"
            )
        if not temperature > 0.0:
            raise ValueError(f"Expected a temperature above 0. Received: {temperature!r}")
        _one_of("codebook", codebook, CODEBOOKS)
        _one_of("distance", distance, DISTANCES)
        _one_of("init", init, INITS)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.codebook_kind = codebook
        self.decay = decay
        self.distance = distance
        self.gradient = gradient
        self.temperature = temperature
        self.revive_after = revive_after
        self.init = init
        self.groups = groups

    def build(self, input_shape: Any) -> None:
        self._check_width(input_shape)
        codes, width = self.num_embeddings, self.embedding_dim

        def state(name: str, shape: tuple[int, ...], initializer: Any, trainable: bool = False) -> Any:
            # float32 whatever the policy: half precision merges codes. Replicas all assign the same all-reduced
            # value: any other aggregation counts twice or raises.
            return self.add_weight(
                name=name,
                shape=shape,
                dtype="float32",
                autocast=False,
                initializer=initializer,
                trainable=trainable,
                aggregation="none",
            )

        limit = 3.0**0.5  # uniform with unit variance
        self.placed = state("placed", (codes, width), keras.initializers.RandomUniform(-limit, limit))
        # A gradient code book is `placed + learned`: data may place codes on every backend (JAX forbids assigning
        # a trainable weight inside a training step) while the optimizer owns `learned` alone.
        self.learned = (
            state("learned", (codes, width), "zeros", trainable=True) if self.codebook_kind == "gradient" else None
        )
        self.weights_ema = state("weights_ema", (codes,), "ones")
        self.idle_steps = state("idle_steps", (codes,), "zeros")
        self.hits = state("hits", (codes,), "zeros")
        self.steps = state("steps", (), "zeros")

    @property
    def codebook(self) -> Any:
        """The codes as they stand, float32 [K, D]; of length one for the cosine distance."""
        codes = ops.convert_to_tensor(self.placed)
        codes = codes if self.learned is None else codes + self.learned
        return quantize.on_unit_sphere(codes) if self.distance == "cosine" else codes

    @property
    def gradient(self) -> str:
        """Name of the gradient estimator."""
        return (_PASSING.get() or {}).get(id(self), self._gradient)

    @gradient.setter
    def gradient(self, name: str) -> None:
        _one_of("gradient", name, GRADIENTS)
        self._gradient = name

    def usage(self) -> float:
        """Share of the codes chosen at least once in training since `reset_usage`, in [0, 1]."""
        return float(ops.mean(ops.cast(ops.greater(self.hits, 0.0), "float32")))

    def perplexity(self) -> float:
        """exp of the entropy of the codes chosen in training since `reset_usage`: from 1 to `num_embeddings`."""
        return float(quantize.perplexity(ops.convert_to_tensor(self.hits)))

    def reset_usage(self) -> None:
        self.hits.assign(ops.zeros(self.hits.shape))

    def call(self, inputs: Any, training: bool = False) -> dict[str, Any]:
        self._check_width(inputs.shape)
        inputs = ops.convert_to_tensor(inputs)
        if "float" not in keras.backend.standardize_dtype(inputs.dtype):
            raise ValueError(f"Expected float inputs. Received: dtype={keras.backend.standardize_dtype(inputs.dtype)}")
        if backend.is_concrete(inputs) and not bool(ops.all(ops.isfinite(inputs))):
            raise ValueError("Expected finite inputs. Received: NaN or infinity")
        vectors = ops.cast(ops.reshape(inputs, (-1, self.embedding_dim)), "float32")  # [N, D]
        if self.distance == "cosine":
            vectors = quantize.on_unit_sphere(vectors)
        frozen = ops.stop_gradient(vectors)
        candidates = self._prepare(frozen) if training else None
        codes = self.codebook
        indices = quantize.nearest_codes(frozen, ops.stop_gradient(codes))  # [N]
        chosen = quantize.lookup(codes, indices)  # [N, D]
        counts, sums = quantize.code_sums(frozen, indices, self.num_embeddings)
        if training:
            counts, sums = backend.sum_over_replicas(counts, sums)
            self._update(ops.stop_gradient(codes), counts, sums, candidates)

        loss = self.commitment_cost * _mean_square(vectors - ops.stop_gradient(chosen))
        if self.learned is not None:
            loss = loss + _mean_square(frozen - chosen)
        quantized = self._replace(vectors, ops.stop_gradient(chosen), ops.stop_gradient(codes))
        shape = ops.shape(inputs)
        return {
            "quantized": ops.cast(ops.reshape(quantized, shape), self.compute_dtype),
            "indices": ops.reshape(indices, self._places(shape)),
            "loss": loss,
            "perplexity": quantize.perplexity(counts),
        }

    def compute_output_spec(self, inputs: Any, training: bool = False) -> dict[str, Any]:
        self._check_width(inputs.shape)
        return {
            "quantized": keras.KerasTensor(inputs.shape, dtype=self.compute_dtype),
            "indices": keras.KerasTensor(self._places(inputs.shape), dtype="int32"),
            "loss": keras.KerasTensor((), dtype="float32"),
            "perplexity": keras.KerasTensor((), dtype="float32"),
        }

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "commitment_cost": self.commitment_cost,
            "codebook": self.codebook_kind,
            "decay": self.decay,
            "distance": self.distance,
            "gradient": self.gradient,
            "temperature": self.temperature,
            "revive_after": self.revive_after,
            "init": self.init,
            "groups": self.groups,
        }

    def _replace(self, vectors: Any, chosen: Any, codes: Any) -> Any:
        """The chosen codes [N, D], with the gradient to the vectors that was asked for."""
        if self.gradient == "rotation":
            return quantize.rotation(vectors, chosen)
        if self.gradient == "soft":
            return quantize.soft_codes(vectors, chosen, codes, self.temperature)
        return vectors if self.gradient == "identity" else quantize.straight_through(vectors, chosen)

    def _prepare(self, vectors: Any) -> Any:
        """Places the codes at the first step; returns rows of the batch [K, D] onto which dead codes may move."""
        number = self.num_embeddings * _SAMPLES_PER_CODE
        mine = quantize.candidate_rows(vectors, number, self.steps, *backend.replica())
        (rows,) = backend.sum_over_replicas(mine)  # the same rows on every replica, so the same code book
        if self.init == "kmeans":
            placed = ops.convert_to_tensor(self.placed)
            first = ops.equal(self.steps, 0.0)
            self.placed.assign(ops.cond(first, lambda: quantize.kmeans(rows, self.num_embeddings), lambda: placed))
        return rows[: self.num_embeddings]

    def _update(self, codes: Any, counts: Any, sums: Any, candidates: Any) -> None:
        """Moves the code book after a training step, and keeps account of the codes nobody chose."""
        hit = ops.greater(counts, 0.0)
        idle = ops.where(hit, 0.0, self.idle_steps + 1.0)
        placed, weights = ops.convert_to_tensor(self.placed), ops.convert_to_tensor(self.weights_ema)
        if self.learned is None:
            moved, weights = quantize.ema_update(codes, weights, counts, sums, self.decay)
            placed = ops.where(hit[:, None], moved, placed)
        if self.revive_after:
            dead = ops.greater_equal(idle, float(self.revive_after))
            placed = ops.where(dead[:, None], candidates if self.learned is None else candidates - self.learned, placed)
            weights = ops.where(dead, 1.0, weights)
            idle = ops.where(dead, 0.0, idle)
        self.placed.assign(placed)
        self.weights_ema.assign(weights)
        self.idle_steps.assign(idle)
        self.hits.assign(self.hits + counts)
        self.steps.assign(self.steps + 1.0)

    def _places(self, shape: Any) -> tuple[Any, ...]:
        """The shape of the indices for inputs of a shape."""
        return (*shape[:-1], self.groups) if self.groups > 1 else tuple(shape[:-1])

    def _check_width(self, shape: Any) -> None:
        if shape[-1] != self.groups * self.embedding_dim:
            groups = f"groups={self.groups} times " if self.groups > 1 else ""
            raise ValueError(
                f"Expected inputs whose last axis is {groups}embedding_dim={self.embedding_dim}. "
                f"Received: shape={tuple(shape)}"
            )


def _mean_square(difference: Any) -> Any:
    """Mean of squares; 0 for an empty batch."""
    total = ops.sum(ops.square(difference))
    return total / ops.cast(ops.maximum(ops.size(difference), 1), "float32")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Expected {name} to be one of {known}. Received: {value!r}")


@contextlib.contextmanager
def passing(quantizers: Iterable[VectorQuantizer], gradient: str | None) -> Iterator[None]:
    """Has quantizers pass this gradient estimator within the block, in this thread only; None leaves them alone.

    A layer reads its estimator while it is traced: what is compiled inside gets this one for good.
    """
    chosen = {} if gradient is None else {id(layer): gradient for layer in quantizers}
    token = _PASSING.set({**(_PASSING.get() or {}), **chosen})
    try:
        yield
    finally:
        _PASSING.reset(token)
