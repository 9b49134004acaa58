"""Token ids to whole characters, one detokenizer per answer.

A token of a byte-level vocabulary may hold half a character, so text is only given out once it is
certain: bytes that do not yet make a character wait for the tokens that complete them, and
`finish` gives out what is left (as U+FFFD, if it never became a character). What all calls
returned together equals the tokenizer's own decoding of all ids. Three kinds of vocabulary:

* byte level (GPT-2 style): every token is a run of bytes, written as printable stand-ins;
* byte fallback (SentencePiece style): a token is text with a mark for the space, or one byte
  ``<0xE4>``;
* anything else: the tokenizer decodes a short window of ids twice, without and with the new one,
  and the difference is what the new one adds.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
WINDOW_TOKENS_MAX = 16
"""Ids an undecided window may hold; a character never takes that many tokens."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


class Detokenizer(Protocol):
    """Incremental: feed ids in order, finish once."""

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; often empty, never half a character."""

    def finish(self) -> str:
        """What was held back."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """What detokenizers of one tokenizer share. ``pieces[id]``: a token's bytes, where fixed."""

    pieces: tuple[bytes, ...]
    strip_first_space: bool
    decode: Callable[[Sequence[int]], str]

    def detokenizer(self) -> Detokenizer:
        """A fresh one."""
        if self.pieces:
            return BytesDetokenizer(self.pieces, strip_first_space=self.strip_first_space)
        return WindowDetokenizer(self.decode)


class BytesDetokenizer:
    """For vocabularies in which every token is a fixed run of bytes."""

    __slots__ = ("_decoder", "_pieces", "_strip")

    def __init__(self, pieces: Sequence[bytes], *, strip_first_space: bool = False) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = strip_first_space

    def add(self, token_id: int) -> str:
        """See Detokenizer. An id beyond the vocabulary (a padded row) has no text."""
        piece = self._pieces[token_id] if token_id < len(self._pieces) else b""
        return self._stripped(self._decoder.decode(piece))

    def finish(self) -> str:
        """See Detokenizer."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """For any tokenizer that can decode a list of ids.

    ``_ids[:_given]`` is context whose text was given out: decoding starts there so that what a
    tokenizer does to the beginning of a text (dropping a space, say) happens to both sides of the
    comparison.
    """

    __slots__ = ("_decode", "_given", "_ids")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        """See Detokenizer."""
        self._ids.append(token_id)
        added = self._added()
        undecided = len(self._ids) - self._given
        if not added or (added.endswith(REPLACEMENT) and undecided < WINDOW_TOKENS_MAX):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return added

    def finish(self) -> str:
        """See Detokenizer."""
        added = self._added()
        self._ids, self._given = [], 0
        return added

    def _added(self) -> str:
        before = self._decode(self._ids[: self._given]) if self._given else ""
        return self._decode(self._ids)[len(before) :]


def token_table(tokenizer: Any) -> TokenTable:
    """Look at a transformers tokenizer and choose how to decode it. Called once per model."""

    def decode(token_ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return TokenTable((), False, decode)
    document = json.loads(backend.to_str())
    kind, strip = _kind_of(document.get("decoder"))
    if kind is None:
        return TokenTable((), False, decode)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    to_bytes = _byte_level_piece if kind == "byte level" else _byte_fallback_piece
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, token_id in vocabulary.items():
        pieces[token_id] = to_bytes(text)
    table = TokenTable(tuple(pieces), strip, decode)
    return table if _agrees(table, tokenizer) else TokenTable((), False, decode)


_PROBE = "Hello,  world! naïve é 你好 😀👩‍👩‍👧 e\u0301\n\tif x<=1: pass"
"""Decoded both ways when a table is made: a table that is wrong about a tokenizer is not used."""


def _agrees(table: TokenTable, tokenizer: Any) -> bool:
    token_ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    incremental = table.detokenizer()
    text = "".join(incremental.add(token_id) for token_id in token_ids) + incremental.finish()
    return text == table.decode(token_ids)


def _kind_of(decoder: Any) -> tuple[str | None, bool]:
    """(kind, drop one space at the very beginning) of a decoder as tokenizer.json describes it."""
    if not isinstance(decoder, dict):
        return None, False
    if decoder.get("type") == "ByteLevel":
        return "byte level", False
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else None
    if not isinstance(steps, list):
        return None, False
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte level", False
    marked = steps[0].get("pattern") == {"String": _SPACE_MARK} and steps[0].get("content") == " "
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or not marked:
        return None, False
    if kinds[3:] == []:
        return "byte fallback", False
    strip = {key: steps[3].get(key) for key in ("type", "content", "start", "stop")}
    if len(steps) == 4 and strip == {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
        return "byte fallback", True
    return None, False


def _byte_stand_ins() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return stand_ins | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_STAND_INS = _byte_stand_ins()


def _byte_level_piece(text: str) -> bytes:
    """A token with a character that stands for no byte (an added token) is plain text."""
    found = [_STAND_INS.get(character) for character in text]
    if any(byte is None for byte in found):
        return text.encode()
    return bytes(byte for byte in found if byte is not None)


def _byte_fallback_piece(text: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(text)
    if match is not None:
        return bytes([int(match[1], 16)])
    return text.replace(_SPACE_MARK, " ").encode()
