"""Mistakes of an earlier attempt at these same guards, each performed against ours.

Each looked like a guard and was none. A test here makes the mistake happen, or asks the question it
got wrong.
"""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path

import mlx.core as mx
import pytest

from coordinator.barrier import Arrival, BarrierState
from coordinator.barrier_book import BarrierBook
from coordinator.corruption_detector import CorruptionDetector
from coordinator.events import BarrierArrived
from coordinator.synchronizer import TokenStreamSynchronizer
from coordinator.testing import MemoryMesh
from coordinator.text_signals import TextSignals
from coordinator.token_validator import ExpectedRow, TokenValidator
from services.codec import decode_request, encode_frame
from stage_worker.mx_barrier import Meeting
from stagemesh.checksum import chain_next, chain_start, history_digest
from stagemesh.errors import BarrierBroken, FrameCorrupted, FrameMalformed, TokenRejected
from stagemesh.frame import FrameKind, Score, StepFrame, StepRow, verify
from stagemesh.hop_receiver import Action, Boundary, HopReceiver
from stagemesh.hop_sender import HopSender
from stagemesh.sequence import End, Order, SequenceIntegrityChecker
from stagemesh.tensor import DType, Tensor
from stagemesh.token import StageMark, TokenChunk

ROOT = Path(__file__).parents[2]
KEY = bytes(range(16))
FINGERPRINT = b"weights!"
STAGES = ("stage-0", "stage-1")


def a_frame(step: int = 1, payload: bytes = bytes(range(64))) -> StepFrame:
    tensor = Tensor(DType.F32, (1, 16), payload)
    rows = (StepRow(KEY, 5, (9,), marks=(StageMark(6, 1, 2),)),)
    return StepFrame(FrameKind.DECODE, FINGERPRINT, 3, step, 0, 1, rows, tensor)


def a_hop() -> tuple[HopSender, HopReceiver]:
    facts = {"epoch": 3, "hop_from": 0, "hop_to": 1, "fingerprint": FINGERPRINT}
    return HopSender(**facts), HopReceiver(**facts)


# ---- checksums computed by the process that verifies them, or over a placeholder


def test_the_senders_digest_travels_and_is_held_against_what_arrived() -> None:
    sealed = a_frame().sealed()
    (encoded,) = encode_frame(sealed)
    arrived = decode_request(encoded)
    assert isinstance(arrived, StepFrame)
    assert (arrived.header_crc32c, arrived.payload_crc32c) == (
        sealed.header_crc32c,
        sealed.payload_crc32c,
    )
    changed = bytearray(arrived.tensor.payload)
    changed[3] ^= 1
    other = replace(arrived, tensor=replace(arrived.tensor, payload=bytes(changed)))
    with pytest.raises(FrameCorrupted):
        verify(other, fingerprint=FINGERPRINT)


def test_a_digest_of_a_placeholder_does_not_stand_for_the_payload() -> None:
    placeholder = a_frame(payload=bytes(64)).sealed()
    filled = replace(placeholder, tensor=a_frame().tensor)
    _, receiver = a_hop()
    assert receiver.receive(filled).action is Action.REFUSE
    assert receiver.next_step == 1


# ---- a token checksum over text, id and index only


def a_stream() -> tuple[TokenStreamSynchronizer, StepRow]:
    stream = TokenStreamSynchronizer(KEY, (1, 2, 3), TokenValidator(1000))
    stream.begin_route(3, STAGES)
    stream.expect(1, 3, 0, (1, 2, 3))
    digest = history_digest((1, 2, 3))
    chain = chain_next(chain_start(KEY, (1, 2, 3)), 3, 77)
    chunk = TokenChunk(KEY, 3, 77, 3, 1, -0.5, 1.0, 0, "stage-1", chain).sealed()
    marks = (StageMark(3, digest, 5), StageMark(3, digest, 0))
    return stream, StepRow(KEY, 0, (1, 2, 3), samples=True, marks=marks, token=chunk)


