"""Which files an ONNX graph reads its weights from, without the `onnx` package, which the base install does not have.

ONNX Runtime checks that these files lie beside the graph in recent versions only (1.32 does, 1.22 reads any path that
it is given), so a bundle is checked before a graph of it is loaded. This reads protobuf's wire format just far enough:
`ModelProto.graph`, its tensors wherever they may be (initializers, sparse ones, attributes, subgraphs, functions,
training graphs), and of a tensor `external_data`. The field numbers are those of `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator

_MOST_DEPTH = 64  # of graphs within graphs, which each take two of it

# Message -> {field number: the message in it}. Every other field is skipped.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}


def external_files(model: bytes) -> set[str]:
    """The `location` of every tensor of a serialized model that lies outside of it. Raises `ValueError` if damaged."""
    found: set[str] = set()
    waiting: list[tuple[str, memoryview, int]] = [("Model", memoryview(model), 0)]
    while waiting:
        kind, message, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise ValueError(f"its graphs are nested more than {_MOST_DEPTH // 2} deep")
        if kind == "Entry":
            entry = {number: bytes(value) for number, value in _fields(message) if number in (1, 2)}
            if entry.get(1) == b"location":
                try:
                    found.add(entry.get(2, b"").decode())
                except UnicodeDecodeError as error:
                    raise ValueError("it names a file that is not UTF-8") from error
            continue
        inner = _FIELDS[kind]
        waiting += [(inner[number], value, depth + 1) for number, value in _fields(message) if number in inner]
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message: number and content."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(message, at)
            if size > end - at:
                break
            yield number, message[at : at + size]
            at += size
        else:
            raise ValueError("it is not a serialized ONNX model")
    if at != end:
        raise ValueError("it is not a whole ONNX model")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("it is not a whole ONNX model")
