"""Token chunks: one generated token with everything needed to prove where it belongs.

The last stage makes a chunk, the coordinator verifies it, the client reads it. ``checksum`` is CRC32C
over every other field at fixed positions; ``chain`` covers the previous token's chain, so that a moved,
relabelled, dropped or repeated token cannot verify even if its own checksum does. ``marks`` are what each
stage of the route, in order, said of its cache after this step.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace

from stagemesh.checksum import CHAIN_BYTES, chain_next, crc32c
from stagemesh.errors import TokenRejected

_FIXED = struct.Struct("<16sQQIIffQB")
_MARK = struct.Struct("<III")
_ALTERNATIVE = struct.Struct("<If")


class ValidationStatus(enum.IntEnum):
    """How far a token has been verified. Wire values are frozen."""

    UNSPECIFIED = 0
    UNVERIFIED = 1
    """As sampled; no check has run yet."""
    VALID = 2
    """Checksum, chain, position and every stage's marks agree; shadow-verified if behind the watermark."""
    CORRECTED = 3
    """Replaces a token that was rejected after it had been delivered."""
    SUSPECT = 4
    """A check raised doubt that is not yet decided."""
    REJECTED = 5
    """Failed a check; never delivered, or withdrawn by a correction."""


@dataclass(frozen=True, slots=True)
class StageMark:
    """One stage's account of one row after a step.

    cache_length: positions its KV cache holds. history_digest: rolling CRC32C of all token ids it
    consumed for this request. output_crc32c: CRC32C of the row's activation as it left this stage (the
    row's logits on the last stage are not covered: 0 there).
    """

    cache_length: int
    history_digest: int
    output_crc32c: int

    def pack(self) -> bytes:
        return _MARK.pack(self.cache_length, self.history_digest, self.output_crc32c)


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One token at absolute ``position`` (0 = first prompt token) of request ``request`` (16 bytes).

    logprob: natural log of the token's probability before temperature and filters, NaN-free, 0.0 if not
    asked for. margin: top-1 minus top-2 of what was maximised (logits when greedy, Gumbel-perturbed
    filtered logits when sampling). sampled_at_unix_ns: the source worker's wall clock, for people only.
    """

    request: bytes
    position: int
    token_id: int
    epoch: int
    step: int
    logprob: float
    margin: float
    sampled_at_unix_ns: int
    source: str
    chain: bytes
    marks: tuple[StageMark, ...] = ()
    alternatives: tuple[tuple[int, float], ...] = ()
    status: ValidationStatus = ValidationStatus.UNVERIFIED
    checksum: int = 0

    def pack(self) -> bytes:
        """Canonical bytes of every field but ``checksum``."""
        source = self.source.encode()
        parts = [
            _FIXED.pack(
                self.request,
                self.epoch,
                self.step,
                self.position,
                self.token_id,
                self.logprob,
                self.margin,
                self.sampled_at_unix_ns,
                self.status,
            ),
            self.chain,
            struct.pack("<HHH", len(source), len(self.marks), len(self.alternatives)),
            source,
            *(mark.pack() for mark in self.marks),
            *(_ALTERNATIVE.pack(*item) for item in self.alternatives),
        ]
        return b"".join(parts)

    def sealed(self) -> TokenChunk:
        """The same chunk with its checksum filled in."""
        return replace(self, checksum=crc32c(self.pack()))

    def with_status(self, status: ValidationStatus) -> TokenChunk:
        """The same chunk with another status, sealed again (the coordinator re-seals what it judged)."""
        return replace(self, status=status).sealed()

    def verify(self, *, previous_chain: bytes | None = None) -> None:
        """Raise TokenRejected unless the checksum (and, if given, the chain) holds."""
        if len(self.chain) != CHAIN_BYTES or crc32c(self.pack()) != self.checksum:
            raise TokenRejected("token checksum does not match", position=self.position)
        if previous_chain is not None:
            expected = chain_next(previous_chain, self.position, self.token_id)
            if expected != self.chain:
                raise TokenRejected("token chain does not match", position=self.position)

    def __str__(self) -> str:
        return (
            f"token req={self.request.hex()[:4]} pos={self.position} id={self.token_id} "
            f"epoch={self.epoch} {self.status.name.lower()} crc={self.checksum:08x}"
        )
