"""The command line as people meet it: results on standard output, one sentence per failure, telling exit codes."""

from __future__ import annotations

import contextlib
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
from nemostream.cli.main import app, main
from nemostream.extras import install_command

CLIPS = Path(__file__).parents[1] / "speech" / "human"
CARDS = [str(CLIPS / f"cards-00{i}.flac") for i in (1, 2, 3)]
COMMAND = [sys.executable, "-m", "nemostream"]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, object]]:
        assert self.code == 0, self.err
        return [json.loads(line) for line in self.out.splitlines()]

    def fails(self, code: int, *parts: str) -> None:
        """Nothing but one sentence on standard error that has all of `parts`."""
        assert (self.code, self.out) == (code, ""), self.err
        self.complains(*parts)

    def complains(self, *parts: str) -> None:
        assert self.err.startswith("nemostream: ") and self.err.count("\n") == 1, self.err
        assert [part for part in parts if part not in self.err] == [], self.err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The command in this process; what it lets escape fails the test, as a traceback would a person's patience."""

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        code = leaving.value.code
        assert isinstance(code, int)
        return Ran(code, *capfd.readouterr())

    return call


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def expected() -> dict[str, nemostream.Result]:
    with nemostream.load() as model:
        return {path.name: model.transcribe(path) for path in CLIPS.glob("*.flac")}


@pytest.fixture
def broken_bundle(demo_bundle: Bundle, tmp_path: Path) -> Callable[[str, bytes | None], Path]:
    """A copy of the demo bundle with one file replaced, or one of its bits turned over."""

    def make(name: str, content: bytes | None = None) -> Path:
        copy = tmp_path / "bundle"
        shutil.copytree(demo_bundle.path, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 3] ^= 1
        (copy / name).write_bytes(data if content is None else content)
        return copy

    return make


# -- results -----------------------------------------------------------------------------------------------------------


def near(value: float) -> object:
    return pytest.approx(value, abs=1e-3)


def test_json_of_several_files_in_order(run: Callable[..., Ran], expected: dict[str, nemostream.Result]) -> None:
    names = [str(CLIPS / name) for name in sorted(expected, reverse=True)]
    rows = run("transcribe", *names, "--format", "json").rows
    assert [row["file"] for row in rows] == names
    for row in rows:
        wanted = expected[Path(str(row["file"])).name]
        assert row == {
            "file": row["file"],
            "duration": pytest.approx(soundfile.info(row["file"]).duration, abs=1e-3),
            "text": wanted.text,
            "words": [
                {"text": w.text, "start": near(w.start), "end": near(w.end), "confidence": near(w.confidence)}
                for w in wanted.words
            ],
            "tokens": [
                {
                    "id": t.id,
                    "text": t.text,
                    "time": near(t.time),
                    "score": near(t.score),
                    "confidence": near(t.confidence),
                }
                for t in wanted.tokens
            ],
            "chunk_ms": 560,
        }
    assert sum(len(result.tokens) for result in expected.values()) > 5  # or the rows above said little


def test_text_of_one_file_is_only_its_text(run: Callable[..., Ran], expected: dict[str, nemostream.Result]) -> None:
    assert run("transcribe", CARDS[0]) == Ran(0, expected["cards-001.flac"].text + "\n", "")


def test_text_of_several_files_is_labelled(run: Callable[..., Ran], expected: dict[str, nemostream.Result]) -> None:
    lines = run("transcribe", CARDS[1], CARDS[0]).out.splitlines()
    assert lines == [f"{name}: {expected[Path(name).name].text}" for name in (CARDS[1], CARDS[0])]


def test_the_chunk_size_is_used(run: Callable[..., Ran]) -> None:
    (row,) = run("transcribe", CARDS[0], "--chunk-ms", 80, "--format", "json").rows
    with nemostream.load(chunk_ms=80) as model:
        assert (row["chunk_ms"], row["text"]) == (80, model.transcribe(CARDS[0]).text)


