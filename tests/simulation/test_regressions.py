"""What the simulator found, kept as small cases that need no simulator."""

from dataclasses import replace

import pytest

from coordinator.core import Mesh
from coordinator.events import (
    BarrierArrived,
    DrainRequested,
    GenerationRequested,
    LinkBroken,
    WorkerLost,
    WorkerRegistered,
)
from coordinator.instructions import CloseLink, DrainWorker, MeetWorker, OpenRoute
from coordinator.memory_worker import worker_info
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.sampling import SamplingSpec
from stagemesh.transport import HopLimits, HopReceiver, HopSender


def test_the_coordinators_ends_of_a_route_that_never_opened_are_closed():
    """Seed 10 of the first campaign: the end for the last stage is expected as soon as a route is
    ordered, but was closed only if the barrier had completed."""
    mesh = Mesh()
    info = worker_info("full", "0-6")
    ordered = [i for i in mesh.handle(WorkerRegistered(info), 0.0) if isinstance(i, OpenRoute)]
    epoch, generation = ordered[0].route.epoch, ordered[0].generation
    refusal = BarrierArrived(info.name, "open-route", epoch, generation, refusal="no room")
    instructions = mesh.handle(refusal, 0.1)
    assert CloseLink(epoch) in instructions


def test_a_lost_worker_closes_the_ends_of_the_route_it_was_joining():
    mesh = Mesh()
    info = worker_info("full", "0-6")
    ordered = [i for i in mesh.handle(WorkerRegistered(info), 0.0) if isinstance(i, OpenRoute)]
    epoch = ordered[0].route.epoch
    instructions = mesh.handle(WorkerLost(info.name, info.instance, "reset"), 0.1)
    assert CloseLink(epoch) in instructions
    assert CloseLink(epoch) not in mesh.handle(LinkBroken(epoch, "STAGE_UNREACHABLE"), 0.2)


def test_a_sender_woken_at_its_own_deadline_has_something_to_do():
    """Seed 65: silence was compared as a difference but announced as a sum, and the two round
    differently: the sender asked to be woken at once, for ever."""
    limits = HopLimits(silence_s_max=2.0)
    for step in range(2000):
        opened = 0.0088 + step * 1e-7 / 3
        sender = HopSender(epoch=1, hop_from=-1, hop_to=0, fingerprint=bytes(8), limits=limits)
        sender.on_opened(1, opened)
        sender.offer(StepFrame(FrameKind.PROBE, bytes(8), 1, 1, -1, 0, ()))
        sender.transmissions(opened)
        now = opened
        while sender.failure is None:
            due = sender.next_deadline(now)
            assert due is not None
            assert due >= now
            sender.on_time(due, draw=0.0)
            assert sender.failure is not None or sender.due(due) or due > now
            sender.transmissions(due)
            now = due
            if sender.next_deadline(now) == now and sender.failure is None:
                sender.on_time(now, draw=0.0)
                assert sender.failure is not None, "woken for nothing"


def test_requests_that_only_wait_do_not_hold_the_mesh_to_a_model_that_is_gone():
    """Seed 117: the only worker came back with the right weights, and was turned away for as long
    as any request waited; each request that failed was followed by one that waited."""
    mesh = Mesh()
    right, wrong = worker_info("full", "0-6"), worker_info("full", "0-6", fingerprint="cd" * 32)
    mesh.handle(WorkerRegistered(wrong), 0.0)
    mesh.handle(WorkerLost(wrong.name, wrong.instance, "reset"), 0.1)
    waiting = GenerationRequested(bytes(16), (1, 2), SamplingSpec(), max_tokens=4)
    mesh.handle(waiting, 0.2)
    instructions = mesh.handle(WorkerRegistered(replace(right, instance="2")), 0.3)
    assert [i.admitted for i in instructions if isinstance(i, MeetWorker)] == [True]


