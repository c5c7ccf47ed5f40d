"""A folder of images, `DIR/{train,test}/<class>/*.png`, as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vqunet_tf.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "RGB", "RGBA", "CMYK", "YCbCr")


def read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns images uint8 `[N,H,W,C]`, labels `[N]` and class names of `root/train` or `root/test`.

    Files are taken in sorted order, so the result is the same on every machine. The training images
    set the rules: one size for all, and C is 1 if all of them are grey, else 3 (grey ones become RGB).
    Raises a `UserError` naming the first file that cannot be read or breaks the rules.
    """
    train = _list(root / "train")
    size, mode = _rules([path for paths in train.values() for path in paths])
    classes = train if split == "train" else _list(root / split)
    if list(classes) != list(train):
        odd = sorted(set(classes) ^ set(train))
        raise UserError(
            f"{root}: expected the same class folders in {split}/ as in train/, found only in one of them: {', '.join(odd)}"
        )
    images = [_open(path, size, mode) for paths in classes.values() for path in paths]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])
    return np.stack(images), labels, tuple(classes)


def _list(folder: Path) -> dict[str, list[Path]]:
    """Class name → its image files, both sorted; every class has at least one."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: expected an image folder with train/<class>/*.png and test/<class>/*.png"
        )
    classes = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        classes[inner.name] = sorted(path for path in inner.iterdir() if _is_image(path))
        if not classes[inner.name]:
            raise UserError(f"{inner} holds no images: expected files ending in {', '.join(_SUFFIXES)}")
    if len(classes) < 2:
        raise UserError(
            f"{folder}: expected a folder for each of at least two classes, found {', '.join(classes) or 'none'}"
        )
    return classes


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _rules(paths: list[Path]) -> tuple[tuple[int, int], str]:
    """The size (width, height) of the first image, and "L" if all are grey, else "RGB"; reads headers only."""
    size, mode = None, "L"
    for path in paths:
        with _opened(path) as image:
            size = size or image.size
            if image.mode not in _GREY:
                mode = "RGB"
    if size is None:
        raise UserError("no training images were found")
    return size, mode


def _open(path: Path, size: tuple[int, int], mode: str) -> np.ndarray:
    """One file as uint8 `[H,W,C]`."""
    with _opened(path) as image:
        if image.size != size:
            raise UserError(
                f"{path} is {image.size[0]}x{image.size[1]} pixels, expected {size[0]}x{size[1]} as in the first training image: "
                "resize the images to one size"
            )
        if mode == "L" and image.mode not in _GREY:
            raise UserError(
                f"{path} is a colour image ({image.mode}), expected grey as in train/: convert it, or the training images"
            )
        try:
            pixels = np.asarray(image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:  # a truncated file is noticed here
            raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it") from None
    return pixels[..., None] if mode == "L" else pixels


def _opened(path: Path) -> Image.Image:
    """Opens a file without decoding it; anything but an 8-bit image raises a `UserError`."""
    try:
        image = Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it") from None
    if image.mode not in (*_GREY, *_COLOUR):
        image.close()
        raise UserError(f"{path} has Pillow mode {image.mode}, expected 8 bits per channel, grey or RGB: convert it")
    return image
