"""Malformed and hostile archives: no file outside the folder, no excessive memory, an error of one sentence."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemostream.errors import CheckpointError

checkpoint = pytest.importorskip("nemostream.export.checkpoint", reason="needs the export extra")
torch = pytest.importorskip("torch", reason="needs the export extra")

ASR = "nemo.collections.asr.modules"
CONFIG: dict[str, Any] = {
    "target": "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel",
    "tokenizer": {"type": "bpe", "model_path": "nemo:0123_tokenizer.model"},
    "preprocessor": {
        "_target_": f"{ASR}.AudioToMelSpectrogramPreprocessor",
        "normalize": "NA",
        "window_size": 0.025,
        "features": 80,
    },
    "encoder": {
        "_target_": f"{ASR}.ConformerEncoder",
        "feat_in": 80,
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "causal_downsampling": True,
        "conv_kernel_size": 9,
        "att_context_style": "chunked_limited",
        "att_context_size": [[70, 6], [70, 0]],
        "conv_context_size": "causal",
    },
    "decoder": {"_target_": f"{ASR}.RNNTDecoder", "prednet": {"pred_hidden": 48}},
    "joint": {
        "_target_": f"{ASR}.RNNTJoint",
        "num_classes": 128,
        "jointnet": {"joint_hidden": 48, "activation": "relu"},
    },
    "decoding": {"greedy": {"max_symbols": 10}},
}


def weights(state: Any = None) -> bytes:
    out = io.BytesIO()
    torch.save({"joint.joint_net.2.weight": torch.zeros(129, 48)} if state is None else state, out)
    return out.getvalue()


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def members(**contents: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    found = {
        "model_config.yaml": yaml.safe_dump(CONFIG).encode(),
        "model_weights.ckpt": weights(),
        "0123_tokenizer.model": b"pieces",
    }
    return [entry(f"./{name}", content) for name, content in (found | contents).items()]


def archive(path: Path, parts: list[tuple[tarfile.TarInfo, bytes]], mode: Any = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as file:
        for member, content in parts:
            file.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_only_weights_and_tokenizer_are_copied(tmp_path: Path, mode: str) -> None:
    more = [entry("./folder", type=tarfile.DIRTYPE), entry("./vocab.txt", b"x"), entry("./evil.py", b"import os")]
    path = archive(tmp_path / "good.nemo", members() + more, mode)
    found = checkpoint.open_checkpoint(path, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model_weights.ckpt", found.tokenizer.name}
    assert found.tokenizer.read_bytes() == b"pieces" and found.array("joint.joint_net.2.weight").shape == (129, 48)
    assert (found.encoder.layers, found.decoder.hidden, found.features.hop) == (2, 48, 160)


@pytest.mark.parametrize(
    "evil",
    [
        entry("./link", type=tarfile.SYMTYPE, linkname="/etc"),
        entry("./model_weights.ckpt/../x", b"1"),
        entry("./hard", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
        entry("./pipe", type=tarfile.FIFOTYPE),
        entry("./zero", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        entry("./disk", type=tarfile.BLKTYPE),
        entry("../outside", b"1"),
        entry("/tmp-outside", b"1"),
        entry("a\\..\\outside", b"1"),
        entry("model_config.yaml", b"a: 1"),
        entry("./model_weights.ckpt", b"1"),
        entry("./sparse", b"1", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}),
    ],
    ids=lambda evil: evil[0].name,
)
def test_members_that_nemo_never_writes_are_rejected(tmp_path: Path, evil: tuple[tarfile.TarInfo, bytes]) -> None:
    path = archive(tmp_path / "evil.nemo", [*members(), evil], format=tarfile.PAX_FORMAT)
    with pytest.raises(CheckpointError, match=r"evil\.nemo") as caught:
        checkpoint.open_checkpoint(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evil.nemo", "out"]


def test_sizes_are_limited_before_the_content_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = archive(tmp_path / "declared.nemo", members())
    data = bytearray(declared.read_bytes())
    # Set the size in the first header to 8 GiB - 1, and correct its checksum.
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    declared.write_bytes(data)
    config = archive(tmp_path / "config.nemo", members(**{"model_config.yaml": b"a: 1\n#" + b" " * 2**23}))
    bomb = archive(tmp_path / "bomb.nemo", members(**{"model_weights.ckpt": bytes(2**27)}), "w:gz")
    pax = io.BytesIO()  # an extended header of 100 MB
    with tarfile.open(fileobj=pax, mode="w") as file:
        for member, content in [entry("x", bytes(10**8), type=tarfile.XHDTYPE), *members()]:
            file.addfile(member, io.BytesIO(content))
    (tmp_path / "pax.nemo").write_bytes(gzip.compress(pax.getvalue(), 1))
    (tmp_path / "plain-pax.nemo").write_bytes(pax.getvalue())
    del pax
    for path in (declared, config, bomb, tmp_path / "pax.nemo", tmp_path / "plain-pax.nemo"):
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.open_checkpoint(path, tmp_path / f"out-{path.name}")
        assert tracemalloc.get_traced_memory()[1] < 40e6, path.name
        tracemalloc.stop()
    truncated = archive(tmp_path / "truncated.nemo", members())
    truncated.write_bytes(truncated.read_bytes()[:-12_000])
    monkeypatch.setattr(checkpoint, "_MAX_TOKENIZER_BYTES", 5)
    for path in (truncated, archive(tmp_path / "tokenizer.nemo", members())):
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.open_checkpoint(path, tmp_path / f"out-{path.name}")


BILLION_LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BILLION_LAUGHS,
        "[" * 100_000,
        "{a: " * 10_000,
        "- " * 10_000,
        "&a [*a]",
        "a: &a {b: *a}",
        "!!python/object/apply:os.system [x]",
        "a: 2020-13-45",
        "? [a]\n: b",
        "<<: [1]",
        "!!timestamp x",
        "\0",
        "a: [",
        "- a",
        "5",
        "",
        "a: !!int x",
        "\xff",
    ],
    ids=range(18),
)
def test_invalid_configurations_raise_one_sentence(tmp_path: Path, text: str) -> None:
    path = archive(tmp_path / "any.nemo", members(**{"model_config.yaml": text.encode("latin1")}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_config(checkpoint.read_config(path))
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_few_aliases_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump(CONFIG) + "x: &x {a: 1}\ny: *x\nz: [*x, *x]\n"
    path = archive(tmp_path / "any.nemo", members(**{"model_config.yaml": text.encode()}))
    assert checkpoint.read_config(path) == CONFIG | {"x": {"a": 1}, "y": {"a": 1}, "z": [{"a": 1}] * 2}


INVALID_VALUES = ["16", [], {}, float("nan"), float("inf"), -1, 10**30, True, [[]], 1.5]


@pytest.mark.parametrize(
    "field",
    [
        "preprocessor.sample_rate",
        "preprocessor.features",
        "encoder.d_model",
        "encoder.n_layers",
        "encoder.n_heads",
        "encoder.conv_kernel_size",
        "encoder.att_context_size",
        "decoder.prednet.pred_hidden",
        "decoder.prednet.pred_rnn_layers",
        "joint.jointnet.joint_hidden",
        "decoding.greedy.max_symbols",
        "encoder.subsampling_factor",
        "tokenizer.type",
        "preprocessor.n_fft",
    ],
)
@pytest.mark.parametrize("value", INVALID_VALUES, ids=map(str, INVALID_VALUES))
def test_invalid_values_are_rejected_by_field_name(field: str, value: Any) -> None:
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    checkpoint.check_config(config)
    section, (*path, last) = config, field.split(".")
    for key in path:
        section = section[key]
    section[last] = value
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_config(config)
    # `feat_in` must be the number of features.
    assert any(name in str(caught.value) for name in (field, *(["encoder.feat_in"] if "features" in field else [])))


@pytest.mark.parametrize("path", ["preprocessor", "encoder", "decoder", "joint", "decoding", "tokenizer"])
@pytest.mark.parametrize("value", [None, [], "x", 5, {}])
def test_invalid_sections_are_rejected(path: str, value: Any) -> None:
    with pytest.raises(CheckpointError):
        checkpoint.check_config(CONFIG | {path: value})


class Evil:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def test_invalid_weights_are_rejected_and_run_no_code(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for index, content in enumerate(
        (
            b"",
            b"junk" * 100,
            weights()[:-50],
            weights([1]),
            weights(5),
            weights({1: torch.zeros(1)}),
            weights({"joint.joint_net.2.weight": 5}),
            weights({"a": torch.zeros(1)}),
            pickle.dumps(Evil(proof.touch)),
            weights({"joint.joint_net.2.weight": Evil(proof.touch)}),
        )
    ):
        path = archive(tmp_path / f"{index}.nemo", members(**{"model_weights.ckpt": content}))
        with pytest.raises(CheckpointError, match=rf"{index}\.nemo") as caught:
            checkpoint.open_checkpoint(path, tmp_path / f"out-{index}")
        assert "\n" not in str(caught.value)
    assert not proof.exists()
