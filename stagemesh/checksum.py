"""CRC32C (Castagnoli; RFC 3720 appendix B.4) over frames, and the digests built beside it.

CRC32C is used for three things: the payload of a frame, the header of a frame, and the rolling
digest of a request's token ids. It finds every burst of up to 32 bits and every odd number of
flipped bits, and swapped words, which the Internet checksum of TCP does not. It is frozen: another
algorithm means another protocol version. It guards against accidents, not against an attacker;
mutual TLS does that.

SHA-256 (truncated to 16 bytes) links tokens into a chain: each digest covers the one before, so
that a moved, relabelled, dropped or repeated token cannot verify.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

from crc32c import crc32c as _crc32c

CHAIN_BYTES = 16
"""Length of a chain digest: SHA-256 truncated to 128 bits."""

_TOKEN = struct.Struct("<II")
_TOKEN_ID = struct.Struct("<I")


def crc32c(data: bytes | memoryview, value: int = 0) -> int:
    """CRC32C of ``data`` as an unsigned 32-bit integer, continued from ``value``."""
    checksum: int = _crc32c(data, value)
    return checksum


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as consecutive little-endian unsigned 32-bit integers."""
    if len(token_ids) == 1:  # of a decode step: no layout has to be looked up
        return _TOKEN_ID.pack(token_ids[0])
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def history_digest(token_ids: Sequence[int], value: int = 0) -> int:
    """Rolling CRC32C of the token ids a stage has consumed; independent of how they were
    chunked."""
    digest: int = _crc32c(pack_token_ids(token_ids), value)
    return digest


def chain_start(request_key: bytes, prompt: Sequence[int]) -> bytes:
    """First link: binds the chain to one request and one prompt. 16 bytes."""
    prompt_digest = hashlib.sha256(pack_token_ids(prompt)).digest()
    text = b"stagemesh.chain.1" + request_key + struct.pack("<I", len(prompt)) + prompt_digest
    return hashlib.sha256(text).digest()[:CHAIN_BYTES]


def chain_next(previous: bytes, position: int, token_id: int) -> bytes:
    """Link for the token ``token_id`` at absolute ``position`` behind ``previous``. 16 bytes."""
    return hashlib.sha256(previous + _TOKEN.pack(position, token_id)).digest()[:CHAIN_BYTES]


def chain_over(start: bytes, first_position: int, token_ids: Iterable[int]) -> bytes:
    """The chain digest behind ``token_ids`` that stand at consecutive positions."""
    link = start
    for offset, token_id in enumerate(token_ids):
        link = chain_next(link, first_position + offset, token_id)
    return link