def test_draining_a_worker_that_is_away_takes_it_off_the_list():
    """Seed 822: its drain barrier waited for nobody, and ended on the process that came after."""
    mesh = Mesh()
    info = worker_info("full", "0-6")
    mesh.handle(WorkerRegistered(info), 0.0)
    mesh.handle(WorkerLost(info.name, info.instance, "reset"), 0.1)
    instructions = mesh.handle(DrainRequested(info.name, 1.0), 0.2)
    assert not [i for i in instructions if isinstance(i, DrainWorker)]
    assert info.name not in mesh.state.workers
    assert not mesh.state.barriers.forming


def test_a_path_that_has_become_slow_does_not_cost_a_copy_of_every_frame():
    """Seed 344: round trips are not measured on frames that were sent twice (Karn), so a timer that
    had become too short stayed too short: every frame was sent again, for ever."""
    facts = {"epoch": 1, "hop_from": -1, "hop_to": 0, "fingerprint": bytes(8)}
    sender, receiver, now = HopSender(**facts), HopReceiver(**facts), 0.0
    sender.on_opened(receiver.opened(), now)
    for step in range(1, 101):
        way_s = 0.001 if step <= 50 else 0.12
        sender.offer(StepFrame(FrameKind.PROBE, bytes(8), 1, step, -1, 0, ()))
        answers: list[tuple[float, int, bool]] = []
        while sender.acked < step:
            for frame in sender.transmissions(now):
                ack = receiver.receive(frame).ack
                assert ack is not None
                answers.append((now + 2 * way_s, ack.step, ack.duplicate))
            due = sender.next_deadline(now)
            now = min(answers[0][0], due if due is not None else answers[0][0])
            while answers and answers[0][0] <= now:
                _, acked, duplicate = answers.pop(0)
                sender.on_ack(acked, now, epoch=1, duplicate=duplicate)
            sender.on_time(now, draw=1.0)
        for at, acked, duplicate in answers:  # copies that are still on their way
            now = max(now, at)
            sender.on_ack(acked, now, epoch=1, duplicate=duplicate)
    assert sender.counters["frames_retransmitted"] <= 5


@pytest.mark.parametrize("draw", [0.0, 0.5, 1.0])
def test_a_path_that_stalls_for_less_than_silence_costs_copies_and_no_route(draw: float):
    """Seed 3204: one frame was late, and on its ordered connection everything behind it. With short
    draws the eighth copy had gone out after 0.64 s, and the hop was given up at a third of the
    silence it was to bear."""
    limits = HopLimits(retransmit_wait_s_min=0.02, retransmit_wait_s_max=0.5, silence_s_max=2.0)
    facts = {"epoch": 1, "hop_from": -1, "hop_to": 0, "fingerprint": bytes(8), "limits": limits}
    sender, receiver, now = HopSender(**facts), HopReceiver(**facts), 0.0
    sender.on_opened(receiver.opened(), now)
    for step in range(1, 30):  # a fast path has taught the timer to be short
        sender.offer(StepFrame(FrameKind.PROBE, bytes(8), 1, step, -1, 0, ()))
        (frame,) = sender.transmissions(now)
        assert receiver.receive(frame).ack is not None
        now += 0.001
        sender.on_ack(step, now, epoch=1)
    sender.offer(StepFrame(FrameKind.PROBE, bytes(8), 1, 30, -1, 0, ()))
    sent_at, late = now, sender.transmissions(now)
    while (due := sender.next_deadline(now)) is not None and due < sent_at + 1.9:
        now = due
        sender.on_time(now, draw=draw)
        late += sender.transmissions(now)
    assert sender.failure is None
    assert len(late) <= limits.copies_max
    for frame in late:  # the path lets go
        ack = receiver.receive(frame).ack
        assert ack is not None
        sender.on_ack(ack.step, sent_at + 1.9, epoch=1, duplicate=ack.duplicate)
    assert sender.acked == 30
    silent = HopSender(**facts)  # and one that lets go of nothing is given up, in time
    silent.on_opened(1, 0.0)
    silent.offer(StepFrame(FrameKind.PROBE, bytes(8), 1, 1, -1, 0, ()))
    now = 0.0
    while silent.failure is None:
        silent.transmissions(now)
        due = silent.next_deadline(now)
        assert due is not None
        now = due
        silent.on_time(now, draw=draw)
    assert now <= limits.silence_s_max
    assert silent.failure.reason == "STAGE_UNREACHABLE"
