"""A look at PNG and JPEG bytes before the graph decodes them: is it an image at all, and how large will it be?"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable

from PIL import Image

from serving.refusal import INVALID, Refused

MAX_PIXELS = 2**24  # of one image: 4096 x 4096
MAX_REQUEST_PIXELS = 2**27
# Pillow warns of large images by a line on stderr; here they are refused.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_encoded(name: str, images: Iterable[bytes]) -> None:
    """Raises a `Refused` unless all are PNG or JPEG of bearable size; reads no more than their headers.

    A PNG of a few kilobytes may unpack to gigabytes: its header says so.
    """
    total = 0
    for place, data in enumerate(images):
        width, height = _size(name, place, data)
        if width * height > MAX_PIXELS:
            words = f"expected images of at most {MAX_PIXELS} pixels in {name!r}, got {width}x{height} at {place}"
            raise Refused(INVALID, f"{words}: make it smaller")
        total += width * height
    if total > MAX_REQUEST_PIXELS:
        words = f"expected at most {MAX_REQUEST_PIXELS} pixels in a request, got {total}: send fewer images at a time"
        raise Refused(INVALID, words)


def _size(name: str, place: int, data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return image.size
    except Image.DecompressionBombError:
        words = f"expected images of at most {MAX_PIXELS} pixels in {name!r}, got many more at {place}: make it smaller"
        raise Refused(INVALID, words) from None
    except Exception:  # a damaged header raises many kinds
        words = f"expected PNG or JPEG files in {name!r}, got {len(data)} bytes of something else at {place}"
        raise Refused(INVALID, words) from None
