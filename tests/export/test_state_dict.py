"""PyTorch state dicts: torch is the oracle of what is read, and malformed files raise one sentence and run no code."""

from __future__ import annotations

import io
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream.export.state_dict import StateDict

torch = pytest.importorskip("torch", reason="the oracle")


def saved(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = torch.nn.LSTM(3, 4, 2).state_dict()  # an ordered dictionary with metadata
    state |= {
        "transposed": base.T,
        "part": base[1:3, 2:],
        "shared": base,
        "parameter": torch.nn.Parameter(base),
        "scalar": torch.tensor(3.5),
    }
    for dtype in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        state[dtype] = (base / 3 - 2).to(getattr(torch, dtype))
    found = StateDict(saved(tmp_path / "state.ckpt", state))
    assert list(found) == list(state) and len(found) == len(state)
    for name, tensor in state.items():
        wanted = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        np.testing.assert_array_equal(found[name], wanted)
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
    assert not found["shared"].flags.writeable


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class Stored:
    """Pickled as a reference to the storage of 4 values in `data/0`."""


def archive(path: Path, content: Any, size: int = 16, **members: bytes) -> Path:
    """Write the archive of a state dict whose pickle is `content`, or the bytes of it."""
    out = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Stored) else None

    if not isinstance(content, bytes):
        Pickler(out, protocol=2).dump(content)
        content = out.getvalue()
    with zipfile.ZipFile(path, "w") as file:
        for name, data in ({"data.pkl": content, "data/0": b"\0" * size} | members).items():
            file.writestr(f"x/{name}", data)
    return path


def tensor(offset: Any = 0, shape: Any = (2, 2), strides: Any = (2, 1), storage: Any = None) -> Call:
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, Stored() if storage is None else storage, offset, shape, strides, False, OrderedDict())


def test_a_minimal_archive(tmp_path: Path) -> None:
    found = StateDict(archive(tmp_path / "a", {"x": tensor()}))
    np.testing.assert_array_equal(found["x"], np.zeros((2, 2), np.float32))


INVALID = {
    "a list": [tensor()],
    "a number": {"x": 5},
    "a name": {5: tensor()},
    "an offset": {"x": tensor(offset=1)},
    "a negative offset": {"x": tensor(offset=-1)},
    "a shape": {"x": tensor(shape=(3, 2))},
    "a huge shape": {"x": tensor(shape=(1 << 40, 1 << 40), strides=(0, 0))},
    "an expanded tensor": {"x": tensor(shape=(100, 2), strides=(0, 1))},
    "strides": {"x": tensor(strides=(5, 1))},
    "negative strides": {"x": tensor(strides=(-1, 1))},
    "missing strides": {"x": tensor(strides=(1,))},
    "a shape of floats": {"x": tensor(shape=(2.0, 2))},
    "no storage": {"x": tensor(storage=5)},
    "code": {"x": Call(eval, "print()")},  # not `print` itself, which Ray replaces
    "a class": {"x": Path("x")},
    "bytes": {"x": b"x"},
    "an empty tensor": {"x": tensor(shape=(0, 3))},
    "an empty tensor with huge axes": {"x": tensor(shape=((1 << 48) - 1, (1 << 48) - 1, 0), strides=(0, 0, 0))},
    "a dictionary with contents": Call(OrderedDict, {"x": tensor()}),
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID.keys())
def test_invalid_contents(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        StateDict(archive(tmp_path / "a", content))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "accepted"),
    [
        (0, (4,), (1,), True),
        (1, (3,), (1,), True),
        (1, (4,), (1,), False),
        (3, (), (), True),
        (4, (), (), False),
        (0, (2, 2), (1, 2), True),
        (0, (2, 2), (0, 3), True),
        (0, (2, 2), (1, 3), False),
        (0, (2,), (3,), True),
        (1, (2,), (3,), False),
        (0, (1,) * 16, (0,) * 16, True),
        (0, (1,) * 17, (0,) * 17, False),
        (0, (True,), (1,), False),
        (False, (2,), (1,), False),
        (0, [2], [1], False),
    ],
)
def test_tensors_are_inside_their_storage(
    offset: Any, shape: Any, strides: Any, accepted: bool, tmp_path: Path
) -> None:
    """In a storage of the values 0 to 3; NumPy computes the same elements."""
    path = archive(tmp_path / "a", {"x": tensor(offset, shape, strides)}, **{"data/0": struct.pack("<4f", 0, 1, 2, 3)})
    if not accepted:
        with pytest.raises(ValueError):
            StateDict(path)
        return
    found = StateDict(path)["x"]
    assert found.shape == shape
    for index in np.ndindex(shape):
        assert found[index] == offset + sum(i * stride for i, stride in zip(index, strides, strict=True))


