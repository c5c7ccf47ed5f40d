"""The victims of an attack: the classifier behind a defence, and the gradients by which it can be attacked.

A quantizer passes no gradient, and each stand-in for it is a way to attack. All of them share the weights of the
real purifier, and whatever they craft is scored on the real chain:

    straight_through    back through the quantizers as if each were the identity
    rotation, soft      other estimators of the same quantizers, see `models/quantize.py`
    identity            forward through the whole purifier, back as if it were the identity (BPDA)
    unquantized         quantizers switched off, forward and back: a smooth network with the same weights
    open_gate           straight-through, with the skip connections of a gated purifier held open, forward and back
    soft_gate           straight-through; back through a gate as if it were a sigmoid of a tenth of its logit (of the larger one of
                        the gate's and the certainty's, where a head closes the skip connections too)
    mismatch            another loss: away from the codes that the clean image chose
    own                 the gradient of a purifier without quantizers
    smooth              forward through the whole purifier, back through a function close to it

"Obfuscated Gradients Give a False Sense of Security", Athalye et al. 2018, https://arxiv.org/abs/1802.00420.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vqunet_tf.attacks import Victim
from vqunet_tf.attacks.base import batches
from vqunet_tf.defenses import Purify
from vqunet_tf.models import VectorQuantizer, VQUNet, quantize
from vqunet_tf.models.blocks import gates
from vqunet_tf.models.vector_quantizer import passing

ESTIMATORS = ("straight_through", "rotation", "soft")
OWN, SMOOTH, IDENTITY, UNQUANTIZED, MISMATCH = "own", "smooth", "identity", "unquantized", "mismatch"
OPEN_GATE, SOFT_GATE = "open_gate", "soft_gate"
VARIANTS = (*ESTIMATORS, OWN, SMOOTH, IDENTITY, UNQUANTIZED, OPEN_GATE, SOFT_GATE, MISMATCH)
# Attacks on these take all their steps: forward the first two are not the chain that is scored, and an image that fools them need not
# fool it. (`soft_gate` is, and could stop at the first success; the released figures were measured without.)
ELSEWHERE = (UNQUANTIZED, OPEN_GATE, SOFT_GATE)

DRAWS = 10  # of a victim that answers at random, for one gradient


class Chain:
    """The classifier behind one defence, as one function of tensors; equal only to itself.

    classifier: images → logits.
    purify: images → images; None is no defence. An attribute `differentiable` that is false says that its gradient
        leads nowhere; an attribute `smooth` is a function of tensors close to it, with a gradient. The identity stands in for any.

    Attributes:
        variants: the gradients and losses by which it can be attacked, `("",)` where there is but one.
        is_random: whether two calls differ; set it before `through`, gradients are then means over `DRAWS` calls.
    """

    def __init__(self, classifier: keras.Model, purify: Purify | None = None):
        self.classifier, self.purify = classifier, purify
        self.is_random = False
        self.model = _model_of(purify)
        self.quantizers = _quantizers(self.model)
        self._encoder = _encoder(self.model, self.quantizers)
        self._victims: dict[str, Victim] = {}
        self._compiled = tf.function(self.__call__)

    def __call__(self, images: Any) -> Any:
        return self.classifier(images if self.purify is None else self.purify(images), training=False)

    @property
    def variants(self) -> tuple[str, ...]:
        if self.purify is None:
            return ("",)
        gated = (OPEN_GATE, SOFT_GATE) if getattr(self.model, "gated", False) else ()
        if self.quantizers:
            found = (*ESTIMATORS, IDENTITY, UNQUANTIZED, *gated)
            return found if self._encoder is None else (*found, MISMATCH)
        has = {
            OWN: getattr(self.purify, "differentiable", True),
            SMOOTH: callable(getattr(self.purify, "smooth", None)),
        }
        return (*(name for name, there in has.items() if there), IDENTITY, *gated)

    def through(self, variant: str = "") -> Victim:
        """The victim with this gradient: a function images → logits, the same object for the same variant.

        An empty variant is the first of `variants`.
        """
        name = variant or self.variants[0]
        if name not in self.variants:
            raise ValueError(f"expected one of {', '.join(self.variants)}, got {variant!r}")
        if name not in self._victims:
            self._victims[name] = self._victim(name)
        return self._victims[name]

    def mismatch(self, images: Any, reference: Any) -> Any:
        """How far the vectors in front of the quantizers are from the codes that other images chose.

            mean over quantizers and places of |z(images) - e(reference)|² / mean of |e|²

        images, reference: `[B,H,W,C]` in [0,1].

        Returns `[B]` float32, with a gradient with respect to `images` only.
        """
        if self._encoder is None:
            raise ValueError("this victim has no quantizers whose vectors could be moved")
        total = 0.0
        with passing(self.quantizers, "straight_through"):
            found = self._encoder(images, training=False)
            wanted = self._encoder(tf.stop_gradient(reference), training=False)
            for i, layer in enumerate(self.quantizers):
                z, clean = found[str(i)], wanted[str(i)]
                codes = tf.stop_gradient(tf.cast(layer(clean, training=False)["quantized"], tf.float32))
                vectors = tf.cast(z, tf.float32)
                if layer.distance == "cosine":
                    split = tf.reshape(vectors, [*tf.unstack(tf.shape(z)[:-1]), layer.groups, layer.embedding_dim])
                    vectors = tf.reshape(quantize.on_unit_sphere(split), tf.shape(z))
                size = tf.reduce_mean(tf.square(tf.stop_gradient(layer.codebook)))
                far = tf.reduce_mean(tf.square(vectors - codes), axis=list(range(1, len(z.shape))))
                total += far / tf.maximum(size, 1e-12) / len(self.quantizers)
        return total

    def logits(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Logits `[N,K]` float32 of images `[N,H,W,C]`, a batch at a time; by one draw where they are random."""
        parts = [
            np.asarray(self._compiled(tf.constant(images[index])), np.float32)[:count]
            for index, count in batches(len(images), batch_size)
        ]
        return np.concatenate(parts)

    def fingerprint(self, probe: np.ndarray) -> str:
        """A hash of what this chain is: weights and configuration of its models.

        A defence that is no Keras model is known by its name and by what it does to the images `probe`.
        """
        found = hashlib.sha256(_of_model(self.classifier))
        if self.model is not None:
            found.update(_of_model(self.model))
        elif self.purify is not None:
            found.update(_name_of(self.purify).encode())
            # Rounded: the last bit is the processor's.
            found.update(
                np.round(np.asarray(self.purify(tf.constant(probe)), np.float64), 5).astype(np.float32).tobytes()
            )
        return found.hexdigest()

    def _victim(self, variant: str) -> Victim:
        victim: Victim
        if variant in ESTIMATORS:
            victim = self._estimated(variant)
        elif variant == UNQUANTIZED:
            victim = self._estimated("identity")  # of the layer: it lets its inputs through
        elif variant in (OPEN_GATE, SOFT_GATE):
            victim = self._gated(variant.removesuffix("_gate"))
        elif variant == IDENTITY:
            victim = self._back_through(lambda images: images)
        elif variant == SMOOTH:
            victim = self._back_through(self.purify.smooth)  # type: ignore[union-attr]
        else:
            victim = self
        return _expectation(victim) if self.is_random and variant != MISMATCH else victim

    def _estimated(self, estimator: str) -> Victim:
        def victim(images: Any) -> Any:
            # Read while the layers are traced: this function and no other gets it.
            with passing(self.quantizers, estimator):
                return self(images)

        return victim

    def _gated(self, how: str) -> Victim:
        through = self._estimated(ESTIMATORS[0])

        def victim(images: Any) -> Any:
            with gates(how):
                return through(images)

        return victim

    def _back_through(self, stand_in: Purify) -> Victim:
        """Forward through the whole purifier, back as if it were `stand_in`."""

        def victim(images: Any) -> Any:
            images = tf.convert_to_tensor(images)
            purified = tf.cast(self.purify(tf.stop_gradient(images)), images.dtype)  # type: ignore[misc]
            near = tf.cast(stand_in(images), images.dtype)
            return self.classifier(quantize.straight_through(near, tf.stop_gradient(purified)), training=False)

        return victim


