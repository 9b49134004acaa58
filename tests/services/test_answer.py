"""An answer between the mesh and its readers: one end, whole text, corrections, bounded memory."""

from __future__ import annotations

import asyncio
import dataclasses
import io

import pytest

from coordinator import instructions as do
from coordinator.events import StopMatched
from services.answer import PIECE_TOKENS_MAX, Answer
from services.answer_book import UNSEEN_SHARE, AnswerBook, Record
from services.answer_codec import piece_to_proto
from services.answer_view import AnswerView
from services.detokenizer import BytesDetokenizer
from services.request_ids import request_key, show_id
from services.stream_checker import StreamChecker
from stagemesh.checksum import chain_next, chain_start
from stagemesh.errors import InvalidRequest, Overloaded, RequestUnknown, RouteUnavailable
from stagemesh.guards import Counters
from stagemesh.token import TokenChunk, ValidationStatus

REQUEST = bytes(range(16))
PIECES = tuple(bytes([index]) for index in range(256))
SUMMARY = do.RequestSummary(prompt_tokens=3, completion_tokens=0)


def chunks(text: bytes, *, first: int = 0, epoch: int = 1) -> tuple[TokenChunk, ...]:
    link = chain_start(REQUEST, (1, 2, 3))
    made = []
    for index, token_id in enumerate(text, first):
        link = chain_next(link, 3 + index, token_id)
        made.append(
            TokenChunk(
                REQUEST, 3 + index, token_id, epoch, 1, 0.0, 1.0, 0, "stage-1", link,
                status=ValidationStatus.VALID,
            ).sealed()
        )  # fmt: skip
    return tuple(made)


def answer(*, stops=(), silent=frozenset(), counters=None) -> tuple[Answer, list]:
    fed: list = []
    made = Answer(
        REQUEST,
        make_detokenizer=lambda: BytesDetokenizer(PIECES),
        stops=stops,
        silent=silent,
        feed=fed.append,
        wall_clock_ns=lambda: 17,
        counters=counters,
    )
    return made, fed


def accept(one: Answer, text: bytes, *, first: int = 0, epoch: int = 1, verified: int = 0) -> None:
    one.accept(do.AcceptTokens(REQUEST, first, chunks(text, first=first, epoch=epoch), verified))


def finish(one: Answer, reason: str = "length") -> None:
    one.finish(do.FinishRequest(REQUEST, reason, SUMMARY))


async def read(one: Answer, first: int = 0) -> list:
    return [piece async for piece in one.read(first)]


async def test_a_reader_gets_tokens_text_and_one_end_whenever_it_comes():
    one, _ = answer()
    early = asyncio.ensure_future(read(one))
    await asyncio.sleep(0)
    accept(one, b"Hello ")
    await asyncio.sleep(0)
    accept(one, "wörld😀".encode(), first=6)
    finish(one)
    for pieces in (await early, await read(one)):
        assert "".join(piece.text for piece in pieces) == "Hello wörld😀"
        assert [piece.end is not None for piece in pieces].count(True) == 1
        assert pieces[-1].end is not None
        assert sum(len(piece.chunks) for piece in pieces) == 6 + len("wörld😀".encode())


async def test_a_reader_from_a_position_gets_the_text_that_its_tokens_add():
    one, _ = answer()
    accept(one, "a😀b".encode())
    finish(one)
    assert "".join(piece.text for piece in await read(one, 2)) == "😀b"
    assert (await read(one, 6))[0].end is not None
    with pytest.raises(InvalidRequest):
        await read(one, 7)


async def test_a_stop_string_is_reported_once_and_what_follows_is_dropped():
    one, fed = answer(stops=["END"])
    accept(one, b"fine E")
    assert one.text == "fine "
    accept(one, b"ND more", first=6)
    assert fed == [StopMatched(REQUEST, 8, "END", one.tokens[-1].chain)]
    accept(one, b"!", first=8)
    finish(one, "stop")
    pieces = await read(one)
    assert "".join(piece.text for piece in pieces) == "fine "
    assert sum(len(piece.chunks) for piece in pieces) == 8


