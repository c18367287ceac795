"""Convert the `tokenizer.json` of the tokenizers library to a SentencePiece model, which a bundle contains.

transformers converts the SentencePiece model of a checkpoint with `ParakeetConverter`: the vocabulary becomes a BPE
model, whatever it was; merges are sorted by the scores of their pieces, which are not stored; user-defined and control
pieces become added tokens, and so do the language tags. Pieces and ids are the same, so decoding is. Encoding (of
boosted phrases) follows the merges.

The messages of `sentencepiece_model.proto` are written without protobuf: five types of fields are needed.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemostream.errors import CheckpointError
from nemostream.untrusted import MIB, parse_json, read_regular, short_repr

_MAX_BYTES = 16 * MIB  # the tokenizer.model of 13087 tokens has 0.4 MB
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# A special token for tokenizers, so that it can be skipped; a piece with a text for SentencePiece.
_LANGUAGE_TAG = re.compile(r"<[a-z]{2,3}-[A-Za-z]{2}>")


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


def convert_tokenizer(source: Path, target: Path, vocabulary: int) -> None:
    """Write the first `vocabulary` tokens of the `tokenizer.json` file `source` to `target`, a SentencePiece model.

    transformers adds `<blank>`, and `<pad>` if there is none, behind the vocabulary of the checkpoint. Raises
    `CheckpointError` if the file is damaged, has other tokens, or is of another type than BPE and unigram.
    """
    try:
        document = parse_json(read_regular(source, _MAX_BYTES))
        content = _model(document, vocabulary)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be used: {error}; copy the tokenizer.json, or the tokenizer.model, of the checkpoint."
        ) from error
    target.write_bytes(content)


def _model(document: Any, vocabulary: int) -> bytes:
    """Return a serialized `ModelProto`. Raises `ValueError` with a fragment of a sentence."""
    model = _object(_object(document, "the document").get("model"), "model")
    kind = model.get("type")
    if kind == "BPE":
        texts, scores, unknown = _bpe(model)
    elif kind == "Unigram":
        texts, scores, unknown = _unigram(model)
    else:
        raise ValueError(f"model.type is {short_repr(kind)}; BPE and Unigram are supported")
    special: dict[int, bool] = {}
    for token in _list(document.get("added_tokens") or [], "added_tokens"):
        entry = _object(token, "added_tokens")
        identifier, text = entry.get("id"), _text(entry.get("content"), "added_tokens.content")
        if type(identifier) is not int or texts.setdefault(identifier, text) != text:
            raise ValueError(f"the added token {short_repr(text)} has the id {short_repr(identifier)} of another token")
        special[identifier] = entry.get("special") is True
    known = set(range(vocabulary))
    if missing := sorted(known - texts.keys()):
        raise ValueError(
            f"it has no token of id {missing[0]}, but the model has {vocabulary} tokens: it belongs to another model"
        )
    if names := sorted(text for i, text in texts.items() if i not in known and i not in special):
        raise ValueError(
            f"it has {len(names)} tokens more than the {vocabulary} of the model, such as {short_repr(names[0])}: "
            "it belongs to another model"
        )
    if len({texts[i] for i in known}) < vocabulary:
        raise ValueError("a token occurs twice")
    if unknown not in known:
        raise ValueError("it has no token for unknown text")
    bytes_known = sum(bool(_BYTE_PIECE.fullmatch(texts[i])) for i in known) == 256  # SentencePiece needs all or none
    pieces = []
    for i in range(vocabulary):
        text = texts[i]
        if i == unknown:
            piece_kind = UNKNOWN
        elif bytes_known and _BYTE_PIECE.fullmatch(text):
            piece_kind = BYTE
        elif i in special:
            piece_kind = CONTROL if special[i] and not _LANGUAGE_TAG.fullmatch(text) else USER_DEFINED
        else:
            piece_kind = NORMAL
        pieces.append(_Piece(text, scores.get(i, 0.0), piece_kind))
    trainer = _TrainerSpec(_BPE if kind == "BPE" else _UNIGRAM, vocabulary, bytes_known, unknown, texts[unknown])
    return b"".join(_serialize(pieces, trainer, _charsmap(document.get("normalizer"))))


def _bpe(model: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, float], int]:
    """Return texts and scores by id, and the id of the unknown token, of a BPE model.

    SentencePiece merges the pair whose piece has the highest score; tokenizers the first pair of the list.
    """
    ids = {_text(text, "model.vocab"): i for text, i in _object(model.get("vocab"), "model.vocab").items()}
    texts = _unique(ids)
    scores: dict[int, float] = {}
    for merge in _list(model.get("merges"), "model.merges"):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"model.merges has {short_repr(merge)}, which is not a pair of tokens")
        if (merged := ids.get("".join(pair))) is None:
            raise ValueError(f"model.merges has {short_repr(merge)}, which makes no token")
        scores.setdefault(merged, -float(len(scores)))
    for i in texts:
        scores.setdefault(i, -float(len(scores)))  # a character, or a token that no merge makes
    unknown = model.get("unk_token")
    return texts, scores, ids.get(unknown, -1) if isinstance(unknown, str) else -1


def _unigram(model: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, float], int]:
    """Return texts and scores by id, and the id of the unknown token, of a unigram model."""
    texts: dict[int, str] = {}
    scores: dict[int, float] = {}
    for i, entry in enumerate(_list(model.get("vocab"), "model.vocab")):
        if not isinstance(entry, list) or len(entry) != 2 or type(entry[1]) not in (int, float):
            raise ValueError(f"model.vocab has {short_repr(entry)}, which is not a token and its score")
        if not abs(entry[1]) < 1e30:
            raise ValueError(f"model.vocab has the score {short_repr(entry[1])}, which is not a float32")
        texts[i], scores[i] = _text(entry[0], "model.vocab"), float(entry[1])
    unknown = model.get("unk_id")
    return texts, scores, unknown if type(unknown) is int else -1


def _charsmap(normalizer: Any) -> bytes:
    """Return the first precompiled normalization of a normalizer, empty if there is none."""
    if not isinstance(normalizer, dict):
        return b""
    if normalizer.get("type") == "Precompiled":
        try:
            return base64.b64decode(
                _text(normalizer.get("precompiled_charsmap"), "precompiled_charsmap"), validate=True
            )
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"normalizer.precompiled_charsmap is not base64 ({error})") from error
    parts = normalizer.get("normalizers")
    found = (_charsmap(part) for part in parts) if isinstance(parts, list) else ()
    return next((charsmap for charsmap in found if charsmap), b"")


def _unique(ids: Mapping[str, Any]) -> dict[int, str]:
    """Return texts by id. Raises `ValueError` if an id is invalid or occurs twice."""
    texts: dict[int, str] = {}
    for text, i in ids.items():
        if type(i) is not int or not 0 <= i <= 1 << 24 or i in texts:
            raise ValueError(f"the token {short_repr(text)} has the id {short_repr(i)}, which is invalid or used twice")
        texts[i] = text
    return texts


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {short_repr(value)}, not an object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {short_repr(value)}, not a list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{name} has {short_repr(value)}, which is not a text")
    return value


# -- protobuf ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TrainerSpec:
    model_type: int
    vocabulary: int
    byte_fallback: bool
    unknown: int
    unknown_piece: str


def _serialize(pieces: list[_Piece], trainer: _TrainerSpec, charsmap: bytes) -> Iterator[bytes]:
    """Yield the fields of a `ModelProto`: pieces, trainer_spec, normalizer_spec."""
    for piece in pieces:
        yield serialize_piece(piece.text, piece.score, piece.kind)
    yield _message(
        2,
        _varint(3, trainer.model_type)
        + _varint(4, trainer.vocabulary)
        + _varint(35, int(trainer.byte_fallback))
        + _varint(40, trainer.unknown)
        + b"".join(_varint(field, -1) for field in (41, 42, 43))  # no bos, eos and pad
        + _message(45, trainer.unknown_piece.encode()),
    )
    name = b"nmt_nfkc" if charsmap else b"identity"
    # add_dummy_prefix, remove_extra_whitespaces and escape_whitespaces, as the converted normalizer does
    flags = b"".join(_varint(field, 1) for field in (3, 4, 5))
    yield _message(3, _message(1, name) + _message(2, charsmap) + flags)


def serialize_piece(text: str, score: float, kind: int) -> bytes:
    """Return a piece as a field of a serialized `ModelProto`, which may be appended to others."""
    return _message(1, _message(1, text.encode()) + _tag(2, 5) + struct.pack("<f", score) + _varint(3, kind))


def _tag(field: int, wire_type: int) -> bytes:
    return _base128(field << 3 | wire_type)


def _varint(field: int, value: int) -> bytes:
    return _tag(field, 0) + _base128(value & 0xFFFF_FFFF_FFFF_FFFF)


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _base128(len(content)) + content


def _base128(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])
