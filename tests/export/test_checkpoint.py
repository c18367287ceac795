"""Malformed and hostile archives: no file outside the folder, no excessive memory, an error of one sentence."""

from __future__ import annotations

import dataclasses
import gzip
import io
import pickle
import re
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nemostream import demo_bundle
from nemostream.bundle import Bundle, LanguageConfig
from nemostream.errors import CheckpointError, OptionError

checkpoint = pytest.importorskip("nemostream.export.checkpoint", reason="needs the export extra")
torch = pytest.importorskip("torch", reason="needs the export extra")

from nemostream.export.bundle import write_bundle  # noqa: E402
from nemostream.export.languages import order_languages, select_language  # noqa: E402

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "demo.nemo"

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
    ids=lambda evil: evil[0].name.replace("\\", "|"),  # pytest escapes a backslash again in a second collection
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
    monkeypatch.setattr(checkpoint, "MAX_TOKENIZER_BYTES", 5)
    for path in (truncated, archive(tmp_path / "tokenizer.nemo", members())):
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.open_checkpoint(path, tmp_path / f"out-{path.name}")


def test_empty_headers_and_files_are_read(tmp_path: Path) -> None:
    parts = [entry("x", type=tarfile.XHDTYPE), *members(), entry("./empty.txt")]
    found = checkpoint.open_checkpoint(archive(tmp_path / "any.nemo", parts), tmp_path / "out")
    assert found.name == "any" and found.tokenizer.read_bytes() == b"pieces"


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


def test_the_tokenizer_that_the_configuration_names(tmp_path: Path) -> None:
    """By its file name without `nemo:`; without a name, the first that ends with tokenizer.model."""
    more = [
        entry("./a/other_tokenizer.model", b"other"),
        entry("./special.spm", b"special"),
        entry("./b/special.spm", b"x"),
    ]

    def found(model_path: Any) -> bytes:
        config = CONFIG | {"tokenizer": {"type": "bpe"} | ({} if model_path is None else {"model_path": model_path})}
        parts = [*more, *members(**{"model_config.yaml": yaml.safe_dump(config).encode()})]
        path = archive(tmp_path / "any.nemo", parts)
        with tempfile.TemporaryDirectory(dir=tmp_path) as out:
            return bytes(checkpoint.open_checkpoint(path, Path(out)).tokenizer.read_bytes())

    assert found(None) == b"other"
    assert found("nemo:0123_tokenizer.model") == found("0123_tokenizer.model") == b"pieces"
    assert found("nemo:special.spm") == b"special", "the first of two"
    with pytest.raises(CheckpointError, match=r"not contain its SentencePiece model \(tokenizer.model_path: 'gone'\)"):
        found("nemo:gone")
    with pytest.raises(
        CheckpointError, match=r"^not supported: tokenizer.model_path is 5; nemostream supports the name"
    ):
        found(5)


def test_files_that_are_missing_in_an_archive(tmp_path: Path) -> None:
    parts = {member.name: (member, content) for member, content in members()}
    for name, message in (
        ("./model_config.yaml", "is not a .nemo checkpoint: it contains no model_config.yaml"),
        ("./model_weights.ckpt", "contains no model_weights.ckpt; sharded or distributed checkpoints"),
        ("./0123_tokenizer.model", "does not contain its SentencePiece model"),
    ):
        path = archive(tmp_path / "any.nemo", [part for key, part in parts.items() if key != name])
        with pytest.raises(CheckpointError, match=re.escape(message)):
            checkpoint.open_checkpoint(path, tmp_path / f"out-{len(name)}")
    path = archive(tmp_path / "a\nb.nemo", members())
    with pytest.raises(CheckpointError, match="has unprintable characters; rename the checkpoint"):
        checkpoint.open_checkpoint(path, tmp_path / "out")