def test_a_stop_string_in_text_that_was_withdrawn_is_not_found_again_behind_a_restart():
    one, fed = answer(stops=["END"])
    kept = [
        (do.AcceptTokens(REQUEST, 0, chunks(b"fine END"), 0), 1),
        (do.CorrectTokens(REQUEST, 5, "SHADOW_MISMATCH"), 0),
        (do.AcceptTokens(REQUEST, 5, chunks(b"and on", first=5), 0), 1),
    ]
    assert one.restore(kept) == fed == []
    assert one.text == "fine and on"
    accept(one, b" END", first=11)
    assert [event.kept for event in fed] == [15]


async def test_what_was_held_back_for_a_stop_string_is_released_at_the_end():
    one, fed = answer(stops=["END"])
    accept(one, b"the E")
    finish(one)
    assert one.text == "the E"
    assert fed == []


async def test_no_more_tokens_are_verified_than_the_answer_has():
    one, _ = answer(stops=["END"])
    accept(one, b"fine END", verified=2)
    accept(one, b" more", first=8, verified=13)
    one.advance(do.AdvanceVerified(REQUEST, 13))
    finish(one, "stop")
    assert [piece.verified_through for piece in await read(one)] == [8, 8]


async def test_silent_tokens_count_and_yield_no_text():
    one, _ = answer(silent=frozenset({ord("$")}))
    accept(one, b"ab$")
    finish(one, "stop")
    assert (one.text, len(one.tokens)) == ("ab", 3)


async def test_repeated_tokens_and_a_second_end_change_nothing():
    one, _ = answer()
    accept(one, b"abc")
    accept(one, b"bc", first=1)
    accept(one, b"x", first=9)
    finish(one)
    one.fail(do.FailRequest(REQUEST, RouteUnavailable("late"), SUMMARY))
    accept(one, b"d", first=3)
    assert one.text == "abc"
    assert one.end is not None
    assert one.end.error is None


async def test_a_correction_reaches_readers_that_saw_the_wrong_tokens_and_no_others():
    one, _ = answer()
    accept(one, "aé".encode())
    reader = one.read()
    first = await anext(reader)
    assert first.text == "aé"
    one.correct(do.CorrectTokens(REQUEST, 2, "TOKEN_REJECTED"))
    accept(one, b"\xa8!", first=2)
    corrected = await anext(reader)
    assert corrected.withdrawal is not None
    assert corrected.withdrawal.from_index == 2
    assert corrected.withdrawal.from_character == 1
    assert (await anext(reader)).text == "è!"
    finish(one)
    late = await read(one)
    assert all(piece.withdrawal is None for piece in late)
    assert "".join(piece.text for piece in late) == "aè!"


def linked(text: bytes, *, first: int, before: bytes) -> do.AcceptTokens:
    """Tokens that follow on the link ``before``."""
    made = []
    for index, token_id in enumerate(text, first):
        before = chain_next(before, 3 + index, token_id)
        made.append(dataclasses.replace(chunks(b"x")[0], position=3 + index, token_id=token_id,
                                        chain=before).sealed())  # fmt: skip
    return do.AcceptTokens(REQUEST, first, tuple(made), 0)


