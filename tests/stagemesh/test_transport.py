"""ReliableMessageTransport without a network: what is delivered is what was sent, whatever the
channel does."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh import errors
from stagemesh.checksum import crc32c
from stagemesh.frame import FrameKind, RowStatus, Score, StepFrame, StepRow
from stagemesh.tensor import DType, Tensor
from stagemesh.token import StageMark, TokenChunk
from stagemesh.transport import (
    Action,
    Boundary,
    FramePart,
    HopLimits,
    HopReceiver,
    HopSender,
    PartAssembler,
    PartedFrame,
    ReliableMessageTransport,
    TokenTransferValidator,
    wire_messages,
)

FINGERPRINT = b"weights!"
HIDDEN = 8
MEGABYTE = 1024 * 1024


def a_row(step: int, *, tokens: int = 1, **facts) -> StepRow:
    marks = (StageMark(10 + step, 77, 99),)
    return StepRow(b"r" * 16, 9 + step, tuple(range(tokens)), samples=True, marks=marks, **facts)


def a_frame(step: int, *, epoch: int = 2, tokens: int = 1, hop=(0, 1), **facts) -> StepFrame:
    payload = bytes((step + index) % 251 for index in range(tokens * HIDDEN * 2))
    facts.setdefault("tensor", Tensor(DType.BF16, (tokens, HIDDEN), payload))
    facts.setdefault("rows", (a_row(step, tokens=tokens),))
    return StepFrame(FrameKind.DECODE, FINGERPRINT, epoch, step, *hop, **facts)


def a_large_frame(step: int, *, megabytes: float = 2.5) -> StepFrame:
    hidden = int(megabytes * MEGABYTE) // 4
    tensor = Tensor(DType.F32, (1, hidden), random.Random(step).randbytes(hidden * 4))
    return a_frame(step, tensor=tensor)


def a_sender(**limits) -> HopSender:
    return HopSender(
        epoch=2, hop_from=0, hop_to=1, fingerprint=FINGERPRINT, limits=HopLimits(**limits)
    )


def a_receiver(**facts) -> HopReceiver:
    facts = {"epoch": 2, "hop_from": 0, "hop_to": 1, "fingerprint": FINGERPRINT} | facts
    return HopReceiver(**facts)


def an_open_sender(count: int = 0, **limits) -> HopSender:
    sender = a_sender(**limits)
    sender.on_opened(1, 0.0)
    for step in range(1, count + 1):
        sender.offer(a_frame(step))
    return sender


def steps(frames) -> list[int]:
    return [frame.step for frame in frames]


# ---------------------------------------------------------------- the sender


def test_frames_go_out_in_order_within_the_window():
    sender = an_open_sender(5, inflight_frames_max=3)
    assert steps(sender.transmissions(0.0)) == [1, 2, 3]
    assert sender.transmissions(0.0) == []
    sender.on_ack(2, 0.01)
    assert steps(sender.transmissions(0.01)) == [4, 5]
    sender.check()


def test_the_window_is_the_smaller_of_both_sides():
    sender = a_sender(inflight_frames_max=10)
    sender.on_opened(1, 0.0, frames_max=2)
    for step in (1, 2, 3):
        sender.offer(a_frame(step))
    assert steps(sender.transmissions(0.0)) == [1, 2]


def test_what_is_sent_is_sealed_and_kept_until_acknowledged():
    sender = an_open_sender()
    sealed = sender.offer(a_frame(1))
    assert sealed.header_crc32c == crc32c(sealed.pack_header())
    assert sender.unacknowledged == 1
    sender.transmissions(0.0)
    sender.on_ack(1, 0.0)
    assert sender.unacknowledged == 0


def test_a_step_out_of_turn_is_refused_at_the_door():
    sender = an_open_sender(1)
    for step in (1, 3):
        with pytest.raises(errors.SequenceGap):
            sender.offer(a_frame(step))


@pytest.mark.parametrize("label", [{"epoch": 3}, {"hop_to": 2}, {"fingerprint": b"another!"}])
def test_a_frame_of_another_hop_is_refused_at_the_door(label):
    with pytest.raises(errors.SequenceGap):
        an_open_sender().offer(replace(a_frame(1), **label))


def test_a_frame_whose_fields_do_not_fit_is_malformed_and_not_kept():
    sender = an_open_sender()
    with pytest.raises(errors.FrameMalformed):
        sender.offer(a_frame(1, rows=(replace(a_row(1), first_position=-1),)))
    assert sender.offer(a_frame(1)).step == 1


def test_the_ledger_is_bounded_by_frames():
    sender = an_open_sender(4, inflight_frames_max=2, ledger_frames_max=4)
    assert not sender.writable
    with pytest.raises(errors.Overloaded):
        sender.offer(a_frame(5))
    sender.transmissions(0.0)
    sender.on_ack(1, 0.0)
    sender.offer(a_frame(5))


def test_the_ledger_is_bounded_by_bytes_but_an_empty_one_takes_any_frame():
    sender = an_open_sender(ledger_bytes_max=100)
    sender.offer(a_frame(1, tokens=100))
    assert not sender.writable


def test_a_nacked_frame_alone_is_sent_again_at_once():
    sender = an_open_sender(5)
    sender.transmissions(0.0)
    sender.on_nack(2, "CHECKSUM_MISMATCH", True, 0.01)
    assert steps(sender.transmissions(0.01)) == [2]
    assert sender.acked == 1
    assert sender.counters["frames_retransmitted"] == 1


def test_repeated_and_stale_nacks_start_no_storm():
    sender = an_open_sender(5)
    sender.transmissions(0.0)
    sent = 0
    for index in range(100):
        sender.on_nack(2, "SEQUENCE_GAP", True, 0.01 + index / 1e6, draw=0.0)
        sent += len(sender.transmissions(0.01 + index / 1e6))
    assert sent <= 7
    sender.on_ack(5, 0.02)
    for stale in (0, 1, 2, 5, 6, 99):
        sender.on_nack(stale, "SEQUENCE_GAP", True, 0.03)
    assert sender.transmissions(0.03) == []
    assert sender.counters["nacks_ignored"] > 0


def test_a_second_nack_waits_with_full_jitter():
    sender = an_open_sender(1, nack_wait_s_initial=0.01)
    sender.transmissions(0.0)
    sender.on_nack(1, "CHECKSUM_MISMATCH", True, 0.1)
    assert len(sender.transmissions(0.1)) == 1
    sender.on_nack(1, "CHECKSUM_MISMATCH", True, 0.2, draw=0.5)
    assert sender.transmissions(0.2) == []
    assert sender.next_deadline(0.2) == pytest.approx(0.205)
    assert len(sender.transmissions(0.2051)) == 1


def test_an_acknowledgement_cancels_the_retransmission_that_waits():
    sender = an_open_sender(2)
    sender.transmissions(0.0)
    sender.on_nack(1, "CHECKSUM_MISMATCH", True, 0.1)
    sender.transmissions(0.1)
    sender.on_nack(1, "CHECKSUM_MISMATCH", True, 0.1, draw=1.0)
    sender.on_ack(2, 0.101)
    assert sender.transmissions(1.0) == []


def wait_in_silence(sender: HopSender, now: float, until: float) -> int:
    """Ask the sender as often as it wants, with the shortest waits that jitter may draw; returns
    how many copies it sent."""
    sent = 0
    while sender.failure is None and (due := sender.next_deadline(now)) is not None and due < until:
        now = max(due, now + 0.001)
        sender.on_time(now, draw=0.0)
        sent += len(sender.transmissions(now))
    return sent


def test_a_path_that_stands_still_for_less_than_the_silence_is_not_given_up_for_want_of_luck():
    sender = an_open_sender(1, copies_max=4, silence_s_max=5.0)
    sender.transmissions(0.0)
    assert wait_in_silence(sender, 0.0, 4.9) == 3
    assert sender.failure is None
    sender.on_ack(1, 4.9)
    assert sender.unacknowledged == 0


def test_silence_to_its_end_is_a_failure_also_when_all_copies_are_spent():
    sender = an_open_sender(2, copies_max=4, silence_s_max=5.0, inflight_frames_max=1)
    sender.transmissions(0.0)
    wait_in_silence(sender, 0.0, 60.0)
    assert isinstance(sender.failure, errors.StageUnreachable)
    assert "no sign of life" in str(sender.failure)


def test_a_receiver_that_is_alive_and_never_takes_a_frame_ends_the_hop():
    sender = an_open_sender(2, copies_max=4, silence_s_max=5.0)
    sender.transmissions(0.0)
    sender.on_ack(1, 0.01)
    wait_in_silence(sender, 0.01, 2.0)
    assert sender.failure is None
    sender.on_ack(1, 2.0)  # Once more, and still not the second.
    wait_in_silence(sender, 2.0, 4.0)
    assert "frame not accepted" in str(sender.failure)


def test_a_refusal_of_another_epoch_does_not_end_the_hop():
    sender = an_open_sender(1)
    sender.transmissions(0.0)
    sender.on_nack(1, "NON_FINITE_ACTIVATION", False, 0.01, epoch=1)
    assert sender.failure is None
    assert sender.counters["nacks_ignored"] == 1
    sender.on_nack(1, "NON_FINITE_ACTIVATION", False, 0.01, epoch=2)
    assert isinstance(sender.failure, errors.NonFiniteActivation)


def test_what_a_frame_carries_beside_its_payload_counts_in_the_window():
    plain = a_frame(1)
    row = plain.rows[0]
    scored = replace(row, scores=(Score(1, 2, 2, 0.0, 1.0),) * 50)
    assert replace(plain, rows=(scored,)).byte_count == plain.byte_count + 1000


def test_nacks_beyond_the_budget_are_left_to_the_timer():
    sender = an_open_sender(
        20, retransmit_budget_burst=3.0, retransmit_budget_ratio=0.0, ledger_frames_max=64
    )
    sender.transmissions(0.0)
    for step in range(1, 11):
        sender.on_nack(step, "CHECKSUM_MISMATCH", True, 0.01)
        sender.transmissions(0.01)
    assert sender.counters["frames_retransmitted"] == 3
    assert sender.counters["retransmits_deferred"] == 7
    due = sender.next_deadline(0.01)
    sender.on_time(due)
    assert steps(sender.transmissions(due)) == [10]


def test_a_frame_refused_too_often_ends_the_hop_with_the_receivers_reason():
    sender = an_open_sender(1, copies_max=4)
    now = 0.0
    while not sender.exhausted:
        sender.transmissions(now)
        sender.on_nack(1, "FINGERPRINT_MISMATCH", True, now)
        now += 1.0
        assert now < 20
    assert isinstance(sender.failure, errors.FingerprintMismatch)
    with pytest.raises(errors.FingerprintMismatch):
        sender.offer(a_frame(2))


def test_a_refusal_for_good_ends_the_hop_at_once():
    sender = an_open_sender(1)
    sender.transmissions(0.0)
    sender.on_nack(1, "NON_FINITE_ACTIVATION", False, 0.0)
    assert isinstance(sender.failure, errors.NonFiniteActivation)
    assert sender.failure.metadata["hop"] == "0→1"
    assert sender.transmissions(9.0) == []


def test_the_timer_sends_only_the_oldest_frame_again():
    sender = an_open_sender(3)
    sender.transmissions(0.0)
    due = sender.next_deadline(0.0)
    assert sender.transmissions(due) == []
    sender.on_time(due)
    assert steps(sender.transmissions(due)) == [1]


def test_the_timer_backs_off_exponentially_with_full_jitter():
    waits = {}
    for draw in (0.0, 0.999):
        sender = an_open_sender(1, copies_max=20, silence_s_max=1000)
        now, waits[draw] = 0.0, []
        sender.transmissions(now)
        for _ in range(6):
            due = sender.next_deadline(now)
            waits[draw].append(due - now)
            now = due
            sender.on_time(now, draw=draw)
            assert len(sender.transmissions(now)) == 1
    assert max(waits[0.0]) == pytest.approx(min(waits[0.0]))
    assert waits[0.999] == sorted(waits[0.999])
    assert max(waits[0.999]) <= 0.4 + 2.0 + 0.01


def test_the_timer_adapts_to_the_round_trip():
    sender = an_open_sender(retransmit_wait_s_min=0.001)
    now = 0.0
    for step in range(1, 40):
        sender.offer(a_frame(step))
        sender.transmissions(now)
        sender.on_ack(step, now + 0.01)
        now += 0.02
    sender.offer(a_frame(40))
    sender.transmissions(now)
    assert 0.01 < sender.next_deadline(now) - now < 0.03


def test_round_trips_of_retransmitted_frames_are_not_measured():
    sender = an_open_sender(1)
    sender.transmissions(0.0)
    sender.on_nack(1, "CHECKSUM_MISMATCH", True, 5.0)
    sender.transmissions(5.0)
    sender.on_ack(1, 5.0)
    assert sender._round_trip.smoothed_s is None


def test_silence_ends_the_hop_as_unreachable_in_bounded_time():
    sender = an_open_sender(3, silence_s_max=2.0)
    now, copies = 0.0, len(sender.transmissions(0.0))
    while not sender.exhausted:
        now = sender.next_deadline(now)
        sender.on_time(now, draw=0.5)
        copies += len(sender.transmissions(now))
    assert isinstance(sender.failure, errors.StageUnreachable)
    assert now <= 2.0
    assert copies <= 3 + 6
    assert sender.next_deadline(now) is None


def test_a_busy_receiver_that_repeats_itself_is_not_silent():
    sender = an_open_sender(2, silence_s_max=1.0)
    sender.transmissions(0.0)
    now = 0.0
    for _ in range(100):
        now += 0.2
        sender.on_ack(0, now)
        sender.on_time(now)
        assert sender.transmissions(now) == []
    assert not sender.exhausted


def test_an_eager_timer_does_not_send_the_whole_window_again():
    sender = an_open_sender(20)
    sender.transmissions(0.0)
    due = sender.next_deadline(0.0)
    sender.on_time(due)
    extra = len(sender.transmissions(due))
    for step in range(1, 21):
        now = due + step * 0.0001
        sender.on_ack(step, now)
        extra += len(sender.transmissions(now))
    assert extra == 1


def test_after_a_black_hole_partial_acknowledgements_release_the_rest():
    sender = an_open_sender(6)
    sender.transmissions(0.0)
    now = sender.next_deadline(0.0)
    sender.on_time(now)
    started = now
    while sender.unacknowledged:
        for frame in sender.transmissions(now):
            sender.on_ack(frame.step, now + 0.001)
        now = max(now + 0.001, sender.next_deadline(now) or now)
        sender.on_time(now)
    assert now - started < 0.4


def test_an_acknowledgement_of_what_was_never_sent_is_ignored():
    sender = an_open_sender(3)
    sender.transmissions(0.0)
    sender.offer(a_frame(4))
    sender.on_ack(4, 0.0)
    sender.on_ack(99, 0.0)
    sender.on_ack(2, 0.0, epoch=1)
    assert sender.acked == 0
    assert sender.counters["acks_ignored"] == 3


def test_a_new_connection_resumes_where_the_receiver_says():
    sender = an_open_sender(5)
    sender.transmissions(0.0)
    sender.on_ack(1, 0.0)
    sender.on_closed()
    assert sender.transmissions(0.1) == []
    assert sender.next_deadline(0.1) is None
    sender.on_opened(4, 0.2)
    assert sender.acked == 3
    assert steps(sender.transmissions(0.2)) == [4, 5]
    assert sender.counters["frames_retransmitted"] == 2


@pytest.mark.parametrize("expected", [1, 7])
def test_a_receiver_that_lost_its_place_ends_the_hop(expected):
    sender = an_open_sender(5)
    sender.transmissions(0.0)
    sender.on_ack(2, 0.0)
    sender.on_opened(expected, 0.1)
    assert isinstance(sender.failure, errors.SequenceGap)


def test_contradicting_limits_are_refused():
    with pytest.raises(errors.InvalidConfiguration):
        HopLimits(inflight_frames_max=9, ledger_frames_max=8)


# ---------------------------------------------------------------- the receiver


def sealed(step: int, **facts) -> StepFrame:
    return a_frame(step, **facts).sealed()


def damaged(frame: StepFrame) -> StepFrame:
    payload = bytearray(frame.tensor.payload)
    payload[3] ^= 4
    return replace(frame, tensor=replace(frame.tensor, payload=bytes(payload)))


def test_the_next_frame_is_accepted_and_acknowledged():
    receiver = a_receiver()
    received = receiver.receive(sealed(1))
    assert received.action is Action.ACCEPT
    assert received.frames == (sealed(1),)
    assert (received.ack.step, received.ack.duplicate) == (1, False)
    assert receiver.next_step == 2


def test_a_duplicate_is_answered_again_and_not_delivered():
    receiver = a_receiver()
    receiver.receive(sealed(1))
    for copy in (sealed(1), damaged(sealed(1))):
        received = receiver.receive(copy)
        assert received.action is Action.DUPLICATE
        assert received.frames == ()
        assert (received.ack.step, received.ack.duplicate) == (1, True)
    assert receiver.counters["duplicates_answered"] == 2


def test_frames_ahead_are_held_and_delivered_when_the_hole_is_filled():
    receiver = a_receiver()
    first = receiver.receive(sealed(2))
    assert (first.action, first.nack.next_step, first.nack.reason) == (
        Action.HELD,
        1,
        "SEQUENCE_GAP",
    )
    second = receiver.receive(sealed(3))
    assert (second.action, second.nack) == (Action.HELD, None)
    filled = receiver.receive(sealed(1))
    assert steps(filled.frames) == [1, 2, 3]
    assert filled.ack.step == 3


def test_a_second_hole_is_asked_for_as_soon_as_the_first_is_filled():
    receiver = a_receiver()
    receiver.receive(sealed(2))
    receiver.receive(sealed(5))
    filled = receiver.receive(sealed(1))
    assert steps(filled.frames) == [1, 2]
    assert filled.nack.next_step == 3


def test_what_is_held_is_bounded():
    limits = HopLimits(inflight_frames_max=4)
    receiver = a_receiver(limits=limits)
    actions = [receiver.receive(sealed(step)).action for step in (3, 4, 5, 6, 90)]
    assert actions == [Action.HELD, Action.HELD, Action.REFUSE, Action.REFUSE, Action.REFUSE]


REFUSALS = {
    "too many rows": (
        lambda: a_frame(1, rows=(a_row(1),) * 300).sealed(),
        errors.FrameTooLarge,
    ),
    "header bit": (lambda: replace(sealed(1), step=3), errors.FrameCorrupted),
    "relabelled": (
        lambda: replace(sealed(1), rows=(replace(a_row(1), request=b"x" * 16),)),
        errors.FrameCorrupted,
    ),
    "moved": (
        lambda: replace(sealed(1), rows=(replace(a_row(1), first_position=0),)),
        errors.FrameCorrupted,
    ),
    "other weights": (
        lambda: replace(a_frame(1), fingerprint=b"another!").sealed(),
        errors.FingerprintMismatch,
    ),
    "other protocol": (lambda: replace(a_frame(1), version=9).sealed(), errors.FrameMalformed),
    "future epoch": (lambda: sealed(1, epoch=3), errors.EpochNotOpen),
    "other hop": (lambda: sealed(1, hop=(1, 2)), errors.HopMismatch),
    "payload bit": (lambda: damaged(sealed(1)), errors.FrameCorrupted),
    "truncated": (
        lambda: replace(sealed(1), tensor=Tensor(DType.BF16, (1, HIDDEN), bytes(6))),
        errors.FrameCorrupted,
    ),
    "truncated resealed": (
        lambda: replace(a_frame(1), tensor=Tensor(DType.BF16, (1, HIDDEN), bytes(6))).sealed(),
        errors.FrameMalformed,
    ),
    "dtype resealed": (
        lambda: replace(a_frame(1), tensor=Tensor(DType.F16, (1, HIDDEN), bytes(16))).sealed(),
        errors.FrameMalformed,
    ),
    "shape resealed": (
        lambda: replace(a_frame(1), tensor=Tensor(DType.BF16, (2, 4), bytes(16))).sealed(),
        errors.FrameMalformed,
    ),
    "token too early": (
        lambda: a_frame(1, rows=(replace(a_row(1), token=a_token(1)),)).sealed(),
        errors.FrameMalformed,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_wrong_frame_is_refused_by_name_and_the_right_one_still_accepted(name):
    make, kind = REFUSALS[name]
    receiver = a_receiver(boundary=Boundary(DType.BF16, HIDDEN))
    received = receiver.receive(make())
    assert type(received.error) is kind
    assert (received.action, received.frames, received.ack) == (Action.REFUSE, (), None)
    assert (received.nack.next_step, received.nack.reason) == (1, kind.reason)
    assert received.nack.retransmit
    assert received.error.metadata["hop"] == "0→1"
    assert receiver.counters[f"frames_rejected.{kind.reason.lower()}"] == 1
    assert receiver.receive(sealed(1)).action is Action.ACCEPT


def test_a_frame_of_an_older_route_is_fenced_silently():
    receiver = a_receiver()
    received = receiver.receive(sealed(1, epoch=1))
    assert (received.action, received.ack, received.nack) == (Action.FENCED, None, None)
    assert isinstance(received.error, errors.EpochFenced)
    assert receiver.counters["frames_fenced"] == 1


def test_the_boundary_is_learnt_from_the_first_activation_that_verifies():
    receiver = a_receiver()
    receiver.receive(sealed(1))
    assert receiver.boundary == Boundary(DType.BF16, HIDDEN)
    other = replace(a_frame(2), tensor=Tensor(DType.F16, (1, HIDDEN), bytes(16))).sealed()
    assert isinstance(receiver.receive(other).error, errors.FrameMalformed)


def test_an_activation_on_the_coordinators_hop_is_refused():
    receiver = a_receiver(hop_from=-1, hop_to=0)
    received = receiver.receive(sealed(1, hop=(-1, 0)))
    assert isinstance(received.error, errors.FrameMalformed)


def test_wrong_content_under_true_checksums_is_asked_for_once_more_then_refused_for_good():
    verdicts = iter([False, False])
    receiver = a_receiver(finite=lambda _frame: next(verdicts))
    first, second = receiver.receive(sealed(1)), receiver.receive(sealed(1))
    assert isinstance(first.error, errors.NonFiniteActivation)
    assert (first.nack.retransmit, second.nack.retransmit) == (True, False)


def test_a_reconnected_receiver_expects_what_it_has_not_accepted():
    receiver = a_receiver()
    receiver.receive(sealed(1))
    receiver.receive(sealed(3))
    assert receiver.opened() == 2
    assert steps(receiver.receive(sealed(2)).frames) == [2]
    assert steps(receiver.receive(sealed(3)).frames) == [3]


def test_a_frame_damaged_ahead_of_its_turn_is_asked_for_in_its_turn():
    receiver = a_receiver()
    assert receiver.receive(damaged(sealed(2))).nack.next_step == 1
    received = receiver.receive(sealed(1))
    assert (received.ack.step, received.nack.next_step) == (1, 2)


# ---------------------------------------------------------------- tokens


def a_token(step: int, **facts) -> TokenChunk:
    facts = {"position": 10 + step, "epoch": 2, "step": step, "request": b"r" * 16} | facts
    return TokenChunk(
        token_id=5,
        logprob=-0.5,
        margin=1.0,
        sampled_at_unix_ns=7,
        source="stage-1",
        chain=b"c" * 16,
        **facts,
    ).sealed()


def a_token_frame(row: StepRow) -> StepFrame:
    return a_frame(1, tensor=None, rows=(row,), hop=(1, -1))


def test_a_token_that_belongs_to_its_row_passes():
    TokenTransferValidator().check(a_token_frame(replace(a_row(1), token=a_token(1))))


WRONG_TOKENS = {
    "missing": (a_row(1), "token"),
    "unasked": (replace(a_row(1), samples=False, token=a_token(1)), "token"),
    "failed row": (replace(a_row(1), status=RowStatus.CACHE_LOST, token=a_token(1)), "token"),
    "request": (replace(a_row(1), token=a_token(1, request=b"x" * 16)), "request"),
    "epoch": (replace(a_row(1), token=a_token(1, epoch=1)), "epoch"),
    "step": (replace(a_row(1), token=a_token(2, position=11)), "step"),
    "position": (replace(a_row(1), token=a_token(1, position=12)), "position"),
}


@pytest.mark.parametrize("name", WRONG_TOKENS)
def test_a_token_under_the_wrong_label_is_refused(name):
    row, field = WRONG_TOKENS[name]
    with pytest.raises(errors.TokenRejected) as caught:
        TokenTransferValidator().check(a_token_frame(row))
    assert caught.value.metadata["field"] == field


def test_a_token_whose_checksum_does_not_match_is_refused_at_the_coordinator():
    row = replace(a_row(1), token=replace(a_token(1), token_id=6))
    receiver = a_receiver(hop_from=1, hop_to=-1)
    received = receiver.receive(a_token_frame(row).sealed())
    assert isinstance(received.error, errors.TokenRejected)
    assert received.nack.retransmit


def test_a_row_that_does_not_sample_needs_no_token():
    TokenTransferValidator().check(a_token_frame(replace(a_row(1), samples=False)))


# ---------------------------------------------------------------- parts


def parts_of(frame: StepFrame) -> tuple[PartedFrame, list[FramePart]]:
    header, *parts = wire_messages(frame)
    return header, parts


def test_a_large_frame_travels_in_parts_and_arrives_whole():
    frame = a_large_frame(1).sealed()
    header, parts = parts_of(frame)
    assert [len(part.data) for part in parts] == [MEGABYTE, MEGABYTE, MEGABYTE // 2]
    receiver = a_receiver()
    for message in (header, *parts[:-1]):
        assert receiver.receive(message).action is Action.PENDING
    received = receiver.receive(parts[-1])
    assert received.action is Action.ACCEPT
    assert received.frames[0] == frame


def test_a_small_frame_is_not_split():
    assert list(wire_messages(sealed(1))) == [sealed(1)]


def flip(part: FramePart) -> FramePart:
    data = bytearray(part.data)
    data[1] ^= 1
    return replace(part, data=bytes(data))


PART_FAULTS = {
    "damaged": (lambda p: [p[0], flip(p[1]), p[2]], "CHECKSUM_MISMATCH"),
    "lost": (lambda p: [p[0], p[2]], "SEQUENCE_GAP"),
    "reordered": (lambda p: [p[1], p[0], p[2]], "SEQUENCE_GAP"),
    "misplaced": (lambda p: [p[0], replace(p[1], offset=7), p[2]], "SEQUENCE_GAP"),
    "short": (lambda p: [p[0], replace(p[1], data=b"short"), p[2]], "FRAME_MALFORMED"),
    "long": (lambda p: [p[0], p[1], replace(p[2], data=p[1].data)], "FRAME_MALFORMED"),
    "huge": (lambda p: [replace(p[0], data=bytes(MEGABYTE + 1))], "FRAME_TOO_LARGE"),
    "of another step": (lambda p: [p[0], replace(p[1], step=9), p[2]], "SEQUENCE_GAP"),
}


@pytest.mark.parametrize("name", PART_FAULTS)
def test_a_faulty_part_is_found_on_arrival_and_the_frame_asked_for_again(name):
    make, reason = PART_FAULTS[name]
    header, parts = parts_of(a_large_frame(1).sealed())
    receiver = a_receiver()
    answers = [receiver.receive(message) for message in (header, *make(parts))]
    nacks = [answer.nack.reason for answer in answers if answer.nack]
    assert nacks == [reason]
    again = [receiver.receive(message) for message in (header, *parts)]
    assert again[-1].action is Action.ACCEPT


def test_a_part_sent_twice_changes_nothing():
    frame = a_large_frame(1).sealed()
    header, parts = parts_of(frame)
    receiver = a_receiver()
    answers = [receiver.receive(m) for m in (header, parts[0], parts[0], parts[1], *parts[2:])]
    assert answers[-1].frames == (frame,)


def test_parts_of_a_duplicate_go_by():
    header, parts = parts_of(a_large_frame(1).sealed())
    receiver = a_receiver()
    for message in (header, *parts):
        receiver.receive(message)
    assert receiver.receive(header).action is Action.DUPLICATE
    for part in parts:
        answer = receiver.receive(part)
        assert (answer.action, answer.nack) == (Action.PENDING, None)


def test_a_swap_between_parts_fails_the_whole_payloads_checksum():
    header, parts = parts_of(a_large_frame(1, megabytes=2).sealed())
    data = [bytes(parts[1].data), bytes(parts[0].data)]
    swapped = [
        replace(part, data=piece, data_crc32c=crc32c(piece))
        for part, piece in zip(parts, data, strict=True)
    ]
    receiver = a_receiver()
    answers = [receiver.receive(message) for message in (header, *swapped)]
    assert isinstance(answers[-1].error, errors.FrameCorrupted)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"part_count": 2}, errors.FrameMalformed),
        ({"payload_length": 3 * MEGABYTE}, errors.FrameMalformed),
        ({"payload_length": 2**40}, errors.FrameTooLarge),
        ({"payload_length": 10, "part_count": 0}, errors.FrameMalformed),
    ],
)
def test_impossible_parts_are_refused_before_anything_is_allocated(change, kind):
    header, _ = parts_of(a_large_frame(1).sealed())
    with pytest.raises(kind):
        PartAssembler(replace(header, **change))


def test_a_header_in_parts_is_verified_before_anything_is_allocated():
    header, _ = parts_of(a_large_frame(1).sealed())
    received = a_receiver().receive(replace(header, payload_length=2**40))
    assert isinstance(received.error, errors.FrameCorrupted)


# ---------------------------------------------------------------- both, over a faulty channel


class FaultyChannel:
    """A seeded channel with virtual time between the two halves of a hop."""

    def __init__(self, seed: int, rate: float, *, count: int, kinds: tuple[str, ...], window: int):
        self.random = random.Random(seed)
        self.rate, self.kinds = rate, kinds
        limits = HopLimits(inflight_frames_max=window, ledger_frames_max=max(64, window))
        self.sender = a_sender()
        self.sender = HopSender(
            epoch=2, hop_from=0, hop_to=1, fingerprint=FINGERPRINT, limits=limits
        )
        self.receiver = a_receiver(limits=limits)
        self.count = count
        self.now = 0.0
        self.copies = 0
        self.fired: Counter[str] = Counter()
        self.delivered: list[StepFrame] = []
        self._queue: list[tuple[float, int, bool, object]] = []
        self._serial = 0
        self._clear_at = [0.0, 0.0]

    def _post(self, forward: bool, message: object, *, delay: float = 0.0) -> None:
        """In order per direction, unless ``delay`` lets others overtake."""
        due = max(self._clear_at[forward], self.now + 0.001)
        self._clear_at[forward] = due
        self._serial += 1
        heapq.heappush(self._queue, (due + delay, self._serial, forward, message))

    def _send(self, forward: bool, message: object) -> None:
        kind = self.random.choice(self.kinds) if self.random.random() < self.rate else ""
        if kind:
            self.fired[kind] += 1
        if kind == "drop":
            return
        if kind == "damage" and isinstance(message, StepFrame):
            message = damaged(message)
        if kind == "header" and isinstance(message, StepFrame):
            message = replace(message, step=message.step ^ 1)
        self._post(forward, message, delay=0.004 if kind == "reorder" else 0.0)
        if kind == "duplicate":
            self._post(forward, message)

    def _pump(self) -> None:
        draw = self.random.random()
        self.sender.on_time(self.now, draw=draw)
        while self.sender.writable and self.sender.next_step <= self.count:
            self.sender.offer(a_frame(self.sender.next_step))
        for frame in self.sender.transmissions(self.now):
            self.copies += 1
            self._send(True, frame)
        self.sender.check()

    def run(self) -> None:
        self.sender.on_opened(self.receiver.opened(), self.now)
        while self.sender.acked < self.count and not self.sender.exhausted:
            self._pump()
            deadline = self.sender.next_deadline(self.now)
            if self._queue and (deadline is None or self._queue[0][0] <= deadline):
                due, _, forward, message = heapq.heappop(self._queue)
                self.now = max(self.now, due)
                self._arrive(forward, message)
            elif deadline is not None:
                self.now = deadline
            assert self.now < 600, f"stuck: {self.sender} {self.receiver.next_step}"

    def _arrive(self, forward: bool, message) -> None:
        if not forward:
            transport = ReliableMessageTransport(self.sender, self.receiver)
            transport.answer(message, self.now, draw=self.random.random())
            return
        received = self.receiver.receive(message)
        self.delivered.extend(received.frames)
        if received.ack or received.nack:
            self._send(False, received)


ALL_KINDS = ("drop", "damage", "header", "reorder", "duplicate")


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([0.02, 0.1, 0.3]),
    window=st.integers(1, 24),
)
def test_whatever_the_channel_does_each_frame_is_delivered_once_and_in_order(seed, rate, window):
    channel = FaultyChannel(seed, rate, count=60, kinds=ALL_KINDS, window=window)
    channel.run()
    if channel.sender.exhausted:
        assert rate == 0.3
    else:
        assert steps(channel.delivered) == list(range(1, 61))
    assert steps(channel.delivered) == list(range(1, len(channel.delivered) + 1))
    assert channel.delivered == [a_frame(frame.step).sealed() for frame in channel.delivered]


def test_the_same_seed_gives_the_same_run():
    runs = []
    for _ in range(2):
        channel = FaultyChannel(7, 0.2, count=80, kinds=ALL_KINDS, window=8)
        channel.run()
        runs.append((channel.copies, channel.now, channel.fired, dict(channel.sender.counters)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("window", [1, 4, 16])
def test_five_percent_of_faults_cost_at_most_ten_percent_extra_frames(window):
    for seed in range(5):
        channel = FaultyChannel(seed, 0.05, count=1000, kinds=ALL_KINDS, window=window)
        channel.run()
        assert steps(channel.delivered) == list(range(1, 1001))
        assert channel.copies <= 1100, f"seed {seed}: {channel.copies}"


def test_when_everything_is_lost_the_hop_ends_and_sends_little():
    channel = FaultyChannel(1, 1.0, count=100, kinds=("drop",), window=16)
    channel.run()
    assert isinstance(channel.sender.failure, errors.StageUnreachable)
    assert channel.copies <= 16 + 8
    assert channel.now <= 6.0


def test_ten_thousand_clean_frames_raise_no_alarm():
    channel = FaultyChannel(1, 0.0, count=10_000, kinds=("drop",), window=16)
    channel.run()
    assert channel.copies == 10_000
    assert dict(channel.receiver.counters) == {"frames_checked": 10_000}
    assert set(channel.sender.counters) <= {"window_waits"}


def test_both_halves_in_one_process_need_nothing_between_them():
    transport = ReliableMessageTransport(a_sender(), a_receiver())
    transport.open(0.0)
    for step in (1, 2, 3):
        transport.sender.offer(a_frame(step))
    assert steps(transport.exchange(0.0)) == [1, 2, 3]
    assert transport.sender.unacknowledged == 0