def test_limits_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of members, and the size of each kind of file, at the limit and one above it."""
    good = archive(tmp_path / "good.nemo", members())
    sizes = {member.name: member.size for member, _ in members()}
    for limit, value, message in (
        ("_MAX_MEMBERS", len(sizes), "it has more than 2 members"),
        ("_MAX_CONFIG_BYTES", sizes["./model_config.yaml"], "model_config.yaml' has .* bytes; at most"),
        ("MAX_TOKENIZER_BYTES", sizes["./0123_tokenizer.model"], "0123_tokenizer.model' has 6 bytes; at most 5"),
        ("_MAX_WEIGHTS_BYTES", sizes["./model_weights.ckpt"], "model_weights.ckpt' has .* bytes; at most"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, limit, value)
            checkpoint.open_checkpoint(good, tmp_path / f"{limit}-good")
            patch.setattr(checkpoint, limit, value - 1)
            with pytest.raises(CheckpointError, match=message):
                checkpoint.open_checkpoint(good, tmp_path / limit)


def test_limits_of_a_configuration(tmp_path: Path) -> None:
    """Aliases, depth and the number of values, at the limit and above it."""

    def read(text: str) -> Any:
        return checkpoint.read_config(archive(tmp_path / "any.nemo", members(**{"model_config.yaml": text.encode()})))

    for aliases, accepted in ((100, True), (101, False)):
        text = "a: &x 1\nb: [" + ", ".join(["*x"] * aliases) + "]\n"
        if accepted:
            assert read(text) == {"a": 1, "b": [1] * aliases}
        else:
            with pytest.raises(CheckpointError, match="it has more than 100 aliases"):
                read(text)
    for depth, accepted in ((48, True), (49, False)):  # a mapping, lists, and a number
        text = "a: " + "[" * depth + "1" + "]" * depth
        if accepted:
            assert str(read(text)["a"]) == "[" * depth + "1" + "]" * depth
        else:
            with pytest.raises(CheckpointError, match="it is nested more than 50 deep"):
                read(text)
    # 50 aliases of 50 aliases of n values are 2551 n + 2604 values.
    fifty = [", ".join([f"*{name}"] * 50) for name in "xy"]
    for values, accepted in ((390, True), (391, False)):
        text = f"a: &x [{', '.join(['1'] * values)}]\nb: &y [{fifty[0]}]\nc: [{fifty[1]}]\n"
        if accepted:
            assert len(read(text)["c"]) == 50
        else:
            with pytest.raises(CheckpointError, match="it has more than 1000000 values"):
                read(text)


def test_compressed_archives_are_limited_by_their_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents of 64 MiB are always allowed, more only up to 200 times the size of the archive."""
    parts = members(**{"vocab.txt": bytes(2**20)})
    path = archive(tmp_path / "zeros.nemo", parts, "w:gz")
    checkpoint.open_checkpoint(path, tmp_path / "out")
    monkeypatch.setattr(checkpoint, "_MIN_CONTENT_LIMIT", 2**20)
    monkeypatch.setattr(checkpoint, "_MAX_RATIO", 1.2 * 2**20 / path.stat().st_size)
    checkpoint.open_checkpoint(path, tmp_path / "ratio")
    monkeypatch.setattr(checkpoint, "_MAX_RATIO", 1)
    with pytest.raises(CheckpointError, match=r"more than the archive contains|larger than the limit"):
        checkpoint.open_checkpoint(path, tmp_path / "rejected")


PROMPTED = CONFIG | {
    "target": "nemo.collections.asr.models.rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt",
    "model_defaults": {
        "initialize_prompt_feature": True,
        "num_prompts": 8,
        "prompt_dictionary": {"ja": 3, "ja-JA": 3, "ja-JP": 3, "zh-TW": 5, "en-US": 0, "en": 0, "auto": 7},
    },
}


def test_languages_of_a_prompted_model() -> None:
    languages = checkpoint.check_config(PROMPTED).languages
    assert (languages.default, languages.count, languages.prompt("zh")) == ("auto", 8, 5)
    assert checkpoint.check_config(CONFIG).languages == LanguageConfig("en")
    for names, default in ({"de": 1, "en-US": 0}, "en-US"), ({"fr": 1, "de": 0}, "fr"):
        defaults = PROMPTED["model_defaults"] | {"prompt_dictionary": names}
        assert checkpoint.check_config(PROMPTED | {"model_defaults": defaults}).languages.default == default
    # Ordered by id; the model's own tag comes first, then a name with a region.
    ordered = order_languages(languages, ["<unk>", "▁<de-DE>", "<ja-JP>", "<zh-CN>", "auto", "<EOU>"])
    assert list(ordered.prompts) == ["en-US", "en", "ja-JP", "ja-JA", "ja", "zh-TW", "auto"]
    assert ordered.names == ("en-US", "ja-JP", "zh-TW", "auto") and ordered.default == "auto"
    assert order_languages(dataclasses.replace(languages, default="ja"), ["<ja-JP>"]).default == "ja-JP"


