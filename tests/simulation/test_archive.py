"""What outlives a coordinator in the simulator: kept at the right moment, and told in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator import instructions as do
from coordinator.echo import oracle
from coordinator.events import Event, GenerationRequested, RequestFailed
from coordinator.simulation.archive import HAND_BACK_S, Disk, Record, VirtualJournal, unknown
from coordinator.simulation.campaign import run_seeds
from coordinator.simulation.clients import Client
from coordinator.simulation.plan import LAYERS
from coordinator.simulation.virtual import Process, VirtualTime
from coordinator.simulation.watch import Watch
from stagemesh.checksum import chain_next, chain_start
from stagemesh.errors import DeadlineExceeded, RouteUnavailable
from stagemesh.sampling import SamplingSpec
from stagemesh.token import StageMark, TokenChunk, ValidationStatus

KEY, PROMPT, COUNT = bytes(15) + b"\x01", (3, 1, 4), 6
DEMAND = GenerationRequested(KEY, PROMPT, SamplingSpec(), COUNT)
ANSWER = oracle(PROMPT, COUNT, layer_count=LAYERS)
COMMIT_S = 0.01


def chunks() -> list[TokenChunk]:
    found, chain = [], chain_start(KEY, PROMPT)
    for position, token_id in enumerate(ANSWER, len(PROMPT)):
        chain = chain_next(chain, position, token_id)
        marks = (StageMark(position, 0, 0),)
        found.append(
            TokenChunk(
                KEY,
                position,
                token_id,
                1,
                1,
                -0.5,
                1.0,
                0,
                "full",
                chain,
                marks=marks,
                status=ValidationStatus.VALID,
            ).sealed()
        )
    return found


CHUNKS = chunks()
SUMMARY = do.RequestSummary(len(PROMPT), COUNT)


class Desk:
    """A coordinator's process with a journal, and what came of it."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.process = Process("coordinator", self.time)
        self.disk = Disk()
        self.fed: list[Event] = []
        self.delivered: list[object] = []
        self.journal = VirtualJournal(
            self.process, self.disk, COMMIT_S, feed=self.fed.append, label=lambda: "w:f32"
        )

    def commit(self, *instructions: object) -> None:
        for one in instructions:
            self.journal.commit(one, self.delivered.append)

    def until(self, when: float) -> None:
        self.time.run_until(lambda: False, when, events_max=1000)


def token(index: int) -> do.AcceptTokens:
    return do.AcceptTokens(KEY, index, (CHUNKS[index],))


@pytest.mark.parametrize(
    ("killed_at", "moment", "kept", "told"),
    [
        (0.0, "queued", 0, 0),
        (COMMIT_S / 2, "writing", 0, 0),
        (COMMIT_S + HAND_BACK_S / 2, "written", 2, 0),
        (COMMIT_S + 2 * HAND_BACK_S, "idle", 2, 2),
    ],
)
def test_a_kill_leaves_on_the_disk_what_was_written_and_never_less_than_was_told(
    killed_at: float, moment: str, kept: int, told: int
) -> None:
    desk = Desk()
    desk.journal.begin(DEMAND)
    desk.commit(token(0), token(1))
    if killed_at:
        desk.until(killed_at)
    assert desk.journal.moments == (moment,)
    desk.process.kill()
    desk.until(1.0)
    assert len(desk.delivered) == told
    found = desk.disk.kept.get(KEY)
    assert (found.tokens() if found else []) == ANSWER[:kept]


def test_what_gathers_while_the_disk_is_busy_is_written_together_and_told_in_order() -> None:
    desk = Desk()
    desk.journal.begin(DEMAND)
    desk.commit(token(0))
    desk.until(COMMIT_S / 2)
    desk.commit(token(1), token(2), do.FinishRequest(KEY, "length", SUMMARY))
    desk.until(COMMIT_S * 1.5)
    assert desk.delivered == [token(0)]
    desk.until(1.0)
    assert [getattr(one, "first_index", "end") for one in desk.delivered] == [0, 1, 2, "end"]
    assert desk.disk.kept[KEY].ended
    assert desk.disk.kept[KEY].label == "w:f32"


