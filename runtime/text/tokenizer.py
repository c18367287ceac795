"""Token ids to text, by SentencePiece; whole lists, and as they come.

What the module does not know: blanks, frames, streams.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from nemostream.errors import BundleError
from nemostream.untrusted import MIB, read_regular

# Punctuation that ends or divides what is before it, in the scripts of published models; never what opens (¿, quotes).
_CLOSING = frozenset(".,?!:;…。、，．！？：；،؛؟۔।॥;·։")
_MOST_BYTES = 64 * MIB
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A bundle's SentencePiece model, `vocabulary` pieces large. Threads may share it.

    Raises `BundleError` if the file is no SentencePiece model or another vocabulary's.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(read_regular(path, _MOST_BYTES))
            size = self._model.get_piece_size()
            if size != vocabulary:
                raise BundleError(f"{path} has {size} pieces, the manifest says {vocabulary}; export the bundle again.")
            self.vocabulary = size
            self.unknown: int = self._model.unk_id()  # the id of whatever the model has no piece for
            self._pieces = tuple(self._model.id_to_piece(i) for i in range(size))
            self._texts = tuple(self._text(i) for i in range(size))
            self._model.decode(list(range(size)))  # so that no stream is the first to find a piece that is not text
        except BundleError:
            raise
        except (
            OSError,
            RuntimeError,
            ValueError,
            LookupError,
        ) as error:  # ValueError: not UTF-8
            raise BundleError(f"{path} is not a SentencePiece model; copy or export the bundle again.") from error
        self.word_starts = tuple(text[:1] == " " for text in self._texts)  # of each id, whether a word begins with it
        # Of each id, whether it is mere punctuation that belongs to the word before it, after a space too.
        self.closing_punctuation = tuple(
            bool(text.strip()) and _CLOSING.issuperset(text.strip()) for text in self._texts
        )
        self._bytes = {i: int(m[1], 16) for i, p in enumerate(self._pieces) if (m := _BYTE.fullmatch(p))}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, from a word's start, as SentencePiece splits it; `unknown` for what it has no piece for."""
        return list(self._model.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole list of ids, exactly SentencePiece's."""
        return self._model.decode(list(ids)) if ids else ""

    def piece(self, token: int) -> str:
        """One token's own text, its leading space included; a byte piece stays what it is called (`<0xE2>`)."""
        return self._texts[token]

    def unfinished(self, ids: Sequence[int]) -> int:
        """How many ids at the end are byte pieces of a character that is not complete yet (0 to 3)."""
        start = len(ids)
        while start and ids[start - 1] in self._bytes:
            start -= 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(self._bytes[i] for i in ids[start:]))
        return len(decoder.getstate()[0])

    def _text(self, token: int) -> str:
        if self._model.is_control(token):
            return ""
        if self._model.is_unknown(token):
            return self._model.decode([token])
        return self._pieces[token].replace("\u2581", " ")


class Detokenizer:
    """One stream's text as its tokens come, in time proportional to the new tokens.

    Every text it gives is a prefix of all later ones: bytes of an unfinished character wait for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = ""
        # The last tokens already in `text`, at least one character's worth. SentencePiece drops a leading space, so a
        # token's text is what it adds to the text of tokens before it, not its text alone.
        self._window: list[int] = []
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """What the new ids add to the text. `text` does not get it."""
        ids = [*self._waiting, *ids]
        waiting = self._tokenizer.unfinished(ids)
        self._waiting = ids[len(ids) - waiting :]
        return self._settle(ids[: len(ids) - waiting])

    def rest(self) -> str:
        """As `add`, when no more ids come."""
        waiting, self._waiting = self._waiting, []
        return self._settle(waiting)

    def push(self, ids: Sequence[int]) -> str:
        """The text so far, the new ids' included."""
        self.text += self.add(ids)
        return self.text

    def finish(self) -> str:
        """The whole text: what `Tokenizer.decode` says of all ids."""
        self.text += self.rest()
        return self.text

    def _settle(self, ids: list[int]) -> str:
        if not ids:
            return ""
        decode = self._tokenizer.decode
        text = decode(self._window + ids)[len(decode(self._window)) :]
        self._window = ids if decode(ids) else self._window + ids
        return text
