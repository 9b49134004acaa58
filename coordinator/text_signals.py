"""Advisory signals about text: telemetry, never a verdict.

Measured on streams that faults had really changed, all text heuristics together found 8 % of them,
and a small model's clean greedy output repeats itself in up to 92 % of its 4-grams. So nothing here
may refuse a token, change output or start a recovery. A signal may be counted, shown, or spend a
little of the audit budget on a shadow check.

What cannot be seen here, by construction: fluent text that is wrong, and word salad. Both are legal
output; only a reference that recomputes the tokens can tell.

``TextSignals`` reads finished text only (the detokenizer holds back incomplete UTF-8): U+FFFD in
text that is still being decoded is nothing at all, and bytes that are not UTF-8 are legal output of
a model too. Memory is bounded by ``window_characters``."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_CHARACTERS = 2048
"""How much of the end of a text is looked at."""
WINDOW_TOKENS = 512
SIGNAL_CHARACTERS_MIN = 64
"""Below this much text no ratio means anything."""
NGRAM = 4

_REPLACEMENT = "\ufffd"
_MOJIBAKE = ("Ã©", "Ã¨", "Ã¼", "Ã¶", "Ã¤", "Ã±", "â€™", "â€œ", "â€\x9d", "Â ", "ï»¿", "â€“")
"""UTF-8 read as Windows-1252 looks like this; each is two or three characters no language puts
together."""


@dataclass(frozen=True, slots=True)
class SignalPolicy:
    """Where a measure becomes a signal. Ratios are of characters, or of 4-grams of token ids."""

    replacement_ratio: float = 0.2
    mojibake_ratio: float = 0.05
    repetition_ratio: float = 0.97
    entropy_bits_min: float = 0.3


@dataclass(frozen=True, slots=True)
class TextReading:
    """Measures of the window. ``entropy_bits``: of its characters, bits per character."""

    characters: int
    replacement_ratio: float
    mojibake_ratio: float
    repetition_ratio: float
    entropy_bits: float
    signals: tuple[str, ...]


class TextSignals:
    """One stream's text as it is finished. ``observe`` adds, ``read`` measures."""

    def __init__(self, policy: SignalPolicy | None = None) -> None:
        self.policy = policy or SignalPolicy()
        self._characters: deque[str] = deque(maxlen=WINDOW_CHARACTERS)
        self._token_ids: deque[int] = deque(maxlen=WINDOW_TOKENS)

    def observe(self, text: str, token_ids: Sequence[int] = ()) -> None:
        """Text that is final, and the ids it came from."""
        self._characters.extend(text)
        self._token_ids.extend(token_ids)

    def read(self) -> TextReading:
        """The measures now; ``signals`` names those past the policy, empty for short text."""
        text = "".join(self._characters)
        count = len(text)
        reading = TextReading(
            characters=count,
            replacement_ratio=text.count(_REPLACEMENT) / count if count else 0.0,
            mojibake_ratio=_mojibake_ratio(text),
            repetition_ratio=repetition_ratio(tuple(self._token_ids)),
            entropy_bits=entropy_bits(text),
            signals=(),
        )
        return reading if count < SIGNAL_CHARACTERS_MIN else _judged(reading, self.policy)


def _judged(reading: TextReading, policy: SignalPolicy) -> TextReading:
    rules = (
        ("replacement", reading.replacement_ratio > policy.replacement_ratio),
        ("mojibake", reading.mojibake_ratio > policy.mojibake_ratio),
        ("repetition", reading.repetition_ratio > policy.repetition_ratio),
        ("entropy", reading.entropy_bits < policy.entropy_bits_min),
    )
    return TextReading(
        reading.characters,
        reading.replacement_ratio,
        reading.mojibake_ratio,
        reading.repetition_ratio,
        reading.entropy_bits,
        tuple(name for name, holds in rules if holds),
    )


def repetition_ratio(token_ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the window; 0 for fewer than two 4-grams."""
    grams = [tuple(token_ids[i : i + NGRAM]) for i in range(len(token_ids) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def entropy_bits(text: str) -> float:
    """Shannon entropy of the characters, bits per character; 0 for empty text."""
    total = len(text)
    counts = Counter(text).values()
    return sum(-count / total * math.log2(count / total) for count in counts) if total else 0.0


def _mojibake_ratio(text: str) -> float:
    if text.isascii():
        return 0.0
    found = sum(text.count(piece) * len(piece) for piece in _MOJIBAKE)
    return found / len(text)