def test_on_a_full_disk_a_request_fails_once_and_nothing_unkept_is_told() -> None:
    desk = Desk()
    desk.journal.begin(DEMAND)
    desk.commit(token(0))
    desk.until(0.1)
    desk.disk.full = True
    desk.commit(token(1), token(2))
    desk.until(0.2)
    desk.disk.full = False
    desk.commit(token(3))  # a file has no gaps
    desk.until(0.3)
    assert desk.delivered == [token(0)]
    assert [type(event) for event in desk.fed] == [RequestFailed]
    desk.commit(do.FinishRequest(KEY, "length", SUMMARY))
    desk.until(0.4)
    assert isinstance(desk.delivered[-1], do.FailRequest)
    assert desk.disk.kept[KEY].recovered().accepted == (ANSWER[0],)
    assert not desk.disk.kept[KEY].ended


def a_client(watch: Watch) -> Client:
    return Client(DEMAND, 0.0, LAYERS, watch)


def test_a_client_that_comes_back_gets_what_it_has_not_seen_and_the_end() -> None:
    watch, record = Watch(), Record.of(DEMAND)
    client = a_client(watch)
    record.attach(client)
    for index in range(2):
        record.accept(token(index))
    record.client = None
    for index in range(2, COUNT):
        record.accept(token(index))
    record.finish(do.FinishRequest(KEY, "length", SUMMARY))
    assert (client.tokens, client.end) == (ANSWER[:2], None)
    record.attach(client)
    assert client.tokens == ANSWER
    assert isinstance(client.end, do.FinishRequest)
    assert not watch.violations


def test_an_answer_that_failed_is_reopened_with_what_it_has_and_its_end_is_no_longer_kept() -> None:
    desk, failure = Desk(), do.FailRequest(KEY, RouteUnavailable("gone"), SUMMARY)
    desk.journal.begin(DEMAND)
    desk.commit(token(0), token(1), failure)
    desk.until(0.1)
    record = Record.restored(desk.disk.kept[KEY])
    assert record.failure is not None
    record.reopen(record.failure, anew=False)
    asked = record.demand
    assert (asked.accepted, asked.recovered) == (tuple(ANSWER[:2]), True)
    assert (asked.resumed_after, asked.fingerprint) == ("ROUTE_UNAVAILABLE", "w:f32")
    assert record.end is None
    desk.journal.begin(asked)
    desk.until(0.2)
    assert not desk.disk.kept[KEY].ended
    desk.commit(token(2))
    desk.until(0.3)
    assert desk.disk.kept[KEY].tokens() == ANSWER[:3]


def test_what_its_client_caused_is_not_reopened() -> None:
    record = Record.of(DEMAND)
    record.fail(do.FailRequest(KEY, DeadlineExceeded("late"), SUMMARY))
    assert record.failure is None


def _forget_a_token(record: Record) -> None:
    del record.ids[1:], record.chunks[1:]


def _change_a_token(record: Record) -> None:
    record.ids[1] += 1


@pytest.mark.parametrize("spoil", [_forget_a_token, _change_a_token])
def test_an_answer_that_is_not_what_a_client_was_shown_is_a_violation(
    spoil: Callable[[Record], None],
) -> None:
    watch, record = Watch(), Record.of(DEMAND)
    client = a_client(watch)
    record.attach(client)
    for index in range(3):
        record.accept(token(index))
    spoil(record)
    record.attach(client)
    assert watch.violations


@pytest.mark.parametrize("lost", [True, False])
def test_an_answer_in_no_file_is_an_end_that_only_a_lost_file_excuses(lost: bool) -> None:
    watch = Watch()
    client = a_client(watch)
    client.accept(token(0))
    unknown(client, lost=lost)
    assert isinstance(client.end, do.FailRequest)
    assert client.end.error.reason == "REQUEST_UNKNOWN"
    assert [one.invariant for one in watch.violations] == ([] if lost else ["I14"])


def test_epochs_of_a_new_coordinator_are_above_all_that_were_used() -> None:
    desk = Desk()
    first = desk.disk.first_epoch()
    for epoch in range(first, first + 40):
        desk.journal.epoch_used(epoch)
        assert Disk(reserved=desk.disk.reserved).first_epoch() > epoch
    desk.disk.lose()
    assert desk.disk.first_epoch() > first + 39


def test_seeds_with_a_killed_coordinator_are_clean_and_kill_it_in_every_phase() -> None:
    campaign = run_seeds(range(120))
    assert not campaign.violations
    kills = {name: n for name, n in campaign.counters.items() if "coordinator_killed" in name}
    assert sum(kills.values()) >= 10
