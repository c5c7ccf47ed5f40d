"""A `.keras` file rewritten smaller, which `keras.models.load_model` still loads into float32 variables.

Kernels and code books are kept as float16, or as float32 with fewer bits of mantissa, whose zeros compress away.
What has one axis or none (biases, statistics of normalisation, the counts of a moving average, which may pass
float16's range) takes a hundredth of the room and stays as it is. Equal weights give equal bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np

HALF, WHOLE = 10, 23  # bits of mantissa of float16 and of float32

_WEIGHTS, _METADATA = "model.weights.h5", "metadata.json"
_FILTERED = 1024  # numbers from which on a data set's own compression pays


def words(bits: int) -> str:
    """How weights are kept, for people."""
    known = {HALF: "float16", WHOLE: "float32"}
    return known.get(bits, f"float32 rounded to {bits} bits of mantissa")


def rewrite(source: Path, target: Path, bits: int) -> None:
    """Writes `target` from `source`, both `.keras` files.

    bits: of mantissa, HALF to WHOLE. A number beyond float16's range becomes infinite there.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == _WEIGHTS:
                content = _weights(content, bits)
            if name == _METADATA:  # without the date: equal weights, equal bytes
                content = json.dumps({"keras_version": json.loads(content)["keras_version"]}).encode()
            new.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def same(one: Path, other: Path) -> bool:
    """Whether two `.keras` files hold the same weights, under the same names."""
    found, wanted = read(one), read(other)
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in found)


def read(path: Path) -> dict[str, np.ndarray]:
    """The weights of a `.keras` file by their place in it, as they are stored."""
    found = {}
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read(_WEIGHTS))) as file:
        file.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return found


def rounded(array: np.ndarray, bits: int) -> np.ndarray:
    """float32 numbers rounded to this many bits of mantissa, halves to even; 23 changes nothing."""
    dropped = WHOLE - bits
    if not dropped:
        return array
    raw = np.ascontiguousarray(array, np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1) + ((raw >> np.uint32(dropped)) & np.uint32(1))
    kept = (raw + half) >> np.uint32(dropped) << np.uint32(dropped)
    return kept.view(np.float32).reshape(array.shape)


def _weights(content: bytes, bits: int) -> bytes:
    """An HDF5 file with the same groups, attributes and data sets, large ones compressed byte plane by byte plane."""
    written = io.BytesIO()
    with h5py.File(io.BytesIO(content)) as old, h5py.File(written, "w") as new:
        new.attrs.update(old.attrs)

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Group):
                made = new.require_group(name)
            else:
                array = stored(np.asarray(item[()]), bits)
                packed = {"shuffle": True, "compression": "gzip", "compression_opts": 9}
                made = new.create_dataset(name, data=array, **(packed if array.size >= _FILTERED else {}))
            made.attrs.update(item.attrs)

        old.visititems(copy)
    return written.getvalue()


def stored(array: np.ndarray, bits: int) -> np.ndarray:
    """What is kept of a weight."""
    if array.dtype != np.float32 or array.ndim < 2:
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float16) if bits == HALF else rounded(array, bits)
