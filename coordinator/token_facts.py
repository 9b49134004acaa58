"""What the event of an accepted token says, as text only once somebody reads it.

Every token is an event, and almost none of them is ever read: they are retained for whoever comes
later. So the event keeps the token and becomes text on demand. The text follows from the token
alone, which is immutable; it is the same whenever it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stagemesh.token import TokenChunk

NAMES = (
    "position",
    "epoch",
    "step",
    "status",
    "checksum",
    "chain",
    "margin",
    "marks",
    "cache_length",
    "verified_through",
)
PACKED_BYTES_MAX = 400
"""A token's event as `coordinator.topics` packs it, its worker's name apart: every value is a
number of bounded size, a status or a digest."""


class TokenFacts(Mapping[str, str]):
    """Attributes of ``ChunkGenerated``. ``index``: the token's place in the answer."""

    __slots__ = ("_chunk", "_index", "_texts", "_verified_through")

    def __init__(self, chunk: TokenChunk, index: int, verified_through: int) -> None:
        self._chunk = chunk
        self._index = index
        self._verified_through = verified_through
        self._texts: dict[str, str] | None = None

    def _made(self) -> dict[str, str]:
        if self._texts is None:
            chunk = self._chunk
            self._texts = {
                "position": str(self._index),
                "epoch": str(chunk.epoch),
                "step": str(chunk.step),
                "status": chunk.status.name,
                "checksum": f"{chunk.checksum:08x}",
                "chain": chunk.chain.hex(),
                "margin": f"{chunk.margin:.4g}",
                "marks": str(len(chunk.marks)),
                "cache_length": str(chunk.position),
                "verified_through": str(self._verified_through),
            }
        return self._texts

    def __getitem__(self, name: str) -> str:
        return self._made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    def __repr__(self) -> str:
        return repr(self._made())
