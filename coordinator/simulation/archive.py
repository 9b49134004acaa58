"""What outlives a coordinator: the disk, the journal that writes to it, and answers in memory.

``Disk`` is the file: it is there when the next coordinator starts, unless a fault has lost it.
``VirtualJournal`` is ``coordinator.ports.Journal`` on virtual time and follows
``services.journal``: one writer takes everything that has gathered, and hands it back when it is
written. A coordinator can be killed while entries are

    queued    submitted or accepted by the machine, and not yet with the writer
    writing   with the writer: the transaction never happened
    written   kept, and nobody has been told

and ``moments`` names the states, so that a campaign can prove that each was reached. ``Record``
follows ``services.answer``: it takes what the driver delivers, passes it on to the client that is
connected, and brings one that comes back up to where the answer is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from coordinator import instructions as do
from coordinator.events import Event, GenerationRequested, RequestFailed
from coordinator.ports import ClientInstruction
from coordinator.simulation.clients import Client
from coordinator.simulation.virtual import Process
from stagemesh.errors import JournalError, RequestUnknown
from stagemesh.token import TokenChunk

EPOCH_BLOCK = 8
"""Epochs reserved at a time; few, so that blocks are used up."""
HAND_BACK_S = 0.0003
"""From the writer's thread to the loop."""

Deliver = Callable[[ClientInstruction], None]
_ENDS = (do.FinishRequest, do.FailRequest)


def resumable(end: ClientInstruction | None) -> do.FailRequest | None:
    """The failure that an answer ended with, if it may be gone on with."""
    return end if isinstance(end, do.FailRequest) and end.error.is_resumable else None


@dataclass(slots=True)
class Kept:
    """One generation in the file. ``label``: the weights that made its tokens, "" without any."""

    demand: GenerationRequested
    label: str = ""
    instructions: list[ClientInstruction] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.instructions) and isinstance(self.instructions[-1], _ENDS)

    @property
    def failure(self) -> do.FailRequest | None:
        """Its end, if it may be gone on with."""
        return resumable(self.instructions[-1] if self.instructions else None)

    def tokens(self) -> list[int]:
        """Of the answer so far."""
        found = list(self.demand.accepted)
        for one in self.instructions:
            if isinstance(one, do.AcceptTokens):
                found += [chunk.token_id for chunk in one.chunks]
            elif isinstance(one, do.CorrectTokens):
                del found[one.from_index :]
        return found

    def recovered(self) -> GenerationRequested:
        """What to ask of the mesh so that it goes on where the file ends."""
        kept = self.instructions
        return replace(
            self.demand,
            accepted=tuple(self.tokens()),
            recovered=True,
            fingerprint=self.label,
            recoveries=tuple(one.record for one in kept if isinstance(one, do.RecoveryEnded)),
        )


@dataclass(slots=True)
class Disk:
    """The file. ``full``: nothing can be written. ``lost``: it was gone once."""

    kept: dict[bytes, Kept] = field(default_factory=dict)
    full: bool = False
    lost: bool = False
    reserved: int = 0

    def first_epoch(self) -> int:
        """Of a coordinator that opens the file now. Also without the file it is above all that were
        used: where no file is, the wall clock says."""
        first = self.reserved + 1
        self.reserved = first + EPOCH_BLOCK
        return first

    def lose(self) -> None:
        """The file is gone."""
        self.kept.clear()
        self.lost = True


@dataclass(frozen=True, slots=True)
class _Entry:
    request: bytes
    begins: GenerationRequested | None = None
    instruction: ClientInstruction | None = None
    deliver: Deliver | None = None
    label: str = ""

    @property
    def ends(self) -> bool:
        return isinstance(self.instruction, _ENDS)


