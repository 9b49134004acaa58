"""Sends clean frames through every check of a hop and counts alarms: ``clean_frames.py 1000000``.

A third of them on each of a route's hops, in epochs of at most ``STEPS_PER_EPOCH``. All that a hop
does to a frame but the network: sealed and kept by ``HopSender``, encoded, decoded,
judged by ``HopReceiver`` with its finite check, acknowledged. First, middle and last hops, prefill
and decode, one row and many, all three float types, payloads inline and in parts, random values and
random (also control and out-of-UTF-8) token ids. Any refusal, retransmission or difference is an
alarm, and so is a kind of frame of which none was sent; the exit status is 1 then.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from services.codec import decode_request, encode_frame
from services.finite import rows_are_finite
from stagemesh.frame import PART_BYTES_MAX, FrameKind, StepFrame, StepRow
from stagemesh.guards import Counters
from stagemesh.parts import FramePart, PartedFrame
from stagemesh.tensor import DType, Tensor
from stagemesh.token import StageMark, TokenChunk
from stagemesh.transport import HopReceiver, HopSender

FINGERPRINT = b"weights!"
HIDDEN = 576
STEPS_PER_EPOCH = 20_000
EPOCHS_MIN = 8
"""Each has one type of activations."""
POOL = 64
"""Different steps of one hop; each is sent under many numbers."""
FEW = 1000
"""Too few frames for every kind to be among them."""
HOPS = ((-1, 0), (0, 1), (1, -1))
DTYPES = {DType.F32: 4, DType.F16: 2, DType.BF16: 2}
KINDS = (
    *(f"hop {one}→{other}" for one, other in HOPS),
    *("PREFILL", "DECODE", "tokens"),
    *(f"{dtype.name} {how}" for dtype in DTYPES for how in ("inline", "in parts")),
)
"""Of each, some must have been sent."""
_TOP_BYTE = {DType.F32: 0x3F, DType.F16: 0x3B, DType.BF16: 0x3F}
"""Keeps every random value finite."""


class CleanHop:
    """One hop of one epoch, and what went over it."""

    def __init__(self, epoch: int, hop: tuple[int, int], draw: random.Random) -> None:
        facts = {"epoch": epoch, "hop_from": hop[0], "hop_to": hop[1], "fingerprint": FINGERPRINT}
        self.counters = Counters()
        self.sender = HopSender(**facts, counters=self.counters)
        self.receiver = HopReceiver(**facts, counters=self.counters, finite=rows_are_finite)
        self.sender.on_opened(self.receiver.opened(), 0.0)
        self.epoch, self.hop, self.draw = epoch, hop, draw
        self.dtype = list(DTYPES)[epoch % len(DTYPES)]
        self.noise = draw.randbytes(4 * HIDDEN * 64)
        self.pool = [self.body(prefill=index % 16 == 0) for index in range(POOL - 1)]
        self.pool.append(self.body(prefill=True, tokens_min=self.parted_tokens()))
        self.seen: Counter[str] = Counter()

    def carry(self) -> None:
        """One frame. Raises AssertionError if anything about it raised an alarm."""
        sealed = self.sender.offer(self.frame(self.sender.next_step))
        accepted = []
        for frame in self.sender.transmissions(0.0):
            messages = list(encode_frame(frame))
            self.note(frame, parted=len(messages) > 1)
            for data in messages:
                message = decode_request(data)
                if not isinstance(message, StepFrame | PartedFrame | FramePart):
                    raise AssertionError(f"encoded {frame}, decoded {message}")
                received = self.receiver.receive(message)
                accepted += received.frames
                if received.error is not None or received.nack is not None:
                    raise AssertionError(f"{frame}: {received.error}")
                if received.ack is not None:
                    self.sender.on_ack(received.ack.step, 0.0)
        if len(accepted) != 1 or accepted[0].header_crc32c != sealed.header_crc32c:
            raise AssertionError(f"{sealed} arrived as {accepted}")

    def note(self, frame: StepFrame, *, parted: bool) -> None:
        """Count what kind of frame this is."""
        self.seen[f"hop {frame.hop_from}→{frame.hop_to}"] += 1
        self.seen[frame.kind.name] += 1
        self.seen["tokens"] += any(row.token is not None for row in frame.rows)
        if frame.tensor is not None:
            self.seen[f"{frame.tensor.dtype.name} {'in parts' if parted else 'inline'}"] += 1

    def frame(self, step: int) -> StepFrame:
        kind, rows, tensor = self.draw.choice(self.pool)
        if self.hop[1] < 0:
            rows = tuple(
                replace(row, token=replace(row.token, step=step).sealed())
                for row in rows
                if row.token
            )
        return StepFrame(kind, FINGERPRINT, self.epoch, step, *self.hop, rows, tensor)

    def parted_tokens(self) -> int:
        """Tokens of a step whose activation needs more than one part."""
        return PART_BYTES_MAX // (HIDDEN * DTYPES[self.dtype]) + 1 if -1 not in self.hop else 1

    def body(
        self, *, prefill: bool, tokens_min: int = 1
    ) -> tuple[FrameKind, tuple[StepRow, ...], Tensor | None]:
        """Rows and activation of one step, to be sent under many step numbers."""
        count = self.draw.randint(1, 8)
        lengths = [self.draw.randint(1, 120) if prefill else 1 for _ in range(count)]
        lengths[0] += max(0, tokens_min - sum(lengths))
        rows = tuple(self.row(1, length) for length in lengths)
        kind = FrameKind.PREFILL if prefill else FrameKind.DECODE
        return kind, rows, self.tensor(sum(lengths))

    def row(self, step: int, length: int) -> StepRow:
        draw = self.draw
        request, first = draw.randbytes(16), draw.randrange(100_000)
        ids = tuple(draw.randrange(150_000) for _ in range(length))
        marks = () if self.hop[0] < 0 else (StageMark(first + length, draw.getrandbits(32), 7),)
        token = None
        if self.hop[1] < 0:
            chunk = TokenChunk(
                request, first + length, draw.randrange(150_000), self.epoch, step, -draw.random(),
                draw.random(), draw.getrandbits(60), "stage-1", draw.randbytes(16), marks,
            )  # fmt: skip
            token = chunk.sealed()
        return StepRow(request, first, ids, samples=True, marks=marks, token=token)

    def tensor(self, tokens: int) -> Tensor | None:
        if -1 in self.hop:
            return None
        size = tokens * HIDDEN * DTYPES[self.dtype]
        payload = bytearray(self.noise * (size // len(self.noise) + 1))[:size]
        width = DTYPES[self.dtype]
        payload[width - 1 :: width] = bytes((_TOP_BYTE[self.dtype],)) * (tokens * HIDDEN)
        return Tensor(self.dtype, (tokens, HIDDEN), bytes(payload))


def hops(seed: int) -> Iterator[CleanHop]:
    """A fresh epoch of all three hops, for ever."""
    draw, epoch = random.Random(seed), 0  # noqa: S311 - repeatable, not secret
    while True:
        epoch += 1
        yield from (CleanHop(epoch, hop, draw) for hop in HOPS)


def main() -> int:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    done, alarms, began = 0, [], time.process_time()
    total, seen = Counters(), Counter[str]()
    steps = min(STEPS_PER_EPOCH, max(1, wanted // (len(HOPS) * EPOCHS_MIN)))
    for hop in hops(seed=1):
        try:
            while done < wanted and hop.sender.next_step <= steps:
                hop.carry()
                done += 1
        except AssertionError as error:
            alarms.append(str(error))
            done += 1
        total = total.merged([hop.counters])
        seen += hop.seen
        if done >= wanted:
            break
    seconds = time.process_time() - began
    others = {name: count for name, count in total.items() if name != "frames_checked"}
    missing = [kind for kind in KINDS if not seen[kind] and wanted >= FEW]
    document = {
        "kinds": dict(seen),
        "missing": missing,
        "frames": done,
        "alarms": len(alarms),
        "first": alarms[:3],
        "other_counters": others,
        "cpu_seconds": round(seconds, 1),
        "cpu_us_per_frame": round(seconds / done * 1e6, 1),
    }
    print(json.dumps(document))
    return 1 if alarms or others or missing else 0


if __name__ == "__main__":
    sys.exit(main())
