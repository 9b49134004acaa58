"""One request: what is sent, what is confirmed, what a summary says."""

from coordinator.events import GenerationRequested
from coordinator.session import Session, SessionPhase
from coordinator.token_validator import TokenValidator
from stagemesh.checksum import chain_over, chain_start
from stagemesh.sampling import SamplingSpec

KEY = bytes(15) + b"\x07"
ROUTE = ("stage-0", "stage-1")


def session(prompt=(5, 6, 7, 8, 9), *, max_tokens=4, accepted=(), context=100):
    demand = GenerationRequested(KEY, tuple(prompt), SamplingSpec(), max_tokens, accepted=accepted)
    return Session.begin(demand, TokenValidator(100), context_tokens_max=context, now=1.0)


def test_a_prompt_is_fed_in_chunks_and_only_the_last_yields_a_token():
    one = session()
    one.attach(1, ROUTE, 2.0)
    rows = [one.next_row(1, 2), one.next_row(2, 2), one.next_row(3, 2)]
    assert [row.token_ids for row in rows] == [(5, 6), (7, 8), (9,)]
    assert [row.first_position for row in rows] == [0, 2, 4]
    assert [row.samples for row in rows] == [False, False, True]
    assert [row.opening is not None for row in rows] == [True, False, False]
    assert one.pending == 0


def test_the_opening_carries_the_chain_and_the_real_prompt_length_of_a_replay():
    one = session(accepted=(11, 12))
    one.attach(3, ROUTE, 2.0)
    row = one.next_row(1, 100)
    assert row.token_ids == (5, 6, 7, 8, 9, 11, 12)
    assert row.opening is not None
    assert row.opening.prompt_length == 5
    assert row.opening.chain == chain_over(chain_start(KEY, (5, 6, 7, 8, 9)), 5, (11, 12))
    assert row.opening.reserve_tokens == 9


def test_the_answer_is_cut_to_what_the_context_holds():
    assert session(max_tokens=50, context=8).max_tokens == 3


def test_a_restart_feeds_everything_again_with_an_opening():
    one = session()
    one.attach(1, ROUTE, 2.0)
    one.next_row(1, 100)
    attempt = one.attempt
    one.restart()
    assert one.attempt == attempt + 1
    assert one.pending == 5
    assert one.next_row(2, 100).opening is not None


def test_a_rewind_feeds_again_only_what_is_not_confirmed():
    one = session()
    one.attach(1, ROUTE, 2.0)
    one.next_row(1, 3)
    one.rewind()
    assert one.pending == 5
    assert one.next_row(2, 100).opening is None


def test_a_stop_string_cuts_the_count_and_the_chain_of_the_summary():
    one = session(accepted=(11, 12, 13))
    one.kept = 1
    summary = one.summary(5.0)
    assert summary.completion_tokens == 1
    assert summary.chain == chain_over(chain_start(KEY, (5, 6, 7, 8, 9)), 5, (11,))


def test_check_names_a_broken_invariant():
    one = session()
    assert one.check() == []
    one.epoch = 4
    assert one.check() == ["session 0000: route exactly with epoch"]
    assert one.phase is SessionPhase.QUEUED
