"""The command line: results on standard output, one-line error messages, exit codes."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import nemostream
from nemostream.bundle import Bundle, sha256
from nemostream.cli import doctor
from nemostream.cli.main import app, main
from nemostream.extras import install_command

CLIPS = Path(__file__).parents[1] / "speech" / "human"
CARDS = [str(CLIPS / f"cards-00{i}.flac") for i in (1, 2, 3)]
COMMAND = [sys.executable, "-m", "nemostream"]


@dataclass(frozen=True)
class Completed:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, object]]:
        assert self.code == 0, self.err
        return [json.loads(line) for line in self.out.splitlines()]

    def assert_failure(self, code: int, *parts: str) -> None:
        """Assert that the only output is one line on standard error that contains all of `parts`."""
        assert (self.code, self.out) == (code, ""), self.err
        assert self.err.startswith("nemostream: ") and self.err.count("\n") == 1, self.err
        assert [part for part in parts if part not in self.err] == [], self.err


Run = Callable[..., Completed]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process. An exception other than `SystemExit` fails the test."""

    def call(*arguments: object) -> Completed:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        code = exited.value.code
        assert isinstance(code, int)
        return Completed(code, *capfd.readouterr())

    return call


def set_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def expected() -> dict[str, nemostream.Result]:
    with nemostream.load() as model:
        return {path.name: model.transcribe(path) for path in CLIPS.glob("*.flac")}


@pytest.fixture
def broken_bundle(demo_bundle: Bundle, tmp_path: Path) -> Callable[[str, bytes | None], Path]:
    """Return a function that copies the demo bundle with one file replaced, or one bit of it flipped."""

    def make(name: str, content: bytes | None = None) -> Path:
        copy = tmp_path / "bundle"
        shutil.copytree(demo_bundle.path, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 3] ^= 1
        (copy / name).write_bytes(data if content is None else content)
        return copy

    return make


# -- results -----------------------------------------------------------------------------------------------------------


def approx(value: float) -> object:
    return pytest.approx(value, abs=1e-3)


def test_json_of_several_files_in_order(run: Run, expected: dict[str, nemostream.Result]) -> None:
    names = [str(CLIPS / name) for name in sorted(expected, reverse=True)]
    rows = run("transcribe", *names, "--format", "json").rows
    assert [row["file"] for row in rows] == names
    for row in rows:
        result = expected[Path(str(row["file"])).name]
        assert row == {
            "file": row["file"],
            "duration": pytest.approx(soundfile.info(row["file"]).duration, abs=1e-3),
            "text": result.text,
            "words": [
                {"text": w.text, "start": approx(w.start), "end": approx(w.end), "confidence": approx(w.confidence)}
                for w in result.words
            ],
            "tokens": [
                {
                    "id": t.id,
                    "text": t.text,
                    "time": approx(t.time),
                    "score": approx(t.score),
                    "confidence": approx(t.confidence),
                }
                for t in result.tokens
            ],
            "chunk_ms": 560,
            "language": "en",
        }
    assert sum(len(result.tokens) for result in expected.values()) > 5  # the comparison above covers some tokens


def test_text_of_one_file_is_only_its_text(run: Run, expected: dict[str, nemostream.Result]) -> None:
    assert run("transcribe", CARDS[0]) == Completed(0, expected["cards-001.flac"].text + "\n", "")


def test_text_of_several_files_is_prefixed_with_file_names(run: Run, expected: dict[str, nemostream.Result]) -> None:
    lines = run("transcribe", CARDS[1], CARDS[0]).out.splitlines()
    assert lines == [f"{name}: {expected[Path(name).name].text}" for name in (CARDS[1], CARDS[0])]


def test_chunk_size(run: Run) -> None:
    (row,) = run("transcribe", CARDS[0], "--chunk-ms", 80, "--format", "json").rows
    with nemostream.load(chunk_ms=80) as model:
        assert (row["chunk_ms"], row["text"]) == (80, model.transcribe(CARDS[0]).text)


