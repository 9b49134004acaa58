"""Token chunks: one generated token with everything needed to prove where it belongs.

The last stage makes a chunk, the coordinator verifies it, the client reads it. ``checksum`` is
CRC32C over every other field at fixed positions; ``chain`` covers the previous token's chain, so
that a moved, relabelled, dropped or repeated token cannot verify even if its own checksum does.
``marks`` are what each stage of the route, in order, said of its cache after this step."""

from __future__ import annotations

import enum
import functools
import struct
from dataclasses import dataclass

from stagemesh.checksum import CHAIN_BYTES, chain_next, crc32c
from stagemesh.errors import TokenRejected

REQUEST_BYTES = 16
"""A request id is a UUID."""
SOURCE_CHARACTERS_MAX = 255
"""Length of a worker name."""
ALTERNATIVES_MAX = 64
"""Alternatives of one token; more than ``sampling.LOGPROBS_MAX`` could ask for."""

_F32 = struct.Struct("<f")
_MARK = struct.Struct("<III")


@functools.lru_cache(maxsize=256)
def _layout(source_bytes: int, marks: int, alternatives: int) -> struct.Struct:
    return struct.Struct(f"<16sQQIIffQB16sHHH{source_bytes}s{3 * marks}I{'If' * alternatives}")


def _as_f32(value: float) -> float:
    """``value`` rounded to the f32 that travels."""
    rounded: float = _F32.unpack(_F32.pack(value))[0]
    return rounded


class ValidationStatus(enum.IntEnum):
    """How far a token has been verified. Wire values are frozen."""

    UNSPECIFIED = 0
    UNVERIFIED = 1
    """As sampled; no check has run yet."""
    VALID = 2
    """Checksum, chain, position and every stage's marks agree; shadow-verified if behind the
    watermark."""
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
    consumed for this request. output_crc32c: CRC32C of the row's activation as it left this stage
    (the row's logits on the last stage are not covered: 0 there)."""

    cache_length: int
    history_digest: int
    output_crc32c: int

    def pack(self) -> bytes:
        return _MARK.pack(self.cache_length, self.history_digest, self.output_crc32c)


class _Packed:
    """A place beside the fields, which copies of a chunk do not share."""

    __slots__ = ("_kept",)
    _kept: bytes


@dataclass(frozen=True, slots=True)
class TokenChunk(_Packed):
    """One token at absolute ``position`` (0 = first prompt token) of request ``request`` (16
    bytes).

    logprob: natural log of the token's probability before temperature and filters, NaN-free, 0.0 if
    not asked for. margin: top-1 minus top-2 of what was maximised (logits when greedy,
    Gumbel-perturbed filtered logits when sampling). sampled_at_unix_ns: the source worker's wall
    clock, for people only."""

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
        """Canonical bytes of every field but ``checksum``: the fixed part, chain, three counts,
        source, then each mark and each alternative. One call of ``struct``, because every token
        pays for it."""
        source = self.source.encode()
        marks, alternatives = self.marks, self.alternatives
        flat: list[float] = []
        for mark in marks:
            flat += (mark.cache_length, mark.history_digest, mark.output_crc32c)
        for token_id, logprob in alternatives:
            flat += (token_id, logprob)
        return _layout(len(source), len(marks), len(alternatives)).pack(
            self.request,
            self.epoch,
            self.step,
            self.position,
            self.token_id,
            self.logprob,
            self.margin,
            self.sampled_at_unix_ns,
            self.status,
            self.chain,
            len(source),
            len(marks),
            len(alternatives),
            source,
            *flat,
        )

    @property
    def packed(self) -> bytes:
        """``pack``, made once and kept: a chunk that arrives is packed for its frame's header and
        twice for its own checksum, and soon forgotten. What stays (``judged``) keeps no copy."""
        try:
            return self._kept
        except AttributeError:
            packed = self.pack()
            object.__setattr__(self, "_kept", packed)
            return packed

    def sealed(self) -> TokenChunk:
        """The same chunk with its checksum filled in, its floats rounded to the f32 they travel as.

        Raises TokenRejected for a field that cannot be packed without loss or ambiguity.
        """
        checksum = crc32c(self._checked_pack())
        alternatives = self.alternatives
        if alternatives:
            alternatives = tuple((token_id, _as_f32(value)) for token_id, value in alternatives)
        return TokenChunk(
            self.request,
            self.position,
            self.token_id,
            self.epoch,
            self.step,
            _as_f32(self.logprob),
            _as_f32(self.margin),
            self.sampled_at_unix_ns,
            self.source,
            self.chain,
            self.marks,
            alternatives,
            self.status,
            checksum,
        )

    def with_status(self, status: ValidationStatus) -> TokenChunk:
        """The same chunk with another status, sealed again (the coordinator seals what it
        judged)."""
        return self._labelled(status, self.marks)

    def judged(self, status: ValidationStatus, marks: tuple[StageMark, ...]) -> TokenChunk:
        """The same chunk with ``status`` and the marks of its row, sealed again."""
        return self._labelled(status, marks)

    def _labelled(self, status: ValidationStatus, marks: tuple[StageMark, ...]) -> TokenChunk:
        chunk = TokenChunk(
            self.request,
            self.position,
            self.token_id,
            self.epoch,
            self.step,
            self.logprob,
            self.margin,
            self.sampled_at_unix_ns,
            self.source,
            self.chain,
            marks,
            self.alternatives,
            status,
        )
        object.__setattr__(chunk, "checksum", crc32c(chunk._checked_pack()))
        return chunk

    def _checked_pack(self, *, keep: bool = False) -> bytes:
        """``pack`` of a chunk whose every field fits its place exactly; else raises TokenRejected.

        ``struct`` pads a byte string that is too short and cuts one that is too long, so two
        different chunks could have the same packed bytes if lengths were not checked first."""
        if len(self.request) != REQUEST_BYTES or len(self.chain) != CHAIN_BYTES:
            raise TokenRejected("token request or chain has the wrong length")
        if len(self.alternatives) > ALTERNATIVES_MAX:
            raise TokenRejected("token over alternatives_max", limit=ALTERNATIVES_MAX)
        if len(self.source) > SOURCE_CHARACTERS_MAX:
            raise TokenRejected("token over source_characters_max", limit=SOURCE_CHARACTERS_MAX)
        try:
            return self.packed if keep else self.pack()
        except (struct.error, OverflowError, ValueError) as error:
            raise TokenRejected("token field out of range", detail=error) from error

    def checksum_holds(self) -> bool:
        """Whether the checksum matches every other field. Raises TokenRejected if one is out of
        range."""
        return crc32c(self._checked_pack(keep=True)) == self.checksum

    def verify(self, *, previous_chain: bytes | None = None) -> None:
        """Raise TokenRejected unless the checksum (and, if given, the chain) holds."""
        if not self.checksum_holds():
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
