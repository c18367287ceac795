"""`nemostream transcribe`: options, their checks, and the run."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemostream.cli.interrupt import Interrupted, signals_stop
from nemostream.cli.options import ENGINE, INPUT, OUTPUT, RECOGNITION, SERVER, ApiKeyOption, EnginesOption
from nemostream.cli.output import MICROPHONE, STDIN, Output, check_writable
from nemostream.cli.phrases import read_phrases
from nemostream.cli.remote import RemoteModel
from nemostream.cli.transcription import MAX_PARALLEL, transcribe_files, transcribe_microphone
from nemostream.errors import OptionError
from nemostream.runtime.text.formats import Format

if TYPE_CHECKING:
    from nemostream.runtime.streaming.session import Options


class DecoderPolicy(StrEnum):
    """What happens to the decoder state at the end of an utterance."""

    keep = "keep"
    reset = "reset"


def transcribe(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="Audio files or pipes; - is standard input: an audio file, or raw 16 kHz mono 16-bit PCM.",
        ),
    ] = None,
    mic: Annotated[
        bool, typer.Option("--mic", help="Transcribe the microphone until Ctrl-C.", rich_help_panel=INPUT)
    ] = False,
    channel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Channel of each FILE to transcribe, from 1, for two-party recordings. Default: mix of all channels.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Process files in real time, like live audio.", rich_help_panel=INPUT)
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="STATE",
            help="File in which to save progress on a long FILE. After an interruption, the same command continues "
            "from it.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    chunk_ms: Annotated[
        int,
        typer.Option(
            help="Chunk size in ms. Smaller: lower latency, more compute. Larger: higher accuracy.",
            rich_help_panel=RECOGNITION,
        ),
    ] = 560,
    final_chunk_ms: Annotated[
        int | None,
        typer.Option(
            help="Larger chunk size in ms for the text that is written; --chunk-ms is then that of captions and of "
            "the ends of utterances. Default: --chunk-ms.",
            rich_help_panel=RECOGNITION,
        ),
    ] = None,
    endpoint_ms: Annotated[
        int | None,
        typer.Option(
            min=80,
            help="Silence in ms that ends an utterance; models with `<EOU>` also end it by that token. Each utterance "
            "is one line of text; JSON has its times.",
            rich_help_panel=RECOGNITION,
        ),
    ] = None,
    decoder: Annotated[
        DecoderPolicy,
        typer.Option(
            help="Decoder state after an utterance ends (--endpoint-ms). reset: recovers a decoder stuck in one output "
            "style.",
            rich_help_panel=RECOGNITION,
        ),
    ] = DecoderPolicy.keep,
    language: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Language of the audio, such as de or de-DE, or auto; `nemostream info` lists those of a model. "
            "Default: the model's.",
            rich_help_panel=RECOGNITION,
        ),
    ] = None,
    phrases: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT[:WEIGHT]|FILE",
            help="Phrase to boost, spelled as the model writes it, or file with one phrase per line, optionally "
            "followed by a tab and its weight. Weight: above 0, up to 100, default 1. Can be repeated.",
            rich_help_panel=RECOGNITION,
        ),
    ] = None,
    vad: Annotated[
        bool,
        typer.Option("--vad", help="Skip chunks without speech (needs the `vad` extra).", rich_help_panel=RECOGNITION),
    ] = False,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="Output format: text, json (one object per line), srt or vtt (subtitles), ctm (for NIST tools) or "
            "manifest (for NeMo tools).",
            rich_help_panel=OUTPUT,
        ),
    ] = Format.text,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|FOLDER/",
            help="File for all transcripts, or folder for one file per input. Default: - (standard output).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Show two lines of live captions (with --mic, --realtime or standard input).",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    itn: Annotated[
        bool,
        typer.Option(
            "--itn", help="Write numbers, dates and amounts in digits (needs the `itn` extra).", rich_help_panel=OUTPUT
        ),
    ] = False,
    delay_ms: Annotated[
        int, typer.Option(help="Delay of the model in ms, subtracted from all times.", rich_help_panel=OUTPUT)
    ] = 0,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Model bundle: a folder written by `nemostream export`. Default: the packaged demo.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.", rich_help_panel=ENGINE)] = "cpu",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of the engines. Default: fp32 on a CPU (needs no engines), fp16 on a GPU.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    engines: EnginesOption = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of ONNX Runtime threads on a CPU. Default: the CPUs available to this process (affinity and "
            "container quota).",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Server that transcribes live input (--realtime, --mic or -) in place of a local model, such as "
            "http://127.0.0.1:8000 (needs the `client` extra). Repeat it for servers that continue the stream if this "
            "one fails.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Transcribe audio files, a pipe or the microphone.

    Writes one line per file, in the order given; with several files, each line of text starts with the file's name. If
    a file cannot be read, or its transcript cannot be written, the error is printed to standard error and the other
    files continue; the exit code is that of the first failure. On a terminal, text is shown while it is recognised.

    Ctrl-C or SIGTERM ends the input: the text so far is written, and the exit code is 130 or 143. A second signal
    aborts.
    """
    import nemostream

    names = files or []
    _check_inputs(names, mic)
    single_file = len(names) == 1 and not mic and STDIN not in names
    if live and not (len(names) + mic == 1 and (mic or realtime or STDIN in names)):
        raise OptionError("--live needs a single live input: --mic, - or one FILE with --realtime.")
    if resume and (not single_file or realtime or endpoint_ms is not None):
        raise OptionError("--resume needs a single FILE, without --realtime and --endpoint-ms.")
    if channel is not None and (mic or STDIN in names):
        raise OptionError("--channel applies to files only, not to standard input or the microphone.")
    if decoder is not DecoderPolicy.keep and endpoint_ms is None:
        raise OptionError(f"--decoder {decoder} needs --endpoint-ms.")
    if servers:
        local = {
            "--bundle": bundle,
            "--device": device if device != "cpu" else None,
            "--precision": precision,
            "--engines": engines,
            "--threads": threads,
            "--delay-ms": delay_ms or None,
        }
        _check_server(live_input=realtime or all(name == STDIN for name in names), local=local)
    options = _stream_options(endpoint_ms, decoder, language, phrases, vad)
    # Two slots per parallel file: a failed file may hold its slot until the current step ends.
    capacity = 2 * max(1, min(len(names), MAX_PARALLEL))
    if final_chunk_ms is not None:
        options["final_chunk_ms"] = final_chunk_ms
        capacity = 2 * capacity + 2  # an accurate lane each, and the slots that are reserved for finals
    with ExitStack() as stack:
        inputs = [*names, *[MICROPHONE] * mic]
        output = stack.enter_context(
            Output(inputs, format, out, split_utterances=endpoint_ms is not None, channel=channel)
        )
        if resume:
            _check_resume(resume, out, names[0])
        model: Any
        if servers:
            model = RemoteModel(servers, api_key, chunk_ms, itn)
        else:
            model = stack.enter_context(
                nemostream.load(
                    bundle,
                    chunk_ms,
                    capacity=capacity,
                    threads=threads,
                    device=device,
                    precision=precision,
                    engines=engines,
                    delay_ms=delay_ms,
                )
            )
        stream = model.stream(**options)  # report invalid options once instead of once per file
        if servers:  # a connection that is only closed would leave a state, and its slot is released later
            deque(stream.finish_events(), maxlen=0)
        stream.close()
        if itn and not servers:  # takes seconds, so after the checks above
            output.itn = nemostream.InverseNormalizer(model.manifest.languages.name(language))
        stop, exit_code = stack.enter_context(signals_stop()), 0
        if names:
            exit_code = transcribe_files(
                model, names, output, options, stop, realtime=realtime, live=live, resume=resume, channel=channel
            )
        interrupted = stop.number
        if mic and not interrupted:
            transcribe_microphone(model, output, options, stop, live=live)
            interrupted = stop.number if stop.number == signal.SIGTERM else None  # Ctrl-C is the normal end
        if interrupted:
            raise Interrupted(interrupted, reported=True)
    if exit_code:
        raise typer.Exit(exit_code)


