"""Synthetic voices saying digits, with the time each word ends where the synthesiser tells it.

flite prints the end of every phone and festival of every word. espeak-ng prints neither: its strings have no times.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
VARIANTS = ("", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5", "klatt", "steph", "boris")
FLITE = ("slt", "rms", "awb", "kal16", "kal")
FESTIVAL = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
PHONES = {"zero": 4, "one": 3, "two": 2, "three": 3, "four": 3, "five": 3, "six": 4, "seven": 5, "eight": 2, "nine": 3}
BATCH = 40  # texts per festival process, which takes a second to start


@dataclass
class Utterance:
    text: str  # digits, lower case
    spoken: str  # the same with punctuation
    voice: str  # "flite-slt", "espeak-en-us+f2", "festival-kal_diphone"
    stretch: float  # 1 is the voice's own pace, 1.5 is slower
    pitch: int
    path: Path
    ends: list[float] = field(default_factory=list)  # seconds, one a word; empty when unknown


def missing_tools() -> str:
    """What has to be installed, in one sentence; empty if all is there."""
    absent = [tool for tool in ("flite", "espeak-ng", "festival") if not shutil.which(tool)]
    if not absent:
        return ""
    return (
        f"Not on the PATH: {', '.join(absent)}; on Debian: apt-get install flite espeak-ng festival "
        "festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts."
    )


def random_voice(rng: random.Random) -> str:
    """Two fifths flite, two fifths espeak-ng (many voices, all alike in their way), one fifth festival."""
    kind = rng.random()
    if kind < 0.4:
        return f"flite-{rng.choice(FLITE)}"
    if kind < 0.8:
        return espeak_voice(rng.choice(ACCENTS), rng.choice(VARIANTS))
    return f"festival-{rng.choice(FESTIVAL)}"


def espeak_voice(accent: str, variant: str) -> str:
    return f"espeak-{accent}+{variant}" if variant else f"espeak-{accent}"


def speak(utterances: list[Utterance], threads: int = 4) -> None:
    """Write every utterance's wave file and fill in its `ends`."""
    festival: dict[tuple[str, float], list[Utterance]] = {}
    jobs: list[list[Utterance]] = []
    for utterance in utterances:
        if utterance.voice.startswith("festival-"):
            festival.setdefault((utterance.voice, utterance.stretch), []).append(utterance)
        else:
            jobs.append([utterance])
    for same in festival.values():
        jobs += [same[start : start + BATCH] for start in range(0, len(same), BATCH)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_say, jobs))


def _say(job: list[Utterance]) -> None:
    maker, voice = job[0].voice.split("-", 1)
    {"flite": _flite, "espeak": _espeak, "festival": _festival}[maker](voice, job)


def _flite(voice: str, job: list[Utterance]) -> None:
    (one,) = job
    options = ["--setf", f"duration_stretch={one.stretch}", "-psdur", "-t", one.spoken, "-o", str(one.path)]
    phones = [item.split(":") for item in _run(["flite", "-voice", voice, *options]).split()]
    ends = [float(end) for phone, end in phones if phone != "pau"]
    words = one.text.split()
    if len(ends) != sum(PHONES[word] for word in words):
        return  # pronounced otherwise than expected: no times
    last = -1
    for word in words:
        last += PHONES[word]
        one.ends.append(ends[last])


def _espeak(voice: str, job: list[Utterance]) -> None:
    (one,) = job
    speed = str(round(150 / one.stretch))
    _run(["espeak-ng", "-v", voice, "-s", speed, "-p", str(one.pitch), "-w", str(one.path), one.spoken])


def _festival(voice: str, job: list[Utterance]) -> None:
    lines = [f"(voice_{voice})", f"(Parameter.set 'Duration_Stretch {job[0].stretch})"]
    for one in job:
        lines += [
            f'(set! utt (utt.synth (Utterance Text "{one.spoken}")))',
            f'(utt.save.wave utt "{one.path}" \'riff)',
            '(mapcar (lambda (w) (format t "%s:%f " (item.name w) (item.feat w "word_end")))'
            " (utt.relation.items utt 'Word))",
            '(format t "\\n")',
        ]
    script = job[0].path.with_suffix(".scm")
    script.write_text("\n".join(lines))
    output = _run(["festival", "-b", str(script)])
    for one, line in zip(job, output.strip().splitlines(), strict=True):
        words = [item.split(":") for item in line.split()]
        if [word for word, _ in words] == one.text.split():
            one.ends = [float(end) for _, end in words]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout
