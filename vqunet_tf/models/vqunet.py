"""VQUNet: a U-Net whose bottleneck and every skip connection pass through a vector quantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from vqunet_tf import backend, pixels
from vqunet_tf.models import blocks as parts
from vqunet_tf.models import presets
from vqunet_tf.models.vector_quantizer import VectorQuantizer


@keras.saving.register_keras_serializable("vqunet_tf")
class VQUNet(keras.Model):
    """Purifies images: [B, H, W, C] in [0, 1] -> the same shape and range (He & Singhal 2024, arXiv 2406.03117).

    The decoder sees the image only through code books, one at the bottleneck and one on each skip connection (and, where it
    is `gated`, through one bit):

        image -> stem -> level 0 -> down -> level 1 -> down -> ... -> level L-1
                            |                 |                          |
                           VQ 0              VQ 1                      VQ L-1
                            |                 |                          |
        image <- head <- level 0 <-  up  <- level 1 <-  up  <- ... <-----+

    Level i works at 1 / (stem 2^i) of the resolution. Any height and width of at least 8 and of half of stem 2^(L-1)
    will do: images are padded and cropped inside.

    Args:
        widths: channels per level; their number is the depth L.
        blocks: residual blocks per level, in the encoder and in the decoder.
        decoder_widths, decoder_blocks: those of the decoder, if others than the encoder's.
        num_embeddings: codes per level, or one number for all.
        embedding_dim: width of a code per level, or one number for all.
        groups: codes at each place of a level, or one number for all; more keep more of the image.
        stem: patch size of the first and last convolution; 2 works at half resolution.
        channels: C.
        commitment_cost, decay, codebook: as in `VectorQuantizer`.
        quantize: False leaves the code books out (a plain U-Net).
        normalize: True normalises each image inside the residual blocks.
        skips: False leaves the skip connections out (a VQ-VAE; with `quantize=False` a denoising autoencoder).
        finest_skip: level of the finest skip connection; those of finer levels are left out.
        gated: True closes the skip connections of an image that a small network on its pixels takes for tampered with: it is
            drawn from the bottleneck alone.
        pixel_share: where the skip connections are open the result is this share of the image itself and else what was drawn; in [0, 1).
        tones: so many, equally far apart in [0, 1], are left of each number of that share (a fixed scalar code book: Mentzer et
            al. 2023, arXiv 2309.15505).
        classes: number of classes of a linear head on the bottleneck; an image of whose class it is certain is drawn from the bottleneck
            alone, too, so that skip connections and pixels speak where the bottleneck is in doubt. 0 has no head; it needs a gate.

    Attributes:
        graph: a functional model on the same layers that returns everything: `images`, `indices` (per level,
            int32 [B, h, w], or [B, h, w, groups]), `loss` (the quantizers', a scalar), `perplexity` (per level),
            `bottleneck` (what the decoder begins with, [B, h, w, decoder_widths[-1]]) and, where it is `gated`, `gate`
            (logits [B]: above 0 the skip connections are closed). With a `pixel_share` also `drawn`, what the decoder drew, and
            `pixels`, what is added to that with all of the share: `images` is `drawn` + `pixel_share` `pixels`. With `classes` also
            the head's logits `classes` [B, K] and `certainty` [B] (above 0 the skip connections are closed, whatever the gate says).
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 96),
        blocks: int = 1,
        num_embeddings: int | Sequence[int] = 512,
        embedding_dim: int | Sequence[int] = 16,
        groups: int | Sequence[int] = 1,
        stem: int = 2,
        channels: int = 3,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        quantize: bool = True,
        skips: bool = True,
        normalize: bool = False,
        finest_skip: int = 0,
        codebook: str = "ema",
        decoder_widths: Sequence[int] | None = None,
        decoder_blocks: int | None = None,
        gated: bool = False,
        pixel_share: float = 0.0,
        tones: int = 64,
        classes: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**{"autocast": False, **kwargs})  # images come in as float32 whatever the policy
        depth = len(widths)
        codes = _per_level("num_embeddings", num_embeddings, depth)
        dims = _per_level("embedding_dim", embedding_dim, depth)
        several = _per_level("groups", groups, depth)
        drawn = tuple(widths if decoder_widths is None else decoder_widths)
        repeated = blocks if decoder_blocks is None else decoder_blocks
        if len(drawn) != depth:
            raise ValueError(f"Expected decoder_widths for each of the {depth} levels. Received: {decoder_widths!r}")
        for name, value in {
            "blocks": blocks,
            "decoder_blocks": repeated,
            "decoder_widths": min(drawn, default=0),
            "stem": stem,
            "channels": channels,
            "widths": min(widths, default=0),
        }.items():
            if value < 1:
                raise ValueError(f"Expected {name} of at least 1. Received: {value!r}")

        if not 0 <= finest_skip < depth:
            raise ValueError(f"Expected finest_skip from 0 to {depth - 1}. Received: {finest_skip!r}")
        if gated and not (skips and finest_skip < depth - 1):
            raise ValueError(
                f"Expected skip connections where gated is True. Received: skips={skips!r}, finest_skip={finest_skip!r} "
                f"with {depth} levels"
            )
        if not 0.0 <= pixel_share < 1.0 or tones < 2:
            raise ValueError(
                f"Expected pixel_share in [0, 1) and tones of at least 2. Received: {pixel_share!r} and {tones!r}"
            )
        if pixel_share and not gated:
            raise ValueError(
                f"Expected a gate (gated=True) where pixel_share is above 0. Received: pixel_share={pixel_share!r}"
            )
        if classes and (classes < 2 or not gated):
            raise ValueError(
                f"Expected classes of 0, or at least 2 with a gate (gated=True). Received: classes={classes!r}, gated={gated!r}"
            )

        # === Layers ===
        bottled = range(finest_skip, depth) if skips else [depth - 1]
        quantizers = {
            i: VectorQuantizer(
                codes[i], dims[i], commitment_cost, codebook, decay, groups=several[i], name=f"quantizer_{i}"
            )
            for i in bottled
            if quantize
        }

        # === Functional graph ===
        images = keras.Input((None, None, channels), name="images")
        padded = parts.PadToMultiple(stem * 2 ** (depth - 1), name="pad")(images)
        centred = 2.0 * padded - 1.0
        h = parts.convolution(centred, widths[0], "stem", kernel=stem + 2 * (stem // 2 or 1), strides=stem)
        encoded = []
        for i in range(depth):
            if i:
                h = parts.down(h, widths[i], f"down_{i}")
            for b in range(blocks):
                h = parts.residual(h, f"encoder_{i}_{b}", normalize)
            encoded.append(h)

        outputs: dict[str, Any] = {"indices": {}, "perplexity": {}}
        losses = []

        def bottle(level: int) -> Any:
            """What the decoder may see of a level: code-book content only."""
            z = parts.convolution(encoded[level], several[level] * dims[level], f"to_codes_{level}", kernel=1)
            if quantize:
                result = quantizers[level](z)
                z = result["quantized"]
                losses.append(result["loss"])
                outputs["indices"][f"level_{level}"] = result["indices"]
                outputs["perplexity"][f"level_{level}"] = result["perplexity"]
            return parts.convolution(z, drawn[level], f"from_codes_{level}", kernel=1)

        h = outputs["bottleneck"] = bottle(depth - 1)
        passed: Any = 1.0
        if gated:
            logits = parts.gate(centred, "gate")
            outputs["gate"] = ops.reshape(logits, (-1,))
            if classes:
                outputs["classes"] = parts.head(h, classes, "classes")
                outputs["certainty"] = parts.Certainty(dtype="float32", name="certainty")(outputs["classes"])
                logits = ops.maximum(logits, ops.reshape(outputs["certainty"], (-1, 1, 1, 1)))
            passed = parts.Passage(dtype="float32", name="passage")(logits)
        for i in reversed(range(depth)):
            if i < depth - 1:
                h = parts.up(h, drawn[i], f"up_{i}")
                if i in bottled:
                    skip = bottle(i)
                    h = h + (skip * ops.cast(passed, skip.dtype) if gated else skip)
            for b in range(repeated):
                h = parts.residual(h, f"decoder_{i}_{b}", normalize)
        h = parts.convolution(ops.relu(h), channels * stem**2, "head", kernel_initializer="glorot_uniform")
        h = parts.DepthToSpace(stem, name="shuffle")(h) if stem > 1 else h
        purified = parts.CropLike(name="crop")(layers.Activation("sigmoid", dtype="float32", name="unit")(h), images)
        if pixel_share:
            toned = parts.Tones(tones, dtype="float32", name="tones")(images)
            outputs["drawn"], outputs["pixels"] = purified, passed * (toned - purified)
            purified = purified + pixel_share * outputs["pixels"]
        outputs["images"] = purified
        outputs["loss"] = ops.sum(ops.stack(losses)) if losses else 0.0 * ops.sum(purified)
        self.graph = keras.Model(images, outputs, name="graph")

        # === Config ===
        self.widths = tuple(widths)
        self.blocks = blocks
        self.num_embeddings = codes
        self.embedding_dim = dims
        self.groups = several
        self.stem = stem
        self.channels = channels
        self.commitment_cost = commitment_cost
        self.decay = decay
        self.quantize = quantize
        self.skips = skips
        self.normalize = normalize
        self.finest_skip = finest_skip
        self.codebook = codebook
        self.decoder_widths = None if drawn == self.widths else drawn
        self.decoder_blocks = None if repeated == blocks else repeated
        self.gated = gated
        self.pixel_share = pixel_share
        self.tones = tones
        self.classes = classes
        self(images)  # so that it can be saved and exported before its first use
        self.jit_compile = self.graph.jit_compile = backend.needs_jit()

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """The vector quantizers, finest level first; empty for `quantize=False`."""
        found = [layer for layer in self.graph.layers if isinstance(layer, VectorQuantizer)]
        return sorted(found, key=lambda layer: layer.name)

    def set_gradient(self, name: str) -> None:
        """Sets the gradient estimator of every quantizer: see `VectorQuantizer`.

        What was compiled before (`fit`, an attack, a `tf.function` of one's own) keeps the old one.
        """
        for quantizer in self.quantizers:
            quantizer.gradient = name
        self.predict_function = self.graph.predict_function = None

    def call(self, images: Any, training: bool = False) -> Any:
        if images.shape[-1] != self.channels:
            raise ValueError(f"Expected images [B, H, W, {self.channels}]. Received: shape={tuple(images.shape)}")
        return self.graph(images, training=training)["images"]

    def compute_output_spec(self, images: Any, training: bool = False) -> Any:
        return keras.KerasTensor(images.shape, dtype="float32")

    def purify(self, images: Any, batch_size: int = 128) -> np.ndarray:
        """Purifies a user's images.

        Args:
            images: uint8 in [0, 255] or float in [0, 1]; one [H, W, C] or a batch [B, H, W, C], an array or a tensor.
            batch_size: images per step; memory grows with it, results do not change.

        Returns:
            A NumPy array float32 in [0, 1] of the same shape.

        Raises:
            ValueError: another rank or channel count, floats outside [0, 1], NaN, or sides below 8.
        """
        batches, single = self._in_batches(images, batch_size, self.predict_on_batch)
        result = np.concatenate(batches)
        return result[0] if single else result

    def codes(self, images: Any, batch_size: int = 128) -> dict[str, np.ndarray]:
        """The discrete code maps of a user's images, all that the decoder sees of them unless it is `gated`.

        Takes and refuses what `purify` does. Returns int32 maps in [0, num_embeddings) by level: `level_0` (the finest)
        [B, h, w], or [h, w] for one image; with one more axis for several `groups`.
        """
        batches, single = self._in_batches(
            images, batch_size, lambda batch: self.graph.predict_on_batch(batch)["indices"]
        )
        levels = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        return {name: maps[0] for name, maps in levels.items()} if single else levels

    def _in_batches(self, images: Any, batch_size: int, function: Callable[[Any], Any]) -> tuple[list[Any], bool]:
        """What a function gives for each batch of a user's images, as arrays; and whether it was one image."""
        array = pixels.checked(images, self.channels)
        single = array.ndim == 3
        batch = array[None] if single else array
        kept = len(batch)
        if not kept:  # convolutions refuse an empty batch: one image, of which nothing is kept
            batch = np.zeros((1, *batch.shape[1:]), batch.dtype)
        results = [function(pixels.to_unit(batch[i : i + batch_size])) for i in range(0, len(batch), batch_size)]
        return keras.tree.map_structure(lambda part: ops.convert_to_numpy(part)[:kept], results), single

    @classmethod
    def from_preset(cls, name: str) -> VQUNet:
        """Returns a purifier with released weights; an unknown name raises a `ValueError` that lists the known ones."""
        return presets.load(name, "purifier")

    def get_config(self) -> dict[str, Any]:
        names = ["widths", "blocks", "num_embeddings", "embedding_dim", "groups", "stem", "channels"]
        names += ["commitment_cost", "decay", "quantize", "skips", "normalize", "finest_skip", "codebook"]
        names += ["decoder_widths", "decoder_blocks", "gated", "pixel_share", "tones", "classes"]
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _per_level(name: str, value: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """One number per level."""
    values = (value,) * depth if isinstance(value, int) else tuple(value)
    values = values * depth if len(values) == 1 else values
    if len(values) != depth:
        raise ValueError(f"Expected {name} to be one number or one for each of the {depth} levels. Received: {value!r}")
    return values
