"""The contract: a manifest survives its file, damage is named, and the arithmetic of time is the convolutions'."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from nemostream.errors import BundleError, OptionError
from nemostream.spec import Bundle, Manifest


def test_round_trip(demo_bundle: Bundle) -> None:
    assert Manifest.from_json(demo_bundle.manifest.to_json()) == demo_bundle.manifest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 99}, "version 99, this nemostream reads version 1"),
        ({"format": "zip"}, "not a nemostream manifest"),
        ({"encoder": {"layers": 3}}, "lacks or misnames a field"),
        ({"graphs": None}, "lacks or misnames a field"),
    ],
)
def test_a_manifest_that_is_not_ours(
    change: dict[str, object], sentence: str, demo_bundle: Bundle, tmp_path: Path
) -> None:
    document = json.loads(demo_bundle.manifest.to_json())
    (tmp_path / "manifest.json").write_text(json.dumps(document | change))
    with pytest.raises(BundleError, match=sentence):
        Bundle.open(tmp_path)


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"has no readable manifest\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        Bundle.open(tmp_path)


def test_every_file_is_checked(demo_bundle: Bundle, tmp_path: Path) -> None:
    manifest = demo_bundle.manifest
    for entry in (manifest.weights, manifest.tokenizer, *manifest.graphs.values()):
        copy = tmp_path / entry.file
        shutil.copytree(demo_bundle.path, copy)
        damaged = bytearray((copy / entry.file).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (copy / entry.file).write_bytes(damaged)
        with pytest.raises(BundleError, match=f"{entry.file} is damaged"):
            Bundle.open(copy)
        (copy / entry.file).unlink()
        with pytest.raises(BundleError, match=f"{entry.file} is missing"):
            Bundle.open(copy)


def windows(frames: int) -> int:
    """Outputs of NeMo's causal stride-2 convolution, counted: kernel 3, two zeros before, one after."""
    padded = frames + 3
    return sum(1 for start in range(0, padded, 2) if start + 3 <= padded)


def test_frames_are_counted_as_the_convolutions_make_them(demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    assert manifest.lead == 1081
    for samples in [*range(0, 40_000, 37), 10**9]:
        assert manifest.mel_frames(samples) == samples // 160
        if samples < 100_000:
            expected = windows(windows(windows(samples // 160))) if samples >= 160 else 0
            assert manifest.encoder_frames(samples) == expected


def test_chunks_by_name(demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    assert [(c.ms, c.frames, c.samples) for c in manifest.chunks] == [
        (80, 1, 1280),
        (160, 2, 2560),
        (560, 7, 8960),
        (1120, 14, 17920),
    ]
    assert manifest.chunk(560).left == 70
    with pytest.raises(OptionError, match="choose one of 80, 160, 560, 1120"):
        manifest.chunk(500)
    assert dataclasses.replace(manifest, name="other") != manifest
