"""Shifted and flipped images, cut from mirrored borders when they are asked for; squares that are covered."""

from __future__ import annotations

import numpy as np


class Augment:
    """Views of images uint8 [N, H, W, C]: each shifted by up to `max_shift` pixels a side and perhaps mirrored."""

    def __init__(self, images: np.ndarray, max_shift: int, flip: bool):
        self.height, self.width = images.shape[1:3]
        self.max_shift, self.flip = max_shift, flip
        border = [(0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0)]
        self.padded = np.pad(images, border, mode="symmetric") if max_shift else images

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random views, int [count, 3]: top and left corner in the padded image, and whether it is mirrored."""
        corners = rng.integers(0, 2 * self.max_shift + 1, size=(count, 2))
        mirrored = rng.random(count) < (0.5 if self.flip else 0.0)
        return np.column_stack([corners, mirrored])

    def __call__(self, chosen: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The images at the places `chosen` [B] as their `views` [B, 3] show them, uint8 [B, H, W, C]."""
        images = np.empty((len(chosen), self.height, self.width, self.padded.shape[-1]), np.uint8)
        for i, (source, (top, left, mirrored)) in enumerate(zip(chosen, views, strict=True)):
            crop = self.padded[source, top : top + self.height, left : left + self.width]
            images[i] = crop[:, ::-1] if mirrored else crop
        return images


class Cutout:
    """Covers a square of every image, anywhere in it, with the mean colour (DeVries & Taylor 2017, arXiv 1708.04552).

    Args:
        images: uint8 [N, H, W, C], whose mean is taken.
        side: of the square, in pixels, at most that of the images; 0 covers nothing.
    """

    def __init__(self, images: np.ndarray, side: int):
        self.side = min(side, *images.shape[1:3])
        self.mean = np.rint(images.mean(axis=(0, 1, 2))).astype(np.uint8) if side else None

    def __call__(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """These images uint8 [B, H, W, C], which are changed in place."""
        if self.mean is not None:
            highest = np.array(images.shape[1:3]) - self.side + 1
            for image, (top, left) in zip(images, rng.integers(0, highest, size=(len(images), 2)), strict=True):
                image[top : top + self.side, left : left + self.side] = self.mean
        return images


class Views:
    """One fixed view of every image for each copy: what the training adversaries are adversaries of.

    Args:
        images: uint8 [N, H, W, C].
        copies: views of each image; the first one is the image itself.
        seed: same seed, same views.
    """

    def __init__(self, images: np.ndarray, copies: int, max_shift: int, flip: bool, seed: int):
        self.images, self.augment = images, Augment(images, max_shift, flip)
        self.drawn = np.stack([self.augment.draw(np.random.default_rng((seed, i)), len(images)) for i in range(copies)])
        self.drawn[0] = (max_shift, max_shift, 0)

    def __call__(self, copies: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Image `chosen[i]` as copy `copies[i]` shows it, uint8 [B, H, W, C]."""
        return self.augment(chosen, self.drawn[copies, chosen])