@pytest.mark.parametrize("regrown", [b"", b"CD", b"CDEFGHI"])
async def test_a_reader_that_was_away_during_a_correction_is_told_of_it(regrown):
    one, _ = answer()
    accept(one, b"abcdef")
    client = StreamChecker(REQUEST, (1, 2, 3))
    client.check(piece_to_proto(one.request_id, await anext(one.read())))
    one.correct(do.CorrectTokens(REQUEST, 4, "SHADOW_MISMATCH"))
    one.accept(linked(b"xyz", first=4, before=one.tokens[3].chain))
    up_to_date = StreamChecker(REQUEST, (1, 2, 3))
    up_to_date.check(piece_to_proto(one.request_id, await anext(one.read())))
    one.correct(do.CorrectTokens(REQUEST, 2, "SHADOW_MISMATCH"))
    one.accept(linked(regrown, first=2, before=one.tokens[1].chain))
    for reader in (client, up_to_date):
        reader.attach(from_start=False)
        stream = one.read(reader.position, reader.link)
        while reader.text != "ab" + regrown.decode():
            reader.check(piece_to_proto(one.request_id, await anext(stream)))
        assert reader.link == one.tokens[-1].chain
        again = asyncio.ensure_future(anext(one.read(reader.position, reader.link)))
        await asyncio.sleep(0)
        one.advance(do.AdvanceVerified(REQUEST, one.verified_through + 1))
        assert (await again).withdrawal is None


async def test_a_correction_takes_the_right_text_back_from_who_began_to_read_later():
    one, _ = answer(stops=["never"])
    accept(one, "é😀b".encode())
    checker = StreamChecker(REQUEST, first_index=2)
    view = AnswerView(one.request_id, first_index=2, stream=io.StringIO())
    stream = one.read(2)

    async def follow() -> None:
        response = piece_to_proto(one.request_id, await anext(stream))
        checker.check(response)
        view.show(response)

    await follow()
    assert checker.text == view.text == "😀b"
    one.correct(do.CorrectTokens(REQUEST, 6, "SHADOW_MISMATCH"))
    one.accept(linked(b"cd", first=6, before=one.tokens[-1].chain))
    await follow()
    assert checker.text == view.text == "😀"
    await follow()
    finish(one)
    assert checker.text == view.text == "😀cd"
    assert checker.token_ids == view.token_ids == list("😀cd".encode())


async def test_text_that_begins_anew_is_counted_from_where_it_begins():
    one, _ = answer()
    accept(one, b"abcdef")
    checker = StreamChecker(REQUEST, first_index=2)
    stream = one.read(2)
    checker.check(piece_to_proto(one.request_id, await anext(stream)))
    one.correct(do.CorrectTokens(REQUEST, 2, "SHADOW_MISMATCH"))
    checker.check(piece_to_proto(one.request_id, await anext(stream)))
    await stream.aclose()
    one.correct(do.CorrectTokens(REQUEST, 1, "SHADOW_MISMATCH"))
    one.accept(linked("éyz".encode(), first=1, before=one.tokens[0].chain))
    checker.attach(from_start=False)
    stream = one.read(checker.position, checker.link)
    checker.check(piece_to_proto(one.request_id, await anext(stream)))
    assert checker.text == "éyz"
    one.correct(do.CorrectTokens(REQUEST, 4, "SHADOW_MISMATCH"))
    checker.check(piece_to_proto(one.request_id, await anext(stream)))
    assert checker.text == "éy"


async def test_a_correction_that_a_slow_reader_has_not_reached_is_invisible_to_it():
    one, _ = answer()
    accept(one, b"ab")
    reader = one.read()
    assert (await anext(reader)).text == "ab"
    accept(one, b"cx", first=2)
    one.correct(do.CorrectTokens(REQUEST, 3, "TOKEN_REJECTED"))
    accept(one, b"d", first=3)
    assert (await anext(reader)).text == "cd"


async def test_a_piece_never_mixes_epochs_and_never_grows_without_bound():
    one, _ = answer()
    accept(one, b"x" * (PIECE_TOKENS_MAX + 10))
    accept(one, b"y" * 5, first=PIECE_TOKENS_MAX + 10, epoch=2)
    finish(one)
    pieces = [piece for piece in await read(one) if piece.chunks]
    assert [len(piece.chunks) for piece in pieces] == [PIECE_TOKENS_MAX, 10, 5]
    assert [piece.epoch for piece in pieces] == [1, 1, 2]


async def test_the_watermark_reaches_readers_even_without_tokens():
    one, _ = answer()
    accept(one, b"abc")
    reader = one.read()
    assert (await anext(reader)).verified_through == 0
    one.advance(do.AdvanceVerified(REQUEST, 2))
    piece = await anext(reader)
    assert (piece.verified_through, piece.chunks) == (2, ())


