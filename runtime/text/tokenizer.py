"""Convert between token ids and text with SentencePiece, for complete lists and incrementally.

This module does not depend on blanks, frames or streams.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import sentencepiece

from nemostream.bundle import Bundle
from nemostream.errors import BundleError
from nemostream.runtime.streaming.compiled import DetokenizerFields
from nemostream.runtime.text.scripts import CLOSING, begins_word
from nemostream.untrusted import MIB, read_regular

_MAX_BYTES = 64 * MIB
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_LANGUAGE_PIECE = re.compile(r"\u2581?<([a-z]{2}-[A-Z]{2})>")  # NeMo's `lang_tag_pattern` (`rnnt_decoding.py`)


class Tokenizer:
    """The SentencePiece model of a bundle, with `vocabulary` pieces. Thread-safe.

    Some models emit *tags*: the language of the text before them (`<de-DE>`), the end of an utterance (`<EOU>`), or a
    backchannel (`<EOB>`). Tags are not part of any text. White space before a tag is removed with it, and so is white
    space at both ends of a text, as in NeMo (`decode_tokens_to_str_with_strip_punctuation`, `strip_lang_tags`). Without
    tags in the vocabulary, all texts equal those of SentencePiece.

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
            languages = {i: m[1] for i, piece in enumerate(self._pieces) if (m := _LANGUAGE_PIECE.fullmatch(piece))}
            self.languages: Mapping[int, str] = MappingProxyType(languages)  # by id of a tag: its language, "de-DE"
            self.end_of_utterance = self._find_tag("<EOU>")
            self.backchannel = self._find_tag("<EOB>")
            controls = (self.end_of_utterance, self.backchannel)
            self.tags = frozenset(languages).union(token for token in controls if token is not None)
            self.texts = tuple(self._piece_text(i) for i in range(size))  # by id: see `piece`
            self._model.decode(list(range(size)))  # find invalid pieces now, not in a stream
        except BundleError:
            raise
        except (OSError, RuntimeError, ValueError, LookupError) as error:  # ValueError: not UTF-8
            raise BundleError(f"{path} is not a SentencePiece model; copy or export the bundle again.") from error
        self.added_texts = self._find_added_texts()
        self.word_starts = tuple(map(begins_word, self.texts))  # by id: whether it starts a word
        # By id: whether it is only punctuation that belongs to the preceding word, even after a space.
        self.closing_punctuation = tuple(bool(text.strip()) and CLOSING.issuperset(text.strip()) for text in self.texts)
        # Tags and pieces of white space, if there are tags: they are not visible in a text that contains nothing else.
        spaces = {i for i, text in enumerate(self.texts) if text.isspace()} if self.tags else set()
        self.invisible = self.tags | spaces
        self._bytes = {i: int(m[1], 16) for i, p in enumerate(self._pieces) if (m := _BYTE_PIECE.fullmatch(p))}
        # SentencePiece drops a space at the start of a text: text after a tag is decoded together with this piece.
        self.anchor = [self.unknown] if self.tags else []

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Tokenizer:
        """Return the tokenizer of a bundle. Raises `BundleError` if it is damaged."""
        return cls(bundle.path / bundle.manifest.tokenizer.file, bundle.manifest.decoder.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that starts at a word boundary; `unknown` for characters without a piece.

        The name of a tag in the text is encoded by its characters, never as the tag.
        """
        ids: list[int] = []
        for token in self._model.encode(text):
            ids += map(self._model.piece_to_id, self._pieces[token]) if token in self.tags else [token]
        return ids

    def without_space(self, ids: Sequence[int]) -> list[int]:
        """Return ids for the same text without the space at its start; none if the vocabulary has no piece for it."""
        text = self.texts[ids[0]]
        if text[:1] != " ":
            return list(ids)
        first = self._model.piece_to_id(text[1:]) if text[1:] else None
        return [] if first == self.unknown else [*([] if first is None else [first]), *ids[1:]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a complete list of ids, as SentencePiece does, without tags."""
        text = ""
        for tags, group in itertools.groupby(ids, self.tags.__contains__):
            text = text.rstrip() if tags else text + self.decode_after(self.anchor, list(group))
        return text.strip() if self.tags else text

    def decode_after(self, before: list[int], ids: list[int]) -> str:
        """Return the text that `ids` add to that of `before`. Neither contains tags."""
        return self._model.decode(before + ids)[len(self._model.decode(before)) :]

    def _find_added_texts(self) -> tuple[str | None, ...]:
        """Return for each id the text that it adds after any id for which this is not None.

        None for ids that SentencePiece must decode together with others, or that add nothing visible; for all ids if
        there are tags, which change the text around them.
        """
        visible = [i for i, text in enumerate(self.texts) if text.strip() and not _BYTE_PIECE.fullmatch(text)]
        added: list[str | None] = [None] * self.vocabulary
        if visible and not self.tags:
            first = self._model.decode([visible[0]])
            for i, text in zip(visible, self._model.decode([[visible[0], i] for i in visible]), strict=True):
                if text == first + self.texts[i]:
                    added[i] = self.texts[i]
        return tuple(added)

    def _find_tag(self, name: str) -> int | None:
        token = self._model.piece_to_id(name)
        return None if token == self.unknown else token

    def piece(self, token: int) -> str:
        """Return the text of a single token with its leading space; "" for a tag, `<0xE2>` for a byte piece."""
        return self.texts[token]

    def count_incomplete(self, ids: Sequence[int]) -> int:
        """Return the number of ids at the end that are byte pieces of an incomplete character (0 to 3)."""
        start = len(ids)
        while start and ids[start - 1] in self._bytes:
            start -= 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(self._bytes[i] for i in ids[start:]))
        return len(decoder.getstate()[0])

    def _piece_text(self, token: int) -> str:
        if token in self.tags or self._model.is_control(token):
            return ""
        if self._model.is_unknown(token):
            return self._model.decode([token])
        return self._pieces[token].replace("\u2581", " ")