def test_the_language_of_an_export() -> None:
    prompted, english = checkpoint.check_config(PROMPTED).languages, LanguageConfig()
    assert select_language(prompted, None) == prompted and select_language(english, None) == english
    assert select_language(prompted, "zh") == dataclasses.replace(prompted, default="zh-TW")
    assert [select_language(english, name).default for name in ("hi", "hi_IN", "yue")] == ["hi", "hi-IN", "yue"]
    with pytest.raises(OptionError, match="language is 'hi', which this model does not support"):
        select_language(prompted, "hi")
    for name in ("", "h", "hindi", "hi IN", "auto", "hi-", "हि"):
        with pytest.raises(OptionError, match="must be the code of a language, like hi or hi-IN"):
            select_language(english, name)


@pytest.mark.parametrize(
    ("field", "value", "reported"),
    [
        ("initialize_prompt_feature", False, "initialize_prompt_feature is False; nemostream supports True"),
        ("num_prompts", "8", "num_prompts is '8'; nemostream supports a whole number"),
        ("num_prompts", 7, "prompt_dictionary.auto is 7; nemostream supports a whole number from 0 to num_prompts"),
        ("prompt_dictionary", None, "prompt_dictionary is None; nemostream supports a mapping"),
        ("prompt_dictionary", {}, "prompt_dictionary is {}; nemostream supports a mapping"),
        ("prompt_dictionary", ["en"], r"prompt_dictionary is \['en'\]; nemostream supports a mapping"),
        ("prompt_dictionary", {"en": -1}, "prompt_dictionary.en is -1; nemostream supports"),
        ("prompt_dictionary", {"en": "1"}, "prompt_dictionary.en is '1'; nemostream supports"),
        ("prompt_dictionary", {"en": True}, "prompt_dictionary.en is True; nemostream supports"),
        ("prompt_dictionary", {False: 3}, "prompt_dictionary is False; nemostream supports names of languages"),
        ("prompt_dictionary", {"a b": 3}, "prompt_dictionary is 'a b'; nemostream supports names of languages"),
    ],
)
def test_invalid_prompts_are_rejected(field: str, value: Any, reported: str) -> None:
    config = PROMPTED | {"model_defaults": PROMPTED["model_defaults"] | {field: value}}
    with pytest.raises(CheckpointError, match=f"not supported: model_defaults.{reported}") as caught:
        checkpoint.check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"target": "nemo.EncDecCTCModelBPE"}, "a CTC model has no transducer; use sherpa-onnx or NeMo"),
        ({"target": "nemo.EncDecRNNTModel"}, "a vocabulary of characters has no SentencePiece model; use NeMo"),
        ({"loss": {"loss_name": "tdt"}}, r"\(TDT\) skips frames; use onnx-asr, sherpa-onnx or NeMo"),
        ({"model_defaults": {"tdt_durations": [0, 1]}}, r"\(TDT\) skips frames; use onnx-asr, sherpa-onnx or NeMo"),
        (
            {"encoder": CONFIG["encoder"] | {"att_context_style": "regular"}},
            "use a streaming one such as nvidia/nemo",
        ),
        (
            {"encoder": CONFIG["encoder"] | {"att_context_style": "chunked_limited_with_rc"}},
            "recomputes its left context; use sherpa-onnx or NeMo",
        ),
    ],
    ids=["ctc", "characters", "tdt", "durations", "offline", "buffered"],
)
def test_other_kinds_of_models_are_rejected_with_an_alternative(changes: dict[str, Any], hint: str) -> None:
    with pytest.raises(CheckpointError, match=f"^not supported: .*; nemostream supports .*; .*{hint}"):
        checkpoint.check_config(CONFIG | changes)


