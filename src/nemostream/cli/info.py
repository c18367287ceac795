"""The output of `nemostream info`: a bundle's manifest as tables or JSON."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemostream.bundle import Bundle, LanguageConfig


def print_bundle_json(bundle: Bundle) -> None:
    """Print a bundle's folder, file sizes and manifest as JSON."""
    manifest = bundle.manifest
    report = {
        "path": str(bundle.path),
        "bytes": {"graphs": _graph_sizes(bundle), "weights": manifest.weights.bytes},
        "manifest": json.loads(manifest.to_json()),
    }
    print(json.dumps(report, indent=2))


def print_bundle(bundle: Bundle) -> None:
    """Print a bundle's manifest as tables."""
    manifest, console = bundle.manifest, Console(highlight=False)
    encoder, decoder, features, source = manifest.encoder, manifest.decoder, manifest.features, manifest.checkpoint
    sizes = _graph_sizes(bundle)
    rows = {
        "model": f"{manifest.name}, {_size(sum(sizes.values()) + manifest.weights.bytes)} in {bundle.path}",
        "audio": f"{features.sample_rate} Hz, {features.mels} mel bins, {features.window}/{features.hop} samples",
        "encoder": f"{encoder.layers} layers, {encoder.d_model} wide, {encoder.heads} heads, "
        f"{encoder.cache} frames of context, x{encoder.subsampling} subsampling",
        "decoder": f"{decoder.layers} LSTM layer(s) of {decoder.hidden}, joint {decoder.joint}, "
        f"{decoder.vocabulary} tokens, max. {decoder.max_symbols} per frame",
        "languages": _languages(manifest.languages),
        "checkpoint": f"{source.get('source', '?')}, sha256 {source.get('sha256', '?')[:16]}…",
        "made with": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    for name, text in rows.items():
        console.print(f"[dim]{name:10}[/dim] {escape(text)}", soft_wrap=True)

    chunks = Table(
        "chunk", "frames", "context", "steps compared", "features", "encoder", title="chunk sizes and parity"
    )
    for chunk in manifest.chunks:
        figures = manifest.parity.get(f"{chunk.ms}ms", {})
        differences = (_difference(figures.get(key)) for key in ("features", "encoder"))
        steps = str(figures.get("steps", "–"))
        chunks.add_row(f"{chunk.ms} ms", str(chunk.frames), f"{chunk.left} frames", steps, *differences)
    console.print(chunks)
    others = (f"{name} {_difference(manifest.parity.get(name))}" for name in ("decoder", "joint"))
    console.print(
        f"Parity is the largest absolute difference from {manifest.parity.get('reference', 'NeMo')} in fp32, measured "
        "during the export. "
        f"Also: {', '.join(others)}."
    )

    graphs = Table("graph", "size", "inputs", "outputs", title="graphs")
    for name, graph in manifest.graphs.items():
        graphs.add_row(name, _size(sizes[name]), str(len(graph.inputs)), str(len(graph.outputs)))
    graphs.add_row("shared weights", _size(manifest.weights.bytes), "", "")
    console.print(graphs)


def _languages(languages: LanguageConfig) -> str:
    """Return the names of the languages with their other names in brackets, the default first."""
    aliases: dict[int, list[str]] = {}
    for name, prompt in languages.prompts.items():
        aliases.setdefault(prompt, []).append(name)
    default = languages.name(None)
    shown = []
    for name in sorted(languages.names, key=lambda name: name != default):
        others = [other for other in aliases.get(languages.prompt(name), ()) if other != name]
        shown.append(name + f" ({', '.join(others)})" * bool(others) + " by default" * (name == default))
    return ", ".join(shown)


def _graph_sizes(bundle: Bundle) -> dict[str, int]:
    return {name: bundle.file(name).stat().st_size for name in bundle.manifest.graphs}


def _difference(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _size(count: int) -> str:
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"
