"""Images for a request: from files, folders, standard input and NumPy arrays, as the signature wants them."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from vqunet_tf.errors import UserError
from vqunet_tf.pixels import to_uint8, to_unit

COLOURS = {1: "L", 3: "RGB", 4: "RGBA"}  # channels → Pillow's name
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
NUMPY = b"\x93NUMPY"  # how a .npy file begins


@dataclass(frozen=True)
class Source:
    """An image that can be had: its name for the user, its content when it is needed.

    encoded: gives the bytes of its file; None for pixels from an array, which have none.
    pixels: gives `[H,W,C]`, uint8 or floats.
    """

    name: str
    encoded: Callable[[], bytes] | None
    pixels: Callable[[Sequence[int]], np.ndarray]

    def as_input(self, spec: tf.TensorSpec, shape: Sequence[int]) -> Any:
        """Returns it as one element of the input `spec`: bytes of a file, or an array of `shape`."""
        if spec.dtype == tf.string:
            if self.encoded is None:
                raise UserError(f"{self.name} is an array: expected a PNG or JPEG file for this signature")
            return self.encoded()
        pixels = self.pixels(shape)
        if spec.dtype != tf.uint8:
            return np.asarray(to_unit(pixels))
        if pixels.dtype != np.uint8:
            raise UserError(f"{self.name}: expected uint8 for this signature, got {pixels.dtype}: ask serving_default")
        return pixels


def sources(places: Sequence[str]) -> list[Source]:
    """Returns the images at `places`: files, folders (searched in depth, in order of names), `.npy` files, `-` for stdin.

    Raises a `UserError` for a place with nothing to send.
    """
    return [source for place in places for source in _at(place)]


def _at(place: str) -> Iterator[Source]:
    path = Path(place)
    if place == "-":
        data = sys.stdin.buffer.read()
        if data.startswith(NUMPY):
            yield from _of_array("stdin", _load_array("stdin", io.BytesIO(data)))
        else:
            yield Source("stdin", lambda: data, lambda shape: _read_image("stdin", io.BytesIO(data), shape))
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise UserError(f"{place} holds no images: expected files that end in {', '.join(SUFFIXES)}")
        yield from map(_of_file, map(str, found))
    elif path.suffix.lower() == ".npy":
        yield from _of_array(place, _load_array(place, place))
    else:
        yield _of_file(place)


def _of_file(path: str) -> Source:
    return Source(path, lambda: _read_bytes(path), lambda shape: read_image(path, shape))


def _of_array(name: str, array: np.ndarray) -> Iterator[Source]:
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise UserError(f"{name}: expected uint8 or floats in [0,1], got {array.dtype}")
    if not 2 <= array.ndim <= 4 or not array.size:
        got = f"got shape {list(array.shape)}"
        raise UserError(f"{name}: expected images [B,H,W,C], [B,H,W] or one [H,W,C], {got}")
    # Three dimensions may be one image or grey ones: the model's shape says which, and it is asked for later.
    single = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in COLOURS)
    for place, image in enumerate(array[None] if single else array):
        yield Source(f"{name}[{place}]", None, functools.partial(_shaped, f"{name}[{place}]", image))


def _shaped(name: str, image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    array = image[..., None] if image.ndim == 2 else image
    if array.shape != tuple(shape):
        got = f"got {list(image.shape)}"
        raise UserError(f"{name}: expected an image of shape {list(shape)}, {got}: crop or resize it first")
    return np.asarray(array)


def _load_array(name: str, file: Any) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r" if isinstance(file, str) else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{name} cannot be read as a NumPy array: {error}") from None


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None


def read_image(path: str, shape: Sequence[int]) -> np.ndarray:
    """Reads an image file as uint8 `[H,W,C]` of exactly `shape`, in that many channels.

    Raises a `UserError` for another size (nothing is resized: that would change what is asked), a file that is no
    image, or one of more than 8 bits per channel.
    """
    return _read_image(path, path, shape)


def _read_image(name: str, file: Any, shape: Sequence[int]) -> np.ndarray:
    height, width, channels = shape
    try:
        with Image.open(file) as image:
            if image.mode not in EIGHT_BIT:
                raise UserError(f"{name}: expected 8 bits per channel, got Pillow mode {image.mode}: convert it first")
            if image.size != (width, height):
                got = f"{image.width}x{image.height}"
                raise UserError(f"{name}: expected {width}x{height} pixels, got {got}: crop or resize it first")
            return np.asarray(image.convert(COLOURS[channels])).reshape(height, width, channels)
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as an image: {error}") from None


def save_image(image: np.ndarray, path: str) -> None:
    """Writes `image`, float32 `[H,W,C]` in [0,1], to a file of the format that its name says."""
    pixels = to_uint8(image)
    try:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--purified_out {path} cannot be written: {error}") from None
