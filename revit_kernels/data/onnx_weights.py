"""Reads the weights out of an ONNX file: the few fields of its protobuf that hold them, without the onnx package."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Field numbers of onnx.proto
GRAPH, NODE, INITIALIZER = 7, 1, 5  # of a model, and of its graph
INPUT, NAME, OP_TYPE = 1, 3, 4  # of a node
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA = 1, 2, 8, 9  # of a tensor
FLOAT = 1


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field of a protobuf message; a value of known length as a view."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"this is no ONNX file: it has a protobuf field of wire type {wire}")
        yield number, value


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    """Name and array; None for an array that is not float32 in raw_data."""
    dims, fields = [], {}
    for number, value in _fields(message):
        if number == DIMS:
            if isinstance(value, int):
                dims.append(value)
            else:  # packed
                at = 0
                while at < len(value):
                    dim, at = _varint(value, at)
                    dims.append(dim)
        else:
            fields[number] = value
    array = None
    if fields.get(DATA_TYPE) == FLOAT and RAW_DATA in fields:
        array = np.frombuffer(fields[RAW_DATA], "<f4").reshape(dims)
    return _text(fields[TENSOR_NAME]), array


def read_onnx(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The float32 initialisers by name, and those that are a MatMul's second input by that node's name."""
    initialisers, second = {}, {}
    for graph in (value for number, value in _fields(memoryview(data)) if number == GRAPH):
        for number, value in _fields(graph):
            if number == INITIALIZER:
                name, array = _tensor(value)
                if array is not None:
                    initialisers[name] = array
            elif number == NODE:
                node = list(_fields(value))
                inputs = [_text(v) for n, v in node if n == INPUT]
                fields = {n: _text(v) for n, v in node if n in (NAME, OP_TYPE)}
                if fields.get(OP_TYPE) == "MatMul":
                    second[fields.get(NAME, "")] = inputs[1]
    return initialisers, {node: initialisers[name] for node, name in second.items() if name in initialisers}