def surrogates(name: str, classifier: keras.Model, purify: Purify | None = None) -> dict[str, Chain]:
    """The attacker's own models by name: a classifier alone, and behind its purifier."""
    found = {f"{name}_classifier": Chain(classifier)}
    return found if purify is None else {**found, f"{name}_purified": Chain(classifier, purify)}


def _expectation(victim: Victim) -> Victim:
    """The mean logits of several draws, whose gradient is the mean over the draws (expectation over transformation).

    "Synthesizing Robust Adversarial Examples", Athalye et al. 2017, https://arxiv.org/abs/1707.07397.
    """
    return lambda images: tf.add_n([tf.cast(victim(images), tf.float32) for _ in range(DRAWS)]) / DRAWS


def _model_of(purify: Any) -> keras.layers.Layer | None:
    """The Keras model or layer behind a defence, if that is what it is: bare, with bound arguments, or its method."""
    while not isinstance(purify, keras.layers.Layer):
        if isinstance(purify, functools.partial):
            purify = purify.func
        elif isinstance(getattr(purify, "__self__", None), keras.layers.Layer):
            purify = purify.__self__
        elif hasattr(purify, "purify"):
            purify = purify.purify
        else:
            return None
    return purify


def _quantizers(model: keras.layers.Layer | None) -> tuple[VectorQuantizer, ...]:
    if model is None:
        return ()
    if isinstance(model, VQUNet):
        return tuple(model.quantizers)
    layers = model._flatten_layers(include_self=True, recursive=True)
    return tuple(dict.fromkeys(layer for layer in layers if isinstance(layer, VectorQuantizer)))


def _encoder(model: Any, quantizers: tuple[VectorQuantizer, ...]) -> keras.Model | None:
    """images → what goes into each quantizer, on the same layers; None where the model does not say it."""
    graph = getattr(model, "graph", model)
    if not quantizers or not isinstance(graph, keras.Model) or not all(layer in graph.layers for layer in quantizers):
        return None
    try:
        (inputs,) = graph.inputs
        # A dictionary: of a list of one Keras makes no list.
        return keras.Model(inputs, {str(i): layer.input for i, layer in enumerate(quantizers)})
    except (AttributeError, ValueError):  # not a functional model, or a quantizer used twice
        return None


def _of_model(model: keras.layers.Layer) -> bytes:
    """Configuration and weights as a hash; of the bytes, whenever the file was written."""
    found = hashlib.sha256(json.dumps(model.get_config(), sort_keys=True, default=str).encode())
    for weight in model.weights:
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    return found.digest()


def _name_of(purify: Any) -> str:
    """What a function is called, with the arguments that are bound to it."""
    if isinstance(purify, functools.partial):
        return f"{_name_of(purify.func)}{purify.args}{sorted(purify.keywords.items())}"
    if hasattr(purify, "purify"):
        return _name_of(purify.purify)
    kind = purify if hasattr(purify, "__qualname__") else type(purify)
    return f"{kind.__module__}.{kind.__qualname__}"