class VirtualJournal:
    """See the module. ``label`` names the weights in use."""

    def __init__(
        self,
        process: Process,
        disk: Disk,
        commit_s: float,
        *,
        feed: Callable[[Event], None],
        label: Callable[[], str],
    ) -> None:
        self._process, self._disk, self._commit_s = process, disk, commit_s
        self._feed, self._label = feed, label
        self._queue: list[_Entry] = []
        self._writing: list[_Entry] = []
        self._unsettled = 0
        self._failed: set[bytes] = set()
        self._cut: set[bytes] = set()

    @property
    def moments(self) -> tuple[str, ...]:
        """What a kill interrupts; see the module."""
        states = (
            ("queued", self._queue),
            ("writing", self._writing),
            ("written", self._unsettled),
        )
        return tuple(name for name, entries in states if entries) or ("idle",)

    # coordinator.ports.Journal

    def begin(self, request: GenerationRequested) -> None:
        """See Journal. What comes from the file is in it; that it is resumed is not."""
        if not request.recovered or request.resumed_after:
            self._put(_Entry(request.request, begins=request))

    def commit(self, instruction: ClientInstruction, deliver: Deliver) -> None:
        """See Journal."""
        label = self._label() if isinstance(instruction, do.AcceptTokens) else ""
        self._put(_Entry(instruction.request, None, instruction, deliver, label))

    def epoch_used(self, epoch: int) -> None:
        """A route is being opened."""
        if epoch + EPOCH_BLOCK // 2 > self._disk.reserved:
            self._disk.reserved = epoch + EPOCH_BLOCK

    # The writer

    def _put(self, entry: _Entry) -> None:
        self._queue.append(entry)
        if not self._writing and len(self._queue) == 1:
            self._process.after(0.0, self._write)

    def _write(self) -> None:
        if self._writing or not self._queue:
            return
        self._writing, self._queue = self._queue, []
        self._process.after(self._commit_s, self._written)

    def _written(self) -> None:
        entries, self._writing = self._writing, []
        errors = [self._keep(entry) for entry in entries]
        for entry in entries:
            if entry.ends:
                self._cut.discard(entry.request)
        self._unsettled += len(entries)
        self._process.after(HAND_BACK_S, lambda: self._settle(entries, errors))
        self._write()

    def _keep(self, entry: _Entry) -> JournalError | None:
        """Into the file; what fails once keeps no more of its request: a file has no gaps."""
        if self._disk.full or entry.request in self._cut:
            self._cut.add(entry.request)
            return JournalError("the disk is full")
        if entry.begins is not None and entry.begins.resumed_after:
            kept = self._disk.kept.get(entry.request)
            if kept is None:
                self._cut.add(entry.request)
                return JournalError("a record of an unknown generation")
            if kept.ended:
                kept.instructions.pop()  # the end that no longer counts
        elif entry.begins is not None:
            self._disk.kept[entry.request] = Kept(entry.begins)
        elif entry.instruction is not None:
            kept = self._disk.kept[entry.request]
            kept.instructions.append(entry.instruction)
            kept.label = kept.label or entry.label
        return None

    def _settle(self, entries: list[_Entry], errors: list[JournalError | None]) -> None:
        self._unsettled -= len(entries)
        for entry, error in zip(entries, errors, strict=True):
            if error is not None:
                self._not_kept(entry, error)
            elif entry.deliver is not None and entry.instruction is not None:
                entry.deliver(entry.instruction)

    def _not_kept(self, entry: _Entry, error: JournalError) -> None:
        end = entry.instruction
        if isinstance(end, _ENDS):
            self._failed.discard(entry.request)
            if isinstance(end, do.FinishRequest):
                end = do.FailRequest(entry.request, error, end.summary)
                self._feed(RequestFailed(entry.request, JournalError(error.message)))
            if entry.deliver is not None:
                entry.deliver(end)
        elif entry.request not in self._failed:
            self._failed.add(entry.request)
            self._feed(RequestFailed(entry.request, JournalError(error.message)))


