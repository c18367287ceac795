"""Every field of a configuration that is read: other values change the result, or are rejected by the field's name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemostream.bundle import ChunkConfig, DecoderConfig, EncoderConfig, FeatureConfig, LanguageConfig
from nemostream.errors import CheckpointError

checkpoint = pytest.importorskip("nemostream.export.checkpoint", reason="needs the export extra")

from nemostream.export.checkpoint import ModelConfig, check_config  # noqa: E402
from nemostream.export.transformers_checkpoint import check_transformers  # noqa: E402

ASR = "nemo.collections.asr.modules"
MODELS = "nemo.collections.asr.models"
# Values differ from NeMo's defaults where other values are supported, so that a field that is not read changes the
# result.
CONFIG: dict[str, Any] = {
    "target": f"{MODELS}.EncDecRNNTBPEModel",
    "adapters": None,
    "tokenizer": {"type": "bpe"},
    "loss": {"loss_name": "default"},
    "model_defaults": {"tdt_durations": None, "initialize_prompt_feature": False},
    "preprocessor": {
        "_target_": f"{ASR}.AudioToMelSpectrogramPreprocessor",
        "normalize": "NA",
        "sample_rate": 8000,
        "window_size": 0.025,
        "window_stride": 0.0125,
        "window": "hann",
        "features": 80,
        "n_fft": 512,
        "preemph": 0.9,
        "log": True,
        "log_zero_guard_type": "add",
        "log_zero_guard_value": 1e-5,
        "mag_power": 2.0,
        "exact_pad": False,
        "frame_splicing": 1,
    },
    "encoder": {
        "_target_": f"{ASR}.ConformerEncoder",
        "feat_in": 80,
        "feat_out": -1,
        "n_layers": 3,
        "d_model": 48,
        "n_heads": 6,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "causal_downsampling": True,
        "reduction": None,
        "self_attention_model": "rel_pos",
        "att_context_style": "chunked_limited",
        "att_context_size": [[70, 6], [56, 0]],
        "conv_kernel_size": 9,
        "conv_norm_type": "layer_norm",
        "conv_context_size": "causal",
        "conv_context_style": "regular",
        "xscaling": False,
        "use_bias": False,
    },
    "decoder": {
        "_target_": f"{ASR}.RNNTDecoder",
        "normalization_mode": None,
        "blank_as_pad": True,
        "prednet": {"pred_hidden": 40, "pred_rnn_layers": 2, "rnn_hidden_size": -1},
    },
    "joint": {
        "_target_": f"{ASR}.RNNTJoint",
        "num_classes": 128,
        "num_extra_outputs": 0,
        "jointnet": {"joint_hidden": 56, "activation": "tanh"},
    },
    "decoding": {"model_type": "rnnt", "durations": [], "strategy": "greedy", "greedy": {"max_symbols": 7}},
}
MODEL = ModelConfig(
    features=FeatureConfig(sample_rate=8000, mels=80, window=200, hop=100, n_fft=512, preemphasis=0.9),
    encoder=EncoderConfig(layers=3, d_model=48, heads=6, subsampling=8, cache=70, conv_cache=8),
    decoder=DecoderConfig(layers=2, hidden=40, joint=56, vocabulary=128, max_symbols=7, activation="tanh"),
    chunks=(ChunkConfig(100, 1, 56, 800), ChunkConfig(700, 7, 70, 5600)),
    log_guard=1e-5,
    conv_norm="layer_norm",
    input_scale=1.0,
    use_bias=False,
)
PROMPTED = {
    "target": f"{MODELS}.EncDecRNNTBPEModelWithPrompt",
    "model_defaults.initialize_prompt_feature": True,
    "model_defaults.num_prompts": 9,
    "model_defaults.prompt_dictionary": {"de-DE": 4, "en-US": 0, "auto": 8},
}
MULTITALKER = {
    "target": f"{MODELS}.EncDecMultiTalkerRNNTBPEModel",
    "spk_kernel_type": "ff",
    "spk_kernel_layers": [0],
    "add_bg_spk_kernel": False,
}
ABSENT = object()
MISSING = "the checkpoint's configuration has no field '{field}'."
REJECTED = "not supported: {field} is "


def chunks(*sizes: tuple[int, int, int, int]) -> tuple[ChunkConfig, ...]:
    return tuple(ChunkConfig(*size) for size in sizes)


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `CONFIG` with the fields at some paths set or removed."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        section, (*sections, last) = config, path.split(".")
        for name in sections:
            section = section.setdefault(name, {})
        if value is ABSENT:
            section.pop(last, None)
        else:
            section[last] = value
    return config


def expected(changes: Mapping[str, Any], model: ModelConfig = MODEL) -> ModelConfig:
    """Return `model` with the fields at some paths replaced."""
    for path, value in changes.items():
        first, _, last = path.partition(".")
        model = dataclasses.replace(
            model, **{first: dataclasses.replace(getattr(model, first), **{last: value}) if last else value}
        )
    return model


# Field -> values, each with what changes in the result, or REJECTED or MISSING. A value that is a dictionary of paths
# changes other fields too.
SAME: dict[str, Any] = {}
AT_16_KHZ = {
    "features.sample_rate": 16000,
    "features.window": 400,
    "features.hop": 200,
    "chunks": chunks((100, 1, 56, 1600), (700, 7, 70, 11200)),
}
BY_FOUR = {"encoder.subsampling": 4, "chunks": chunks((50, 1, 56, 400), (350, 7, 70, 2800))}
WINDOW_160 = {"features.window": 160}
FIELDS: dict[str, list[tuple[Any, Any]]] = {
    "target": [
        (f"{MODELS}.EncDecHybridRNNTCTCBPEModel", SAME),
        (f"{MODELS}.EncDecRNNTModel", REJECTED),
        (ABSENT, MISSING),
    ],
    "adapters": [({}, SAME), ({"speaker": {"enabled": True}}, REJECTED), (ABSENT, SAME)],
    "tokenizer.type": [("wpe", REJECTED), (ABSENT, MISSING)],
    **{
        field: [
            *((value, SAME) for value in ("rnnt", "default", "warprnnt_numba", "warprnnt", "pytorch", None, ABSENT)),
            ("tdt", REJECTED),
            ("multiblank", REJECTED),
        ]
        for field in ("loss.loss_name", "decoding.model_type")
    },
    **{
        field: [(None, SAME), ([], SAME), (ABSENT, SAME), ([0, 1], REJECTED)]
        for field in ("model_defaults.tdt_durations", "decoding.durations")
    },
    "model_defaults.initialize_prompt_feature": [(None, SAME), (ABSENT, SAME), (True, REJECTED)],
    "preprocessor._target_": [("x.AudioToMFCCPreprocessor", REJECTED), (ABSENT, MISSING)],
    "preprocessor.normalize": [(None, SAME), ("per_feature", REJECTED), ("all_features", REJECTED), (ABSENT, REJECTED)],
    "preprocessor.window": [("hamming", REJECTED), (None, REJECTED), (ABSENT, SAME)],
    "preprocessor.log": [(False, REJECTED), (1, REJECTED), (ABSENT, SAME)],
    "preprocessor.log_zero_guard_type": [("clamp", REJECTED), (ABSENT, SAME)],
    "preprocessor.mag_power": [(1.0, REJECTED), (None, REJECTED), (2, SAME), (ABSENT, SAME)],
    "preprocessor.exact_pad": [(True, REJECTED), (0, REJECTED), (ABSENT, SAME)],
    "preprocessor.frame_splicing": [(2, REJECTED), (True, REJECTED), (ABSENT, SAME)],
    "preprocessor.sample_rate": [
        (16000, AT_16_KHZ),
        (ABSENT, AT_16_KHZ),
        (999, REJECTED),
        (384_001, REJECTED),
        (8000.0, REJECTED),
    ],
    "preprocessor.log_zero_guard_value": [
        (0.5, {"log_guard": 0.5}),
        (0, {"log_guard": 0.0}),
        (ABSENT, {"log_guard": 2**-24}),
        (-1e-9, REJECTED),
        (1.1, REJECTED),
        ("tiny", REJECTED),
    ],
    "preprocessor.window_size": [
        (0.02, WINDOW_160),
        (ABSENT, WINDOW_160),
        (0.064, {"features.window": 512}),
        (0.0009, REJECTED),
        (1.1, REJECTED),
        (
            {"preprocessor.window_size": 0.06425, "preprocessor.n_fft": 1 << 10},
            {"features.window": 514, "features.n_fft": 1024},
        ),
    ],
    "preprocessor.window_stride": [
        (0.02, {"features.hop": 160, "chunks": chunks((160, 1, 56, 1280), (1120, 7, 70, 8960))}),
        (ABSENT, {"features.hop": 80, "chunks": chunks((80, 1, 56, 640), (560, 7, 70, 4480))}),
        (0.0009, REJECTED),
        (1.1, REJECTED),
    ],
    "preprocessor.n_fft": [
        (1024, {"features.n_fft": 1024}),
        (200, {"features.n_fft": 200}),
        *((value, {"features.n_fft": 256}) for value in (0, None, ABSENT)),  # the next power of two
        (199, REJECTED),
        (-1, REJECTED),
        ((1 << 17) + 1, REJECTED),
    ],
    "preprocessor.preemph": [
        (0.5, {"features.preemphasis": 0.5}),
        (None, {"features.preemphasis": 0.0}),
        (0, {"features.preemphasis": 0.0}),
        (ABSENT, {"features.preemphasis": 0.97}),
        (-0.1, REJECTED),
        (1.1, REJECTED),
    ],
    "preprocessor.features": [
        ({"preprocessor.features": 64, "encoder.feat_in": 64}, {"features.mels": 64}),
        ({"preprocessor.features": ABSENT, "encoder.feat_in": 64}, {"features.mels": 64}),
        (0, REJECTED),
        (4097, REJECTED),
    ],
    "encoder._target_": [("x.SqueezeformerEncoder", REJECTED), (ABSENT, MISSING)],
    "encoder.feat_in": [(64, REJECTED), (True, REJECTED), (ABSENT, MISSING)],
    "encoder.feat_out": [(None, SAME), (0, SAME), (48, SAME), (ABSENT, SAME), (64, REJECTED)],
    "encoder.n_layers": [
        (5, {"encoder.layers": 5}),
        (0, REJECTED),
        (1001, REJECTED),
        (ABSENT, MISSING),
    ],
    "encoder.d_model": [
        (60, {"encoder.d_model": 60}),
        (50, REJECTED),  # not a multiple of the heads
        (0, REJECTED),
        ((1 << 16) + 2, REJECTED),
        (ABSENT, MISSING),
    ],
    "encoder.n_heads": [
        (3, {"encoder.heads": 3}),
        (ABSENT, {"encoder.heads": 4}),
        (0, REJECTED),
        (1025, REJECTED),
    ],
    "encoder.subsampling": [("striding", REJECTED), (ABSENT, REJECTED)],
    "encoder.subsampling_factor": [(4, BY_FOUR), (ABSENT, BY_FOUR), (2, REJECTED), (16, REJECTED), ("8", REJECTED)],
    "encoder.causal_downsampling": [(False, REJECTED), (1, REJECTED), (ABSENT, REJECTED)],
    "encoder.reduction": [("pooling", REJECTED), (ABSENT, SAME)],
    "encoder.self_attention_model": [("abs_pos", REJECTED), ("rel_pos_local_attn", REJECTED), (ABSENT, SAME)],
    "encoder.att_context_style": [("regular", REJECTED), ("chunked_limited_with_rc", REJECTED), (ABSENT, REJECTED)],
    "encoder.att_context_size": [
        ([63, 6], {"encoder.cache": 63, "chunks": chunks((700, 7, 63, 5600))}),
        (
            [[1, 0], [56, 13], [80, 1]],
            {
                "encoder.cache": 80,
                "chunks": chunks((100, 1, 1, 800), (200, 2, 80, 1600), (1400, 14, 56, 11200)),
            },
        ),
        ([[65536, 0]], {"encoder.cache": 65536, "chunks": chunks((100, 1, 65536, 800))}),
        ([[20000, 9999]], {"encoder.cache": 20000, "chunks": chunks((1_000_000, 10_000, 20000, 8_000_000))}),
        ([], REJECTED),
        ([[70, 0]] * 65, REJECTED),
        ([[65537, 0]], REJECTED),
        ([[20002, 10000]], REJECTED),
        ([[0, 0]], REJECTED),
        ([[-1, -1]], REJECTED),
        ([[70, -1]], REJECTED),
        ([[71, 6]], REJECTED),  # not a multiple of the chunk
        ([[70, 6], [77, 6]], REJECTED),  # two left contexts for a chunk size
        ([[70, 6, 1]], REJECTED),
        ([[70.0, 6]], REJECTED),
        ([[70, True]], REJECTED),
        ("70", REJECTED),
        (ABSENT, MISSING),
    ],
    "encoder.conv_kernel_size": [
        (1, {"encoder.conv_cache": 0}),
        (ABSENT, {"encoder.conv_cache": 30}),
        (0, REJECTED),
        (4097, REJECTED),
    ],
    "encoder.conv_norm_type": [
        ("batch_norm", {"conv_norm": "batch_norm"}),
        (ABSENT, {"conv_norm": "batch_norm"}),
        ("instance_norm", REJECTED),
    ],
    "encoder.conv_context_size": [
        ([8, 0], SAME),
        ([4, 4], REJECTED),
        ([9, 0], REJECTED),
        (None, REJECTED),
        (ABSENT, REJECTED),
    ],
    "encoder.conv_context_style": [(None, SAME), (ABSENT, SAME), ("dcc", REJECTED)],
    "encoder.xscaling": [
        (True, {"input_scale": pytest.approx(48**0.5, rel=1e-12)}),
        (ABSENT, {"input_scale": pytest.approx(48**0.5, rel=1e-12)}),
        (0, REJECTED),
        (None, REJECTED),
    ],
    "encoder.use_bias": [(True, {"use_bias": True}), (ABSENT, {"use_bias": True}), (1, REJECTED), (None, REJECTED)],
    "decoder._target_": [("x.StatelessTransducerDecoder", REJECTED), (ABSENT, MISSING)],
    "decoder.normalization_mode": [("layer", REJECTED), (ABSENT, SAME)],
    "decoder.blank_as_pad": [(False, REJECTED), (None, REJECTED), (ABSENT, SAME)],
    "decoder.prednet.pred_hidden": [
        (64, {"decoder.hidden": 64}),
        (0, REJECTED),
        ((1 << 16) + 1, REJECTED),
        (ABSENT, MISSING),
    ],
    "decoder.prednet.pred_rnn_layers": [
        (3, {"decoder.layers": 3}),
        (ABSENT, {"decoder.layers": 1}),
        (0, REJECTED),
        (101, REJECTED),
    ],
    "decoder.prednet.rnn_hidden_size": [(None, SAME), (0, SAME), (40, SAME), (ABSENT, SAME), (41, REJECTED)],
    "decoder.vocab_size": [
        (100, {"decoder.vocabulary": 100}),
        (-1, SAME),  # a placeholder: that of the joint
        (0, SAME),
        (None, SAME),
        (ABSENT, SAME),
        (-2, REJECTED),
        ("100", REJECTED),
        ((1 << 20) + 1, REJECTED),
    ],
    "joint._target_": [("x.SampledRNNTJoint", REJECTED), (ABSENT, MISSING)],
    "joint.num_extra_outputs": [(None, SAME), (ABSENT, SAME), (5, REJECTED)],
    "joint.num_classes": [
        (200, {"decoder.vocabulary": 200}),
        (-1, REJECTED),
        (0, REJECTED),
        ("128", REJECTED),
        (ABSENT, REJECTED),
    ],
    "joint.vocabulary": [
        (["a", "b", "c"], {"decoder.vocabulary": 3}),
        ({"joint.vocabulary": ["a"], "decoder.vocab_size": 100}, {"decoder.vocabulary": 1}),
        ([], SAME),
        (None, SAME),
        (ABSENT, SAME),
        ("abc", REJECTED),
    ],
    "joint.jointnet.joint_hidden": [
        (64, {"decoder.joint": 64}),
        (0, REJECTED),
        ((1 << 16) + 1, REJECTED),
        (ABSENT, MISSING),
    ],
    "joint.jointnet.activation": [
        ("relu", {"decoder.activation": "relu"}),
        ("sigmoid", {"decoder.activation": "sigmoid"}),
        ("gelu", REJECTED),
        (ABSENT, MISSING),
    ],
    "decoding.strategy": [("greedy_batch", SAME), (ABSENT, SAME), (["greedy"], REJECTED)],
    "decoding.greedy.max_symbols": [
        (1, {"decoder.max_symbols": 1}),
        (10_000, {"decoder.max_symbols": 10_000}),
        (0, REJECTED),
        (10_001, REJECTED),
        (True, REJECTED),
        (ABSENT, REJECTED),
        (None, REJECTED),
    ],
    "decoding.greedy.max_symbols_per_step": [
        (9, SAME),  # the newer field takes precedence
        ({"decoding.greedy.max_symbols_per_step": 9, "decoding.greedy.max_symbols": None}, {"decoder.max_symbols": 9}),
        ({"decoding.greedy.max_symbols_per_step": 0, "decoding.greedy.max_symbols": ABSENT}, REJECTED),
    ],
}
# Fields that only other kinds of models have.
FIELDS_OF_KINDS: dict[str, tuple[dict[str, Any], list[tuple[Any, Any]]]] = {
    "model_defaults.initialize_prompt_feature": (PROMPTED, [(False, REJECTED), (None, REJECTED), (ABSENT, REJECTED)]),
    "model_defaults.num_prompts": (
        PROMPTED,
        [
            (20, {"languages.count": 20}),
            (ABSENT, {"languages.count": 128}),
            (0, REJECTED),
            ((1 << 16) + 1, REJECTED),
        ],
    ),
    "model_defaults.prompt_dictionary": (
        PROMPTED,
        [
            ({"fr": 8}, {"languages.default": "fr", "languages.prompts": {"fr": 8}}),
            (
                {"de": 2, "en-US": 1, "fr": 0},
                {"languages.default": "en-US", "languages.prompts": {"de": 2, "en-US": 1, "fr": 0}},
            ),
            ({}, REJECTED),
            (["en"], REJECTED),
            (ABSENT, MISSING),
        ],
    ),
    "spk_kernel_type": (
        MULTITALKER,
        [(None, {"speaker_kernels": ()}), (ABSENT, {"speaker_kernels": ()}), ("mha", REJECTED)],
    ),
    "spk_kernel_layers": (MULTITALKER, [(["0"], SAME), ([0, 4], REJECTED), ([1], REJECTED), (ABSENT, MISSING)]),
    "add_bg_spk_kernel": (
        MULTITALKER,
        [
            (True, {"speaker_kernels": ("spk_kernels.0", "bg_spk_kernels.0")}),
            (ABSENT, {"speaker_kernels": ("spk_kernels.0", "bg_spk_kernels.0")}),
            (1, REJECTED),
        ],
    ),
}
KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (PROMPTED, {"languages": LanguageConfig("auto", {"de-DE": 4, "en-US": 0, "auto": 8}, 9)}),
    (MULTITALKER, {"speaker_kernels": ("spk_kernels.0",)}),
]


def check(field: str, value: Any, outcome: Any, kind: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    changes = value if isinstance(value, dict) and "." in next(iter(value), "") else {field: value}
    config = changed({**kind, **changes})
    if isinstance(outcome, dict):
        assert check_config(config) == expected({**result, **outcome})
        return
    with pytest.raises(CheckpointError) as caught:
        check_config(config)
    message = str(caught.value)
    assert message.startswith(outcome.format(field=field)) and message.endswith(".") and "\n" not in message
    if outcome == REJECTED:
        assert "; nemostream supports " in message


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "prompted", "multitalker"])
def test_the_configurations_without_changes(kind: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert check_config(changed(kind[0])) == expected(kind[1])


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_determines_the_result_or_is_rejected_by_name(field: str) -> None:
    for value, outcome in FIELDS[field]:
        check(field, value, outcome, {}, {})


@pytest.mark.parametrize("field", FIELDS_OF_KINDS)
def test_a_field_of_other_kinds_of_models(field: str) -> None:
    kind, cases = FIELDS_OF_KINDS[field]
    result = next(result for changes, result in KINDS if changes is kind)
    for value, outcome in cases:
        check(field, value, outcome, kind, result)


def test_rejections_state_the_value() -> None:
    for field, cases in FIELDS.items():
        for value, outcome in cases:
            derived = field in ("preprocessor.n_fft", "joint.num_classes")  # the value that results is stated
            if outcome == REJECTED and not derived and not isinstance(value, dict | list) and value is not ABSENT:
                with pytest.raises(CheckpointError) as caught:
                    check_config(changed({field: value}))
                assert f" is {value!r}; nemostream supports " in str(caught.value), field


@pytest.mark.parametrize(
    ("field", "default"),
    [
        ("preprocessor.normalize", "per_feature"),
        ("encoder.subsampling", "striding"),
        ("encoder.causal_downsampling", False),
        ("encoder.att_context_style", "regular"),
        ("encoder.conv_context_size", None),
        ("decoding.greedy.max_symbols", None),
    ],
)
def test_rejections_of_absent_fields_state_nemos_default(field: str, default: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_config(changed({field: ABSENT}))
    assert str(caught.value).startswith(f"not supported: {field} is {default!r}; nemostream supports ")


@pytest.mark.parametrize(
    ("contexts", "stated"),
    [
        ([[70, 6], [71, 6]], [71, 6]),
        ([[70, 6], [70, 6, 1]], [70, 6, 1]),
        ([[70, 6], [77, 6]], [[70, 6], [77, 6]]),
        ([[70, 0]] * 65, [[70, 0]] * 65),
        ([], []),
    ],
)
def test_rejections_state_the_contexts_that_are_invalid(contexts: Any, stated: Any) -> None:
    """The one that is, or all if they do not agree."""
    with pytest.raises(CheckpointError) as caught:
        check_config(changed({"encoder.att_context_size": contexts}))
    assert f"encoder.att_context_size is {str(stated)[:200]}" in str(caught.value)


LIMITS: dict[str, tuple[float, float]] = {
    "preprocessor.sample_rate": (1000, 384_000),
    "preprocessor.features": (1, 4096),
    "preprocessor.n_fft": (0, 131_072),
    "preprocessor.log_zero_guard_value": (0.0, 1.0),
    "preprocessor.window_size": (0.001, 1.0),
    "preprocessor.window_stride": (0.001, 1.0),
    "preprocessor.preemph": (0.0, 1.0),
    "encoder.n_layers": (1, 1000),
    "encoder.d_model": (1, 65536),
    "encoder.n_heads": (1, 1024),
    "encoder.conv_kernel_size": (1, 4096),
    "decoder.prednet.pred_hidden": (1, 65536),
    "decoder.prednet.pred_rnn_layers": (1, 100),
    "decoder.vocab_size": (-1, 1_048_576),
    "joint.jointnet.joint_hidden": (1, 65536),
    "model_defaults.num_prompts": (1, 65536),
}


def assert_limits(limits: tuple[float, float], message: Callable[[float], str]) -> None:
    """The values outside are rejected with the limits. Those at the limits are not, but other rules may apply."""
    minimum, maximum = limits
    kind, step = ("whole number", 1.0) if isinstance(maximum, int) else ("number", 1e-6)
    for value, allowed in ((minimum, True), (maximum, True), (minimum - step, False), (maximum + step, False)):
        found = message(int(value) if isinstance(maximum, int) else value)
        stated = f"a {kind} from {minimum:.10g} to {maximum:.10g}."
        assert found.endswith(stated) != allowed, (value, found)


@pytest.mark.parametrize("field", LIMITS)
def test_limits_of_numbers(field: str) -> None:
    def message(value: float) -> str:
        try:
            check_config(changed({**(PROMPTED if "prompts" in field else {}), field: value}))
        except CheckpointError as error:
            return str(error)
        return ""

    assert_limits(LIMITS[field], message)


@pytest.mark.parametrize(
    ("samples", "stride", "allowed"), [(201, 100, False), (200, 200, False), (202, 201, True), (198, 199, False)]
)
def test_windows_are_even_and_longer_than_the_stride(samples: int, stride: int, allowed: bool) -> None:
    config = changed({"preprocessor.window_size": samples / 8000, "preprocessor.window_stride": stride / 8000})
    if allowed:
        features = check_config(config).features
        assert (features.window, features.hop) == (samples, stride)
    else:
        with pytest.raises(CheckpointError, match=f"^not supported: preprocessor.window_size is {samples}; "):
            check_config(config)


class Recorder(Mapping[str, Any]):
    """A configuration that records the paths of the fields that are read."""

    def __init__(self, fields: dict[str, Any], read: set[str], path: str = "") -> None:
        self._fields, self._read, self._path = fields, read, path

    def __getitem__(self, name: str) -> Any:
        path, value = f"{self._path}{name}", self._fields.get(name)
        if isinstance(value, dict) and name != "prompt_dictionary":
            return Recorder(value, self._read, f"{path}.")
        self._read.add(path)
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def test_every_field_that_is_read_has_a_test() -> None:
    read: set[str] = set()
    for changes in (
        {},
        PROMPTED,
        MULTITALKER,
        {"joint.num_classes": 100},
        {"decoding.greedy.max_symbols": None, "decoding.greedy.max_symbols_per_step": 5},
    ):
        check_config(Recorder(changed(changes), read))
    assert read == {*FIELDS, *FIELDS_OF_KINDS}


@pytest.mark.nemo
def test_absent_fields_have_nemos_defaults() -> None:
    from nemo.collections.asr import modules

    compared = 0
    for section in ("preprocessor", "encoder", "decoder", "joint"):
        kind = getattr(modules, CONFIG[section]["_target_"].rpartition(".")[2])
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            if f"{section}.{name}" not in FIELDS or parameter.default is inspect.Parameter.empty:
                continue
            results: list[Any] = []
            for value in (ABSENT, parameter.default):
                try:
                    results.append(check_config(changed({f"{section}.{name}": value, "encoder.feat_in": 80})))
                except CheckpointError:
                    results.append("rejected")
            assert results[0] == results[1], name
            compared += 1
    assert compared > 30


@pytest.mark.parametrize(
    ("changes", "warns"),
    [({}, False), ({"decoding.strategy": "beam"}, True), ({"decoding.strategy": "greedy_batch"}, False)],
)
def test_other_strategies_are_reported(changes: dict[str, Any], warns: bool) -> None:
    model = check_config(changed(changes))
    assert bool(model.warnings) == warns and model.decoder.max_symbols == 7
    assert dataclasses.replace(model, warnings=()) == MODEL


# -- transformers ------------------------------------------------------------------------------------------------------

# Values differ from the defaults of transformers.
TRANSFORMERS: dict[str, Any] = {
    "model_type": "nemotron_asr_streaming",
    "vocab_size": 129,
    "blank_token_id": 128,
    "decoder_hidden_size": 40,
    "num_decoder_layers": 3,
    "hidden_act": "tanh",
    "max_symbols_per_step": 7,
    "durations": [],
    "encoder_config": {
        "hidden_act": "silu",
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "sliding_window": 57,
        "num_mel_bins": 64,
        "attention_bias": False,
        "convolution_bias": False,
        "num_hidden_layers": 5,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "subsampling_factor": 4,
        "scale_input": False,
        "conv_kernel_size": 5,
        "default_num_lookahead_tokens": 0,
    },
}
EXTRACTOR = {
    "feature_size": 64,
    "sampling_rate": 8000,
    "win_length": 200,
    "hop_length": 100,
    "n_fft": 1024,
    "preemphasis": 0.9,
    "mel_filters_dtype": "float32",
}
PROCESSOR: dict[str, Any] = {"supported_num_lookahead_tokens": [3, 0], "feature_extractor": EXTRACTOR}
TRANSFORMERS_MODEL = ModelConfig(
    features=FeatureConfig(sample_rate=8000, mels=64, window=200, hop=100, n_fft=1024, preemphasis=0.9),
    encoder=EncoderConfig(layers=5, d_model=48, heads=6, subsampling=4, cache=56, conv_cache=4),
    decoder=DecoderConfig(layers=3, hidden=40, joint=40, vocabulary=128, max_symbols=7, activation="tanh"),
    chunks=(ChunkConfig(50, 1, 56, 400), ChunkConfig(200, 4, 56, 1600)),
    log_guard=2**-24,
    conv_norm="layer_norm",
    input_scale=1.0,
    use_bias=False,
)
DOCUMENTS = {"config.json": TRANSFORMERS, "processor_config.json": PROCESSOR}
TRANSFORMERS_PROMPTED = {
    "config.json:model_type": "nemotron3_5_asr",
    "config.json:num_prompts": 9,
    "config.json:default_prompt_id": 4,
    "processor_config.json:prompt_dictionary": {"en": 0, "de-DE": 4, "auto": 8},
}
CONFIG_FIELD, ENCODER_FIELD = "config.json:", "config.json:encoder_config."
EXTRACTOR_FIELD = "processor_config.json:feature_extractor."
# Field -> values, each with what changes in the result, or the message.
TRANSFORMERS_FIELDS: dict[str, list[tuple[Any, Any]]] = {
    f"{CONFIG_FIELD}model_type": [("whisper", "model_type is 'whisper'"), (ABSENT, "has no field 'model_type'")],
    f"{CONFIG_FIELD}vocab_size": [
        ({f"{CONFIG_FIELD}vocab_size": 100, f"{CONFIG_FIELD}blank_token_id": 99}, {"decoder.vocabulary": 99}),
        ({f"{CONFIG_FIELD}vocab_size": None, f"{CONFIG_FIELD}blank_token_id": None}, {"decoder.vocabulary": 1024}),
        (1, "vocab_size is 1"),
        ((1 << 20) + 1, "vocab_size is 1048577"),
    ],
    f"{CONFIG_FIELD}blank_token_id": [(127, "blank_token_id is 127"), (0, "blank_token_id is 0"), (ABSENT, SAME)],
    f"{CONFIG_FIELD}decoder_hidden_size": [
        (64, {"decoder.hidden": 64, "decoder.joint": 64}),
        (ABSENT, {"decoder.hidden": 640, "decoder.joint": 640}),
        (0, "decoder_hidden_size is 0"),
    ],
    f"{CONFIG_FIELD}num_decoder_layers": [
        (1, {"decoder.layers": 1}),
        (ABSENT, {"decoder.layers": 2}),
        (101, "num_decoder_layers is 101"),
    ],
    f"{CONFIG_FIELD}hidden_act": [
        ("sigmoid", {"decoder.activation": "sigmoid"}),
        (ABSENT, {"decoder.activation": "relu"}),
        ("gelu", "hidden_act is 'gelu'"),
    ],
    f"{CONFIG_FIELD}max_symbols_per_step": [
        (3, {"decoder.max_symbols": 3}),
        (ABSENT, {"decoder.max_symbols": 10}),
        (0, "max_symbols_per_step is 0"),
    ],
    f"{CONFIG_FIELD}durations": [(ABSENT, SAME), ([0, 1], "durations is a list of 2"), ([0], "durations")],
    f"{ENCODER_FIELD}hidden_act": [("relu", "hidden_act is 'relu'"), (ABSENT, SAME)],
    f"{ENCODER_FIELD}subsampling_conv_kernel_size": [(5, "subsampling_conv_kernel_size is 5"), (ABSENT, SAME)],
    f"{ENCODER_FIELD}subsampling_conv_stride": [(1, "subsampling_conv_stride is 1"), (ABSENT, SAME)],
    f"{ENCODER_FIELD}sliding_window": [
        (45, {"encoder.cache": 44, "chunks": chunks((50, 1, 44, 400), (200, 4, 44, 1600))}),
        # 70 is no multiple of 4 frames, so the default needs other chunks.
        (
            {f"{ENCODER_FIELD}sliding_window": ABSENT, "processor_config.json:supported_num_lookahead_tokens": [0]},
            {"encoder.cache": 70, "chunks": chunks((50, 1, 70, 400))},
        ),
        (1, "sliding_window is 1"),
    ],
    f"{ENCODER_FIELD}num_mel_bins": [
        ({f"{ENCODER_FIELD}num_mel_bins": 96, f"{EXTRACTOR_FIELD}feature_size": 96}, {"features.mels": 96}),
        ({f"{ENCODER_FIELD}num_mel_bins": ABSENT, f"{EXTRACTOR_FIELD}feature_size": ABSENT}, {"features.mels": 80}),
        (96, "feature_size is 64"),
    ],
    f"{ENCODER_FIELD}attention_bias": [
        ({f"{ENCODER_FIELD}attention_bias": True, f"{ENCODER_FIELD}convolution_bias": True}, {"use_bias": True}),
        ({f"{ENCODER_FIELD}attention_bias": ABSENT, f"{ENCODER_FIELD}convolution_bias": True}, {"use_bias": True}),
        (True, "convolution_bias is False"),
        ("yes", "attention_bias is 'yes'"),
    ],
    f"{ENCODER_FIELD}convolution_bias": [(True, "convolution_bias is True"), ("no", "convolution_bias is 'no'")],
    f"{ENCODER_FIELD}num_hidden_layers": [
        (2, {"encoder.layers": 2}),
        (ABSENT, {"encoder.layers": 24}),
        (0, "num_hidden_layers is 0"),
    ],
    f"{ENCODER_FIELD}hidden_size": [
        (96, {"encoder.d_model": 96}),
        (
            {f"{ENCODER_FIELD}hidden_size": ABSENT, f"{ENCODER_FIELD}num_attention_heads": 4},
            {"encoder.d_model": 1024, "encoder.heads": 4},
        ),
        (0, "hidden_size is 0"),
        (50, "encoder.d_model is 50"),
    ],
    f"{ENCODER_FIELD}num_attention_heads": [
        (3, {"encoder.heads": 3}),
        (ABSENT, {"encoder.heads": 8}),
        (0, "num_attention_heads is 0"),
    ],
    f"{ENCODER_FIELD}subsampling_factor": [
        (8, {"encoder.subsampling": 8, "chunks": chunks((100, 1, 56, 800), (400, 4, 56, 3200))}),
        (ABSENT, {"encoder.subsampling": 8, "chunks": chunks((100, 1, 56, 800), (400, 4, 56, 3200))}),
        (2, "subsampling_factor is 2"),
    ],
    f"{ENCODER_FIELD}scale_input": [
        (True, {"input_scale": pytest.approx(48**0.5, rel=1e-12)}),
        (ABSENT, {"input_scale": pytest.approx(48**0.5, rel=1e-12)}),
        (1, "scale_input is 1"),
    ],
    f"{ENCODER_FIELD}conv_kernel_size": [
        (3, {"encoder.conv_cache": 2}),
        (ABSENT, {"encoder.conv_cache": 8}),
        (0, "conv_kernel_size is 0"),
    ],
    f"{ENCODER_FIELD}default_num_lookahead_tokens": [
        (3, SAME),
        (ABSENT, SAME),
        (1, "default_num_lookahead_tokens is 1"),
    ],
    "processor_config.json:supported_num_lookahead_tokens": [
        ([1, 0], {"chunks": chunks((50, 1, 56, 400), (100, 2, 56, 800))}),
        (
            {
                "processor_config.json:supported_num_lookahead_tokens": ABSENT,
                f"{ENCODER_FIELD}supported_num_lookahead_tokens": [0, 7],
            },
            {"chunks": chunks((50, 1, 56, 400), (400, 8, 56, 3200))},
        ),
        ([], "supported_num_lookahead_tokens is a list of 0"),
        ([0, 0], "encoder.att_context_size"),
        ([2, 0], "encoder.att_context_size"),  # 56 is no multiple of 3 frames
    ],
    f"{EXTRACTOR_FIELD}feature_size": [(80, "feature_size is 80"), (ABSENT, SAME)],
    f"{EXTRACTOR_FIELD}sampling_rate": [
        (
            16000,
            {"features.sample_rate": 16000, "chunks": chunks((25, 1, 56, 400), (100, 4, 56, 1600))},
        ),
        (ABSENT, {"features.sample_rate": 16000, "chunks": chunks((25, 1, 56, 400), (100, 4, 56, 1600))}),
        (999, "sampling_rate is 999"),
    ],
    f"{EXTRACTOR_FIELD}win_length": [
        (300, {"features.window": 300}),
        (ABSENT, {"features.window": 400}),
        (1, "win_length is 1"),
    ],
    f"{EXTRACTOR_FIELD}hop_length": [
        (80, {"features.hop": 80, "chunks": chunks((40, 1, 56, 320), (160, 4, 56, 1280))}),
        (ABSENT, {"features.hop": 160, "chunks": chunks((80, 1, 56, 640), (320, 4, 56, 2560))}),
        (0, "hop_length is 0"),
    ],
    f"{EXTRACTOR_FIELD}n_fft": [
        (256, {"features.n_fft": 256}),
        (ABSENT, {"features.n_fft": 512}),
        (1, "n_fft is 1"),
    ],
    f"{EXTRACTOR_FIELD}preemphasis": [
        (0.5, {"features.preemphasis": 0.5}),
        (None, {"features.preemphasis": 0.0}),
        (ABSENT, {"features.preemphasis": 0.97}),
        (1.5, "preemphasis is 1.5"),
    ],
    f"{EXTRACTOR_FIELD}mel_filters_dtype": [("bfloat16", "mel_filters_dtype is 'bfloat16'"), (ABSENT, SAME)],
}
GERMAN = LanguageConfig("de-DE", {"en": 0, "de-DE": 4, "auto": 8}, 9)
PROMPTED_FIELDS: dict[str, list[tuple[Any, Any]]] = {
    f"{CONFIG_FIELD}num_prompts": [
        (20, {"languages": dataclasses.replace(GERMAN, count=20)}),
        (ABSENT, {"languages": dataclasses.replace(GERMAN, count=128)}),
        (8, "prompt_dictionary.auto is 8"),
        (0, "num_prompts is 0"),
    ],
    f"{CONFIG_FIELD}default_prompt_id": [
        (8, {"languages": dataclasses.replace(GERMAN, default="auto")}),
        (5, "default_prompt_id is 5, which has no name"),
        (9, "default_prompt_id is 9"),
        (
            {
                f"{CONFIG_FIELD}default_prompt_id": ABSENT,
                f"{CONFIG_FIELD}num_prompts": 128,
                "processor_config.json:prompt_dictionary": {"en": 0, "fr": 101},
            },
            {"languages": LanguageConfig("fr", {"en": 0, "fr": 101}, 128)},
        ),
    ],
    "processor_config.json:prompt_dictionary": [
        ({"en": 4, "de": 0}, {"languages": LanguageConfig("en", {"en": 4, "de": 0}, 9)}),
        (ABSENT, "has no field 'prompt_dictionary'"),
    ],
    f"{CONFIG_FIELD}vocab_size": [
        ({f"{CONFIG_FIELD}vocab_size": None, f"{CONFIG_FIELD}blank_token_id": None}, {"decoder.vocabulary": 13087}),
    ],
}


def written(folder: Path, changes: Mapping[str, Any]) -> Path:
    """Write the documents with the fields at some paths ("config.json:vocab_size") set or removed."""
    documents = copy.deepcopy(DOCUMENTS)
    for path, value in changes.items():
        file, _, field = path.partition(":")
        section, (*sections, last) = documents[file], field.split(".")
        for name in sections:
            section = section[name]
        if value is ABSENT:
            section.pop(last, None)
        else:
            section[last] = value
    for file, document in documents.items():
        (folder / file).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("field", "kind"),
    [*((field, "plain") for field in TRANSFORMERS_FIELDS), *((field, "prompted") for field in PROMPTED_FIELDS)],
)
def test_a_field_of_transformers(field: str, kind: str, tmp_path: Path) -> None:
    prompted = kind == "prompted"
    cases = (PROMPTED_FIELDS if prompted else TRANSFORMERS_FIELDS)[field]
    base = TRANSFORMERS_PROMPTED if prompted else {}
    result = {"languages": GERMAN} if prompted else {}
    assert check_transformers(written(tmp_path, base)) == expected(result, TRANSFORMERS_MODEL)
    for value, outcome in cases:
        changes = value if isinstance(value, dict) and ":" in next(iter(value)) else {field: value}
        folder = written(tmp_path, {**base, **changes})
        if isinstance(outcome, dict):
            assert check_transformers(folder) == expected({**result, **outcome}, TRANSFORMERS_MODEL), value
            continue
        with pytest.raises(CheckpointError) as caught:
            check_transformers(folder)
        assert outcome in str(caught.value) and "\n" not in str(caught.value)


TRANSFORMERS_LIMITS: dict[str, tuple[float, float]] = {
    f"{CONFIG_FIELD}vocab_size": (2, 1_048_576),
    f"{CONFIG_FIELD}decoder_hidden_size": (1, 65536),
    f"{CONFIG_FIELD}num_decoder_layers": (1, 100),
    f"{CONFIG_FIELD}max_symbols_per_step": (1, 10_000),
    f"{CONFIG_FIELD}num_prompts": (1, 65536),
    f"{CONFIG_FIELD}default_prompt_id": (0, 8),
    f"{ENCODER_FIELD}sliding_window": (2, 65536),
    f"{ENCODER_FIELD}num_mel_bins": (1, 4096),
    f"{ENCODER_FIELD}num_hidden_layers": (1, 1000),
    f"{ENCODER_FIELD}hidden_size": (1, 65536),
    f"{ENCODER_FIELD}num_attention_heads": (1, 1024),
    f"{ENCODER_FIELD}conv_kernel_size": (1, 4096),
    f"{EXTRACTOR_FIELD}sampling_rate": (1000, 384_000),
    f"{EXTRACTOR_FIELD}win_length": (2, 65536),
    f"{EXTRACTOR_FIELD}hop_length": (1, 65536),
    f"{EXTRACTOR_FIELD}n_fft": (2, 131_072),
    f"{EXTRACTOR_FIELD}preemphasis": (0.0, 1.0),
}


@pytest.mark.parametrize("field", TRANSFORMERS_LIMITS)
def test_limits_of_numbers_of_transformers(field: str, tmp_path: Path) -> None:
    def message(value: float) -> str:
        try:
            check_transformers(
                written(tmp_path, {**(TRANSFORMERS_PROMPTED if "prompt" in field else {}), field: value})
            )
        except CheckpointError as error:
            return str(error)
        return ""

    assert_limits(TRANSFORMERS_LIMITS[field], message)


def test_the_front_end_of_older_checkpoints_is_in_a_file_of_its_own(tmp_path: Path) -> None:
    """`preprocessor_config.json` is read if `processor_config.json` has no front end, or does not exist."""
    folder = written(tmp_path, {"processor_config.json:feature_extractor": ABSENT})
    with pytest.raises(CheckpointError, match="has no field 'feature_extractor'"):
        check_transformers(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(EXTRACTOR))
    assert check_transformers(folder) == TRANSFORMERS_MODEL
    written(tmp_path, {})
    (folder / "preprocessor_config.json").write_text(json.dumps(EXTRACTOR | {"preemphasis": 0.1}))
    assert check_transformers(folder) == TRANSFORMERS_MODEL, "processor_config.json takes precedence"
    (folder / "processor_config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps(
            TRANSFORMERS
            | {"encoder_config": TRANSFORMERS["encoder_config"] | {"supported_num_lookahead_tokens": [0, 3]}}
        )
    )
    assert check_transformers(folder) == expected({"features.preemphasis": 0.1}, TRANSFORMERS_MODEL)


@pytest.mark.nemo
@pytest.mark.parametrize("name", ["NemotronAsrStreaming", "Nemotron3_5Asr"])
def test_absent_fields_have_the_defaults_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config = getattr(transformers, f"{name}Config")()
    extractor = transformers.NemotronAsrStreamingFeatureExtractor(feature_size=config.encoder_config.num_mel_bins)
    prompts = {"en-US": 0, "de-DE": 101}
    processor: dict[str, Any] = {"feature_extractor": {}, "prompt_dictionary": prompts}
    results = []
    for document, front_end in (
        ({"model_type": config.model_type, "encoder_config": {}}, {}),
        (json.loads(config.to_json_string(use_diff=False)), json.loads(extractor.to_json_string())),
    ):
        (tmp_path / "config.json").write_text(json.dumps(document))
        (tmp_path / "processor_config.json").write_text(json.dumps(processor | {"feature_extractor": front_end}))
        results.append(check_transformers(tmp_path))
    assert results[0] == results[1]
    assert bool(results[0].languages.count) == (name == "Nemotron3_5Asr")
