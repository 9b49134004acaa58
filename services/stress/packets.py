"""What a bad link does to one IP packet. Pure: a packet's fate depends on the seed, whose it is and
its number, and on nothing else.

    lost        it does not arrive
    corrupted   one bit is wrong; TCP's checksum says so, and TCP sends it again
    forged      one bit of what TCP carries is wrong and the checksum fits, as after a fault in a
                switch's memory: only what is above TCP can notice
    overtaking  it waits for half the delay only, so that it passes those before it
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass

IP_VERSION, TCP_PROTOCOL = 4, 6
IP_HEADER_BYTES_MIN = TCP_HEADER_BYTES_MIN = 20
_PROTOCOL_AT, _SOURCE, _DESTINATION = 9, slice(12, 16), slice(16, 20)
_OFFSET_AT, _CHECKSUM_AT = 12, 16
"""Within the TCP header."""
_SHARES = struct.Struct("<4Q")
_RANGE = float(1 << 64)
_WORD = 0xFFFF


class Fate(enum.Enum):
    """Values are what reports call them."""

    WHOLE = "carried"
    LOST = "lost"
    CORRUPTED = "corrupted"
    FORGED = "forged"


@dataclass(frozen=True, slots=True)
class LinkQuality:
    """Shares of packets, and how long each is on its way."""

    delay_s: float = 0.05
    lost: float = 0.01
    corrupted: float = 0.001
    forged: float = 0.001
    overtaking: float = 0.01


@dataclass(frozen=True, slots=True)
class Passage:
    """One packet's. ``bit``: which bit of what it carries is wrong, of any number of bits."""

    fate: Fate
    delay_s: float
    bit: int
    overtakes: bool = False


def passage(quality: LinkQuality, seed: int, machine: str, number: int) -> Passage:
    """What happens to packet ``number`` that ``machine`` sends."""
    digest = hashlib.sha256(f"{seed}/packet/{machine}/{number}".encode()).digest()
    which, early, bit, _spare = _SHARES.unpack(digest)
    share, fate = which / _RANGE, Fate.WHOLE
    for one, width in (
        (Fate.LOST, quality.lost),
        (Fate.CORRUPTED, quality.corrupted),
        (Fate.FORGED, quality.forged),
    ):
        if share < width:
            fate = one
            break
        share -= width
    overtakes = early / _RANGE < quality.overtaking
    return Passage(fate, quality.delay_s / 2.0 if overtakes else quality.delay_s, bit, overtakes)


def destination(packet: bytes) -> bytes | None:
    """The IPv4 address it goes to; None if it is no IPv4 packet."""
    if len(packet) < IP_HEADER_BYTES_MIN or packet[0] >> 4 != IP_VERSION:
        return None
    return packet[_DESTINATION]


def tcp_payload(packet: bytes) -> slice:
    """Where the bytes that TCP carries are; empty if there are none."""
    start = (packet[0] & 15) * 4
    end = min(len(packet), int.from_bytes(packet[2:4], "big"))
    is_tcp = packet[_PROTOCOL_AT] == TCP_PROTOCOL and end - start >= TCP_HEADER_BYTES_MIN
    if not is_tcp:
        return slice(0, 0)
    return slice(min(end, start + (packet[start + _OFFSET_AT] >> 4) * 4), end)


def corrupted(packet: bytes, bit: int) -> bytes | None:
    """One bit of the TCP payload is another; the checksum is not. None without a payload."""
    where = tcp_payload(packet)
    bits = (where.stop - where.start) * 8
    if bits <= 0:
        return None
    byte, shift = divmod(bit % bits, 8)
    changed = bytearray(packet)
    changed[where.start + byte] ^= 1 << shift
    return bytes(changed)


def forged(packet: bytes, bit: int) -> bytes | None:
    """As ``corrupted``, with the checksum repaired: TCP takes it for what was sent."""
    changed = corrupted(packet, bit)
    if changed is None:
        return None
    start = (packet[0] & 15) * 4
    end = min(len(packet), int.from_bytes(packet[2:4], "big"))
    whole = bytearray(changed)
    at = start + _CHECKSUM_AT
    whole[at : at + 2] = bytes(2)
    pseudo = packet[_SOURCE] + packet[_DESTINATION] + struct.pack("!HH", TCP_PROTOCOL, end - start)
    whole[at : at + 2] = struct.pack("!H", internet_checksum(pseudo + bytes(whole[start:end])))
    return bytes(whole)


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total > _WORD:
        total = (total & _WORD) + (total >> 16)
    return ~total & _WORD