def test_a_moved_or_relabelled_token_does_not_verify_whatever_its_checksum_says() -> None:
    stream, row = a_stream()
    others = {
        "request": bytes(16),
        "position": 4,
        "epoch": 2,
        "step": 2,
        "token_id": 78,
        "source": "stage-0",
        "chain": bytes(16),
    }
    for field, value in others.items():
        assert not replace(row.token, **{field: value}).checksum_holds(), field
        resealed = replace(row, token=replace(row.token, **{field: value}).sealed())
        expected = ExpectedRow(
            KEY, 3, 1, 0, 3, history_digest((1, 2, 3)), True, stream.chain, STAGES
        )
        assert TokenValidator(1000).check_row(resealed, expected), field
    assert stream.accept(row, epoch=3, step=1).token_id == 77


def test_the_token_checksum_covers_every_field_there_is() -> None:
    _, row = a_stream()
    token = row.token
    for field in fields(TokenChunk):
        value = getattr(token, field.name)
        if field.name == "checksum":
            continue
        other = {
            bytes: lambda old: old[:-1] + b"\xff",
            str: lambda old: old + "x",
            float: lambda old: old + 0.25,
            tuple: lambda old, name=field.name: (
                (*old, StageMark(1, 2, 3)) if name == "marks" else ((1, 0.5),)
            ),
        }.get(type(value), lambda old: type(old)(int(old) + 1))(value)
        assert not replace(token, **{field.name: other}).checksum_holds(), field.name


# ---- a sequence checker whose range was what happened to arrive


def test_losing_the_head_or_the_tail_of_a_stream_is_seen() -> None:
    headless = SequenceIntegrityChecker(first=0)
    assert headless.observe(2) is Order.GAP
    headless.skip_to(2)
    assert headless.observe(2) is Order.NEXT
    assert headless.finish(3) is End.HEAD_LOST
    tailless = SequenceIntegrityChecker(first=0)
    assert [tailless.observe(n) for n in (0, 1)] == [Order.NEXT, Order.NEXT]
    assert tailless.finish(3) is End.TAIL_LOST
    nothing = SequenceIntegrityChecker(first=0)
    assert nothing.finish(3) is End.HEAD_LOST


# ---- a barrier retry that issued a second collective


def test_trying_again_is_a_new_generation_and_an_old_arrival_cannot_complete_it() -> None:
    book = BarrierBook()
    first = book.form("open-route", 3, STAGES, 0.0, timeout_s=1.0)
    book.arrive(BarrierArrived("stage-0", "open-route", 3, 1, {}), 0.5)
    book.expire(1.0)
    assert first.state is BarrierState.BROKEN
    second = book.form("open-route", 3, STAGES, 2.0, timeout_s=1.0, generation=2)
    late = BarrierArrived("stage-1", "open-route", 3, 1, {})
    assert book.arrive(late, 2.1)[1] is Arrival.LATE
    assert (second.generation, second.absent) == (2, STAGES)


def test_no_member_issues_a_second_collective_behind_one_that_failed() -> None:
    meeting = Meeting(mx.distributed.init(), epoch=1, timeout_s=5.0)
    begun: list[str] = []

    def lost() -> mx.array:
        begun.append("collective")
        raise RuntimeError("connection to a peer was lost")

    for _ in range(3):
        with pytest.raises(BarrierBroken, match="lost"):
            meeting.collective(lost, "all_sum")
    assert begun == ["collective"]


# ---- a garbled-text detector that flagged legal output and passed word salad


@pytest.mark.parametrize("text", ["\n", "é", "你好", "😀", "----", "e\u0301", "\t\x0b", "\ufffd"])
def test_legal_text_raises_no_signal_alone_or_in_the_middle_of_other_text(text: str) -> None:
    prose = "Once upon a time there was a mesh that answered every question it was asked. "
    for whole in (text, f"{prose}{text}{prose}{text}"):
        signals = TextSignals()
        signals.observe(whole)
        assert not signals.read().signals


def test_word_salad_is_found_by_the_reference_and_not_pretended_to_be_found_in_the_text() -> None:
    salad = "green seventeen quickly of the umbrella did perhaps " * 8
    signals = TextSignals()
    signals.observe(salad)
    assert not signals.read().signals
    scores = [Score(10, 5, 6, 4.2, 0.1)]
    detector = CorruptionDetector()
    result, findings = detector.check_scores(
        scores, [5], first_position=10, worker="stage-1", request=KEY
    )
    assert not result.agrees
    assert findings[0].worker == "stage-1"