def test_messages_of_invalid_archives(tmp_path: Path) -> None:
    for members, message in (
        ({"data/0": b"\0" * 15}, "the storage '0' has 15 bytes, less than 4 values"),
        ({"byteorder": b"big"}, "its byte order is b'big'; little is supported"),
    ):
        with pytest.raises(ValueError, match=message):
            StateDict(archive(tmp_path / "a", {"x": tensor()}, **members))
    assert len(StateDict(archive(tmp_path / "a", {"x": tensor()}, byteorder=b"little"))) == 1
    for kind, message in ((torch.ComplexFloatStorage, "ComplexFloatStorage', which no state dict needs"),):

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any, kind: Any = kind) -> Any:
                return ("storage", kind, "0", "cpu", 2) if isinstance(value, Stored) else None

        out = io.BytesIO()
        Pickler(out, protocol=2).dump({"x": tensor(shape=(2,), strides=(1,))})
        with pytest.raises(ValueError, match=message):
            StateDict(archive(tmp_path / "a", out.getvalue()))
    for identifier, message in (
        (("other", torch.FloatStorage, "0", "cpu", 4), "something that is not a storage"),
        (("storage", torch.FloatStorage, "0", "cpu"), "something that is not a storage"),
        (("storage", torch.FloatStorage, 0, "cpu", 4), "an invalid storage"),
        (("storage", torch.FloatStorage, "0", "cpu", -4), "an invalid storage"),
        (("storage", torch.FloatStorage, "0", "cpu", 4.0), "an invalid storage"),
        (("storage", "Float", "0", "cpu", 4), "the unknown type 'Float'"),
        (("storage", torch.FloatStorage, "7", "cpu", 4), "it has no member 'data/7'"),
    ):

        class Other(pickle.Pickler):
            def persistent_id(self, value: Any, identifier: Any = identifier) -> Any:
                return identifier if isinstance(value, Stored) else None

        out = io.BytesIO()
        Other(out, protocol=2).dump({"x": tensor()})
        with pytest.raises(ValueError, match=message):
            StateDict(archive(tmp_path / "a", out.getvalue()))


def test_invalid_archives(tmp_path: Path) -> None:
    good = pickle.dumps({}, 2)
    cases = {
        "short": archive(tmp_path / "short", {"x": tensor()}, size=15),
        "no storage": archive(tmp_path / "none", {"x": tensor()}, **{"data/1": b""}),
        "large pickle": archive(tmp_path / "large", good + b"N" * (5 << 20)),
        "opcodes": archive(tmp_path / "opcodes", b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR."),
        "memo": archive(tmp_path / "memo", b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f."),
        "empty": archive(tmp_path / "empty", b""),
        "stack": archive(tmp_path / "stack", b"\x80\x02}b."),
        "big endian": archive(tmp_path / "big", {}, byteorder=b"big"),
    }
    with zipfile.ZipFile(tmp_path / "deflated", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", good)
    cases["compressed"] = tmp_path / "deflated"
    with zipfile.ZipFile(cases["no storage"]) as old, zipfile.ZipFile(tmp_path / "without", "w") as new:
        new.writestr("x/data.pkl", old.read("x/data.pkl"))
    cases["no storage"] = tmp_path / "without"
    for name, path in cases.items():
        with pytest.raises(ValueError):
            StateDict(path)
            pytest.fail(name)


NESTED = b")" + b"\x85" * 1_000_000  # a tuple of a tuple of ... the empty tuple: CPython computes its hash recursively
STORAGE = b"X\x07\0\0\0storage"


@pytest.mark.parametrize(
    "content",
    [
        b"}" + NESTED + b"K\x01s",
        b"}(" + NESTED + b"K\x01u",
        b"(" + STORAGE + NESTED + b"X\x01\0\0\x000NK\x01tQ",
        b"(" + NESTED + b"NNNNtQ",
        NESTED + b")R",
        b")" + NESTED + b"R",
        NESTED,
    ],
    ids=["key", "keys", "kind of storage", "identifier", "function", "arguments", "value"],
)
def test_deeply_nested_tuples_are_rejected(content: bytes, tmp_path: Path) -> None:
    """In a process of its own, which a stack overflow ends."""
    script = """
import sys
from pathlib import Path
from nemostream.export.state_dict import StateDict
try:
    StateDict(Path(sys.argv[1]))
except ValueError as error:
    print("rejected:", error)
"""
    path = archive(tmp_path / "a", b"\x80\x02" + content + b".")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("rejected: ") and done.stdout.count("\n") == 1, done


def test_objects_in_the_memo_are_not_copied(tmp_path: Path) -> None:
    """A dictionary, or a tuple of arguments, that many calls copy needs memory or time without limit."""
    large = b"}q\0(" + b"".join(b"X\x04\0\0\0%04dN" % index for index in range(5000)) + b"u"
    copied = large + b"ccollections\nOrderedDict\nh\0\x85R"
    with pytest.raises(ValueError, match="makes a dictionary from arguments"):
        StateDict(archive(tmp_path / "dictionary", b"\x80\x02" + copied + b"."))
    for function in (b"_rebuild_parameter", b"_rebuild_tensor_v2"):
        repeated = b"(" + b"N" * 5000 + b"tq\0ctorch._utils\n" + function + b"\nh\0R"
        with pytest.raises(ValueError, match="it has an invalid call"):
            StateDict(archive(tmp_path / "arguments", b"\x80\x02" + repeated + b"."))


def test_damaged_files_raise_no_other_errors(tmp_path: Path) -> None:
    """One byte, or the end, of the file is changed: it is rejected, or arrays are still inside the file."""
    content = saved(tmp_path / "good", {"a": torch.ones(3, 4), "b": torch.zeros(5).half()}).read_bytes()
    rng = random.Random(0)
    rejected = 0
    for index in range(400):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = tmp_path / "damaged"
        path.write_bytes(damaged[: rng.randrange(len(damaged))] if index % 4 == 0 else damaged)
        try:
            for array in StateDict(path).values():
                assert array.size <= 12 and np.isreal(array).all()
        except (OSError, ValueError):
            rejected += 1
    assert 100 < rejected < 400