def _check_inputs(names: list[str], mic: bool) -> None:
    """Raise `OptionError` if there is no input or standard input cannot be read."""
    if not names and not mic:
        raise OptionError("nothing to transcribe: give a FILE, - for standard input, or --mic.")
    if names.count(STDIN) > 1:
        raise OptionError("standard input (-) is given more than once; it can be read only once.")
    if STDIN in names and sys.stdin is None:
        raise OptionError("standard input is closed: pipe an audio file or raw 16 kHz mono 16-bit PCM into it.")
    if STDIN in names and sys.stdin.isatty():
        raise OptionError("standard input is not a pipe: pipe an audio file or raw 16 kHz mono 16-bit PCM into it.")


def _check_server(live_input: bool, local: dict[str, Any]) -> None:
    """Raise `OptionError` for options that do not apply to a server. `local`: the values of those of local models."""
    if not live_input:
        raise OptionError("--server needs live input: FILE with --realtime, - or --mic.")
    if given := [name for name, value in local.items() if value is not None]:
        raise OptionError(f"{given[0]} applies to a local model, not to --server: set it where the server is started.")


def _stream_options(
    endpoint_ms: int | None, decoder: DecoderPolicy, language: str | None, phrases: list[str] | None, vad: bool
) -> Options:
    """Return the options of a stream that differ from the defaults."""
    options: Options = {}
    if endpoint_ms is not None:
        from nemostream.runtime.text.endpointing import Endpoint

        reset = decoder is DecoderPolicy.reset
        options["endpoint"] = Endpoint(silence_ms=endpoint_ms, decoder="reset" if reset else "keep")
    if language is not None:
        options["language"] = language
    if phrases:
        options["phrases"] = read_phrases(phrases)
    if vad:
        options["vad"] = True
    return options


def _check_resume(resume: Path, out: str | None, recording: str) -> None:
    """Raise `OptionError` if no state can be saved in `resume`."""
    if not resume.absolute().parent.is_dir():
        raise OptionError(f"--resume: there is no folder {resume.parent} for {resume.name}.")
    for other, what in ((out, "--out"), (recording, "the recording")):
        if other is not None and os.path.abspath(other) == os.path.abspath(resume):
            raise OptionError(f"--resume and {what} are the same file, {resume}; use another file for the state.")
    check_writable(resume, "--resume")