# ---- recovery that slept and said it had worked; a fallback nobody called; acks nobody read


def test_a_recovery_is_computed_somewhere_else_and_not_merely_announced() -> None:
    mesh = MemoryMesh()
    for name, span in (("stage-0", "0-3"), ("stage-1", "3-6"), ("full", "0-6")):
        mesh.join(name, span)
    client = mesh.request(1, tuple(range(1, 20)), 30)
    assert mesh.run_until(lambda: len(client.tokens) == 10)
    steps_before = mesh.workers["full"].steps_computed
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    (recovery,) = client.summary.recoveries
    assert (recovery.action, recovery.to_route) == ("reroute", ("full",))
    assert recovery.replayed >= recovery.kept  # the rest was in a warm cache
    assert mesh.workers["full"].steps_computed - steps_before >= 30 - recovery.kept
    assert [chunk.source for chunk in client.chunks][-1] == "full"


def test_acknowledgements_are_read_and_without_them_nothing_more_goes_out() -> None:
    sender, receiver = a_hop()
    sender.on_opened(receiver.opened(), 0.0, frames_max=2)
    for step in (1, 2, 3):
        sender.offer(a_frame(step))
    went = sender.transmissions(0.0)
    assert [frame.step for frame in went] == [1, 2]
    assert sender.transmissions(0.0) == []
    received = receiver.receive(went[0])
    assert received.ack is not None
    assert sender.on_ack(received.ack.step, 0.1) == 1
    assert [frame.step for frame in sender.transmissions(0.1)] == [3]


# ---- a validator and a stress test whose generators were stubs


def test_no_function_of_the_product_has_an_empty_body() -> None:
    empty = []
    for room in ("stagemesh", "coordinator", "stage_worker", "services"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if "v1" in path.parts:
                continue
            for kind in (n for n in ast.walk(ast.parse(path.read_text())) if _may_be_empty(n)):
                empty += [f"{path.name}:{function.lineno}" for function in _stubs(kind)]
    assert not empty


def _may_be_empty(node: ast.AST) -> bool:
    if isinstance(node, ast.Module):
        return True
    protocol = isinstance(node, ast.ClassDef) and any("Protocol" in ast.dump(b) for b in node.bases)
    return isinstance(node, ast.ClassDef) and not protocol


def _stubs(owner: ast.AST) -> list[ast.FunctionDef]:
    """Functions that do nothing and do not say that there is nothing to do."""
    return [
        function
        for function in owner.body
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(function) is None
        and all(isinstance(one, ast.Pass) or _is_ellipsis(one) for one in function.body)
    ]


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and getattr(node.value, "value", None) is ...


# ---- what had really gone wrong: none of it was a flipped bit


def test_a_second_token_for_a_position_is_refused_wherever_it_comes_from() -> None:
    stream, row = a_stream()
    stream.accept(row, epoch=3, step=1)
    with pytest.raises(TokenRejected):
        stream.accept(row, epoch=3, step=1)
    assert stream.accepted == 1


def test_logits_where_hidden_states_belong_are_refused_by_shape() -> None:
    logits = replace(a_frame(), tensor=Tensor(DType.F32, (1, 32_000), bytes(128_000)))
    with pytest.raises(FrameMalformed, match="wrong shape"):
        Boundary(DType.F32, 16).check(logits)


def test_positions_in_chunked_prefill_are_the_same_account_however_the_prompt_is_cut() -> None:
    prompt = tuple(range(50))
    whole = history_digest(prompt)
    for cut in (1, 7, 16, 49):
        rolling = 0
        for first in range(0, 50, cut):
            rolling = history_digest(prompt[first : first + cut], rolling)
        assert rolling == whole
    stream = TokenStreamSynchronizer(KEY, prompt, TokenValidator(1000))
    stream.begin_route(3, STAGES)
    stream.expect(1, 3, 0, prompt[:16])
    short = (StageMark(16, history_digest(prompt[:16]), 1), StageMark(15, 0, 0))
    with pytest.raises(TokenRejected, match="cache holds 15"):
        stream.confirm(StepRow(KEY, 0, prompt[:16], marks=short), epoch=3, step=1)
