"""The journal: a token is on disk before a client sees it. ``coordinator.ports.Journal``.

The event loop never waits for the disk. What has to be kept goes into a queue; one writer thread
takes everything that has gathered there, writes it in one transaction (group commit) and hands it
back to the loop, which delivers it in order:

    begin, commit ──queue──▶ writer: one transaction for all of it ──call_soon_threadsafe──▶ deliver

What cannot be written is not delivered. Each request concerned then fails, once, with JournalError:
the writer remembers it and keeps nothing more of it (a journal has no gaps), the mesh is told with
RequestFailed so that it frees the caches, and the terminal instruction that comes of it is the one
thing that is delivered unwritten. The journal tries again with the next request, so that the mesh
serves again as soon as the disk does. In the file such a request has no end; it goes on when its
client resumes it, or when a coordinator next starts from it. Only where more is kept than may be is
its failure written all the same: what has no end is never retired, and would fill the file for
good.

Invariants: deliveries happen in the order of ``commit``; a delivered token is in the file; of a
request that failed here nothing but that end is written afterwards, unless it begins again or is
resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.events import Event, GenerationRequested, RequestFailed
from coordinator.instructions import AcceptTokens, FailRequest, FinishRequest
from coordinator.ports import ClientInstruction
from services.journal_codec import instruction_record, is_end, request_record, resumed_record
from services.journal_contents import Write
from services.journal_file import WAL_PAGES_IDLE, WAL_PAGES_MAX
from services.journal_rows import StoredGeneration
from services.journal_store import EPOCH_BLOCK, JournalStore
from stagemesh.errors import JournalError

BATCH_ENTRIES_MAX = 1024
"""Entries in one transaction, and what came together with the last of them."""
BACKLOG_ENTRIES_MAX = 100_000
"""Entries on their way to the disk; a request that adds to more of them fails."""
COMMITS_PER_LOOK = 16
"""Commits between two looks at the write-ahead log's length."""
IDLE_S = 0.2
"""Without work for this long a long write-ahead log is moved into the file."""
CLOSE_S_MAX = 10.0
"""A disk that takes longer to write the rest is left behind."""