class Detokenizer(DetokenizerFields):
    """Incremental text of one stream, in time proportional to the new tokens.

    Every returned text is a prefix of all later ones: the bytes of an incomplete character are held back. If the
    vocabulary has tags, so is white space, until visible text follows it.
    """

    __slots__ = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._added_texts = tokenizer, tokenizer.added_texts
        self.text = ""
        # The last tokens already in `text`, with at least one character. SentencePiece drops a leading space, so new
        # tokens are decoded together with them.
        self._window = tokenizer.anchor
        # Instead of the window: the last token, if it has an added text and no byte piece follows it
        self._last: int | None = None
        self._incomplete: list[int] = []  # byte pieces of an incomplete character
        self._space = ""  # white space that was held back
        self._begun = False  # whether the text has a visible character; only used if the vocabulary has tags

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that the new ids add. `text` is not updated."""
        added = self._added_texts
        if self._last is not None:
            texts = [text for id_ in ids if (text := added[id_]) is not None]
            if len(texts) == len(ids):  # most tokens: the result is the same without SentencePiece
                self._last = ids[-1] if ids else self._last
                return "".join(texts)
            self._window, self._last = [self._last], None
        ids = [*self._incomplete, *ids]
        complete = len(ids) - self._tokenizer.count_incomplete(ids)
        self._incomplete = ids[complete:]
        text = self._decode_new(ids[:complete])
        if self._window and not self._incomplete and added[self._window[-1]] is not None:
            self._last = self._window[-1]
        return text

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
        tokenizer = self._tokenizer
        if not tokenizer.tags:
            return self._decode_visible(ids)
        text = ""
        for tags, group in itertools.groupby(ids, tokenizer.tags.__contains__):
            if tags:
                self._window, self._space = tokenizer.anchor, ""
            else:
                text += self._hold_space(self._decode_visible(list(group)))
        return text

    def _hold_space(self, text: str) -> str:
        """Return `text` after the white space that was held back; hold back the white space at its end."""
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        visible = text.rstrip()
        self._space, self._begun = text[len(visible) :], self._begun or bool(visible)
        return visible

    def _decode_visible(self, ids: list[int]) -> str:
        """Return the text that ids without tags add."""
        if not ids:
            return ""
        text = self._tokenizer.decode_after(self._window, ids)
        self._window = ids if self._tokenizer.decode_after([], ids) else self._window + ids
        return text
