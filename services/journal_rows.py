"""What a journal's rows hold, and how they are verified.

A generation's head is ``SHA-256(head before ‖ number ‖ length ‖ record)``, so that no record can be
changed, moved, dropped or repeated unseen; a row's own digest covers its head, so that no
generation can. What does not verify is JournalError, never an answer. No I/O is here: see
``journal_store`` for the file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from stagemesh.errors import JournalError
from stagemesh.v1 import journal_pb2 as pb

RECORD_OVERHEAD_BYTES = 4
"""What a record costs in its generation's row beyond itself."""

_LENGTH = struct.Struct("<I")
_LINK = struct.Struct("<QI")
_ROW = struct.Struct("<Q16sQQBq")


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A generation as it was read, verified. ``records`` begins with its request."""

    request: bytes
    records: tuple[pb.JournalRecord, ...]
    ended: bool

    @property
    def opening(self) -> pb.JournalRequest:
        return self.records[0].request


@dataclass(slots=True)
class Row:
    """A row of ``generations``, as it is or would be.

    ``bodies``: its records, while it runs; copies share them, and nothing but ``Contents.apply``
    adds to them, so that the first ``records`` of them never change. ``saved``: the digest of the
    row in the file; 0: there is none."""

    id: int
    request: bytes
    records: int = 0
    size: int = 0
    head: bytes = b""
    ended: bool = False
    ended_unix_ns: int = 0
    bodies: list[bytes] = field(default_factory=list)
    saved: int = 0

    def append(self, body: bytes) -> None:
        self.head = link(self.head, self.records, body)
        self.records += 1
        self.size += len(body) + RECORD_OVERHEAD_BYTES

    @property
    def digest(self) -> int:
        row = _ROW.pack(
            self.id, self.request, self.records, self.size, self.ended, self.ended_unix_ns
        )
        return int.from_bytes(hashlib.sha256(row + self.head).digest(), "little")

    @property
    def values(self) -> tuple[object, ...]:
        """The row, without its records."""
        return (
            *(self.id, self.request, self.records, self.size, self.head),
            *(int(self.ended), self.ended_unix_ns),
        )

    def copy(self) -> Row:
        return Row(
            self.id,
            self.request,
            self.records,
            self.size,
            self.head,
            self.ended,
            self.ended_unix_ns,
            self.bodies,
            self.saved,
        )


def joined(bodies: Iterable[bytes]) -> bytes:
    """Records as they lie in a row, each behind its length (4 bytes, little-endian)."""
    return b"".join(part for body in bodies for part in (_LENGTH.pack(len(body)), body))


def split(stored: object) -> list[bytes]:
    """The opposite of ``joined``. Raises JournalError."""
    if not isinstance(stored, bytes):  # a flipped bit
        raise JournalError("the journal is damaged: records are no bytes")
    bodies, at = list[bytes](), 0
    while at < len(stored):
        start = at + _LENGTH.size
        at = start + int.from_bytes(stored[at:start], "little")
        bodies.append(stored[start:at])
    if at != len(stored):
        raise JournalError("the journal is damaged: a generation's records do not verify")
    return bodies


def link(head: bytes, number: int, body: bytes) -> bytes:
    """The chain's next head (32 bytes)."""
    return hashlib.sha256(head + _LINK.pack(number, len(body)) + body).digest()


def epoch_bytes(epoch: int) -> bytes:
    """The number and its digest: a lower one would let a dead coordinator's frames in."""
    number = epoch.to_bytes(8, "little")
    return number + hashlib.sha256(number).digest()[:8]


def epoch_of(stored: bytes) -> int:
    epoch = int.from_bytes(stored[:8], "little")
    if stored != epoch_bytes(epoch):
        raise JournalError("the journal is damaged: its epoch does not verify")
    return epoch


def log_place(number: int, digest: bytes) -> bytes:
    """Number and digest of the last row of a log that was emptied, as they are kept."""
    return number.to_bytes(8, "little") + digest


def log_place_of(stored: bytes) -> tuple[int, bytes]:
    """The opposite of ``log_place``."""
    return int.from_bytes(stored[:8], "little"), stored[8:]


def row_of(found: Sequence[object]) -> Row:
    """A row of the file, without its records. Raises JournalError."""
    match found:
        case (
            int(number),
            bytes(request),
            int(records),
            int(size),
            bytes(head),
            int(ended),
            int(ended_ns),
        ) if len(request) == 16 and min(number, records, size) >= 0:
            row = Row(number, request, records, size, head, bool(ended), ended_ns)
            row.saved = row.digest
            return row
    raise JournalError("the journal is damaged: a generation's row makes no sense")


def check_chain(row: Row, bodies: Sequence[bytes]) -> None:
    head = b""
    for number, body in enumerate(bodies):
        head = link(head, number, body)
    if head != row.head or len(bodies) != row.records:
        raise JournalError(
            "the journal is damaged: a generation's records do not verify",
            request_id=row.request.hex(),
        )


def verified(row: Row, bodies: Sequence[bytes]) -> StoredGeneration:
    check_chain(row, bodies)
    try:
        records = tuple(pb.JournalRecord.FromString(body) for body in bodies)
    except DecodeError:
        raise JournalError(
            "the journal holds a record that cannot be read", request_id=row.request.hex()
        ) from None
    if not records or records[0].WhichOneof("record") != "request":
        raise JournalError("a generation has no beginning", request_id=row.request.hex())
    return StoredGeneration(row.request, records, row.ended)
