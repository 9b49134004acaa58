"""A bad link's packets: fates are shares of all, and a forged packet is one that TCP believes."""

import struct
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.stress import packets
from services.stress.packets import Fate, LinkQuality, passage

HERE, THERE = bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2])


def packet(payload: bytes, *, options: bytes = b"", protocol: int = 6) -> bytes:
    """An IPv4 packet with TCP's checksum as a sender makes it."""
    offset = (20 + len(options)) // 4
    header = struct.pack("!HHIIBBHHH", 40000, 7070, 1, 2, offset << 4, 24, 512, 0, 0)
    segment = header + options + payload
    pseudo = HERE + THERE + struct.pack("!HH", 6, len(segment))
    checksum = struct.pack("!H", packets.internet_checksum(pseudo + segment))
    segment = segment[:16] + checksum + segment[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 7, 0, 64, protocol, 0)
    return ip + HERE + THERE + segment


def is_believed(one: bytes) -> bool:
    """What a receiver's TCP computes: over everything, checksum included, it comes to 0."""
    segment = one[20:]
    pseudo = one[12:20] + struct.pack("!HH", 6, len(segment))
    return packets.internet_checksum(pseudo + segment) == 0


def different_bits(one: bytes, other: bytes) -> int:
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def test_the_checksum_is_that_of_the_standard():
    example = bytes.fromhex("0001f203f4f5f6f7")  # RFC 1071, 3
    assert packets.internet_checksum(example) == ~0xDDF2 & 0xFFFF


@given(st.binary(min_size=1, max_size=90), st.integers(0, 2**64 - 1), st.sampled_from((0, 4, 12)))
def test_one_bit_is_wrong_and_only_a_forged_packet_hides_it(payload, bit, options):
    sent = packet(payload, options=bytes(options))
    assert is_believed(sent)
    noticed, hidden = packets.corrupted(sent, bit), packets.forged(sent, bit)
    assert not is_believed(noticed)
    assert is_believed(hidden)
    assert different_bits(sent, noticed) == 1
    where = packets.tcp_payload(sent)
    assert sent[where] == payload
    assert noticed[where] == hidden[where] != payload
    assert hidden[: 20 + 16] == sent[: 20 + 16], "only payload and checksum are others"


def test_a_packet_that_carries_nothing_has_nothing_to_damage():
    for one in (packet(b""), packet(b"data", protocol=17), packet(b"data")[:24]):
        assert packets.corrupted(one, 5) is None
        assert packets.forged(one, 5) is None


def test_only_ipv4_has_a_place_to_go():
    assert packets.destination(packet(b"x")) == THERE
    assert packets.destination(b"\x60" + bytes(39)) is None
    assert packets.destination(b"") is None


@pytest.mark.parametrize("machine", ["stage-0", "coordinator"])
def test_fates_are_shares_of_all_packets_and_a_function_of_the_seed(machine):
    quality, count = LinkQuality(), 40_000
    found = [passage(quality, 3, machine, number) for number in range(count)]
    fates = Counter(one.fate for one in found)
    assert 0.008 < fates[Fate.LOST] / count < 0.012
    assert 0.0005 < fates[Fate.CORRUPTED] / count < 0.0016
    assert 0.0005 < fates[Fate.FORGED] / count < 0.0016
    assert 0.008 < sum(one.overtakes for one in found) / count < 0.012
    assert {one.delay_s for one in found} == {0.05, 0.025}
    assert found[:500] == [passage(quality, 3, machine, number) for number in range(500)]
    assert found[:500] != [passage(quality, 4, machine, number) for number in range(500)]


def test_a_good_link_carries_everything():
    quality = LinkQuality(0.0, 0.0, 0.0, 0.0, 0.0)
    assert {passage(quality, 1, "x", number).fate for number in range(2000)} == {Fate.WHOLE}
