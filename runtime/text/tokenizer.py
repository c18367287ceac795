"""Convert between token ids and text with SentencePiece, for complete lists and incrementally.

This module does not depend on blanks, frames or streams.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from nemostream.errors import BundleError
from nemostream.runtime.text.scripts import CLOSING
from nemostream.untrusted import MIB, read_regular

# Punctuation that belongs to the preceding word, in the scripts of published models; no opening marks (¿, quotes).
_CLOSING = frozenset(".,?!:;…。、，．！？：；،؛؟۔।॥;·։")
_MAX_BYTES = 64 * MIB
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """The SentencePiece model of a bundle, with `vocabulary` pieces. Thread-safe.

    Raises `BundleError` if the file is not a SentencePiece model or has another number of pieces.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(read_regular(path, _MAX_BYTES))
            size = self._model.get_piece_size()
            if size != vocabulary:
                raise BundleError(
                    f"{path} has {size} pieces, but the manifest states {vocabulary}; export the bundle again."
                )
            self.vocabulary = size
            self.unknown: int = self._model.unk_id()  # id for text that no piece covers
            self._pieces = tuple(self._model.id_to_piece(i) for i in range(size))
            self._texts = tuple(self._piece_text(i) for i in range(size))
            self._model.decode(list(range(size)))  # find invalid pieces now, not in a stream
        except BundleError:
            raise
        except (OSError, RuntimeError, ValueError, LookupError) as error:  # ValueError: not UTF-8
            raise BundleError(f"{path} is not a SentencePiece model; copy or export the bundle again.") from error
        self.word_starts = tuple(text[:1] == " " for text in self._texts)  # by id: whether it starts a word
        # By id: whether it is only punctuation that belongs to the preceding word, even after a space.
        self.closing_punctuation = tuple(
            bool(text.strip()) and CLOSING.issuperset(text.strip()) for text in self._texts
        )
        self._bytes = {i: int(m[1], 16) for i, p in enumerate(self._pieces) if (m := _BYTE_PIECE.fullmatch(p))}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that starts at a word boundary; `unknown` for characters without a piece."""
        return list(self._model.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a complete list of ids, as SentencePiece does."""
        return self._model.decode(list(ids)) if ids else ""

    def piece(self, token: int) -> str:
        """Return the text of a single token, including its leading space; a byte piece is returned as `<0xE2>`."""
        return self._texts[token]

    def count_incomplete(self, ids: Sequence[int]) -> int:
        """Return the number of ids at the end that are byte pieces of an incomplete character (0 to 3)."""
        start = len(ids)
        while start and ids[start - 1] in self._bytes:
            start -= 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(self._bytes[i] for i in ids[start:]))
        return len(decoder.getstate()[0])

    def _piece_text(self, token: int) -> str:
        if self._model.is_control(token):
            return ""
        if self._model.is_unknown(token):
            return self._model.decode([token])
        return self._pieces[token].replace("\u2581", " ")


class Detokenizer:
    """Incremental text of one stream, in time proportional to the new tokens.

    Every returned text is a prefix of all later ones: the bytes of an incomplete character are held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = ""
        # The last tokens already in `text`, with at least one character. SentencePiece drops a leading space, so new
        # tokens are decoded together with them.
        self._window: list[int] = []
        self._incomplete: list[int] = []  # byte pieces of an incomplete character

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that the new ids add. `text` is not updated."""
        ids = [*self._incomplete, *ids]
        complete = len(ids) - self._tokenizer.count_incomplete(ids)
        self._incomplete = ids[complete:]
        return self._decode_new(ids[:complete])

    def flush(self) -> str:
        """Return the text of ids that were held back. `text` is not updated."""
        ids, self._incomplete = self._incomplete, []
        return self._decode_new(ids)

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; return the text so far."""
        self.text += self.add(ids)
        return self.text

    def finish(self) -> str:
        """Return the complete text, which equals `Tokenizer.decode` of all ids."""
        self.text += self.flush()
        return self.text

    def _decode_new(self, ids: list[int]) -> str:
        if not ids:
            return ""
        decode = self._tokenizer.decode
        text = decode(self._window + ids)[len(decode(self._window)) :]
        self._window = ids if decode(ids) else self._window + ids
        return text
