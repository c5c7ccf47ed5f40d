"""Attacks of ART that see answers only: Square (logits) and HopSkipJump (classes). See `art.py` for what they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vqunet_tf.attacks import square_l2
from vqunet_tf.attacks.art import ORDER, ArtAttack
from vqunet_tf.errors import UserError

if TYPE_CHECKING:
    from vqunet_tf.attacks.art_model import EndToEnd

_TRIES = 100  # random images among which HopSkipJump looks for one of another class
_LEAST = 10  # pixels: an image is cut into five tiles, and each into two halves


@dataclass(frozen=True, kw_only=True)
class Square(ArtAttack):
    """Random squares of changed pixels, kept where they lower the margin; no gradient is asked for.

    steps: queries for each image; one that is fooled asks no more. In l2 images need 10 pixels on each side.

    ART puts the square of one iteration at the same place in all images of a batch. It asks about the same images
    three times over; the answers are remembered, not asked for again. Its l2 form has a defect, `square_l2.py` is used.

    "Square Attack: a query-efficient black-box adversarial attack via random search", Andriushchenko et al.,
    https://arxiv.org/abs/1912.00049.
    """

    steps: int = 1000

    name: ClassVar[str] = "square"
    remember: ClassVar[bool] = True

    def attack(
        self, model: EndToEnd, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]
    ) -> np.ndarray:
        from art.attacks.evasion import SquareAttack

        from vqunet_tf.attacks.art_model import seeded

        if self.threat.norm == "l2":
            if min(images.shape[1:3]) < _LEAST:
                raise UserError(f"square in l2 needs {_LEAST} pixels on each side, got images {images.shape[1:3]}")
            # The batch was looked at once to see what is right.
            return square_l2.search(model.predict, images, labels, self.threat.epsilon, max(1, self.steps - 1), rngs)
        attack = SquareAttack(
            model,
            norm=ORDER[self.threat.norm],
            eps=self.threat.epsilon,
            max_iter=max(1, self.steps - 2),  # the image itself and the stripes it starts with
            batch_size=len(images),
            verbose=False,
        )
        with seeded(rngs[0]):
            return attack.generate(images, labels)


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(ArtAttack):
    """Walks along the border of the class towards the image; sees only which class is answered.

    Begins at random noise of another class or, where there is none, at the nearest image of the batch that has one.

    steps: queries for each image, at most; the walk takes as many iterations as fit (iteration i asks about
        100 · √i random neighbours). The original uses 1,000 to 25,000; one image is walked at a time.

    ART draws its start from the operating system's entropy and so is not repeatable; here it is given one.

    "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", Chen et al., https://arxiv.org/abs/1904.02144.
    """

    steps: int = 1000

    name: ClassVar[str] = "hopskipjump"

    def attack(
        self, model: EndToEnd, images: np.ndarray, labels: np.ndarray, rngs: list[np.random.Generator]
    ) -> np.ndarray:
        from art.attacks.evasion import HopSkipJump as ArtHopSkipJump

        from vqunet_tf.attacks.art_model import TooManyQueries, seeded

        walk = ArtHopSkipJump(
            model, norm=ORDER[self.threat.norm], max_iter=self.iterations(images[0].size), batch_size=256, verbose=False
        )
        found = images.copy()
        for row, (image, label, rng) in enumerate(zip(images, labels, rngs, strict=True)):
            begin = _elsewhere(model, image, label, rng, images)
            if begin is None:
                continue
            # Its search for a step never ends if the answers at one point are not always the same.
            model.limit = model.queries + 10 * self.steps
            try:
                with seeded(rng):
                    found[row] = walk.generate(image[None], label[None], x_adv_init=begin[None].copy())[0]
            except TooManyQueries:
                found[row] = begin
            finally:
                model.limit = None
        return found

    def iterations(self, size: int) -> int:
        """How many fit into the queries for an image of `size` numbers; at least one."""
        share = 100 * (size if self.threat.norm == "linf" else math.sqrt(size))
        search = math.ceil(math.log2(share)) + 5  # bisection onto the border, and a few steps away from it
        left, count = self.steps - 20, 0
        while left >= 0:
            count += 1
            left -= int(100 * math.sqrt(count)) + search
        return max(1, count - 1)


def _elsewhere(
    model: EndToEnd, image: np.ndarray, label: int, rng: np.random.Generator, others: np.ndarray
) -> np.ndarray | None:
    """An image of another class, or None."""
    for _ in range(_TRIES // 20):
        noise = rng.random((20, *image.shape), np.float32)
        classes = model.predict(noise).argmax(axis=1)
        if (classes != label).any():
            return noise[np.argmax(classes != label)]
    usable = others[model.predict(others).argmax(axis=1) != label]
    if not len(usable):
        return None
    return usable[np.argmin(np.square(usable - image).sum(axis=(1, 2, 3)))]