def test_configurations_of_other_versions_are_accepted() -> None:
    for section, change in (
        ("encoder", {"conv_context_style": None}),
        ("encoder", {"att_context_size": [70, 1]}),
        ("loss", {"loss_name": "pytorch"}),
        ("decoding", {"strategy": "greedy"}),
    ):
        assert not checkpoint.check_config(CONFIG | {section: CONFIG.get(section, {}) | change}).warnings
    for strategy in ("beam", "tsd", "alsd", "maes", "malsd_batch"):
        model = checkpoint.check_config(CONFIG | {"decoding": {"strategy": strategy}})
        assert model.decoder.max_symbols == 10
        assert model.warnings[0].startswith(f"decoding.strategy is '{strategy}', but nemostream decodes greedily")


MULTITALKER = CONFIG | {"target": "nemo.EncDecMultiTalkerRNNTBPEModel", "spk_kernel_type": "ff"}


def test_speaker_kernels_of_multitalker_models() -> None:
    kernels = checkpoint.check_config(MULTITALKER | {"spk_kernel_layers": [0]}).speaker_kernels
    assert kernels == ("spk_kernels.0", "bg_spk_kernels.0")
    foreground = MULTITALKER | {"spk_kernel_layers": [0], "add_bg_spk_kernel": False}
    assert checkpoint.check_config(foreground).speaker_kernels == ("spk_kernels.0",)
    assert checkpoint.check_config(MULTITALKER | {"spk_kernel_type": None}).speaker_kernels == ()
    for changes in ({}, {"spk_kernel_layers": [0, 4]}, {"spk_kernel_layers": [0], "spk_kernel_type": "mha"}):
        with pytest.raises(CheckpointError, match="spk_kernel_"):
            checkpoint.check_config(MULTITALKER | changes)


def test_missing_and_misshapen_tensors_and_another_tokenizer_are_reported(tmp_path: Path) -> None:
    source = checkpoint.open_checkpoint(DEMO, tmp_path / "unpacked")
    state = {name: source.state[name] for name in source.state}
    cases: dict[str, Any] = {
        "has no tensor 'joint.enc.bias', which": {"joint.enc.bias": None},
        "has no tensor 'encoder.layers.1.norm_out.weight', which": {"encoder.layers.1.norm_out.weight": None},
        "has no tensor 'joint.joint_net.*.weight'": {f"{source.joint_output}.weight": None},
        "tensor 'decoder.prediction.embed.weight' of the checkpoint has the shape [7, 2], but its configuration "
        f"requires [{source.decoder.vocabulary + 1}, {source.decoder.hidden}]": {
            "decoder.prediction.embed.weight": np.zeros((7, 2), np.float32)
        },
        "tensor 'encoder.layers.0.feed_forward2.linear2.weight' of the checkpoint has the shape []": {
            "encoder.layers.0.feed_forward2.linear2.weight": np.zeros((), np.float32)
        },
        "tensor 'joint.enc.weight' of the checkpoint has the type int64, but weights must be floating point": {
            "joint.enc.weight": source.state["joint.enc.weight"].astype(np.int64)
        },
    }
    for index, (message, changes) in enumerate(cases.items()):
        changed = {name: array for name, array in (state | changes).items() if array is not None}
        folder = tmp_path / str(index)
        folder.mkdir()
        with pytest.raises(CheckpointError, match=re.escape(message)):
            write_bundle(dataclasses.replace(source, state=changed), folder, {})
    decoder = dataclasses.replace(source.decoder, vocabulary=source.decoder.vocabulary + 1)
    with pytest.raises(CheckpointError, match=f"has {source.decoder.vocabulary} pieces, but the model has"):
        write_bundle(dataclasses.replace(source, decoder=decoder), tmp_path, {})
    (tmp_path / "other.model").write_bytes(b"pieces")
    with pytest.raises(CheckpointError, match="the tokenizer of demo is not a SentencePiece model"):
        write_bundle(dataclasses.replace(source, tokenizer=tmp_path / "other.model"), tmp_path, {})


def test_the_demo_bundle_is_reproduced_bit_for_bit(tmp_path: Path) -> None:
    """Graphs and weights of existing bundles do not change."""
    (tmp_path / "bundle").mkdir()
    bundle = write_bundle(checkpoint.open_checkpoint(DEMO, tmp_path / "unpacked"), tmp_path / "bundle", {})
    packaged = Bundle.open(demo_bundle()).manifest
    assert dataclasses.replace(bundle.manifest, checkpoint={}, parity={}, versions={}) == dataclasses.replace(
        packaged, checkpoint={}, parity={}, versions={}
    )
