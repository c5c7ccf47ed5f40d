"""What is minimised, as Keras models whose `fit` trains the model inside them on any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from vqunet_tf import backend, pixels
from vqunet_tf.config import TrainingConfig
from vqunet_tf.models.blocks import held_open
from vqunet_tf.models.vector_quantizer import passing
from vqunet_tf.models.vqunet import VQUNet


class Objective(keras.Model):
    """A weighted sum of named losses; every part is reported beside the sum.

    A subclass says in `losses_of` what the parts are. The sum is a share of the mean over all replicas.
    """

    def __init__(self, weights: dict[str, float]):
        super().__init__()
        self.weights_of = weights
        self.parts = {name: keras.metrics.Mean(name=name) for name in weights}
        self.built = True

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        """The parts by name, each a mean over the batch."""
        raise TypeError(f"{type(self).__name__} must say what it minimises")

    def weights_for(self, x: Any) -> dict[str, Any]:
        """The weights of the parts for these inputs."""
        del x
        return self.weights_of

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Nothing: all is built. Keras 3.15 averages a first batch over the replicas here, which fails over workers."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        return backend.for_mean_over_workers(super().compute_metrics(x, y, y_pred, sample_weight))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        del sample_weight, training
        losses, weights = self.losses_of(x, y, y_pred), self.weights_for(x)
        for name, metric in self.parts.items():
            metric.update_state(losses[name])
        return backend.share_of_loss(sum(weight * losses[name] for name, weight in weights.items()))


class ClassifierObjective(Objective):
    """Cross-entropy with label smoothing on uint8 images; trains `classifier`."""

    def __init__(self, classifier: keras.Model, label_smoothing: float = 0.0):
        super().__init__({"cross_entropy": 1.0})
        self.classifier = classifier
        self.smoothing = label_smoothing
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")

    def call(self, images: Any, training: bool = False) -> Any:
        return ops.cast(self.classifier(pixels.to_unit(images), training=training), "float32")

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        del x
        self.accuracy.update_state(y, outputs)
        return {"cross_entropy": cross_entropy(outputs, y, self.smoothing)}


class GrayBoxObjective(Objective):
    """Gives the clean image back from a clean, noisy or adversarial one; trains `purifier` only.

    With x the clean image, x' what the purifier P sees, f the frozen classifier and phi its features:

        pixel_weight    * mean |P(x') - x|                                     reconstruction (L1); the weight may fade
      + guidance_weight * KL(softmax f(x) || softmax f(P(x')))                 logit guidance, and
      + feature_weight  * mean of |phi(P(x')) - phi(x)|^2 / |phi(x)|^2         feature guidance, after the high-level
                                                                               guided denoiser (Liao et al. 2018,
                                                                               arXiv 1712.02976)
      + head_weight     * CE(h(x'), y)                                         of a linear head on the bottleneck (deep
                                                                               supervision, Lee et al. 2015, arXiv 1409.5185)
      + gate_weight     * CE(gate(x'), attacked)                               of a gated purifier's gate, unless it learned
                                                                               alone (`gate_epochs`)
      + codebook_weight * sum over levels of the quantizer losses              (van den Oord et al. 2017, Eq. 3)

    A purifier with a `pixel_share` learns with a random one for each image ("share"), so that what it draws does as a whole and as a
    correction; the reconstruction is that of what it draws. The gates of images that are "open" are held so.

    Where the batches have a "start" and an "epsilon" (`training.loop_epsilon`), x' is first moved up to epsilon further, to where
    f(P(x')) is least sure of what f says about x: a few projected gradient steps (Madry et al. 2018, arXiv 1706.06083) on the chain
    as it stands. What was crafted against f alone tells how f can be fooled; this tells what P still lets through.

    The head h, of the mean over all places, learns beside the purifier and is then thrown away.
    The quantizers' losses are outputs added here: `add_loss` is not safe under `tf.distribute` once a layer
    synchronises its replicas.

    Args:
        guide: the frozen classifier with its features (`classifiers.with_features`).
        head: that learned before (`encoder.EncoderObjective`), to go on with; None is a new one.
    """

    def __init__(
        self, purifier: VQUNet, guide: keras.Model, config: TrainingConfig, head: keras.layers.Dense | None = None
    ):
        super().__init__(
            {
                "pixel": config.pixel_weight,
                "guidance": config.guidance_weight,
                "feature": config.feature_weight,
                **({"head": config.head_weight} if config.head_weight else {}),
                **({"gate": config.gate_beside_the_rest} if purifier.gated and config.gate_beside_the_rest else {}),
                "codebook": config.codebook_weight,
            }
        )
        self.purifier = purifier
        self.guide = guide
        self.guide.trainable = False
        self.attack_steps, self.step_size = config.attack_steps, config.attack_step_size
        self.head = None
        if config.head_weight:
            self.head = new_head(purifier, guide.output["logits"].shape[-1]) if head is None else head

    def call(self, inputs: dict[str, Any], training: bool = False) -> dict[str, Any]:
        seen = pixels.to_unit(inputs["seen"])
        if training and "epsilon" in inputs:
            seen = ops.stop_gradient(self.attack(seen, inputs))
        if training and "share" in inputs:
            with held_open(inputs["open"]):
                result = self.purifier.graph(seen, training=True)
            result = {**result, "images": result["drawn"] + inputs["share"] * result["pixels"]}
        else:
            result = self.purifier.graph(seen, training=training)
        found = self.guide(result["images"], training=False)
        if self.head is not None:
            found = {**found, "head": glance(self.head, result["bottleneck"])}
        if "gate" in self.weights_of:
            found = {**found, "gate": result["gate"]}
        return {"images": result.get("drawn", result["images"]), "codebook": result["loss"], **found}

    def attack(self, seen: Any, inputs: dict[str, Any]) -> Any:
        """Images [B, H, W, C] within epsilon of those seen and [0, 1], against what the classifier says about the clean ones."""

        def logits(x: Any) -> Any:
            return self.guide(self.purifier.graph(x, training=False)["images"], training=False)["logits"]

        said = ops.argmax(self._wanted(inputs)["logits"], axis=-1)
        return climb(logits, seen, inputs["start"], inputs["epsilon"], said, self.attack_steps, self.step_size)

    def _wanted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the classifier says about the clean images: known beforehand, or asked now."""
        return inputs if "features" in inputs else self.guide(pixels.to_unit(inputs["clean"]), training=False)

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        del y
        clean, wanted = pixels.to_unit(x["clean"]), self._wanted(x)
        return {
            "pixel": ops.mean(ops.abs(outputs["images"] - clean)),
            "guidance": divergence(wanted["logits"], outputs["logits"]),
            "feature": relative_error(wanted["features"], outputs["features"]),
            "codebook": outputs["codebook"],
            **({"head": cross_entropy(outputs["head"], x["label"])} if self.head is not None else {}),
            **({"gate": binary_cross_entropy(outputs["gate"], x["attacked"])} if "gate" in self.weights_of else {}),
        }

    def weights_for(self, x: Any) -> dict[str, Any]:
        return {**self.weights_of, **({"pixel": ops.mean(x["pixel_weight"])} if "pixel_weight" in x else {})}


class AdaptiveObjective(Objective):
    """Adversarial training through the whole chain, only the purifier learning (Lin et al. 2024, arXiv 2401.16352).

    With x the clean image, y its label, g = classifier after purifier, and x' = x + d the end of a few projected
    gradient steps on g (Madry et al. 2018, arXiv 1706.06083), |d| <= epsilon:

        guidance_weight * CE(g(x'), y)                                         trades = 0
        guidance_weight * (CE(g(x), y) + trades * KL(g(x) || g(x')))           otherwise (Zhang et al. 2019,
                                                                               arXiv 1901.08573, Eq. 5)
      + head_weight     * CE(h(x'), y)                                         of a linear head on the bottleneck (deep
                                                                               supervision, Lee et al. 2015, arXiv 1409.5185)
      + pixel_weight    * mean |P(x') - x|                                     reconstruction
      + codebook_weight * sum over levels of the quantizer losses

    The head h, of the mean over all places, learns beside the purifier and is then thrown away: to what the encoder should
    keep it is a shorter way than the decoder and a classifier that was never trained to resist. With `attack_on="head"` the
    attack climbs the cross-entropy of h instead, which leaves decoder and classifier out.

    The attack climbs the cross-entropy, with the gradient the quantizers are set to pass (`VQUNet.set_gradient`), or with
    each of `attack_gradients` for an equal part of the batch, which is then learned with it too. `identity` switches the
    quantizers off for its part: the attack follows the true gradient of a smooth network there. Attacked through
    its quantizers alone the chain learns to make that gradient useless, and little else. A code book moves after each share:
    with two gradients twice a step, so that its moving averages and dead codes age twice as fast.

    Args:
        head: that learned before (`encoder.EncoderObjective`), to go on with; None is a new one.
    """

    def __init__(
        self, purifier: VQUNet, classifier: keras.Model, config: TrainingConfig, head: keras.layers.Dense | None = None
    ):
        super().__init__(
            {
                "classification": config.guidance_weight,
                "divergence": config.guidance_weight * config.trades,
                **({"head": config.head_weight} if config.head_weight else {}),
                "pixel": config.pixel_weight,
                "codebook": config.codebook_weight,
            }
        )
        self.purifier = purifier
        self.classifier = classifier
        self.classifier.trainable = False
        self.trades = config.trades
        self.gradients = config.attack_gradients or (None,)
        self.attack_steps, self.step_size = config.attack_steps, config.attack_step_size
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="attacked_accuracy")
        self.attacks_head = config.attack_on == "head"
        self.head = None
        if config.head_weight:
            self.head = new_head(purifier, classifier.output_shape[-1]) if head is None else head

    def call(self, inputs: dict[str, Any], training: bool = False) -> dict[str, Any]:
        clean = pixels.to_unit(inputs["clean"])
        seen = ops.stop_gradient(self.attack(clean, inputs)) if training else clean
        parts = self._each(lambda part: self._learn(clean[part], seen[part], training), clean)
        shares = [part["images"].shape[0] or ops.shape(part["images"])[0] for part in parts]
        codebook = sum(ops.cast(n, "float32") * part.pop("codebook") for n, part in zip(shares, parts, strict=True))
        codebook = codebook / ops.cast(sum(shares), "float32")
        return {**{name: ops.concatenate([part[name] for part in parts]) for name in parts[0]}, "codebook": codebook}

    def attack(self, clean: Any, inputs: dict[str, Any]) -> Any:
        """Adversarial images [B, H, W, C] against the chain as it stands, within epsilon and [0, 1]."""
        given = (clean, inputs["start"], inputs["epsilon"], inputs["label"])
        return ops.concatenate(self._each(lambda part: self._climb(*(array[part] for array in given)), clean))

    def _each(self, function: Callable[[slice], Any], images: Any) -> list[Any]:
        """What a function gives for each gradient's share of a batch, while the quantizers pass that gradient."""
        size, number, found = ops.shape(images)[0], len(self.gradients), []
        for i, name in enumerate(self.gradients):
            with passing(self.purifier.quantizers, name):
                found.append(function(slice(i * size // number, (i + 1) * size // number)))
        return found

    def _learn(self, clean: Any, seen: Any, training: bool) -> dict[str, Any]:
        result = self._through(seen, training)
        logits = self._through(clean, False)["logits"] if self.trades else result["logits"]
        outputs = {"images": result["images"], "attacked": result["logits"], "logits": logits}
        if self.head is not None:
            outputs["head"] = glance(self.head, result["bottleneck"])
        return {**outputs, "codebook": result["loss"]}

    def _climb(self, clean: Any, start: Any, epsilon: Any, label: Any) -> Any:
        def logits(x: Any) -> Any:
            result = self.purifier.graph(x, training=False)
            if self.attacks_head:
                return glance(self.head, result["bottleneck"])
            return self.classifier(result["images"], training=False)

        return climb(logits, clean, start, epsilon, label, self.attack_steps, self.step_size)

    def losses_of(self, x: Any, y: Any, outputs: Any) -> dict[str, Any]:
        del y
        self.accuracy.update_state(x["label"], outputs["attacked"])
        return {
            "classification": cross_entropy(outputs["logits"], x["label"]),
            "divergence": divergence(outputs["logits"], outputs["attacked"]),
            "pixel": ops.mean(ops.abs(outputs["images"] - pixels.to_unit(x["clean"]))),
            "codebook": outputs["codebook"],
            **({"head": cross_entropy(outputs["head"], x["label"])} if self.head is not None else {}),
        }

    def _through(self, images: Any, training: bool) -> dict[str, Any]:
        result = self.purifier.graph(images, training=training)
        return {**result, "logits": self.classifier(result["images"], training=False)}


def new_head(purifier: VQUNet, classes: int) -> keras.layers.Dense:
    """A linear classifier of what passes the bottleneck, with random weights."""
    head = keras.layers.Dense(classes, dtype="float32", name="head")
    head.build((None, purifier.graph.output["bottleneck"].shape[-1]))
    return head


def glance(head: keras.layers.Dense, bottleneck: Any) -> Any:
    """A head's logits [B, K] for a bottleneck [B, h, w, C]: of the mean over all places."""
    return head(ops.mean(ops.relu(ops.cast(bottleneck, "float32")), axis=(1, 2)))


def climb(
    logits: Callable[[Any], Any], clean: Any, start: Any, epsilon: Any, labels: Any, steps: int, step_size: float
) -> Any:
    """Projected gradient descent from clean + start: climbs the cross-entropy, stays within epsilon and [0, 1].

    Args:
        clean, start: [B, H, W, C]. epsilon: [B, 1, 1, 1]. labels: [B]. step_size: a share of epsilon.
    """

    def loss(x: Any) -> Any:
        found = ops.cast(logits(x), "float32")
        return -ops.sum(_one_hot(labels, found) * ops.log_softmax(found), axis=-1)

    gradient = backend.input_gradient(loss)
    x = ops.clip(clean + start, 0.0, 1.0)
    for _ in range(steps):
        moved = x + step_size * epsilon * ops.sign(gradient(x))
        x = ops.clip(ops.clip(moved, clean - epsilon, clean + epsilon), 0.0, 1.0)
    return x


def cross_entropy(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """Mean cross-entropy of logits [B, K] with labels [B]; `smoothing` is shared out over all classes."""
    log_share = ops.log_softmax(ops.cast(logits, "float32"))
    wanted = _one_hot(labels, logits) * (1.0 - smoothing) + smoothing / logits.shape[-1]
    return -ops.mean(ops.sum(wanted * log_share, axis=-1))


def binary_cross_entropy(logits: Any, truths: Any) -> Any:
    """Mean cross-entropy of logits [B] with truths [B] in [0, 1]."""
    return ops.mean(ops.softplus(logits) - truths * logits)


def divergence(known: Any, found: Any) -> Any:
    """Mean Kullback-Leibler divergence KL(softmax known || softmax found) of logits [B, K]."""
    known, found = (ops.log_softmax(ops.cast(logits, "float32")) for logits in (known, found))
    return ops.mean(ops.sum(ops.exp(known) * (known - found), axis=-1))


def relative_error(known: Any, found: Any) -> Any:
    """Mean over images of |found - known|^2 / |known|^2, features [B, F]: of each image, so that replicas add up."""
    known, found = (ops.cast(features, "float32") for features in (known, found))
    missed = ops.mean(ops.square(found - known), axis=-1)
    return ops.mean(missed / (ops.mean(ops.square(known), axis=-1) + 1e-6))


def _one_hot(labels: Any, logits: Any) -> Any:
    return ops.one_hot(ops.cast(labels, "int32"), logits.shape[-1])
