"""Runs a SavedModel through TensorFlow's C API alone, as a server without Python does.

  python serving/c_api.py LIBRARY < requests.pickle > answers.pickle

LIBRARY is libtensorflow_cc of the wheel. This file imports neither TensorFlow nor Keras: what it can load needs nothing
of theirs but the operations compiled into the library. Standard input is a pickled pair: the folder of the SavedModel, and
a list of requests (a dict tensor name → array, a list of tensor names to fetch); standard output a list of lists of arrays.
Strings are arrays of `object` that hold `bytes`.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

# enum TF_DataType of tensorflow/c/tf_datatype.h
_DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 9: np.int64, 10: np.bool_}
_STRING = 7
_TSTRING_BYTES = 24


class _Output(ctypes.Structure):
    _fields_ = (("operation", c_void_p), ("index", c_int))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "TF_NewStatus": (c_void_p, ()),
    "TF_GetCode": (c_int, (c_void_p,)),
    "TF_Message": (c_char_p, (c_void_p,)),
    "TF_NewGraph": (c_void_p, ()),
    "TF_NewSessionOptions": (c_void_p, ()),
    "TF_LoadSessionFromSavedModel": (
        c_void_p,
        (c_void_p, c_void_p, c_char_p, POINTER(c_char_p), c_int, c_void_p, c_void_p, c_void_p),
    ),
    "TF_GraphOperationByName": (c_void_p, (c_void_p, c_char_p)),
    "TF_AllocateTensor": (c_void_p, (c_int, POINTER(c_int64), c_int, c_size_t)),
    "TF_DeleteTensor": (None, (c_void_p,)),
    "TF_TensorData": (c_void_p, (c_void_p,)),
    "TF_TensorType": (c_int, (c_void_p,)),
    "TF_TensorByteSize": (c_size_t, (c_void_p,)),
    "TF_NumDims": (c_int, (c_void_p,)),
    "TF_Dim": (c_int64, (c_void_p, c_int)),
    "TF_StringInit": (None, (c_void_p,)),
    "TF_StringCopy": (None, (c_void_p, c_char_p, c_size_t)),
    "TF_StringGetDataPointer": (c_void_p, (c_void_p,)),
    "TF_StringGetSize": (c_size_t, (c_void_p,)),
    "TF_SessionRun": (
        None,
        (c_void_p, c_void_p, POINTER(_Output), POINTER(c_void_p), c_int)
        + (POINTER(_Output), POINTER(c_void_p), c_int, c_void_p, c_int, c_void_p, c_void_p),
    ),
}


class Session:
    """A SavedModel loaded with the tag `serve`; errors of TensorFlow become `RuntimeError`s."""

    def __init__(self, library: str, saved_model: str):
        self._tf = ctypes.CDLL(library)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._tf, name)
            function.restype, function.argtypes = result, arguments
        self._status = self._tf.TF_NewStatus()
        self._graph = self._tf.TF_NewGraph()
        tags = (c_char_p * 1)(b"serve")
        options = self._tf.TF_NewSessionOptions()
        self._session = self._tf.TF_LoadSessionFromSavedModel(
            options, None, saved_model.encode(), tags, 1, self._graph, None, self._status
        )
        self._check()

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Feeds `inputs` (names such as `serving_default_images:0`) and returns the tensors named."""
        fed = [self._tensor(array) for array in inputs.values()]
        got = (c_void_p * len(outputs))()
        # fmt: off
        self._tf.TF_SessionRun(
            self._session, None,
            self._places(inputs), (c_void_p * len(fed))(*fed), len(fed),
            self._places(outputs), got, len(outputs),
            None, 0, None, self._status,
        )
        # fmt: on
        for tensor in fed:
            self._tf.TF_DeleteTensor(tensor)
        self._check()
        return [self._array(tensor) for tensor in got]

    def _places(self, names: Any) -> Any:
        found = []
        for name in names:
            operation, _, index = name.partition(":")
            place = self._tf.TF_GraphOperationByName(self._graph, operation.encode())
            if not place:
                raise RuntimeError(f"the graph has no operation {operation!r}")
            found.append(_Output(place, int(index or 0)))
        return (_Output * len(found))(*found)

    def _tensor(self, array: np.ndarray) -> Any:
        strings = array.dtype == object
        kind = _STRING if strings else next(key for key, dtype in _DTYPES.items() if dtype == array.dtype)
        size = _TSTRING_BYTES * array.size if strings else array.nbytes
        tensor = self._tf.TF_AllocateTensor(kind, (c_int64 * array.ndim)(*array.shape), array.ndim, size)
        data = self._tf.TF_TensorData(tensor)
        if not strings:
            ctypes.memmove(data, np.ascontiguousarray(array).ctypes.data, size)
        for i, text in enumerate(array.ravel() if strings else ()):
            self._tf.TF_StringInit(data + i * _TSTRING_BYTES)
            self._tf.TF_StringCopy(data + i * _TSTRING_BYTES, text, len(text))
        return tensor

    def _array(self, tensor: Any) -> np.ndarray:
        shape = [self._tf.TF_Dim(tensor, i) for i in range(self._tf.TF_NumDims(tensor))]
        data, kind = self._tf.TF_TensorData(tensor), self._tf.TF_TensorType(tensor)
        if kind == _STRING:
            places = [data + i * _TSTRING_BYTES for i in range(int(np.prod(shape)))]
            texts = [
                ctypes.string_at(self._tf.TF_StringGetDataPointer(place), self._tf.TF_StringGetSize(place))
                for place in places
            ]
            array = np.array(texts, dtype=object).reshape(shape)
        else:
            content = ctypes.string_at(data, self._tf.TF_TensorByteSize(tensor))
            array = np.frombuffer(content, _DTYPES[kind]).reshape(shape).copy()
        self._tf.TF_DeleteTensor(tensor)
        return array

    def _check(self) -> None:
        if self._tf.TF_GetCode(self._status):
            raise RuntimeError(self._tf.TF_Message(self._status).decode(errors="replace"))


def main() -> None:
    saved_model, requests = pickle.load(sys.stdin.buffer)
    session = Session(sys.argv[1], saved_model)
    answers = [session.run(inputs, outputs) for inputs, outputs in requests]
    foreign = sorted({name.partition(".")[0] for name in sys.modules} & {"tensorflow", "keras", "vqunet_tf"})
    if foreign:
        raise RuntimeError(f"meant to run without {', '.join(foreign)}")
    sys.stdout.buffer.write(pickle.dumps(answers))


if __name__ == "__main__":
    main()