@dataclass(slots=True)
class Record:
    """One answer at the edge; the driver's sink. ``base`` tokens came with the request."""

    demand: GenerationRequested
    client: Client | None = None
    ids: list[int] = field(default_factory=list)
    chunks: list[TokenChunk] = field(default_factory=list)
    base: int = 0
    verified_through: int = 0
    end: do.FinishRequest | do.FailRequest | None = None

    @classmethod
    def of(cls, demand: GenerationRequested) -> Record:
        """Of a request that is new."""
        return cls(demand, ids=list(demand.accepted), base=len(demand.accepted))

    @classmethod
    def restored(cls, kept: Kept) -> Record:
        """Of one that is in the file."""
        record = cls.of(kept.demand)
        record.demand = kept.recovered()
        for one in kept.instructions:
            match one:
                case do.AcceptTokens():
                    record.accept(one)
                case do.AdvanceVerified():
                    record.advance(one)
                case do.CorrectTokens():
                    record.correct(one)
                case do.FinishRequest():
                    record.finish(one)
                case do.FailRequest():
                    record.fail(one)
        return record

    @property
    def failure(self) -> do.FailRequest | None:
        """Its end, if it may be gone on with."""
        return resumable(self.end)

    def reopen(self, failure: do.FailRequest, *, anew: bool) -> None:
        """Go on behind it; ``anew``: nothing of it was ever kept, and it begins again."""
        self.end = None
        self.demand = replace(self.demand, deadline=None)
        if not anew:
            weights = self.demand.fingerprint or failure.summary.weights
            self.demand = replace(
                self.demand,
                accepted=tuple(self.ids),
                recovered=True,
                fingerprint=weights if self.ids else "",
                resumed_after=failure.error.reason,
                recoveries=failure.summary.recoveries,
            )

    def attach(self, client: Client) -> None:
        """A client is here, perhaps again: it gets what it has not seen."""
        self.client = client
        same = 0
        for ours, theirs in zip(self.ids, client.tokens, strict=False):
            if ours != theirs:
                break
            same += 1
        if same < len(client.tokens):
            client.correct(do.CorrectTokens(self.demand.request, same, "while it was away"))
        rest = self.chunks[len(client.tokens) - self.base :]
        if rest:
            through = self.verified_through
            index = len(client.tokens)
            client.accept(do.AcceptTokens(self.demand.request, index, tuple(rest), through))
        elif self.verified_through > client.verified_through:
            client.advance(do.AdvanceVerified(self.demand.request, self.verified_through))
        if isinstance(self.end, do.FinishRequest):
            client.finish(self.end)
        elif self.end is not None:
            client.fail(self.end)

    # coordinator.ports.TokenSink

    def accept(self, instruction: do.AcceptTokens) -> None:
        self.ids += [chunk.token_id for chunk in instruction.chunks]
        self.chunks += instruction.chunks
        self.verified_through = max(self.verified_through, instruction.verified_through)
        if self.client is not None:
            self.client.accept(instruction)

    def advance(self, instruction: do.AdvanceVerified) -> None:
        self.verified_through = max(self.verified_through, instruction.verified_through)
        if self.client is not None:
            self.client.advance(instruction)

    def correct(self, instruction: do.CorrectTokens) -> None:
        del self.ids[instruction.from_index :]
        del self.chunks[max(0, instruction.from_index - self.base) :]
        self.verified_through = min(self.verified_through, instruction.from_index)
        if self.client is not None:
            self.client.correct(instruction)

    def finish(self, instruction: do.FinishRequest) -> None:
        self.end = instruction
        if self.client is not None:
            self.client.finish(instruction)

    def fail(self, instruction: do.FailRequest) -> None:
        """At the token that readers have got to: the mesh may have been further, with tokens that
        could not be kept."""
        summary = replace(instruction.summary, completion_tokens=len(self.ids))
        self.end = replace(instruction, summary=summary)
        if self.client is not None:
            self.client.fail(self.end)


def unknown(client: Client, *, lost: bool) -> None:
    """A client comes back for an answer that is in no file. That is its end, and only a lost file
    excuses it."""
    if not lost:
        client.watch.violate("I14", f"{client.name} was shown tokens that were not kept")
    error = RequestUnknown("no such generation", request_id=client.key.hex())
    summary = do.RequestSummary(len(client.demand.prompt), len(client.tokens))
    client.fail(do.FailRequest(client.key, error, summary))
