"""Three servers that are killed, restarted and frozen, and whose connections are cut: no event is lost or repeated."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

pytest.importorskip("websockets", reason="needs the serve extra")

from nemostream.benchmarks import survival
from nemostream.benchmarks.survival import Injected, Transcript
from nemostream.bundle import Bundle
from nemostream.client import Event
from nemostream.errors import OptionError


def row(result: Any, fault: str) -> dict[str, Any]:
    return next(each["values"] for each in result["rows"] if each["case"]["fault"] == fault)


def check(result: Any, streams: int) -> None:
    values = row(result, "all")
    assert (values["streams"], values["equal"]) == (streams, streams), values["errors"]
    assert (values["lost_events"], values["repeated_events"], values["lost_streams"]) == (0, 0, 0)
    assert values["reconnects"] > 0 and survival.passed(result)


@pytest.mark.parametrize("balancer", ["HAProxy", "TCP balancer"])
def test_streams_survive(balancer: str, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short form of `nemostream bench survival`, which has 60 streams and two minutes."""
    if balancer == "HAProxy" and survival.haproxy() is None:
        pytest.skip("needs HAProxy")
    if balancer != "HAProxy":
        monkeypatch.setattr(survival, "haproxy", lambda: None)
    faults = ["kill", "terminate", "freeze", "cut"] if balancer == "HAProxy" else ["kill", "cut"]
    result = survival.measure_survival(demo_bundle, 6, 8 if balancer == "HAProxy" else 5, faults=faults, chunk_ms=160)
    assert result["method"]["balancer"] == balancer
    assert [row(result, fault)["faults"] for fault in faults] == [1] * len(faults)
    check(result, 6)


def test_without_a_mount_writes_fail(monkeypatch: pytest.MonkeyPatch, demo_bundle: Bundle) -> None:
    """Clients have all addresses, the store cannot be mounted, and its writes fail or are slow."""
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    monkeypatch.setenv("PATH", "")
    result = survival.measure_survival(demo_bundle, 3, 6, faults=["full", "slow", "cut"], chunk_ms=560, direct=True)
    assert (result["method"]["store"], result["method"]["balancer"]) == ("folder", "none")
    check(result, 3)


def events(*numbers: int, text: str = "a") -> list[Event]:
    return [Event("partial", text=text, sequence=number) for number in numbers]


def test_rows() -> None:
    """Lost, repeated and different events are counted, and gaps belong to the last fault before them."""
    expected = [Transcript(0, events(1, 2, 3)), Transcript(1, events(1, 2))]
    found = [
        Transcript(0, events(1, 2, 3), [(5.0, 0.5), (9.0, 1.5)], 2),
        Transcript(1, events(1, 2, 2), [(7.9, 0.25)], 1),
        Transcript(0, events(1, 3), [(8.0, 2.0)], 1, "lost"),
        Transcript(1, events(1, 2, text="b")),
    ]
    injected = [Injected("kill", 4.0), Injected("cut", 8.0)]
    rows = survival.rows_of(expected, found, injected, ["kill", "cut", "full"])
    result = {"rows": rows}
    names = ("faults", "streams", "reconnects", "equal", "lost_events", "repeated_events", "lost_streams")
    counts = {each["case"]["fault"]: [each["values"][name] for name in names] for each in rows}
    assert counts == {
        "kill": [1, 2, 2, 1, 0, 1, 0],
        "cut": [1, 2, 2, 1, 1, 0, 1],
        "full": [0, 0, 0, 0, 0, 0, 0],
        "all": [2, 4, 4, 1, 1, 1, 1],
    }
    assert [each["ms"]["gap"] for each in rows] == [[500, 250], [1500, 2000], [], [500, 1500, 250, 2000]]
    assert row(result, "cut")["errors"] == ["lost"] and not survival.passed(result)
    assert survival.passed({"rows": survival.rows_of(expected, found[:1], injected, [])})
    method = dict.fromkeys(("streams", "chunk_ms", "servers", "balancer", "store", "seed", "threads"), 1)
    text = survival.show(result | {"method": method | {"seconds": 5.0, "other_work_cores": 0.0}})
    assert "| full | 0 | 0 | 0 | – | – | – | – | – | – | – |" in text  # nothing is equal, lost or not
    assert "| kill | 1 | 2 | 2 | 0.250 | 0.500 | 0.500 | 1 | 0 | 1 | 0 |" in text


def test_the_command_fails_if_events_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survival, "run", lambda measure, options: measure())
    for equal in (True, False):
        rows = survival.rows_of([Transcript(0, events(1))], [Transcript(0, events(1) if equal else [])], [], [])
        monkeypatch.setattr(survival, "measure_survival", lambda *given, rows=rows, **options: {"rows": rows})
        if equal:
            survival.main([])
        else:
            with pytest.raises(SystemExit, match="1"):
                survival.main([])


@pytest.mark.parametrize("options", [{"streams": 0}, {"servers": 1}, {"seconds": 1}, {"faults": ["fire"]}])
def test_invalid_options(options: dict[str, Any], demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match=r"streams is|there is no fault 'fire'"):
        survival.measure_survival(demo_bundle, **options)
