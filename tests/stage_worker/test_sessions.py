"""Bookkeeping of requests on one stage: position, digest, chain and budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_worker.sessions import RowFault, Session, SessionTable
from stagemesh.checksum import chain_over, history_digest
from stagemesh.frame import RowStatus, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec

CHAIN = b"0123456789abcdef"
REQUEST = b"request-00000001"


def opening(prompt_length: int = 3, reserve: int = 10) -> RowOpening:
    return RowOpening(SamplingSpec(), prompt_length, CHAIN, reserve)


def row(first: int, ids: tuple[int, ...], request: bytes = REQUEST) -> StepRow:
    return StepRow(request, first, ids)


def status_of(action: Callable[[], object]) -> RowStatus:
    with pytest.raises(RowFault) as caught:
        action()
    return caught.value.status


tokens_lists = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=6), max_size=6)


@given(tokens_lists)
def test_the_digest_is_of_all_tokens_however_they_came(chunks: list[list[int]]) -> None:
    session = Session(REQUEST, opening())
    for chunk in chunks:
        session.consume(chunk)
    tokens = [token for chunk in chunks for token in chunk]
    assert session.length == len(tokens)
    assert list(session.tokens) == tokens
    assert session.digest == history_digest(tokens)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=12), st.data())
def test_a_rewind_restores_length_digest_and_chain(tokens: list[int], data: st.DataObject) -> None:
    session = Session(REQUEST, opening())
    session.consume([1, 2, 3])
    assert session.chain_before(3) == CHAIN
    session.consume(tokens)
    session.pending = "logits"
    assert session.chain_before(session.length) == chain_over(CHAIN, 3, tokens)
    kept = data.draw(st.integers(0, len(tokens)))
    session.rewind(3 + kept)
    assert session.digest == history_digest([1, 2, 3, *tokens[:kept]])
    assert session.pending is None
    assert session.chain_before(3 + kept) == chain_over(CHAIN, 3, tokens[:kept])
    session.consume([7])
    assert session.chain_before(4 + kept) == chain_over(CHAIN, 3, [*tokens[:kept], 7])


def test_no_chain_is_known_ahead_of_the_prefills_end() -> None:
    session = Session(REQUEST, opening())
    session.consume([1, 2, 3])
    session.chain_before(3)
    session.rewind(1)
    assert status_of(lambda: session.chain_before(1)) is RowStatus.INVALID


def test_rows_are_admitted_only_where_the_cache_ends() -> None:
    table = SessionTable(100)
    table.open(row(0, (1, 2, 3)), opening()).consume([1, 2, 3])
    assert table.admit(row(3, (4,))).length == 3
    for wrong in (2, 4, 0):
        assert status_of(lambda first=wrong: table.admit(row(first, (4,)))) is (
            RowStatus.POSITION_MISMATCH
        )


def test_an_unknown_request_is_a_lost_cache() -> None:
    assert status_of(lambda: SessionTable(9).find(REQUEST)) is RowStatus.CACHE_LOST


def test_an_opening_not_at_zero_is_refused() -> None:
    table = SessionTable(9)
    assert status_of(lambda: table.open(row(1, (1,)), opening())) is RowStatus.POSITION_MISMATCH
    assert len(table) == 0


def test_reserves_add_up_and_never_exceed_the_budget() -> None:
    table = SessionTable(25)
    table.open(row(0, (1,), b"a" * 16), opening(reserve=10))
    table.open(row(0, (1,), b"b" * 16), opening(reserve=10))
    assert table.reserved_tokens == 20
    full = lambda: table.open(row(0, (1,), b"c" * 16), opening(reserve=10))  # noqa: E731
    assert status_of(full) is RowStatus.CACHE_EXHAUSTED
    assert (len(table), table.reserved_tokens) == (2, 20)
    table.open(row(0, (1,), b"b" * 16), opening(reserve=15))  # over again, larger
    assert (len(table), table.reserved_tokens) == (2, 25)
    assert table.close(b"a" * 16)
    assert not table.close(b"a" * 16)
    assert table.reserved_tokens == 15
    table.clear()
    assert (len(table), table.reserved_tokens, table.kv_tokens) == (0, 0, 0)


def test_a_request_may_outgrow_its_reserve_only_into_free_budget() -> None:
    table = SessionTable(5)
    session = table.open(row(0, (1, 2, 3)), opening(reserve=0))
    session.consume([1, 2, 3])
    assert (session.reserve_tokens, table.kv_tokens) == (3, 3)
    table.admit(row(3, (4, 5)))
    assert table.reserved_tokens == 5
    session.consume([4, 5])
    assert status_of(lambda: table.admit(row(5, (6,)))) is RowStatus.CACHE_EXHAUSTED
    assert [held.request for held in table] == [REQUEST]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_links_made_while_drawing_are_those_over_what_came_back(
    drawn: list[int], data: st.DataObject
) -> None:
    """The token that was drawn need not be the one that is consumed, and a rewind may come between:
    what was remembered of a link must not stand in for another."""
    session = Session(REQUEST, opening())
    session.consume([1, 2, 3])
    known: list[int] = []
    for token in drawn:
        before = chain_over(CHAIN, 3, known)
        assert session.chain_behind(session.length, token) == chain_over(
            before, session.length, [token]
        )
        taken = data.draw(st.sampled_from([token, (token + 1) % 4]))
        session.consume([taken])
        known.append(taken)
        if data.draw(st.booleans()):
            kept = data.draw(st.integers(0, len(known)))
            session.rewind(3 + kept)
            del known[kept:]
        assert session.chain_before(session.length) == chain_over(CHAIN, 3, known)