Deliver = Callable[[ClientInstruction], None]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """One thing to keep, made for every token and never changed. ``refused``: not to be written,
    whatever the disk says."""

    request: bytes
    wall_ns: int
    now: float = 0.0
    begins: GenerationRequested | None = None
    instruction: ClientInstruction | None = None
    deliver: Deliver | None = None
    fingerprint: str = ""
    epochs_through: int = 0
    refused: bool = False

    @property
    def ends(self) -> bool:
        return self.instruction is not None and is_end(self.instruction)

    def write(self) -> Write:
        resumes = self.begins is not None and bool(self.begins.resumed_after)
        if self.begins is not None and resumes:
            record = resumed_record(self.begins, now=self.now, wall_ns=self.wall_ns)
        elif self.begins is not None:
            record = request_record(self.begins, now=self.now, wall_ns=self.wall_ns)
        elif self.instruction is not None:
            record = instruction_record(
                self.instruction, wall_ns=self.wall_ns, fingerprint=self.fingerprint
            )
        else:
            raise JournalError("an entry without content")
        begins = self.begins is not None and not resumes
        return Write(self.request, record.SerializeToString(), begins, self.ends, resumes)

    def write_failure(self, error: JournalError) -> Write:
        """Its end, of a request that could not be kept whole: it failed."""
        if not isinstance(self.instruction, FinishRequest | FailRequest):
            raise JournalError("an entry that is no end")
        end = FailRequest(self.request, error, self.instruction.summary)
        record = instruction_record(end, wall_ns=self.wall_ns)
        return Write(self.request, record.SerializeToString(), ends=True)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of each entry. ``trouble``: what the disk said, "" for success, None if it was
    not asked."""

    errors: list[JournalError | None]
    trouble: str | None = None


class Journal:
    """See the module. ``start`` it on the loop that ``begin`` and ``commit`` are called on.

    ``feed`` tells the mesh; ``fingerprint`` gives the weights in use; ``on_change`` hears of the
    first failure (its text) and of the first success after it ("").
    """

    def __init__(
        self,
        store: JournalStore,
        *,
        feed: Callable[[Event], None],
        fingerprint: Callable[[], str] = lambda: "",
        on_change: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.store = store
        self.trouble = ""
        """Why the last write failed; "" if it did not."""
        self._feed = feed
        self._fingerprint = fingerprint
        self._on_change = on_change
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._queue: queue.SimpleQueue[list[_Entry] | None] = queue.SimpleQueue()
        self._gathered: list[_Entry] = []
        """On the loop: entries of this turn of it, which go to the writer together."""
        self._pending = 0
        self._failed: set[bytes] = set()
        """On the loop: requests that were told to fail and have not ended yet."""
        self._marked: set[bytes] = set()
        """On the loop: running requests whose weights are in the file."""
        self._cut: set[bytes] = set()
        """On the writer's thread: requests of which nothing more is written."""
        self._flushing: threading.Thread | None = None
        """On the writer's thread: who copies a long log into the file."""
        self._reserved = store.first_epoch + EPOCH_BLOCK
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Write and deliver the rest, then let go of the file."""
        self._pass_on()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_S_MAX)
        await asyncio.sleep(0)  # What the writer handed back is delivered.
        if self._thread.is_alive():
            _log.error("the journal's disk does not answer; it is left behind")
        else:
            self.store.close()

    # -- coordinator.ports.Journal ----------------------------------------------------------------

    def begin(self, request: GenerationRequested) -> None:
        """See Journal. What comes from the journal is in it; that it is resumed is not."""
        if request.fingerprint:
            self._marked.add(request.request)
        if request.recovered and not request.resumed_after:
            return
        self._put(_Entry(request.request, self._wall_clock_ns(), now=self._clock(), begins=request))

    def commit(self, instruction: ClientInstruction, deliver: Deliver) -> None:
        """See Journal."""
        request, fingerprint = instruction.request, ""
        if isinstance(instruction, AcceptTokens) and request not in self._marked:
            self._marked.add(request)
            fingerprint = self._fingerprint()
        elif is_end(instruction):
            self._marked.discard(request)
        refused = self._pending >= BACKLOG_ENTRIES_MAX
        self._put(
            _Entry(
                request,
                self._wall_clock_ns(),
                instruction=instruction,
                deliver=deliver,
                fingerprint=fingerprint,
                refused=refused,
            )
        )
        if refused and not is_end(instruction):
            self._fail(request, JournalError("the journal cannot keep up"))

    def epoch_used(self, epoch: int) -> None:
        """A route was opened; the next owner of the file begins above it. Far ahead of need, so
        nothing waits for it."""
        if epoch + EPOCH_BLOCK // 2 > self._reserved:
            self._reserved = epoch + EPOCH_BLOCK
            self._put(_Entry(b"", 0, epochs_through=self._reserved))

    # -- for the edge and for operators -----------------------------------------------------------

    def holds(self, request: bytes) -> bool:
        """Whether a generation is in the file."""
        return self.store.holds(request)

    async def read(self, request: bytes) -> StoredGeneration | None:
        """A generation that is in the file; None if it is not. Raises JournalError."""
        if not self.store.holds(request):
            return None
        return await asyncio.to_thread(self.store.read, request)

    def facts(self) -> dict[str, str]:
        """What ``stagemesh status`` shows."""
        store = self.store
        return {
            "journal": str(store.path),
            "journal_state": self.trouble or "ok",
            "journal_generations": f"{store.running} running, {store.ended} ended",
            "journal_bytes": str(store.size),
            "journal_commits": str(store.commits),
            "journal_retired": str(store.retired),
        }

    # -- on the loop ------------------------------------------------------------------------------

    def _put(self, entry: _Entry) -> None:
        self._pending += 1
        self._gathered.append(entry)
        if self._loop is None:
            self._pass_on()
        elif len(self._gathered) == 1:
            # Waking the writer costs the loop far more than an entry does: once for a whole step.
            self._loop.call_soon(self._pass_on)

    def _pass_on(self) -> None:
        if self._gathered:
            self._queue.put(self._gathered)
            self._gathered = []

    def _settle(self, entries: list[_Entry], outcome: _Outcome) -> None:
        """The writer is through with ``entries``."""
        self._pending -= len(entries)
        if outcome.trouble is not None:
            self._note(outcome.trouble)
        for entry, error in zip(entries, outcome.errors, strict=True):
            try:
                if error is not None:
                    self._not_kept(entry, error)
                elif entry.deliver is not None and entry.instruction is not None:
                    entry.deliver(entry.instruction)
            except Exception:  # noqa: BLE001 - the others' tokens are not kept back
                _log.exception("delivering to request %s failed", entry.request.hex())

    def _not_kept(self, entry: _Entry, error: JournalError) -> None:
        match entry.instruction:
            case FailRequest() | FinishRequest() as end:
                self._failed.discard(entry.request)
                if isinstance(end, FinishRequest):
                    end = FailRequest(entry.request, JournalError(error.message), end.summary)
                    self._feed(RequestFailed(entry.request, JournalError(error.message)))
                if entry.deliver is not None:
                    entry.deliver(end)
            case _ if entry.request:
                self._fail(entry.request, error)

    def _fail(self, request: bytes, error: JournalError) -> None:
        if request not in self._failed:
            self._failed.add(request)
            # An error of its own: what is added to it concerns one request.
            self._feed(RequestFailed(request, JournalError(error.message)))

    def _note(self, text: str) -> None:
        changed, self.trouble = bool(text) != bool(self.trouble), text
        if not changed:
            return
        if text:
            _log.error("%s; requests fail until it can be", text)
        else:
            _log.warning("the journal can be written again")
        self._on_change(text)

    # -- on the writer's thread -------------------------------------------------------------------

    def _run(self) -> None:
        running, unsaved = True, True
        while running:
            entries, running = self._take(IDLE_S if unsaved else None)
            if entries:
                self._hand_back(entries, self._keep(entries))
            self._shorten_log(is_busy=bool(entries))
            unsaved = bool(entries)
        if self._flushing is not None:
            self._flushing.join()

    def _shorten_log(self, *, is_busy: bool) -> None:
        """Tokens must not wait while a long write-ahead log is moved into the file: in the middle
        of work another thread moves it, and only what came meanwhile is moved here."""
        self.store.shorten(is_busy=is_busy)
        if is_busy and self.store.commits % COMMITS_PER_LOOK:
            return
        file, flushing = self.store.file, self._flushing
        if flushing is not None and not flushing.is_alive():
            self._flushing = None
            file.checkpoint(shrink=not is_busy)
        elif flushing is None and is_busy and WAL_PAGES_IDLE < file.log_pages <= WAL_PAGES_MAX:
            beside = threading.Thread(target=file.flush, name="flush", daemon=True)
            with contextlib.suppress(RuntimeError):  # No thread to be had: later, or in the way.
                beside.start()
                self._flushing = beside
        else:
            file.checkpoint(
                above_pages=WAL_PAGES_MAX if is_busy or flushing is not None else WAL_PAGES_IDLE
            )

    def _take(self, timeout_s: float | None) -> tuple[list[_Entry], bool]:
        """Whatever waits, at least one entry unless it is quiet; False: it was the last."""
        entries: list[_Entry] = []
        try:
            group = self._queue.get(timeout=timeout_s)
            while group is not None:
                entries += group
                if len(entries) >= BATCH_ENTRIES_MAX:
                    return entries, True
                group = self._queue.get_nowait()
        except queue.Empty:
            return entries, True
        return entries, False

    def _keep(self, entries: list[_Entry]) -> _Outcome:
        """Write them in one transaction; what became of each."""
        errors: list[JournalError | None] = [None] * len(entries)
        writes: list[Write] = []
        written: list[int] = []
        for index, entry in enumerate(entries):
            if entry.epochs_through:
                self._reserve(entry.epochs_through)
            elif entry.refused or entry.request in self._cut:
                errors[index] = error = JournalError("this generation is no longer journalled")
                self._cut.add(entry.request)
                writes += self._failed_end(entry, error)
            else:
                try:
                    writes.append(entry.write())
                    written.append(index)
                except Exception as error:  # noqa: BLE001 - one record must not stop all the others
                    errors[index] = JournalError(f"a record cannot be made: {error}")
                    self._cut.add(entry.request)
            if entry.ends:
                self._cut.discard(entry.request)
        if not writes:
            return _Outcome(errors)
        failed = self._write(writes)
        if failed is None:
            return _Outcome(errors, "")
        for index in written:
            errors[index] = failed
            self._cut.add(entries[index].request)
        self._cut.difference_update(entry.request for entry in entries if entry.ends)
        self._end_alone(entries, failed)
        return _Outcome(errors, failed.message)

    def _end_alone(self, entries: list[_Entry], error: JournalError) -> None:
        """Tokens that do not fit may have kept ends out of a crowded file that make room in it."""
        ends = [one for entry in entries for one in self._failed_end(entry, error)]
        if ends:
            self._write(ends)

    def _failed_end(self, entry: _Entry, error: JournalError) -> list[Write]:
        """The end of a request that is not kept, if the file has to be rid of it."""
        if not (entry.ends and self.store.is_crowded_by(entry.request)):
            return []
        try:
            return [entry.write_failure(error)]
        except Exception:  # noqa: BLE001 - it stays without an end; the writer must not stop
            return []

    def _write(self, writes: list[Write]) -> JournalError | None:
        """What the store says; a defect there is a failed write as well, never a dead thread."""
        try:
            self.store.write(writes, wall_ns=self._wall_clock_ns())
        except JournalError as error:
            return error
        except Exception as error:  # noqa: BLE001 - told, logged and survived
            _log.exception("the journal's store failed")
            return JournalError(f"the journal cannot be written: {error}")
        return None

    def _reserve(self, through: int) -> None:
        try:
            self.store.reserve_epochs(through)
        except Exception as error:  # noqa: BLE001 - half a block is left, and it is tried again
            _log.warning("epochs could not be reserved in the journal: %s", error)

    def _hand_back(self, entries: list[_Entry], outcome: _Outcome) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._settle, entries, outcome)
        except RuntimeError:
            return  # The loop is closed: nobody is left to be told.
