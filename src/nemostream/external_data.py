"""List the files and the shapes of an ONNX graph's weights, without the `onnx` package (not in the base install).

Only recent versions of ONNX Runtime reject files outside the graph's folder (1.32 does, 1.22 reads any path), so a
bundle is checked before its graphs are loaded. The parser reads as much of protobuf's wire format as this needs:
`ModelProto.graph`, its tensors wherever they occur (initializers, sparse initializers, attributes, subgraphs,
functions, training graphs), and the `external_data` of each tensor. The field numbers are those of `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator

_MAX_DEPTH = 96  # of nested messages; a nested graph adds three levels: node, attribute, graph

# Message -> {field number: type of its message}. All other fields are skipped.
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
    """Return the `location` of every external tensor of a serialized model. Raises `ValueError` if it is damaged."""
    found: set[str] = set()
    pending: list[tuple[str, memoryview, int]] = [("Model", memoryview(model), 0)]
    while pending:
        kind, message, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"its graphs are nested more than {_MAX_DEPTH // 3} deep")
        if kind == "Entry":
            entry = {number: bytes(value) for number, value in _fields(message) if number in (1, 2)}
            if entry.get(1) == b"location":
                found.add(_text(entry.get(2, b"")))
            continue
        inner = _FIELDS[kind]
        pending += [(inner[number], value, depth + 1) for number, value in _fields(message) if number in inner]
    return found


def initializer_shapes(model: bytes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every initializer of a serialized model by name. Raises `ValueError` if it is damaged."""
    found: dict[str, tuple[int, ...]] = {}
    for graph in (value for number, value in _fields(memoryview(model)) if number == 7):
        for tensor in (value for number, value in _fields(graph) if number == 5):
            name, shape = "", list[int]()
            for number, value in _values(tensor):
                if number == 8 and isinstance(value, memoryview):
                    name = _text(value)
                elif number == 1:
                    shape += [value] if isinstance(value, int) else _varints(value)
            found[name] = tuple(shape)
    return found


def _text(value: bytes | memoryview) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError("it has a name that is not UTF-8") from error


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of the length-delimited fields of a message."""
    for number, value in _values(message):
        if isinstance(value, memoryview):
            yield number, value


def _values(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of the integers and of the length-delimited fields of a message."""
    offset, end = 0, len(message)
    while offset < end:
        tag, offset = _varint(message, offset)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            integer, offset = _varint(message, offset)
            yield number, integer
        elif wire in (1, 5):
            offset += 8 if wire == 1 else 4
        elif wire == 2:
            size, offset = _varint(message, offset)
            if size > end - offset:
                break
            yield number, message[offset : offset + size]
            offset += size
        else:
            raise ValueError("it is not a serialized ONNX model")
    if offset != end:
        raise ValueError("it is a truncated ONNX model")


def _varints(message: memoryview) -> list[int]:
    """Return the integers of a packed field."""
    values, offset = list[int](), 0
    while offset < len(message):
        value, offset = _varint(message, offset)
        values.append(value)
    return values


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    """Return the variable-length integer at `offset`, and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            break
        byte = message[offset]
        value |= (byte & 0x7F) << shift
        offset += 1
        if byte < 0x80:
            return value, offset
    raise ValueError("it is a truncated ONNX model")
