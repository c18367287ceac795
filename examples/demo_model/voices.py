"""Speech synthesisers that return the times of all words and sounds.

With these times (frame-level targets and one good alignment), a small transducer can be trained in hours. All voices
return an `Utterance`. Texts are plain words with punctuation; `ends` has one entry per space-separated word.

- flite: its C library (Debian libflite1), in this process;
- espeak-ng: its C library (Debian libespeak-ng1), with phoneme and word events;
- festival (Debian festival and its voices): one process per list of sentences;
- Piper and Kokoro: piper.py and kokoro.py.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16000


@dataclass
class Utterance:
    """Synthesised speech with the times of its words and sounds."""

    audio: np.ndarray  # float32, 16 kHz
    voice: str
    starts: list[float]  # seconds, one per word
    ends: list[float]
    phones: list[tuple[str, float]]  # (symbol, end in seconds), "" for silence
    phone_set: str


class SynthesisError(Exception):
    """The words of the synthesiser do not match those of the text."""


def _words_from_phones(ends: list[float], phones: list[tuple[str, float]]) -> list[float]:
    """Return the start of each word: the first sound after the end of the previous word."""
    starts, previous = [], 0.0
    edges = [(symbol, begin, end) for (symbol, end), begin in zip(phones, [0.0, *(e for _, e in phones)], strict=False)]
    for end in ends:
        begin = next((b for symbol, b, e in edges if symbol and b >= previous - 1e-3), previous)
        starts.append(min(begin, end))
        previous = end
    return starts


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


class _Voice(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


class Flite:
    NAMES = ("cmu_us_slt", "cmu_us_rms", "cmu_us_awb", "cmu_us_kal16", "cmu_us_kal")

    def __init__(self) -> None:
        for name in ("libflite.so.1", "libflite_usenglish.so.1", "libflite_cmulex.so.1"):
            lib = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            self.lib = lib if name == "libflite.so.1" else self.lib
        lib = self.lib
        for name in ("flite_synth_text", "utt_wave", "utt_relation", "relation_head", "item_next"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.ffeature_float.restype, lib.ffeature_string.restype = ctypes.c_float, ctypes.c_char_p
        lib.flite_init()
        self.voices = {}
        for name in self.NAMES:
            register = getattr(ctypes.CDLL(f"lib{'flite_' + name}.so.1", mode=ctypes.RTLD_GLOBAL), f"register_{name}")
            register.restype = ctypes.c_void_p
            self.voices[name] = register(None)

    def synthesize(self, text: str, rng: random.Random) -> Utterance:
        lib, name = self.lib, rng.choices(self.NAMES, (3, 3, 3, 1.5, 0.5))[0]
        voice = self.voices[name]
        features = ctypes.c_void_p(ctypes.cast(voice, ctypes.POINTER(_Voice)).contents.features)
        for feature, value in (("duration_stretch", rng.uniform(0.8, 1.35)), ("f0_shift", rng.uniform(0.8, 1.25))):
            lib.feat_set_float(features, feature.encode(), ctypes.c_float(value))
        utterance = ctypes.c_void_p(lib.flite_synth_text(text.encode(), ctypes.c_void_p(voice)))
        if not utterance:
            raise SynthesisError(text)
        try:
            wave = ctypes.cast(lib.utt_wave(utterance), ctypes.POINTER(_Wave)).contents
            audio, rate = np.ctypeslib.as_array(wave.samples, (wave.count,)).astype(np.float32) / 32768, wave.rate
            phones = [
                (lib.ffeature_string(i, b"name").decode(), lib.ffeature_float(i, b"end"))
                for i in self._items(utterance, "Segment")
            ]
            last = b"daughtern.R:SylStructure.daughtern.daughtern.R:Segment.end"
            ends = [lib.ffeature_float(item, last) for item in self._items(utterance, "Token")]
        finally:
            lib.delete_utterance(utterance)
        phones = [("" if symbol == "pau" else symbol, end) for symbol, end in phones]
        if len(ends) != len(text.split()) or any(a >= b for a, b in zip([0.0, *ends], ends, strict=False)):
            raise SynthesisError(text)
        return Utterance(resample(audio, rate), f"flite-{name}", _words_from_phones(ends, phones), ends, phones, "us")

    def _items(self, utterance: ctypes.c_void_p, relation: str):
        item = self.lib.relation_head(ctypes.c_void_p(self.lib.utt_relation(utterance, relation.encode())))
        while item:
            yield ctypes.c_void_p(item)
            item = self.lib.item_next(ctypes.c_void_p(item))


class _Event(ctypes.Structure):
    class _Id(ctypes.Union):
        _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("id", _Id),
    ]


class Espeak:
    ACCENTS = (
        "en-us",
        "en-us",
        "en-us",
        "en",
        "en",
        "en-gb-scotland",
        "en-gb-x-rp",
        "en-gb-x-gbclan",
        "en-gb-x-gbcwmd",
        "en-029",
        "en-us-nyc",
    )
    VARIANTS = ("", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libespeak-ng.so.1")
        self.rate = self.lib.espeak_Initialize(2, 0, None, 1 | 2)  # synchronous; phoneme events, in IPA
        self.pieces: list[np.ndarray] = []
        self.events: list[tuple[int, int, int, str]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self.callback = kind(self._on_audio)  # a reference: the library stores only the address
        self.lib.espeak_SetSynthCallback(self.callback)

    def _on_audio(self, wave, count: int, events) -> int:
        if count and wave:
            self.pieces.append(np.ctypeslib.as_array(wave, (count,)).copy())
        n = 0
        while events[n].type != 0:
            event = events[n]
            if event.type in (1, 7):
                symbol = bytes(event.id.string).split(b"\0")[0].decode("utf-8", "ignore") if event.type == 7 else ""
                self.events.append((event.type, event.position, event.sample, symbol))
            n += 1
        return 0

    def synthesize(self, text: str, rng: random.Random) -> Utterance:
        accent, variant = rng.choice(self.ACCENTS), rng.choice(self.VARIANTS)
        voice = f"{accent}+{variant}" if variant else accent
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SynthesisError(f"no espeak-ng voice {voice}")
        for parameter, value in ((1, rng.randint(110, 200)), (3, rng.randint(25, 75)), (4, rng.randint(30, 70))):
            self.lib.espeak_SetParameter(parameter, value, 0)
        self.pieces, self.events = [], []
        data = text.encode()
        self.lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
        self.lib.espeak_Synchronize()
        audio = np.concatenate(self.pieces).astype(np.float32) / 32768 if self.pieces else np.zeros(0, np.float32)
        offsets, at = [], 0
        for word in text.split():
            at = text.index(word, at)
            offsets.append(at)
            at += len(word)
        sounds = [(sample / self.rate, symbol) for kind, _, sample, symbol in self.events if kind == 7]
        edges = [*(begin for begin, _ in sounds[1:]), len(audio) / self.rate]
        symbols = ["" if set(symbol) <= set("_:|") else symbol for _, symbol in sounds]
        phones = list(zip(symbols, edges, strict=True))
        # A word event precedes the events of its sounds. Some short words have no event ("of the").
        groups: list[list] = []  # index of the first word, start, end of the last sound
        index = 0
        for kind, position, sample, _ in self.events:
            if kind == 1:
                number = max((i for i, offset in enumerate(offsets) if offset <= position - 1), default=0)
                if not groups or number > groups[-1][0]:
                    groups.append([number, sample / self.rate, sample / self.rate])
            else:
                symbol, end = phones[index]
                index += 1
                if symbol and groups:
                    groups[-1][2] = end
        if not groups or groups[0][0] != 0:
            raise SynthesisError(text)
        starts, ends = [], []
        words = text.split()
        for (first, begin, end), (after, limit, _) in zip(groups, [*groups[1:], [len(words), 1e9, 0.0]], strict=True):
            split_time(words[first:after], begin, min(end, limit), starts, ends)
        if any(a >= b for a, b in zip([0.0, *ends], ends, strict=False)):
            raise SynthesisError(text)
        return Utterance(resample(audio, self.rate), f"espeak-{voice}", starts, ends, phones, "ipa")

    def sounds(self, text: str, accent: str = "en-us") -> str:
        """Return IPA with spaces between words, for other voices. The library returns one clause per call."""
        self.lib.espeak_SetVoiceByName(accent.encode())
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        buffer = ctypes.c_char_p(text.encode())  # the pointer below advances through it
        rest, parts = ctypes.c_void_p(ctypes.cast(buffer, ctypes.c_void_p).value), []
        while rest.value:
            part = self.lib.espeak_TextToPhonemes(ctypes.byref(rest), 1, 2)
            parts.append((part or b"").decode())
        return " ".join(part for part in parts if part)


class Festival:
    NAMES = ("cmu_us_slt_arctic_hts", "kal_diphone", "ked_diphone")

    def synthesize_all(self, texts: list[str], rng: random.Random) -> list[Utterance | None]:
        """Synthesise a list in one process, because festival takes a second to start. None marks a failure."""
        utterances: list[Utterance | None] = []
        with tempfile.TemporaryDirectory() as folder:
            script = [
                "(define (dump utt) (mapcar (lambda (s)",
                ' (format t "S %s %f\\n" (item.name s) (item.feat s \'end)))',
                ' (utt.relation.items utt \'Segment)) (mapcar (lambda (k) (format t "T %f\\n" (parse-number',
                ' (item.feat k "R:SylStructure.daughtern.daughtern.R:Segment.end"))))',
                " (utt.relation.items utt 'Token)))",
            ]
            names = []
            for number, text in enumerate(texts):
                names.append(rng.choices(self.NAMES, (3, 1, 1))[0])
                words = text.replace('"', "")
                script += [
                    f"(voice_{names[-1]})",
                    f"(Parameter.set 'Duration_Stretch {rng.uniform(0.8, 1.3):.2f})",
                    f'(set! utt (utt.synth (Utterance Text "{words}")))',
                    f'(utt.save.wave utt "{folder}/{number}.wav" \'riff)',
                    f'(format t "U {number}\\n")',
                    "(dump utt)",
                ]
            path = Path(folder) / "say.scm"
            path.write_text("\n".join(script))
            run = subprocess.run(["festival", "-b", str(path)], capture_output=True, text=True)
            blocks = {int(b.split("\n", 1)[0]): b.split("\n")[1:] for b in run.stdout.split("U ")[1:]}
            for number, text in enumerate(texts):
                lines = [line.split() for line in blocks.get(number, [])]
                phones = [("" if p[1] == "pau" else p[1], float(p[2])) for p in lines if p[:1] == ["S"]]
                # The items of the Token relation are tokens, each followed by its words; only words have an end.
                times = [float(p[1]) for p in lines if p[:1] == ["T"]]
                ends = [a for a, b in zip(times, [*times[1:], 0.0], strict=True) if a > 0 and b == 0]
                valid = len(ends) == len(text.split()) and all(a < b for a, b in zip([0.0, *ends], ends, strict=False))
                if not valid or not (Path(folder) / f"{number}.wav").is_file():
                    utterances.append(None)
                    continue
                audio, rate = soundfile.read(Path(folder) / f"{number}.wav", dtype="float32")
                utterances.append(
                    Utterance(
                        resample(audio, rate),
                        f"festival-{names[number]}",
                        _words_from_phones(ends, phones),
                        ends,
                        phones,
                        "us",
                    )
                )
        return utterances


def split_time(words: list[str], begin: float, end: float, starts: list[float], ends: list[float]) -> None:
    """Divide the time of words that were synthesised as one among them, by their letters."""
    letters = np.cumsum([len(word) for word in words])
    cuts = [float(begin + (end - begin) * n / letters[-1]) for n in letters]
    starts += [begin, *cuts[:-1]]
    ends += cuts


def resample(audio: np.ndarray, rate: int) -> np.ndarray:
    """Convert to 16 kHz float32."""
    return audio.astype(np.float32) if rate == RATE else soxr.resample(audio, rate, RATE).astype(np.float32)
