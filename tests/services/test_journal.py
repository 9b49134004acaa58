"""The journal before a client's eyes: nothing is shown that is not kept, and failures are typed."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.events import RequestFailed
from coordinator.instructions import (
    AcceptTokens,
    AdvanceVerified,
    CorrectTokens,
    FailRequest,
    FinishRequest,
)
from coordinator.ports import ClientInstruction
from services import journal as journal_module
from services import journal_store as store_module
from services.journal import Journal
from services.journal_codec import accepted_tokens, fingerprint_of
from services.journal_contents import JournalLimits
from services.journal_store import EPOCH_BLOCK, JournalStore
from stagemesh.errors import JournalError
from tests.services.journal_helpers import (
    MODEL,
    NOW_NS,
    PROMPT,
    accept,
    demand,
    failure,
    finish,
    key,
    open_store,
    tokens_of,
)


class Disk(JournalStore):
    """A store whose disk can be held up, or be full."""

    gate: threading.Event
    full = False
    narrow = False
    """Too full for anything but ends."""
    rounds: list[int]

    def write(self, writes: Any, *, wall_ns: int) -> None:
        assert self.gate.wait(20)
        self.rounds.append(len(writes))
        if self.full or (self.narrow and not all(one.ends for one in writes)):
            raise JournalError("the journal cannot be written: database or disk is full")
        super().write(writes, wall_ns=wall_ns)


class Desk:
    """A journal on a running loop, what it delivered and what it told the mesh."""

    def __init__(self, journal: Journal, disk: Disk) -> None:
        self.journal, self.disk = journal, disk
        self.delivered: list[Any] = []
        self.fed: list[RequestFailed] = []
        self.changes: list[str] = []

    def commit(self, *instructions: Any) -> None:
        for instruction in instructions:
            self.journal.commit(instruction, self.delivered.append)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.001)

    def stored(self, number: int) -> Any:
        return self.disk.read(key(number))


@asynccontextmanager
async def desk(
    path: Path, limits: JournalLimits | None = None, **options: Any
) -> AsyncIterator[Desk]:
    disk = Disk.open(path, model=MODEL, wall_ns=NOW_NS, limits=limits)
    disk.gate, disk.rounds = threading.Event(), []
    disk.gate.set()
    one: Desk
    journal = Journal(
        disk,
        feed=lambda event: one.fed.append(event),
        on_change=lambda text: one.changes.append(text),
        wall_clock_ns=lambda: NOW_NS,
        **options,
    )
    one = Desk(journal, disk)
    journal.start()
    try:
        yield one
    finally:
        disk.gate.set()
        await journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


async def test_nothing_is_delivered_before_it_is_kept_and_all_of_it_in_order(path: Path):
    async with desk(path, fingerprint=lambda: "f:f32") as one:
        one.disk.gate.clear()
        one.journal.begin(demand(key(1)))
        tokens = [accept(key(1), index) for index in range(20)]
        one.commit(*tokens, AdvanceVerified(key(1), 8))
        await asyncio.sleep(0.05)
        assert one.delivered == []
        one.disk.gate.set()
        await one.until(lambda: len(one.delivered) == 21)
        assert one.delivered == [*tokens, AdvanceVerified(key(1), 8)]
        assert tokens_of(one.stored(1)) == list(range(20))
        one.commit(CorrectTokens(key(1), 12, "TOKEN_REJECTED"), finish(key(1), 12))
        await one.until(lambda: len(one.delivered) == 23)
        stored = one.stored(1)
        assert (accepted_tokens(stored), stored.ended) == (tuple(range(12)), True)
        assert fingerprint_of(stored) == "f:f32"
        assert one.fed == []


async def test_what_comes_while_the_disk_is_busy_shares_one_transaction(path: Path):
    async with desk(path) as one:
        one.disk.gate.clear()
        one.journal.begin(demand(key(1)))
        await asyncio.sleep(0.02)
        one.commit(*(accept(key(1), index) for index in range(50)))
        one.disk.gate.set()
        await one.until(lambda: len(one.delivered) == 50)
        assert len(one.disk.rounds) <= 3
        assert sum(one.disk.rounds) == 51


async def test_a_full_disk_fails_its_requests_once_and_no_unkept_token_is_shown(path: Path):
    async with desk(path) as one:
        one.journal.begin(demand(key(1)))
        one.commit(accept(key(1), 0))
        await one.until(lambda: len(one.delivered) == 1)
        one.disk.full = True
        one.commit(accept(key(1), 1), accept(key(1), 2))
        one.journal.begin(demand(key(2)))
        await one.until(lambda: len(one.fed) == 2)
        assert [event.request for event in one.fed] == [key(1), key(2)]
        assert all(isinstance(event.error, JournalError) for event in one.fed)
        assert one.delivered == [accept(key(1), 0)]
        one.disk.full = False
        # The mesh has not heard of it yet and goes on for a moment; there are no gaps in a journal.
        one.commit(accept(key(1), 3))
        for event in one.fed:
            one.commit(FailRequest(event.request, event.error, failure(event.request, 0).summary))
        await one.until(lambda: len(one.delivered) == 3)
        assert [type(instruction) for instruction in one.delivered[1:]] == [FailRequest] * 2
        assert len(one.fed) == 2
        assert (tokens_of(one.stored(1)), one.stored(1).ended) == ([0], False)
        assert one.stored(2) is None


@pytest.mark.parametrize("end", [failure(key(1), 2), finish(key(1), 2)])
async def test_what_failed_in_a_file_over_its_limit_is_retired_and_leaves_room(
    path: Path, end: ClientInstruction
):
    async with desk(path, JournalLimits(bytes_max=1)) as one:
        one.journal.begin(demand(key(1)))
        one.commit(accept(key(1), 0))
        await one.until(lambda: len(one.delivered) == 1)
        one.disk.full = True
        one.commit(accept(key(1), 1))
        await one.until(lambda: len(one.fed) == 1)
        one.disk.full = False
        one.commit(end)
        await one.until(lambda: len(one.delivered) == 2)
        assert isinstance(one.delivered[1], FailRequest)
        assert (one.disk.running, one.disk.size, one.stored(1)) == (0, 0, None)


@pytest.mark.parametrize("cut", [False, True], ids=["fine before", "failed before"])
async def test_tokens_that_do_not_fit_keep_no_end_out_of_a_file_over_its_limit(
    path: Path, cut: bool
):
    async with desk(path, JournalLimits(bytes_max=1)) as one:
        for number in (1, 2):
            one.journal.begin(demand(key(number)))
            one.commit(accept(key(number), 0))
        await one.until(lambda: len(one.delivered) == 2)
        one.disk.narrow = True
        if cut:
            one.commit(accept(key(2), 1))
            await one.until(lambda: len(one.fed) == 1)
        one.commit(accept(key(1), 1), finish(key(2), 1))  # in one transaction
        await one.until(lambda: len(one.delivered) == 3)
        assert isinstance(one.delivered[2], FailRequest)
        assert "full" in one.journal.trouble
        assert (one.disk.running, one.stored(2)) == (1, None)
        assert tokens_of(one.stored(1)) == [0]
        one.commit(failure(key(1), 1))
        await one.until(lambda: len(one.delivered) == 4)
        assert (one.disk.running, one.disk.size) == (0, 0)


async def test_an_end_that_cannot_be_kept_is_told_as_a_failure(path: Path):
    async with desk(path) as one:
        one.journal.begin(demand(key(1)))
        one.commit(accept(key(1), 0))
        await one.until(lambda: len(one.delivered) == 1)
        one.disk.full = True
        one.commit(accept(key(1), 1), finish(key(1), 2))
        await one.until(lambda: len(one.delivered) == 2)
        end = one.delivered[1]
        assert isinstance(end, FailRequest)
        assert (end.error.reason, end.error.code) == ("JOURNAL_ERROR", "DATA_LOSS")
        assert (tokens_of(one.stored(1)), one.stored(1).ended) == ([0], False)


async def test_the_mesh_is_told_before_the_client_that_an_end_could_not_be_kept(path: Path):
    async with desk(path) as one:
        one.journal.begin(demand(key(1)))
        one.commit(accept(key(1), 0))
        await one.until(lambda: len(one.delivered) == 1)
        one.disk.full = True
        told: list[int] = []
        one.journal.commit(finish(key(1), 1), lambda end: told.append(len(one.fed)))
        await one.until(lambda: bool(told))
        assert told == [1]
        assert (one.fed[0].request, one.fed[0].error.reason) == (key(1), "JOURNAL_ERROR")


async def test_the_journal_serves_again_as_soon_as_the_disk_does_and_says_so(path: Path):
    async with desk(path) as one:
        assert one.journal.facts()["journal_state"] == "ok"
        one.disk.full = True
        one.journal.begin(demand(key(1)))
        await one.until(lambda: bool(one.fed))
        assert "full" in one.journal.facts()["journal_state"]
        one.disk.full = False
        one.journal.begin(demand(key(2)))
        one.commit(accept(key(2), 0), finish(key(2), 1))
        await one.until(lambda: len(one.delivered) == 2)
        assert isinstance(one.delivered[1], FinishRequest)
        assert one.journal.facts()["journal_state"] == "ok"
        assert one.changes[1:] == [""]
        assert "full" in one.changes[0]
        assert one.journal.facts()["journal_generations"] == "0 running, 1 ended"


async def test_a_record_that_cannot_be_made_fails_its_request_and_no_other(path: Path):
    async with desk(path) as one:
        one.disk.gate.clear()
        one.journal.begin(demand(key(1)))
        one.journal.begin(demand(key(2)))
        broken = AcceptTokens(key(1), 2**40, ())
        one.commit(broken, accept(key(2), 0))
        one.disk.gate.set()
        await one.until(lambda: bool(one.delivered) and bool(one.fed))
        assert one.delivered == [accept(key(2), 0)]
        assert [event.request for event in one.fed] == [key(1)]


async def test_a_disk_that_cannot_keep_up_fails_what_goes_beyond_the_bound(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(journal_module, "BACKLOG_ENTRIES_MAX", 5)
    async with desk(path) as one:
        one.disk.gate.clear()
        one.journal.begin(demand(key(1)))
        one.commit(*(accept(key(1), index) for index in range(6)))
        assert [event.request for event in one.fed] == [key(1)]
        assert "keep up" in one.fed[0].error.message
        one.commit(FailRequest(key(1), one.fed[0].error, failure(key(1), 4).summary))
        one.disk.gate.set()
        await one.until(lambda: len(one.delivered) == 5)
        assert one.delivered[:4] == [accept(key(1), index) for index in range(4)]
        assert isinstance(one.delivered[4], FailRequest)


async def test_a_request_that_came_from_the_journal_is_continued_in_place(path: Path):
    async with desk(path, fingerprint=lambda: "f:f32") as one:
        one.journal.begin(demand(key(1)))
        one.commit(accept(key(1), 0))
        await one.until(lambda: len(one.delivered) == 1)
    async with desk(path, fingerprint=lambda: "f:f32") as one:
        (stored,) = one.disk.unfinished()
        one.journal.begin(
            demand(key(1), accepted=(0,), recovered=True, fingerprint=fingerprint_of(stored))
        )
        one.commit(accept(key(1), 1), finish(key(1), 2))
        await one.until(lambda: len(one.delivered) == 2)
        stored = await one.journal.read(key(1))
        assert (tokens_of(stored), stored.ended) == ([0, 1], True)
        assert list(stored.opening.prompt) == list(PROMPT)
        assert await one.journal.read(key(3)) is None


async def test_epochs_are_reserved_long_before_they_are_used(path: Path):
    async with desk(path) as one:
        first = one.disk.first_epoch
        used = first + EPOCH_BLOCK + 3
        for epoch in range(first, used):
            one.journal.epoch_used(epoch)
    store = open_store(path, wall_ns=1)
    assert store.first_epoch > used
    store.close()


async def test_closing_writes_and_delivers_what_is_left(path: Path):
    async with desk(path) as one:
        one.journal.begin(demand(key(1)))
        one.commit(*(accept(key(1), index) for index in range(5)))
    assert len(one.delivered) == 5
    store = open_store(path)
    assert tokens_of(store.read(key(1))) == list(range(5))
    store.close()


@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_long_log_of_commits_is_emptied(path: Path, monkeypatch, is_busy: bool):
    monkeypatch.setattr(store_module, "LOG_BYTES_MAX", 1000 if is_busy else 1 << 20)
    monkeypatch.setattr(store_module, "LOG_BYTES_IDLE", 0)
    monkeypatch.setattr(journal_module, "IDLE_S", 3600.0 if is_busy else 0.01)
    async with desk(path) as one:
        folds: list[int] = []
        fold = one.disk.fold

        def seen(*, above_bytes: int = 0) -> None:
            before = one.disk._contents.log_bytes
            fold(above_bytes=above_bytes)
            folds.extend([before] if one.disk._contents.log_bytes < before else [])

        one.disk.fold = seen
        one.journal.begin(demand(key(1)))
        index = 0
        async with asyncio.timeout(20):
            while not folds:
                one.commit(accept(key(1), index))
                index += 1
                await one.until(lambda count=index: len(one.delivered) == count)
                await asyncio.sleep(0.0 if is_busy else 0.05)
    again = open_store(path)
    assert tokens_of(again.read(key(1))) == list(range(index))
    again.close()


async def test_in_the_middle_of_work_a_long_log_is_moved_beside_it(path: Path, monkeypatch):
    monkeypatch.setattr(journal_module, "WAL_PAGES_IDLE", 40)
    monkeypatch.setattr(journal_module, "IDLE_S", 3600.0)
    async with desk(path) as one:
        disk, lengths, rooms, flushers = one.disk, [], [], []
        flush = disk.file.flush

        def seen() -> None:
            flushers.append(threading.current_thread().name)
            flush()

        disk.file.flush = seen
        one.journal.begin(demand(key(1)))
        index = 0
        async with asyncio.timeout(20):
            while len(flushers) < 3:  # never idle: there is always more to keep
                one.commit(accept(key(1), index))
                index += 1
                await one.until(lambda count=index: len(one.delivered) == count)
                lengths.append(disk.file.log_pages)
                rooms.append(disk.file._log_file_pages())
        assert set(flushers) == {"flush"}, "not the writer's thread"
        shortened = [after for before, after in itertools.pairwise(lengths) if after < before]
        assert len(shortened) >= 2
        assert max(lengths) < 400
        assert rooms == sorted(rooms)  # nobody waits for room that is given back
    again = open_store(path)
    assert tokens_of(again.read(key(1))) == list(range(index))
    again.close()


async def test_where_no_thread_is_to_be_had_tokens_go_on_and_the_log_stays_bounded(
    path: Path, monkeypatch
):
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    async with desk(path) as one:
        monkeypatch.setattr(journal_module.threading, "Thread", Refused)
        monkeypatch.setattr(journal_module, "WAL_PAGES_IDLE", 20)
        monkeypatch.setattr(journal_module, "WAL_PAGES_MAX", 60)
        one.journal.begin(demand(key(1)))
        lengths = []
        for index in range(60):
            one.commit(accept(key(1), index))
            await one.until(lambda count=index + 1: len(one.delivered) == count)
            lengths.append(one.disk.file.log_pages)
        monkeypatch.undo()
    assert 20 < max(lengths) < 200


async def test_a_delivery_that_raises_keeps_no_other_back(path: Path):
    async with desk(path) as one:

        def raises(instruction: object) -> None:
            raise ValueError("a defect of the receiver")

        one.journal.begin(demand(key(1)))
        one.journal.commit(accept(key(1), 0), raises)
        one.commit(accept(key(1), 1))
        await one.until(lambda: one.delivered == [accept(key(1), 1)])
