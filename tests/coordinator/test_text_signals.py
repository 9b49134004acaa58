"""Text signals are advisory; legal but odd text raises none, and some corruption cannot be seen at
all."""

from __future__ import annotations

import random

import pytest

from coordinator.text_signals import (
    SIGNAL_CHARACTERS_MIN,
    WINDOW_CHARACTERS,
    TextSignals,
    entropy_bits,
    repetition_ratio,
)


def signals_of(text: str, token_ids=()) -> tuple[str, ...]:
    reader = TextSignals()
    reader.observe(text, token_ids)
    return reader.read().signals


@pytest.mark.parametrize(
    "text",
    [
        "😀🎉👩‍👩‍👧‍👦🇨🇭" * 20,
        "你好,世界。這是一個測試。" * 10,
        "สวัสดีชาวโลก " * 10,
        "Zalgo: " + "e\u0301\u0302\u0303\u0323" * 30,
        "def f(x):\n\treturn {k: v for k, v in x.items() if k}\n" * 4,
        "\n\n\t\t  \r\n" * 40,
        "| a | b |\n|----|----|\n" + "| é | ü |\n" * 20,
        "naïve café, façade, Ångström, “quoted” – dashed… €5 " * 4,
        "The quick brown fox jumps over the lazy dog. " * 6,
        "one bad byte \ufffd in a long and otherwise quite ordinary piece of text " * 2,
        "0123456789abcdef" * 10,
        "مرحبا بالعالم " * 12,
    ],
)
def test_legal_but_odd_text_raises_no_signal(text):
    assert len(text) >= SIGNAL_CHARACTERS_MIN
    assert signals_of(text, range(len(text))) == ()


@pytest.mark.parametrize("text", ["", "\n", "é", "你好", "😀", "----", "\ufffd\ufffd"])
def test_short_text_is_never_judged(text):
    assert signals_of(text, [1] * 500) == ()


def test_a_rule_of_dashes_is_low_entropy_and_only_ever_a_signal():
    assert signals_of("-" * 200) == ("entropy",)


def test_double_decoded_text_is_a_mojibake_signal():
    original = "Führer für größere Äpfel und süße Öfen, é à è " * 4
    assert "mojibake" in signals_of(original.encode().decode("cp1252", "replace"))


def test_mostly_replacement_characters_are_a_signal():
    assert "replacement" in signals_of("\ufffd" * 80 + "abcdefgh" * 4)


def test_an_endless_loop_is_a_repetition_signal():
    assert "repetition" in signals_of("round and round and " * 20, [1, 2, 3, 4] * 100)


def test_word_salad_is_undetectable_here():
    """Known and accepted: only a reference that recomputes the tokens can tell."""
    words = ["river", "quantum", "teapot", "although", "seven", "glass", "merely", "orange"]
    rng = random.Random(1)
    salad = " ".join(rng.choice(words) for _ in range(200))
    assert signals_of(salad, [rng.randrange(50_000) for _ in range(200)]) == ()


def test_memory_is_bounded_and_the_end_of_the_text_is_what_counts():
    reader = TextSignals()
    reader.observe("\ufffd" * 5000)
    reader.observe("plain words again, and again some more of them. " * 60)
    reading = reader.read()
    assert reading.characters == WINDOW_CHARACTERS
    assert reading.signals == ()


def test_measures_of_nothing_are_zero():
    assert entropy_bits("") == 0.0
    assert entropy_bits("abab") == 1.0
    assert repetition_ratio([1, 2, 3]) == 0.0
    assert repetition_ratio([1] * 10) == pytest.approx(1 - 1 / 7)
