"""`bench serve` with real servers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import AudioError, BackendError

pytest.importorskip("fastapi", reason="needs the serve extra")

from nemostream.benchmarks import serve
from nemostream.benchmarks.harness.server_process import server_process
from nemostream.client import Stream

HELDOUT = Path(__file__).parents[2] / "examples" / "demo_model" / "heldout" / "heldout.jsonl"


def test_serving(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherWork:
        def cores(self) -> float:
            # The server has ended: the time of a child that has ended is that of this process, and subtracted once.
            assert os.times().children_user > before
            return 0.0567

    before = os.times().children_user
    monkeypatch.setattr(serve, "OtherWork", OtherWork)
    monkeypatch.setattr(serve, "_SETTLING", 0.0)
    result = serve.measure_serving(demo_bundle, [2, 4], seconds=1.0, manifest=HELDOUT)
    assert result["method"]["other_work_cores"] == 0.057
    assert [row["case"]["streams"] for row in result["rows"]] == [2, 4]
    for row in result["rows"]:
        assert row["values"]["utterances"] >= 1
        assert row["values"]["wrong"] == 0 and row["values"]["server_cores"] > 0 and row["values"]["audio_seconds"] > 0
        assert not any("errors" in failure for failure in row["values"]["failures"])
        assert 1 <= row["values"]["mean_batch"] <= 4 and row["values"]["step_ms"] > 0
    text = serve.show(result)
    assert "| 4 | 560 ms |" in text and result["method"]["recordings"] == HELDOUT.read_text().count("\n")


def test_texts_are_those_of_the_server(demo_bundle: Bundle) -> None:
    """A pause within a word ends the utterance, so that the text differs from that of the whole recording."""
    command = [sys.executable, "-m", "nemostream", "serve", "--bundle", str(demo_bundle.path), "--no-measure"]
    clips = serve.pcm_clips(demo_bundle)
    with nemostream.load(demo_bundle.path, 560) as model:
        texts = [serve._utterances(model, clip) for clip in clips]
        assert texts != [model.transcribe(clip).text for clip in clips]
    with server_process([*command, "--chunk-ms", "560", "--port", "0", "--grpc-port", "-1"]) as (_, url):
        for clip, text in zip(clips, texts, strict=True):
            with Stream(url) as stream:
                stream.send(clip)
                stream.finish()
                assert [event.text for event in stream if event.type == "done"] == [text]


def test_missing_recording_is_reported(demo_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"audio_filepath": "none.wav", "text": ""}')
    with pytest.raises(AudioError, match=r"none\.wav"):
        serve.measure_serving(demo_bundle, [1], manifest=tmp_path / "none.jsonl")


def test_server_that_does_not_start_is_reported(demo_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"^the server did not start: .*max.streams"):
        serve.measure_serving(demo_bundle, [1], seconds=4.0, options=["--max-streams", "0"])
