"""One request's stream: ordered, verified at every stage, and never beyond what was accepted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.barrier import BarrierState
from coordinator.synchronizer import OUTSTANDING_ROWS_MAX, TokenStreamSynchronizer
from coordinator.token_validator import Corruption, TokenValidator
from stagemesh.checksum import chain_next, chain_over, chain_start, history_digest
from stagemesh.errors import EpochFenced, EpochNotOpen, InvalidConfiguration, TokenRejected
from stagemesh.frame import StepRow
from stagemesh.token import StageMark, TokenChunk, ValidationStatus
from stagemesh.topology import WorkerName

REQUEST = bytes(range(16))
PROMPT = tuple(range(100, 110))
ROUTE = (WorkerName("s0"), WorkerName("s1"), WorkerName("s2"))
VOCAB = 1000


class HonestRoute:
    """Stages that do what they are asked: the reference the synchronizer is held against."""

    def __init__(self, epoch: int, chain: bytes, stages=ROUTE) -> None:
        self.epoch, self.stages, self.chain = epoch, stages, chain
        self.length = self.digest = 0

    def answer(self, row: StepRow, step: int) -> StepRow:
        self.length = row.first_position + len(row.token_ids)
        self.digest = history_digest(row.token_ids, self.digest)
        marks = tuple(StageMark(self.length, self.digest, 1) for _ in self.stages)
        if not row.samples:
            return replace(row, marks=marks)
        token_id = (self.length * 7919 + self.digest) % VOCAB
        self.chain = chain_next(self.chain, self.length, token_id)
        chunk = TokenChunk(
            row.request,
            self.length,
            token_id,
            self.epoch,
            step,
            0.0,
            1.0,
            5,
            self.stages[-1],
            self.chain,
        )
        return replace(row, marks=marks, token=chunk.sealed())


def stream(**options) -> TokenStreamSynchronizer:
    return TokenStreamSynchronizer(REQUEST, PROMPT, TokenValidator(VOCAB), **options)


def begin(sync: TokenStreamSynchronizer, epoch: int = 1, stages=ROUTE) -> HonestRoute:
    return HonestRoute(epoch, sync.begin_route(epoch, stages).chain, stages)


def send(sync: TokenStreamSynchronizer, step: int, count: int = 10_000) -> StepRow:
    ids = sync.tokens(sync.consumed, sync.consumed + count)
    expected = sync.expect(step, sync.epoch, sync.consumed, ids)
    return StepRow(REQUEST, expected.first_position, ids, samples=expected.samples)


def run(sync: TokenStreamSynchronizer, route: HonestRoute, tokens: int, step: int = 0) -> int:
    """Generate until ``tokens`` more are accepted; returns the last step used."""
    for _ in range(tokens):
        step += 1
        sync.accept(route.answer(send(sync, step), step), epoch=sync.epoch, step=step, now=1.0)
    return step


def test_a_clean_stream_advances_every_watermark():
    sync = stream(checkpoint_every=4)
    run(sync, begin(sync), 6)
    assert (sync.accepted, sync.next_position, sync.confirmed) == (6, 16, 15)
    assert sync.outstanding == 0
    assert sync.chain == chain_over(chain_start(REQUEST, PROMPT), 10, sync.tokens(10))


def test_an_accepted_chunk_is_valid_sealed_and_carries_every_mark():
    sync = stream()
    route = begin(sync)
    answer = route.answer(send(sync, 1), 1)
    chunk = sync.accept(answer, epoch=1, step=1)
    assert chunk.status is ValidationStatus.VALID
    assert chunk.marks == answer.marks
    chunk.verify(previous_chain=chain_start(REQUEST, PROMPT))


def test_a_prefill_in_chunks_is_confirmed_chunk_by_chunk():
    sync = stream()
    route = begin(sync)
    rows = [send(sync, step, 4) for step in (1, 2, 3)]
    assert [row.samples for row in rows] == [False, False, True]
    assert sync.outstanding == 3
    answers = [route.answer(row, step) for step, row in enumerate(rows, 1)]
    assert sync.confirm(answers[0], epoch=1, step=1) == 4
    assert sync.confirm(answers[1], epoch=1, step=2) == 8
    assert sync.accept(answers[2], epoch=1, step=3).position == 10


@pytest.mark.parametrize("stage", range(3))
def test_a_stage_with_another_history_is_named_before_a_token_is_accepted(stage):
    sync = stream(checkpoint_every=5)
    route = begin(sync)
    answer = route.answer(send(sync, 1), 1)
    marks = [*answer.marks]
    marks[stage] = replace(marks[stage], history_digest=1)
    with pytest.raises(TokenRejected) as caught:
        sync.accept(replace(answer, marks=tuple(marks)), epoch=1, step=1, now=3.0)
    assert caught.value.findings[0].worker == ROUTE[stage]
    assert (sync.accepted, sync.confirmed, sync.checkpointed) == (0, 0, 0)
    barrier = sync.take_checkpoint()
    assert barrier.state is BarrierState.BROKEN
    assert barrier.culprits == (ROUTE[stage],)
    assert sync.take_checkpoint() is None


def test_at_every_checkpoint_all_stages_meet_for_the_same_position():
    sync = stream(checkpoint_every=4)
    route = begin(sync)
    met = []
    for step in range(1, 9):
        sync.accept(route.answer(send(sync, step), step), epoch=1, step=step, now=2.0)
        barrier = sync.take_checkpoint()
        if barrier is not None:
            assert barrier.outcome().complete
            met.append(int(barrier.name.rpartition("/")[2]))
    assert met == [10, 12, 16]
    assert sync.checkpointed == 16


def test_a_missing_mark_breaks_the_checkpoint_by_absence():
    sync = stream(checkpoint_every=2)
    route = begin(sync)
    answer = route.answer(send(sync, 1), 1)
    with pytest.raises(TokenRejected):
        sync.accept(replace(answer, marks=answer.marks[:2]), epoch=1, step=1, now=2.0)
    assert sync.take_checkpoint().absent == ("s2",)


def test_a_row_that_returns_twice_is_a_duplication_and_changes_nothing():
    sync = stream()
    route = begin(sync)
    answer = route.answer(send(sync, 1), 1)
    sync.accept(answer, epoch=1, step=1)
    with pytest.raises(TokenRejected) as caught:
        sync.accept(answer, epoch=1, step=1)
    assert caught.value.findings[0].corruption is Corruption.DUPLICATION
    assert sync.accepted == 1


def test_a_row_that_overtakes_another_shows_the_loss():
    sync = stream()
    route = begin(sync)
    rows = [send(sync, 1, 5), send(sync, 2, 5)]
    answers = [route.answer(row, step) for step, row in enumerate(rows, 1)]
    with pytest.raises(TokenRejected) as caught:
        sync.accept(answers[1], epoch=1, step=2)
    assert caught.value.findings[0].corruption is Corruption.LOSS
    sync.confirm(answers[0], epoch=1, step=1)
    sync.accept(answers[1], epoch=1, step=2)


def test_rows_of_older_routes_are_fenced_and_of_unopened_ones_refused():
    sync = stream()
    old = begin(sync, 1)
    stale = old.answer(send(sync, 1), 1)
    begin(sync, 2)
    with pytest.raises(EpochFenced):
        sync.accept(stale, epoch=1, step=1)
    with pytest.raises(EpochNotOpen):
        sync.accept(stale, epoch=3, step=1)
    with pytest.raises(EpochFenced):
        sync.begin_route(2, ROUTE)
    assert sync.validator.counters["tokens_fenced"] == 1
    assert sync.accepted == 0


def test_confirm_and_accept_do_not_stand_in_for_each_other():
    sync = stream()
    route = begin(sync)
    with pytest.raises(TokenRejected):
        sync.accept(route.answer(send(sync, 1, 5), 1), epoch=1, step=1)
    sync.rewind_to(0)
    route = HonestRoute(1, sync.chain)
    with pytest.raises(TokenRejected):
        sync.confirm(route.answer(send(sync, 2), 2), epoch=1, step=2)
    assert sync.accepted == 0


@pytest.mark.parametrize(
    ("step", "epoch", "first", "ids"),
    [
        (5, 1, 0, PROMPT),  # the step number does not grow
        (9, 2, 0, PROMPT),  # another epoch
        (9, 1, 3, PROMPT[3:]),  # a hole before it
        (9, 1, 0, PROMPT[::-1]),  # not the stream's tokens
        (9, 1, 0, (*PROMPT, 1)),  # a token nobody accepted
        (9, 1, 0, ()),  # nothing
        (9, 1, 0, (999,)),  # one wrong token
    ],
)
def test_the_coordinator_cannot_send_what_is_not_the_next_piece_of_the_stream(
    step, epoch, first, ids
):
    sync = stream()
    begin(sync)
    sync.expect(5, 1, 0, PROMPT[:5])
    sync.rewind_to(0)
    with pytest.raises(InvalidConfiguration):
        sync.expect(step, epoch, first, ids)


def test_rows_under_way_are_bounded():
    long_prompt = tuple(range(VOCAB)) * 2
    sync = TokenStreamSynchronizer(REQUEST, long_prompt, TokenValidator(VOCAB))
    sync.begin_route(1, ROUTE)
    for step in range(1, OUTSTANDING_ROWS_MAX + 1):
        sync.expect(step, 1, step - 1, long_prompt[step - 1 : step])
    with pytest.raises(InvalidConfiguration, match="outstanding_rows_max"):
        sync.expect(step + 1, 1, step, long_prompt[step : step + 1])


def test_a_stream_moved_to_another_route_continues_where_it_stopped():
    alone = stream()
    run(alone, begin(alone), 12)
    moved = stream()
    run(moved, begin(moved), 5)
    plan = moved.replay_plan()
    assert (len(plan.token_ids), plan.prompt_length, plan.next_position) == (15, 10, 15)
    assert plan.end_digest == history_digest(plan.token_ids)
    run(moved, begin(moved, 2, (WorkerName("full"),)), 7)
    assert moved.tokens() == alone.tokens()
    assert moved.chain == alone.chain


def test_a_rewind_keeps_what_was_accepted_and_feeds_it_again():
    sync = stream()
    route = begin(sync)
    step = run(sync, route, 6)
    before = sync.tokens()
    sync.rewind_to(12)
    route.length, route.digest = 12, history_digest(before[:12])
    run(sync, route, 3, step)
    assert sync.tokens()[:16] == before
    assert sync.accepted == 9
    with pytest.raises(InvalidConfiguration):
        sync.rewind_to(100)


def test_withdrawn_tokens_are_gone_and_verified_ones_cannot_be():
    sync = stream()
    run(sync, begin(sync), 6)
    assert sync.verify_through(4) == 4
    assert sync.verify_through(2) == 4
    gone = sync.withdraw_from(14)
    assert (len(gone), sync.accepted) == (2, 4)
    assert sync.verify_through(99) == 4
    assert sync.chain == chain_over(chain_start(REQUEST, PROMPT), 10, sync.tokens(10))
    with pytest.raises(InvalidConfiguration):
        sync.withdraw_from(13)


def test_a_stream_restored_from_a_journal_continues_its_chain():
    first = stream()
    run(first, begin(first), 5)
    restored = stream(accepted=first.tokens(10))
    assert (restored.accepted, restored.chain) == (5, first.chain)
    run(restored, begin(restored, 9), 4)
    run(first, begin(first, 2), 4)
    assert restored.tokens() == first.tokens()


def test_checkpoints_need_a_distance():
    with pytest.raises(InvalidConfiguration):
        stream(checkpoint_every=0)


ACTS = st.sampled_from(["token", "repeat", "stale", "altered", "dropped", "move"])


@settings(max_examples=150)
@given(st.lists(ACTS, max_size=25))
def test_whatever_returns_only_the_one_true_stream_is_ever_accepted(acts):
    truth = stream()
    run(truth, begin(truth), len(acts) + 1)
    sync = stream(checkpoint_every=3)
    route = begin(sync)
    step, last = 0, None
    for act in acts:
        if act == "repeat" and last is not None:
            with pytest.raises(TokenRejected):
                sync.accept(last, epoch=sync.epoch, step=step)
        elif act == "stale":
            with pytest.raises(EpochFenced):
                sync.accept(last or StepRow(REQUEST, 0, ()), epoch=0, step=step)
        elif act == "move":
            route, step, last = begin(sync, sync.epoch + 1), 0, None
        elif act == "token":
            step += 1
            last = route.answer(send(sync, step), step)
            sync.accept(last, epoch=sync.epoch, step=step)
        elif act in ("altered", "dropped"):
            step += 1
            answer = route.answer(send(sync, step), step)
            wrong_id = (answer.token.token_id + 1) % VOCAB
            chunk = replace(answer.token, token_id=wrong_id).sealed() if act == "altered" else None
            with pytest.raises(TokenRejected):
                sync.accept(replace(answer, token=chunk), epoch=sync.epoch, step=step)
            route, step, last = begin(sync, sync.epoch + 1), 0, None
    assert sync.tokens() == truth.tokens()[: len(sync.tokens())]