@pytest.mark.parametrize("threads", [None, 1])
def test_threads(run: Run, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    used = []
    session = onnxruntime.InferenceSession

    def spy(graph: Path, options: Any, **more: Any) -> Any:
        if "encoder" in Path(graph).name:
            used.append(options.intra_op_num_threads)
        return session(graph, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    monkeypatch.setattr("nemostream.runtime.backends.cpu.default_threads", lambda: 3)
    assert run("transcribe", CARDS[0], *(["--threads", threads] if threads else [])).code == 0
    assert set(used) == {threads or 3}
    run("transcribe", CARDS[0], "--threads", 0).assert_failure(2, "--threads")


def test_bundle_option(run: Run, demo_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(demo_bundle.path, tmp_path / "copy")
    assert run("transcribe", CARDS[0], "--bundle", tmp_path / "copy") == run("transcribe", CARDS[0])


def test_raw_pcm_on_standard_input(
    run: Run, expected: dict[str, nemostream.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pcm, _ = soundfile.read(CARDS[1], dtype="int16")
    set_standard_input(monkeypatch, pcm.tobytes())
    (row,) = run("transcribe", "-", "--format", "json").rows
    assert (row["file"], row["text"]) == ("-", expected["cards-002.flac"].text)


def test_pipe_between_files(expected: dict[str, nemostream.Result]) -> None:
    """Uses a real pipe to a subprocess."""
    pcm, _ = soundfile.read(CARDS[1], dtype="int16")
    arguments = ["transcribe", CARDS[0], "-", CARDS[2], "--format", "json"]
    done = subprocess.run([*COMMAND, *arguments], input=pcm.tobytes(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert texts == [expected[f"cards-00{i}.flac"].text for i in (1, 2, 3)]


def test_realtime_gives_the_same_text(run: Run) -> None:
    assert run("transcribe", CARDS[0], "--realtime") == run("transcribe", CARDS[0])


def test_other_formats_rates_and_channels(run: Run, tmp_path: Path) -> None:
    audio, rate = soundfile.read(CARDS[0])
    for name, subtype in (("a.wav", "PCM_16"), ("a.aiff", "PCM_24"), ("a.ogg", "VORBIS")):
        soundfile.write(tmp_path / name, np.stack([audio, audio], axis=1), rate, subtype=subtype)
    soundfile.write(tmp_path / "b.wav", np.repeat(audio, 3), 3 * rate)
    rows = run("transcribe", *sorted(tmp_path.iterdir()), "--format", "json").rows
    assert [row["duration"] for row in rows] == pytest.approx([len(audio) / rate] * 4, abs=1e-3)
    by_name = {Path(str(row["file"])).name: row["text"] for row in rows}
    assert by_name["a.wav"] == run("transcribe", CARDS[0]).out.rstrip("\n")  # the clip has 16 bits


def test_file_names_that_the_terminal_cannot_encode(expected: dict[str, nemostream.Result], tmp_path: Path) -> None:
    name = str(tmp_path / "für.flac")
    shutil.copyfile(CARDS[0], name)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, "transcribe", name, "nö.wav"], capture_output=True, env=environment)
    assert done.returncode == 3
    assert done.stdout.decode("ascii").endswith(f"f\\xfcr.flac: {expected['cards-001.flac'].text}\n")
    assert done.stderr == b"nemostream: n\\xf6.wav does not exist.\n"


def test_file_name_that_is_not_valid_text(run: Run, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.flac")
    run("transcribe", name).assert_failure(3, ".flac does not exist")
    try:
        shutil.copyfile(CARDS[0], name)
    except OSError:
        pytest.skip("the file system rejects names that are not valid text")
    assert run("transcribe", name).out == run("transcribe", str(CARDS[0])).out


# -- terminals and signals ---------------------------------------------------------------------------------------------


def test_standard_input_is_a_terminal(expected: dict[str, nemostream.Result]) -> None:
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    done = subprocess.run([*COMMAND, "transcribe", "-"], stdin=terminal, capture_output=True, text=True)
    os.close(controller)
    os.close(terminal)
    Completed(done.returncode, done.stdout, done.stderr).assert_failure(2, "not a pipe")


def test_ctrl_c() -> None:
    """Ctrl-C while the command waits for more audio on standard input."""
    with subprocess.Popen(
        [*COMMAND, "transcribe", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # SIGINT is ignored if these tests run as a background job of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        assert command.stdin
        command.stdin.write(bytes(1 << 19))  # more than a pipe holds: once written, the command is reading
        command.stdin.flush()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        assert command.stdout and command.stdout.read() == b""
        assert command.stderr and command.stderr.read() == b"nemostream: interrupted.\n"


def test_closed_reader_of_standard_output() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "transcribe", *CARDS], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# -- invalid audio -----------------------------------------------------------------------------------------------------


def write_truncated_file(path: Path) -> None:
    data = Path(CARDS[0]).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_file_with_nan(path: Path) -> None:
    audio = np.zeros(16000, np.float32)
    audio[8000] = np.nan
    soundfile.write(path, audio, 16000, subtype="FLOAT")


INVALID_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.wav": (lambda path: None, "does not exist"),
    "cut.flac": (write_truncated_file, "cut short"),
    "notes.txt": (lambda path: path.write_text("this is not audio " * 100), "not audio"),
    "nothing.wav": (lambda path: path.write_bytes(b""), "it is empty"),
    "empty.wav": (lambda path: soundfile.write(path, np.zeros(0), 16000), "no audio"),
    "nan.wav": (write_file_with_nan, "NaN"),
    "folder.wav": (lambda path: path.mkdir(), "is a folder"),
    "raw.raw": (lambda path: path.write_bytes(bytes(3200)), "no header"),
    "long" * 100 + ".wav": (lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("realtime", [False, True])
@pytest.mark.parametrize("name", INVALID_FILES, ids=lambda name: name[:12])
def test_invalid_audio(run: Run, tmp_path: Path, name: str, realtime: bool) -> None:
    make, message = INVALID_FILES[name]
    make(tmp_path / name)
    run("transcribe", tmp_path / name, *["--realtime"] * realtime).assert_failure(3, name, message)


def test_invalid_files_do_not_affect_other_files(
    run: Run,
    tmp_path: Path,
    expected: dict[str, nemostream.Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_file_with_nan(tmp_path / "nan.wav")
    write_truncated_file(tmp_path / "cut.flac")
    # More files than are decoded in parallel, so that slots are reused after a failure.
    names = [*CARDS, tmp_path / "missing.wav", *([tmp_path / "nan.wav", CARDS[0], tmp_path / "cut.flac"] * 8), CARDS[2]]
    completed = run("transcribe", *names, "--format", "json")
    assert completed.code == 3
    good = [str(name) for name in names if str(name) in CARDS]
    rows = [json.loads(line) for line in completed.out.splitlines()]
    assert [row["file"] for row in rows] == good
    assert [row["text"] for row in rows] == [expected[Path(name).name].text for name in good]
    messages = completed.err.splitlines()
    found = [re.search(r"(missing\.wav|nan\.wav|cut\.flac)", line) for line in messages]
    assert [match and match[1] for match in found] == ["missing.wav", *["nan.wav", "cut.flac"] * 8]
    assert "does not exist" in messages[0]


@pytest.mark.parametrize(("data", "message"), [(b"", "empty"), (bytes(3201), "middle of a sample")])
def test_invalid_pcm(run: Run, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    set_standard_input(monkeypatch, data)
    run("transcribe", "-").assert_failure(3, message)


# -- invalid bundles and options ---------------------------------------------------------------------------------------


def test_invalid_options(run: Run) -> None:
    run("transcribe", CARDS[0], "--chunk-ms", 500).assert_failure(2, "500 ms", "80, 160, 560, 1120")
    run("transcribe", CARDS[0], "--chunk-ms", "soon").assert_failure(2, "--chunk-ms")
    run("transcribe", CARDS[0], "--format", "xml").assert_failure(2, "xml")
    run("transcribe", CARDS[0], "--loud").assert_failure(2, "--loud")
    run("transcribe").assert_failure(2, "FILE")
    run("sing").assert_failure(2, "sing")


@pytest.mark.parametrize("name", ["weights.bin", "encoder-560ms.onnx", "joint.onnx", "tokenizer.model"])
def test_damaged_bundle(run: Run, broken_bundle: Callable[..., Path], name: str) -> None:
    run("transcribe", CARDS[0], "--bundle", broken_bundle(name)).assert_failure(4, f"{name} is damaged")


def test_bundle_of_another_version(run: Run, broken_bundle: Callable[..., Path], demo_bundle: Bundle) -> None:
    document = json.loads(demo_bundle.manifest.to_json()) | {"version": 7}
    bundle = broken_bundle("manifest.json", json.dumps(document).encode())
    run("transcribe", CARDS[0], "--bundle", bundle).assert_failure(4, "version 7", "reads version 3")
    run("info", bundle).assert_failure(4, "version 7", "reads version 3")


def test_invalid_graph(run: Run, broken_bundle: Callable[..., Path], demo_bundle: Bundle) -> None:
    """A file with the right hash that is not an ONNX graph."""
    bundle = broken_bundle("decoder.onnx", b"not a graph")
    document = json.loads(demo_bundle.manifest.to_json())
    document["graphs"]["decoder"]["sha256"] = sha256(bundle / "decoder.onnx")
    (bundle / "manifest.json").write_text(json.dumps(document))
    run("transcribe", CARDS[0], "--bundle", bundle).assert_failure(7, "cannot load", "decoder.onnx")


def test_folder_that_is_not_a_bundle(run: Run, tmp_path: Path) -> None:
    run("transcribe", CARDS[0], "--bundle", tmp_path / "none").assert_failure(4, "is not a folder")
    run("info", tmp_path).assert_failure(4, "not a bundle")


# -- the other commands ------------------------------------------------------------------------------------------------


def test_version(run: Run) -> None:
    assert run("--version") == Completed(0, f"nemostream {nemostream.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("transcribe", "-h")])
def test_help(run: Run, arguments: tuple[str, ...]) -> None:
    completed = run(*arguments)
    assert (completed.code, completed.err) == (0, "")
    assert "Usage:" in completed.out and "transcribe" in completed.out


def test_help_shows_the_names_of_tokens(run: Run) -> None:
    """Markdown would remove a tag."""
    assert "<EOU>" in run("transcribe", "--help").out


def commands() -> dict[str, Any]:
    import typer

    return typer.main.get_command(app).commands  # type: ignore[attr-defined, no-any-return]


def test_help_texts() -> None:
    """Every command and option is in a panel, and its help starts with a noun or a verb."""
    for name, command in commands().items():
        assert command.rich_help_panel in ("Speech to text", "Models", "This machine"), name
        assert re.match(r"(Transcribe|Export|Build|Show|Serve|Measure) .*\.", command.help.partition("\n")[0]), name
        for option in command.params:
            text = option.help
            assert re.match(r"[A-Z]", text) and text.endswith("."), (name, option.name, text)
            assert not re.match(r"(A|Of|To|The|How|Most|There|Where)\b", text), (name, option.name, text)
            if option.param_type_name == "option":
                assert option.rich_help_panel, (name, option.name)


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("nemostream tr", ["transcribe"]),
        ("nemostream transcribe --ph", ["--phrases"]),
        ("nemostream transcribe -f s", ["srt"]),
        ("nemostream bench th", ["throughput"]),
    ],
)
def test_completion(line: str, completions: list[str]) -> None:
    """The environment variables are those that the script of `--show-completion bash` sets."""
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_NEMOSTREAM_COMPLETE": "complete_bash"}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | variables)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, completions, "")


def test_completion_script(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")  # the shell that runs the tests may differ
    completed = run("--show-completion")
    assert (
        completed.code == 0 and "_NEMOSTREAM_COMPLETE=complete_bash" in completed.out and "nemostream" in completed.out
    )


def test_serve_without_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("grpc", "uvicorn", "pydantic_settings", "fastapi", "nemostream.serving.server"):
        monkeypatch.setitem(sys.modules, module, None)
    completed = run("serve", "--help")
    assert (completed.code, completed.err) == (0, "")
    assert install_command("serve") in completed.out
    for option in ("--bundle (default: None)", "--port (default: 8000)", "--grpc-port", "--api-keys", "--max-streams"):
        assert option in completed.out
    run("serve", "--port", 1).assert_failure(7, install_command("serve"))


def test_serve_help_without_its_extra_lists_all_settings() -> None:
    settings = pytest.importorskip("nemostream.serving.settings")
    from nemostream.cli.serve_help import serve_help

    options = set(re.findall(r"^  --([a-z-]+) ", serve_help(), re.MULTILINE))
    assert options == {name.replace("_", "-") for name in settings.Settings.model_fields}
    lines = serve_help().splitlines()
    assert all(f"      {field.description}" in lines for field in settings.Settings.model_fields.values())


def test_build_without_a_gpu_prints_a_working_command(
    run: Run, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemostream.cli.doctor.has_gpu", lambda: False)
    copy = tmp_path / "my bundle"
    shutil.copytree(demo_bundle.path, copy)
    completed = run("build", copy)
    completed.assert_failure(7, "no NVIDIA GPU", "--target (sm89)")
    pytest.importorskip("onnx")
    command = completed.err.strip().rpartition("build for this CPU: nemostream ")[2]
    engines = ["--engines", tmp_path / "engines", "--chunk-ms", 560]
    assert run(*shlex.split(command), *engines).code == 0
    assert run("transcribe", CARDS[0], "--bundle", copy, "--precision", "int8", *engines).code == 0


def test_info(run: Run, demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    completed = run("info")
    assert (completed.code, completed.err) == (0, "")
    parts = [manifest.name, str(demo_bundle.path), str(manifest.encoder.d_model), manifest.checkpoint["sha256"][:16]]
    parts += [f"{chunk.ms} ms" for chunk in manifest.chunks] + list(manifest.graphs)
    parts += [f"{manifest.parity[f'{chunk.ms}ms']['encoder']:.1e}" for chunk in manifest.chunks]
    parts += [f"{name} {number}" for name, number in manifest.versions.items()]
    assert [part for part in parts if part not in completed.out] == []


def test_info_as_json(run: Run, demo_bundle: Bundle) -> None:
    report = json.loads(run("info", "--json").out)
    assert report["path"] == str(demo_bundle.path)
    assert report["manifest"] == json.loads((demo_bundle.path / "manifest.json").read_text())
    sizes = {name: (demo_bundle.path / f"{name}.onnx").stat().st_size for name in demo_bundle.manifest.graphs}
    assert report["bytes"] == {"graphs": sizes, "weights": (demo_bundle.path / "weights.bin").stat().st_size}


def test_doctor_as_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    completed = run("doctor", "--json")
    assert (completed.code, completed.err) == (0, "")
    report = json.loads(completed.out)
    assert report["nemostream"] == nemostream.__version__ and report["works"] is True
    assert {check["name"]: check["state"] for check in report["checks"]} == states(run("doctor"))
    monkeypatch.setattr(nemostream, "demo_bundle", lambda: Path("/nowhere"))
    broken = run("doctor", "--json")
    assert broken.code == 7 and json.loads(broken.out)["works"] is False


def states(completed: Completed) -> dict[str, str]:
    return dict(re.findall(r"^(\S.*?)  +(works|installed|missing|broken)  ", completed.out, re.MULTILINE))


def test_doctor(run: Run) -> None:
    completed = run("doctor")
    assert (completed.code, completed.err) == (0, "")
    found = states(completed)
    assert found["ONNX Runtime, CPU"] == "works"
    assert list(found.values()).count("works") == 1  # only tested backends are reported as working
    extras = {
        "TensorRT": "tensorrt",
        "TensorRT for RTX": "tensorrt-rtx",
        "CUDA for Python": "gpu",
        "microphone": "mic",
    }
    extras |= {"ONNX Runtime, CUDA": "cuda", "building engines": "build", "exporting": "export"}
    assert found.keys() == extras.keys() | {"ONNX Runtime, CPU", "int8 operators", "NVIDIA driver"}
    for name, extra in extras.items():
        if found[name] == "missing":
            line = next(line for line in completed.out.splitlines() if line.startswith(f"{name}  "))
            assert install_command(extra) in line


def test_doctor_names_a_gpu_that_tensorrt_for_rtx_does_not_support(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is simulated; the list of architectures is the installed library's."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    gpu = {"name": b"NVIDIA H100 80GB HBM3", "capability": {75: 9, 76: 0}}

    class Driver:
        def cuInit(self, flags: int) -> int:
            return 0

        def cuDriverGetVersion(self, version: Any) -> int:
            version._obj.value = 13000
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = 1
            return 0

        def cuDeviceGetName(self, name: Any, size: int, ordinal: int) -> int:
            name.value = gpu["name"]
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, ordinal: int) -> int:
            value._obj.value = gpu["capability"][attribute]
            return 0

    types_of_c = {name: getattr(ctypes, name) for name in ("c_int", "create_string_buffer", "byref")}
    monkeypatch.setattr(doctor, "ctypes", types.SimpleNamespace(CDLL=lambda name: Driver(), **types_of_c))
    completed = run("doctor")
    assert states(completed)["TensorRT for RTX"] == "broken"
    line = next(line for line in completed.out.splitlines() if line.startswith("TensorRT for RTX"))
    assert "does not support NVIDIA H100 80GB HBM3 (sm90), only sm75, " in line
    assert install_command("tensorrt") in line and install_command("cuda") in line
    assert "NVIDIA H100 80GB HBM3 (sm90)" in completed.out.split("NVIDIA driver")[1]

    gpu |= {"name": b"NVIDIA L40S", "capability": {75: 8, 76: 9}}
    completed = run("doctor")
    assert states(completed)["TensorRT for RTX"] == "installed"
    assert re.search(r"^TensorRT for RTX +installed +tensorrt_rtx [\d.]+, for sm89$", completed.out, re.MULTILINE)


def test_doctor_with_a_damaged_bundle(
    run: Run, broken_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = broken_bundle("weights.bin")
    monkeypatch.setattr(nemostream, "demo_bundle", lambda: bundle)
    completed = run("doctor")
    assert completed.code == 7
    assert states(completed)["ONNX Runtime, CPU"] == "broken"
    assert "weights.bin is damaged" in completed.out


def test_export_without_its_extra(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    run("export", "voice.nemo", tmp_path / "out").assert_failure(7, "onnx", install_command("export"))


def test_microphone_without_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    run("transcribe", "--mic").assert_failure(7, install_command("mic"))


def test_microphone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake device plays a clip and raises `KeyboardInterrupt` at its end."""
    audio, _ = soundfile.read(nemostream.demo_clip(), dtype="float32")
    audio = np.pad(audio, (0, -len(audio) % 1280))
    blocks = iter(audio.reshape(-1, 1280, 1))

    class InputStream(contextlib.nullcontext[None]):
        def __init__(self, **options: object) -> None:
            super().__init__()
            assert options == {"samplerate": 16000, "channels": 1, "dtype": "float32"}

        def read(self, frames: int) -> tuple[np.ndarray, bool]:
            assert frames == 1280
            try:
                return next(blocks), False
            except StopIteration:
                raise KeyboardInterrupt from None

    device = types.SimpleNamespace(InputStream=InputStream, PortAudioError=RuntimeError)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    completed = run("transcribe", "--mic", "--format", "json")
    (row,) = completed.rows
    with nemostream.load() as model:
        assert (row["file"], row["text"]) == ("microphone", model.transcribe(audio).text)
    assert row["text"]
    assert completed.err == "listening; press Ctrl-C to stop\n"


@pytest.mark.nemo
def test_export_without_a_checkpoint(tmp_path: Path) -> None:
    arguments = ["export", str(tmp_path / "no.nemo"), str(tmp_path / "out")]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "")
    *_, last = done.stderr.splitlines()
    assert last.startswith("nemostream: ") and "no.nemo does not exist" in last
    assert "Traceback" not in done.stderr


@pytest.mark.nemo
def test_export_then_transcribe(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = subprocess.run([*COMMAND, "export", str(tiny_checkpoint), str(out)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert "560ms" in done.stderr and "of NeMo" in done.stderr
    done = subprocess.run(
        [*COMMAND, "transcribe", CARDS[0], "--bundle", str(out), "--format", "json"], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["duration"] == pytest.approx(soundfile.info(CARDS[0]).duration, abs=1e-3)
