"""Incremental text equals the tokenizer's own decoding, and never contains half a character."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.detokenizer import (
    REPLACEMENT,
    WINDOW_TOKENS_MAX,
    BytesDetokenizer,
    WindowDetokenizer,
    token_table,
)
from services.tokenizer import load_tokenizer
from stage_worker.model_source import resolve
from stagemesh.errors import ModelRefused

TEXTS = (
    "plain English, with commas; and (brackets).",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji with joiners",
    "你好，世界。日本語のテキストと한국어",
    "e\u0301a\u0308o\u0302 combining, naïve café Ω≈ç√",
    "def f(x):\n\tif x <= 1:\n        return 'ok'  # two  spaces\n\n",
    " leading space",
    "العربية עברית हिन्दी ไทย",
    "\x00\x01 controls \x7f",
)


def streamed(detokenizer, token_ids) -> str:
    return "".join(detokenizer.add(one) for one in token_ids) + detokenizer.finish()


class Fast:
    """What `token_table` needs of a transformers tokenizer, around a bare one."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids, **_options) -> str:
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=False)


def sentencepiece_like(*, strip: bool) -> Fast:
    """A byte-fallback vocabulary with the space mark, as Llama 2 has it."""
    words = ["▁Hello", "▁world", "▁", "lo", "你", "好", "é", "▁▁", "x", "\n"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)
    return Fast(backend)


@pytest.fixture(scope="module")
def byte_level(echo_model):
    return echo_model.tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_text_comes_back_whole(byte_level, text):
    token_ids = byte_level.encode(text)
    assert streamed(byte_level.detokenizer(), token_ids) == byte_level.decode(token_ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_ever_holds_half_a_character(byte_level, text):
    detokenizer = byte_level.detokenizer()
    pieces = [detokenizer.add(token_id) for token_id in byte_level.encode(text)]
    assert REPLACEMENT not in "".join(pieces)
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)


@given(token_ids=st.lists(st.integers(0, 996), max_size=60))
@settings(deadline=None)
def test_any_ids_at_all_give_the_tokenizers_own_text(byte_level, token_ids):
    expected = byte_level.decode(token_ids)
    assert isinstance(byte_level.detokenizer(), BytesDetokenizer)
    assert streamed(byte_level.detokenizer(), token_ids) == expected
    assert streamed(WindowDetokenizer(byte_level.decode), token_ids) == expected


@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece_style_text_keeps_and_drops_spaces_as_its_tokenizer_does(strip):
    tokenizer = sentencepiece_like(strip=strip)
    table = token_table(tokenizer)
    assert isinstance(table.detokenizer(), BytesDetokenizer)
    ids = tokenizer.get_vocab()
    emoji = [ids[f"<0x{byte:02X}>"] for byte in "😀".encode()]
    sequences = [
        [ids["▁Hello"], ids["▁world"], *emoji, ids["▁"], ids["x"]],
        [ids["▁"], ids["▁Hello"], ids["▁▁"], ids["你"], ids["好"]],
        [*emoji, ids["▁Hello"], *emoji],
        [ids["é"], ids["\n"], ids["▁"]],
    ]
    for sequence in sequences:
        expected = tokenizer.decode(sequence)
        assert streamed(table.detokenizer(), sequence) == expected
        assert streamed(WindowDetokenizer(tokenizer.decode), sequence) == expected


def test_a_character_cut_short_is_only_judged_at_the_end(byte_level):
    detokenizer = byte_level.detokenizer()
    assert detokenizer.add(195) == ""
    assert detokenizer.finish() == REPLACEMENT
    whole = byte_level.detokenizer()
    assert (whole.add(195), whole.add(169)) == ("", "é")


def test_an_id_beyond_the_vocabulary_has_no_text():
    assert streamed(BytesDetokenizer([b"a"]), [0, 7, 0]) == "aa"


def test_an_unknown_decoder_falls_back_to_windows_of_the_tokenizers_own_decoding():
    vocabulary = {"▁a": 0, "▁b": 1, "c": 2, "[UNK]": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    backend.decoder = decoders.Metaspace()
    table = token_table(Fast(backend))
    detokenizer = table.detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    chooser = random.Random(5)
    for _ in range(50):
        sequence = [chooser.randrange(3) for _ in range(chooser.randrange(1, 30))]
        assert streamed(table.detokenizer(), sequence) == backend.decode(sequence)


def test_an_undecided_window_does_not_grow_for_ever():
    window = WindowDetokenizer(lambda ids: REPLACEMENT * len(ids))
    pieces = [window.add(0) for _ in range(3 * WINDOW_TOKENS_MAX)]
    assert any(pieces)
    assert "".join(pieces) + window.finish() == REPLACEMENT * (3 * WINDOW_TOKENS_MAX)


def test_raw_text_and_chats_are_encoded_as_mlx_lm_does():
    from mlx_lm.tokenizer_utils import load as load_reference

    directory = resolve("tiny").directory
    ours, reference = load_tokenizer(directory), load_reference(directory)
    messages = [{"role": "user", "content": "What is 17 + 4?"}]
    rendered = ours.render_chat(messages)
    assert ours.encode_rendered(rendered) == reference.apply_chat_template(
        messages, add_generation_prompt=True
    )
    for text in TEXTS:
        special = reference.bos_token is None or not text.startswith(reference.bos_token)
        assert ours.encode(text) == reference.encode(text, add_special_tokens=special)


def test_a_directory_without_a_tokenizer_is_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelRefused, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