@pytest.mark.parametrize("threads", [None, 1])
def test_threads(run: Callable[..., Ran], threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
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
    run("transcribe", CARDS[0], "--threads", 0).fails(2, "--threads")


def test_a_bundle_of_ones_own(run: Callable[..., Ran], demo_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(demo_bundle.path, tmp_path / "mine")
    assert run("transcribe", CARDS[0], "--bundle", tmp_path / "mine") == run("transcribe", CARDS[0])


def test_raw_pcm_on_standard_input(
    run: Callable[..., Ran], expected: dict[str, nemostream.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pcm, _ = soundfile.read(CARDS[1], dtype="int16")
    feed(monkeypatch, pcm.tobytes())
    (row,) = run("transcribe", "-", "--format", "json").rows
    assert (row["file"], row["text"]) == ("-", expected["cards-002.flac"].text)


def test_a_pipe_among_files(expected: dict[str, nemostream.Result]) -> None:
    """A real pipe, in another process, between two files."""
    pcm, _ = soundfile.read(CARDS[1], dtype="int16")
    arguments = ["transcribe", CARDS[0], "-", CARDS[2], "--format", "json"]
    done = subprocess.run([*COMMAND, *arguments], input=pcm.tobytes(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert texts == [expected[f"cards-00{i}.flac"].text for i in (1, 2, 3)]


def test_realtime_says_the_same(run: Callable[..., Ran]) -> None:
    assert run("transcribe", CARDS[0], "--realtime") == run("transcribe", CARDS[0])


def test_other_formats_rates_and_channels(run: Callable[..., Ran], tmp_path: Path) -> None:
    audio, rate = soundfile.read(CARDS[0])
    for name, subtype in (("a.wav", "PCM_16"), ("a.aiff", "PCM_24"), ("a.ogg", "VORBIS")):
        soundfile.write(tmp_path / name, np.stack([audio, audio], axis=1), rate, subtype=subtype)
    soundfile.write(tmp_path / "b.wav", np.repeat(audio, 3), 3 * rate)
    rows = run("transcribe", *sorted(tmp_path.iterdir()), "--format", "json").rows
    assert [row["duration"] for row in rows] == pytest.approx([len(audio) / rate] * 4, abs=1e-3)
    by_name = {Path(str(row["file"])).name: row["text"] for row in rows}
    assert by_name["a.wav"] == run("transcribe", CARDS[0]).out.rstrip("\n")  # 16 bits are what the clip has


def test_names_that_the_terminal_cannot_write(expected: dict[str, nemostream.Result], tmp_path: Path) -> None:
    name = str(tmp_path / "für.flac")
    shutil.copyfile(CARDS[0], name)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, "transcribe", name, "nö.wav"], capture_output=True, env=environment)
    assert done.returncode == 3
    assert done.stdout.decode("ascii").endswith(f"f\\xfcr.flac: {expected['cards-001.flac'].text}\n")
    assert done.stderr == b"nemostream: n\\xf6.wav does not exist.\n"


def test_a_name_that_is_not_text(run: Callable[..., Ran], tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.flac")
    run("transcribe", name).fails(3, ".flac does not exist")
    try:
        shutil.copyfile(CARDS[0], name)
    except OSError:
        pytest.skip("this file system wants names of text")
    assert run("transcribe", name).out == run("transcribe", str(CARDS[0])).out


# -- a terminal --------------------------------------------------------------------------------------------------------


def test_standard_input_that_is_a_terminal(expected: dict[str, nemostream.Result]) -> None:
    pty = pytest.importorskip("pty")
    ours, terminal = pty.openpty()
    done = subprocess.run([*COMMAND, "transcribe", "-"], stdin=terminal, capture_output=True, text=True)
    os.close(ours)
    os.close(terminal)
    Ran(done.returncode, done.stdout, done.stderr).fails(2, "not a pipe")


def test_ctrl_c() -> None:
    """While it waits for more audio that nobody sends."""
    with subprocess.Popen(
        [*COMMAND, "transcribe", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs, these tests maybe among them, hand on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        assert command.stdin
        command.stdin.write(bytes(1 << 19))  # more than a pipe holds: once it is gone, the command is under way
        command.stdin.flush()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        assert command.stdout and command.stdout.read() == b""
        assert command.stderr and command.stderr.read() == b"nemostream: interrupted.\n"


def test_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "transcribe", *CARDS], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# -- audio that cannot be used -----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    data = Path(CARDS[0]).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def nan(path: Path) -> None:
    audio = np.zeros(16000, np.float32)
    audio[8000] = np.nan
    soundfile.write(path, audio, 16000, subtype="FLOAT")


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.wav": (lambda path: None, "does not exist"),
    "cut.flac": (cut, "cut short"),
    "notes.txt": (lambda path: path.write_text("this is not audio " * 100), "not audio"),
    "nothing.wav": (lambda path: path.write_bytes(b""), "not audio"),
    "empty.wav": (lambda path: soundfile.write(path, np.zeros(0), 16000), "no audio"),
    "nan.wav": (nan, "NaN"),
    "folder.wav": (lambda path: path.mkdir(), "is a folder"),
    "raw.raw": (lambda path: path.write_bytes(bytes(3200)), "no header"),
    "long" * 100 + ".wav": (lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("realtime", [False, True])
@pytest.mark.parametrize("name", BAD_FILES, ids=lambda name: name[:12])
def test_bad_audio_is_one_sentence(run: Callable[..., Ran], tmp_path: Path, name: str, realtime: bool) -> None:
    make, says = BAD_FILES[name]
    make(tmp_path / name)
    run("transcribe", tmp_path / name, *["--realtime"] * realtime).fails(3, name, says)


def test_bad_files_fail_alone(
    run: Callable[..., Ran], tmp_path: Path, expected: dict[str, nemostream.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    nan(tmp_path / "nan.wav")
    cut(tmp_path / "cut.flac")
    # More files than are decoded at once, so that a lane goes on after a failure.
    names = [*CARDS, tmp_path / "missing.wav", *([tmp_path / "nan.wav", CARDS[0], tmp_path / "cut.flac"] * 8), CARDS[2]]
    ran = run("transcribe", *names, "--format", "json")
    assert ran.code == 3
    good = [str(name) for name in names if str(name) in CARDS]
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [row["file"] for row in rows] == good
    assert [row["text"] for row in rows] == [expected[Path(name).name].text for name in good]
    complaints = ran.err.splitlines()
    found = [re.search(r"(missing\.wav|nan\.wav|cut\.flac)", line) for line in complaints]
    assert [match and match[1] for match in found] == ["missing.wav", *["nan.wav", "cut.flac"] * 8]
    assert "does not exist" in complaints[0]


@pytest.mark.parametrize(("data", "says"), [(b"", "empty"), (bytes(3201), "middle of a sample")])
def test_bad_pcm(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, data: bytes, says: str) -> None:
    feed(monkeypatch, data)
    run("transcribe", "-").fails(3, says)


# -- bundles and options that cannot be used ---------------------------------------------------------------------------


def test_options(run: Callable[..., Ran]) -> None:
    run("transcribe", CARDS[0], "--chunk-ms", 500).fails(2, "500 ms", "80, 160, 560, 1120")
    run("transcribe", CARDS[0], "--chunk-ms", "soon").fails(2, "--chunk-ms")
    run("transcribe", CARDS[0], "--format", "xml").fails(2, "xml")
    run("transcribe", CARDS[0], "--loud").fails(2, "--loud")
    run("transcribe").fails(2, "FILE")
    run("sing").fails(2, "sing")


@pytest.mark.parametrize("name", ["weights.bin", "encoder-560ms.onnx", "joint.onnx", "tokenizer.model"])
def test_a_damaged_bundle(run: Callable[..., Ran], broken_bundle: Callable[..., Path], name: str) -> None:
    run("transcribe", CARDS[0], "--bundle", broken_bundle(name)).fails(4, f"{name} is damaged")


def test_a_bundle_of_another_version(
    run: Callable[..., Ran], broken_bundle: Callable[..., Path], demo_bundle: Bundle
) -> None:
    document = json.loads(demo_bundle.manifest.to_json()) | {"version": 7}
    bundle = broken_bundle("manifest.json", json.dumps(document).encode())
    run("transcribe", CARDS[0], "--bundle", bundle).fails(4, "version 7", "reads version 2")
    run("info", bundle).fails(4, "version 7", "reads version 2")


def test_a_graph_that_is_none(run: Callable[..., Ran], broken_bundle: Callable[..., Path], demo_bundle: Bundle) -> None:
    """Its hash is right: whoever exported it wrote nonsense."""
    bundle = broken_bundle("decoder.onnx", b"not a graph")
    document = json.loads(demo_bundle.manifest.to_json())
    document["graphs"]["decoder"]["sha256"] = sha256(bundle / "decoder.onnx")
    (bundle / "manifest.json").write_text(json.dumps(document))
    run("transcribe", CARDS[0], "--bundle", bundle).fails(7, "cannot load", "decoder.onnx")


def test_not_a_bundle(run: Callable[..., Ran], tmp_path: Path) -> None:
    run("transcribe", CARDS[0], "--bundle", tmp_path / "none").fails(4, "is not a folder")
    run("info", tmp_path).fails(4, "not a bundle")


# -- the other commands ------------------------------------------------------------------------------------------------


def test_version(run: Callable[..., Ran]) -> None:
    assert run("--version") == Ran(0, f"nemostream {nemostream.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("transcribe", "-h")])
def test_help(run: Callable[..., Ran], arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.err) == (0, "")
    assert "Usage:" in ran.out and "transcribe" in ran.out


def commands() -> dict[str, Any]:
    import typer

    return typer.main.get_command(app).commands  # type: ignore[attr-defined, no-any-return]


def test_help_is_grouped_and_says_what_things_are() -> None:
    """Every command and option is in a panel and has a sentence that begins with a noun or a verb."""
    for name, command in commands().items():
        assert command.rich_help_panel in ("Speech to text", "Models", "This machine"), name
        assert re.match(r"(Transcribe|Export|Build|Show|Serve|Measure) .*\.", command.help.partition("\n")[0]), name
        for option in command.params:
            said = option.help
            assert re.match(r"[A-Z]", said) and said.endswith("."), (name, option.name, said)
            assert not re.match(r"(A|Of|To|The|How|Most|There|Where)\b", said), (name, option.name, said)
            if option.param_type_name == "option":
                assert option.rich_help_panel, (name, option.name)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("nemostream tr", ["transcribe"]),
        ("nemostream transcribe --ph", ["--phrases"]),
        ("nemostream transcribe -f s", ["srt"]),
        ("nemostream bench th", ["throughput"]),
    ],
)
def test_completion(line: str, found: list[str]) -> None:
    """As bash asks for it, by the script that `--show-completion bash` prints."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_NEMOSTREAM_COMPLETE": "complete_bash"}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | words)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, found, "")


def test_the_completion_script(run: Callable[..., Ran]) -> None:
    ran = run("--show-completion", "bash")
    assert ran.code == 0 and "_NEMOSTREAM_COMPLETE=complete_bash" in ran.out and "nemostream" in ran.out


def test_help_of_the_server_without_its_extra(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("grpc", "uvicorn", "pydantic_settings", "fastapi", "nemostream.serving.server"):
        monkeypatch.setitem(sys.modules, module, None)
    ran = run("serve", "--help")
    assert (ran.code, ran.err) == (0, "")
    assert install_command("serve") in ran.out
    for option in ("--bundle (default: None)", "--port (default: 8000)", "--grpc-port", "--api-keys", "--max-streams"):
        assert option in ran.out
    run("serve", "--port", 1).fails(7, install_command("serve"))


def test_that_help_lists_what_the_server_has() -> None:
    settings = pytest.importorskip("nemostream.serving.settings")
    from nemostream.cli.serve_help import serve_help

    listed = set(re.findall(r"^  --([a-z-]+) ", serve_help(), re.MULTILINE))
    assert listed == {name.replace("_", "-") for name in settings.Settings.model_fields}


def test_building_without_a_gpu_prints_the_command_that_works(
    run: Callable[..., Ran], demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemostream.cli.doctor.has_gpu", lambda: False)
    copy = tmp_path / "my bundle"
    shutil.copytree(demo_bundle.path, copy)
    ran = run("build", copy)
    ran.fails(7, "no NVIDIA GPU", "--target (sm89)")
    pytest.importorskip("onnx")
    command = ran.err.strip().rpartition("build for this CPU: nemostream ")[2]
    engines = ["--engines", tmp_path / "engines", "--chunk-ms", 560]
    assert run(*shlex.split(command), *engines).code == 0
    assert run("transcribe", CARDS[0], "--bundle", copy, "--precision", "int8", *engines).code == 0


def test_info(run: Callable[..., Ran], demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    ran = run("info")
    assert (ran.code, ran.err) == (0, "")
    words = [manifest.name, str(demo_bundle.path), str(manifest.encoder.d_model), manifest.checkpoint["sha256"][:16]]
    words += [f"{chunk.ms} ms" for chunk in manifest.chunks] + list(manifest.graphs)
    words += [f"{manifest.parity[f'{chunk.ms}ms']['encoder']:.1e}" for chunk in manifest.chunks]
    words += [f"{name} {number}" for name, number in manifest.versions.items()]
    assert [word for word in words if word not in ran.out] == []


def test_info_as_json(run: Callable[..., Ran], demo_bundle: Bundle) -> None:
    report = json.loads(run("info", "--json").out)
    assert report["path"] == str(demo_bundle.path)
    assert report["manifest"] == json.loads((demo_bundle.path / "manifest.json").read_text())
    sizes = {name: (demo_bundle.path / f"{name}.onnx").stat().st_size for name in demo_bundle.manifest.graphs}
    assert report["bytes"] == {"graphs": sizes, "weights": (demo_bundle.path / "weights.bin").stat().st_size}


def test_doctor_as_json(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("doctor", "--json")
    assert (ran.code, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert report["nemostream"] == nemostream.__version__ and report["works"] is True
    assert {check["name"]: check["state"] for check in report["checks"]} == states(run("doctor"))
    monkeypatch.setattr(nemostream, "demo_bundle", lambda: Path("/nowhere"))
    broken = run("doctor", "--json")
    assert broken.code == 7 and json.loads(broken.out)["works"] is False


def states(ran: Ran) -> dict[str, str]:
    return dict(re.findall(r"^(\S.*?)  +(works|installed|missing|broken)  ", ran.out, re.MULTILINE))


def test_doctor(run: Callable[..., Ran]) -> None:
    ran = run("doctor")
    assert (ran.code, ran.err) == (0, "")
    found = states(ran)
    assert found["ONNX Runtime, CPU"] == "works"
    assert list(found.values()).count("works") == 1  # nothing else was tried, so of nothing else may it be said
    extras = {
        "TensorRT": "tensorrt",
        "TensorRT for RTX": "tensorrt-rtx",
        "CUDA for Python": "gpu",
        "microphone": "mic",
    }
    extras |= {"ONNX Runtime, CUDA": "cuda", "building engines": "build", "exporting": "export"}
    assert found.keys() == extras.keys() | {"ONNX Runtime, CPU", "NVIDIA driver"}
    for name, extra in extras.items():
        if found[name] == "missing":
            line = next(line for line in ran.out.splitlines() if line.startswith(f"{name}  "))
            assert install_command(extra) in line


def test_doctor_without_a_bundle_that_works(
    run: Callable[..., Ran], broken_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = broken_bundle("weights.bin")
    monkeypatch.setattr(nemostream, "demo_bundle", lambda: bundle)
    ran = run("doctor")
    assert ran.code == 7
    assert states(ran)["ONNX Runtime, CPU"] == "broken"
    assert "weights.bin is damaged" in ran.out


def test_export_without_its_extra(run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo", None)
    run("export", "voice.nemo", tmp_path / "out").fails(7, "nemo", install_command("export"))


def test_the_microphone_without_its_extra(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    run("transcribe", "--mic").fails(7, install_command("mic"))


def test_the_microphone(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the device: a clip, and Ctrl-C at its end."""
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
    ran = run("transcribe", "--mic", "--format", "json")
    (row,) = ran.rows
    with nemostream.load() as model:
        assert (row["file"], row["text"]) == ("microphone", model.transcribe(audio).text)
    assert row["text"]
    assert ran.err == "listening; Ctrl-C ends\n"


@pytest.mark.nemo
def test_export_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    arguments = ["export", str(tmp_path / "no.nemo"), str(tmp_path / "out")]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "")
    *_, last = done.stderr.splitlines()
    assert last.startswith("nemostream: ") and "no.nemo is not a file" in last
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
