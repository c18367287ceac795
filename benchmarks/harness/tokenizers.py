"""SentencePiece models of made-up words, with the kinds of pieces that published tokenizers have."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nemostream.export.sentencepiece_model import NORMAL, UNKNOWN, USER_DEFINED, serialize_piece

# Share of the pieces, range of the letters, and tags of each script, with about the shares of the tokenizer of
# nemotron-3.5-asr-streaming-0.6b. Like there, the pieces of a language follow its tag, so that tags are scattered.
_SCRIPTS: Sequence[tuple[float, str, str, Sequence[str]]] = (
    (0.04, "а", "я", ("<bg-BG>", "<ru-RU>")),
    (0.20, "a", "z", ("<de-DE>", "<en-US>", "<en-GB>", "<es-ES>", "<fr-FR>", "<pt-BR>", "<sl-SL>")),
    (0.02, "α", "ω", ("<el-GR>",)),
    (0.02, "ء", "ي", ("<ar-AR>",)),
    (0.02, "א", "ת", ("<he-IL>",)),
    (0.02, "अ", "ह", ("<hi-IN>",)),
    (0.02, "ぁ", "ゖ", ("<ja-JP>",)),
    (0.10, "가", "힣", ("<ko-KR>",)),
    (0.02, "ก", "ฮ", ("<th-TH>",)),
    (0.54, "一", "鿋", ("<zh-CN>",)),
)
_PUNCTUATION = [*"▁.,?!'\"-<>¿¡،؟।、。，？〜·"]


def train_tokenizer(
    folder: Path,
    vocab: int,
    seed: int,
    piece_model: str = "bpe",
    punctuation: bool = True,
    controls: Sequence[str] = (),
) -> None:
    """Train a SentencePiece model of `vocab` pieces on made-up words with Zipf frequencies.

    With `punctuation`, the text consists of sentences with capital letters and punctuation marks. `controls` become the
    last pieces. Writes `tokenizer.model` and `vocab.txt` into `folder`.
    """
    import sentencepiece

    rng = np.random.default_rng(seed)
    onsets = ["", *"bcdfghjklmnprstvwyz", "st", "tr", "pl", "sh", "ch", "th", "qu"]
    nuclei, codas = ["a", "e", "i", "o", "u", "ea", "ou"], ["", "", "n", "r", "s", "t", "l", "d", "ng", "ck", "x"]
    syllables = np.array([o + n + c for o in onsets for n in nuclei for c in codas])
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(4000)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    frequencies /= frequencies.sum()
    lines = [" ".join(line) for line in rng.choice(words, (4000, 12), p=frequencies)]
    if punctuation:
        marks = rng.choice([".", "?", "!"], len(lines), p=[0.8, 0.15, 0.05])
        lines = [f"{line.capitalize()}{mark}".replace(" a", ", a", 1) for line, mark in zip(lines, marks, strict=True)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type=piece_model,
        vocab_size=vocab - len(controls),
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    # Concatenated protobuf messages are one message: the pieces are appended.
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(_pieces((piece, 0.0, USER_DEFINED) for piece in controls))
    _write_vocabulary(folder)


def write_multilingual_tokenizer(folder: Path, vocab: int, seed: int) -> None:
    """Write a SentencePiece unigram model of `vocab` pieces in ten scripts, with language tags and punctuation marks.

    As in the published tokenizer, the first tag is a user-defined piece, and the others are normal pieces. There are
    no byte pieces. Writes `tokenizer.model` and `vocab.txt` into `folder`.
    """
    rng = np.random.default_rng(seed)
    pieces = dict.fromkeys(_PUNCTUATION)  # an ordered set
    for share, first, last, tags in _SCRIPTS:
        letters = [chr(code) for code in range(ord(first), ord(last) + 1)]
        unused = iter(letters)
        for tag in tags:
            pieces[tag] = None
            size = len(pieces) + int(share * (vocab - 64) / len(tags))
            while len(pieces) < size:
                pieces[next(unused, None) or _word(rng, letters)] = None
    if len(pieces) > vocab - 1:
        raise ValueError(f"vocab is {vocab}; a tokenizer of many scripts has at least {len(pieces) + 1} pieces")
    while len(pieces) < vocab - 1:
        pieces[_word(rng, [*"abcdefghijklmnopqrstuvwxyz"])] = None
    kinds = (USER_DEFINED if piece == _SCRIPTS[0][3][0] else NORMAL for piece in pieces)
    scored = ((piece, -3.0 - 0.01 * rank, kind) for rank, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)))
    (folder / "tokenizer.model").write_bytes(_pieces(itertools.chain([("<unk>", 0.0, UNKNOWN)], scored)))
    _write_vocabulary(folder)


def _word(rng: np.random.Generator, letters: Sequence[str]) -> str:
    """Return two to five random letters, with or without a space before them."""
    drawn = "".join(letters[i] for i in rng.integers(len(letters), size=rng.integers(2, 6)))
    return "▁" * int(rng.integers(2)) + drawn


def _pieces(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """Return pieces (text, score, type) of a serialized SentencePiece model."""
    return b"".join(serialize_piece(*piece) for piece in pieces)


def _write_vocabulary(folder: Path) -> None:
    """Write the pieces without <unk> into `vocab.txt`, which NeMo reads."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(1, processor.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