def record(
    number: int, *, ended: bool, tokens: int = 0, readers: int = 0, kind: type[Answer] = Answer
) -> Record:
    one = kind(
        number.to_bytes(16, "big"),
        make_detokenizer=lambda: BytesDetokenizer(PIECES),
        feed=lambda event: None,
        wall_clock_ns=lambda: 0,
    )
    accept(one, b"x" * tokens)
    if ended:
        finish(one)
    return Record(one, b"", 1, 0, readers=readers)


def test_the_book_forgets_the_oldest_ended_answers_and_never_a_running_or_read_one():
    book = AnswerBook(ended_max=2)
    book.add(record(1, ended=False))
    book.add(record(2, ended=True, readers=1))
    for number in range(3, 8):
        book.add(record(number, ended=True))
    kept = [int.from_bytes(one.answer.request, "big") for one in book.newest_first()]
    assert 1 in kept
    assert 2 in kept
    assert 3 not in kept
    assert 7 in kept
    with pytest.raises(RequestUnknown):
        book.get((3).to_bytes(16, "big"))


def test_the_book_is_bounded_in_tokens_too():
    book = AnswerBook(ended_max=100, tokens_max=50)
    for number in range(10):
        book.add(record(number, ended=True, tokens=20))
    assert len(book) <= 3


class WatchedAnswer(Answer):
    """Counts how often somebody looks whether one has ended."""

    looks = 0
    _end = None

    @property
    def end(self):
        WatchedAnswer.looks += 1
        return self._end

    @end.setter
    def end(self, value):
        self._end = value


def test_a_request_costs_the_book_the_same_however_many_answers_it_keeps():
    def looks_per_request(kept: int) -> float:
        book = AnswerBook(ended_max=10_000)
        for number in range(kept + 200):
            if number == kept:
                WatchedAnswer.looks = 0
            book.add(record(number, ended=True, kind=WatchedAnswer))
        return WatchedAnswer.looks / 200

    assert 0 < looks_per_request(2000) < 3 * looks_per_request(100)


def test_a_book_of_many_exceeds_its_limit_by_no_more_than_it_has_not_looked_at():
    book = AnswerBook(ended_max=640)
    for number in range(2000):
        book.add(record(number, ended=True))
    assert 640 <= len(book) <= 640 * (1 + 2 * UNSEEN_SHARE)


def test_an_id_that_is_being_started_is_not_taken_twice():
    book = AnswerBook(ended_max=5)
    book.add(record(1, ended=False))
    with pytest.raises(Overloaded):
        book.add(record(1, ended=False))


def test_ids_are_shown_as_uuids():
    assert show_id(REQUEST) == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert request_key(show_id(REQUEST)) == REQUEST
    with pytest.raises(InvalidRequest, match="not a UUID"):
        request_key("seven")


@pytest.mark.parametrize(
    ("text", "signals"),
    [
        (b"ha" * 300, ("repetition",)),
        (b"\xff\xfe" * 60 + b"and more of it", ("replacement",)),
        (
            "Le café était fermé; Zoë mangea 12 crêpes – ----- {x: [1, 2]} 東京 👩‍💻".encode(),
            (),
        ),
        (b"aaaa", ()),  # too short to say anything
    ],
)
async def test_odd_text_is_counted_at_the_end_and_changes_nothing(text, signals):
    counters = Counters()
    one, fed = answer(counters=counters)
    accept(one, text)
    assert one.advice == ()
    finish(one)
    finish(one)
    assert set(one.advice) == set(signals)
    assert counters == {f"text_signals.{name}": 1 for name in signals}
    assert not counters.unregistered()
    assert fed == []
    pieces = await read(one)
    assert "".join(piece.text for piece in pieces) == text.decode(errors="replace")
    assert pieces[-1].end.reason == "length"
