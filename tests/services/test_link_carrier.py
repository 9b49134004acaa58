"""What goes over a connection: frames that this end has not spoilt itself."""

from __future__ import annotations

import asyncio

from services import codec
from stagemesh import errors
from stagemesh.frame import StepFrame
from tests.services.test_stage_link import a_hop


async def test_an_encoder_that_spoils_frames_is_found_out_at_the_sender_and_never_trusted_again(
    monkeypatch,
):
    encode = codec._encode_message

    def spoilt(message):
        encoded = bytearray(encode(message))
        if isinstance(message, StepFrame) and message.step == 2:
            encoded[-1] ^= 1
        return bytes(encoded)

    monkeypatch.setattr(codec, "_encode_message", spoilt)
    async with a_hop(proxied=False) as hop:
        hop.send(3)
        async with asyncio.timeout(8):
            while not hop.broken:
                await asyncio.sleep(0.01)
        assert isinstance(hop.broken[0], errors.FrameCorrupted)
        assert hop.link.counters["frames_misencoded"] == 1
        assert hop.reasons == {"CHECKSUM_MISMATCH"}
        assert [frame.step for frame in hop.delivered] == [1]


async def test_the_first_frame_of_a_link_is_proved_before_it_goes_out(monkeypatch):
    encode = codec._encode_message
    monkeypatch.setattr(codec, "_encode_message", lambda message: encode(message)[:-1] + b"!")
    async with a_hop(proxied=False) as hop:
        hop.send(1)
        async with asyncio.timeout(8):
            while not hop.broken:
                await asyncio.sleep(0.01)
        assert isinstance(hop.broken[0], errors.FrameError)
        assert not hop.seen
