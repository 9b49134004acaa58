"""One member of a ``device_group``: joins the ring, meets the others, answers commands.

``python -m stage_worker.device_member EPOCH TIMEOUT_S`` with ``MLX_HOSTFILE`` and ``MLX_RANK`` set.
Commands, one JSON object a line: ``barrier`` (name, generation, state), and ``all_sum`` and
``all_gather`` (tag, dtype, values: a list of numbers), which a group is proved with before it is
used. Answers: the result, or ``{"broken": …}``, behind which the process ends: its ring is of no
more use.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from stage_worker.mx_barrier import EXIT_BARRIER_BROKEN, Meeting
from stage_worker.tensor_parallel import CheckedCollectives, result_digest
from stagemesh.errors import BarrierBroken, InvalidConfiguration, MeshError

_DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16, "i32": mx.int32}


class DeviceMember:
    """Carries out commands on one meeting."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.collectives = CheckedCollectives(meeting)

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command. Raises BarrierBroken, InvalidConfiguration."""
        match command:
            case {"do": "barrier", "name": name, "generation": generation}:
                self.meeting.barrier(name, generation, command.get("state"))
                return {"met": name}
            case {"do": "all_sum", "values": values, "tag": tag}:
                result = self.collectives.all_sum(_array(command, values), tag=tag)
            case {"do": "all_gather", "values": values, "tag": tag}:
                result = self.collectives.all_gather(_array(command, values), tag=tag)
            case _:
                raise InvalidConfiguration("no such command", setting=str(command.get("do")))
        return {"digest": result_digest(result), "values": result.astype(mx.float32).tolist()}


def _array(command: dict[str, Any], values: Any) -> mx.array:
    return mx.array(values, _DTYPES[command.get("dtype", "f32")])


def answer(document: dict[str, Any]) -> None:
    """One JSON line on standard output."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def join(epoch: int, timeout_s: float) -> Meeting:
    """Join the ring that the environment names and meet everybody. Raises BarrierBroken."""
    try:
        group = mx.distributed.init(strict=True, backend="ring")
    except RuntimeError as error:
        raise BarrierBroken(f"the ring could not be joined: {error}") from error
    meeting = Meeting(group, epoch=epoch, timeout_s=timeout_s)
    meeting.barrier("join", 1, {"mlx": version("mlx")})
    return meeting


def serve(member: DeviceMember) -> int:
    """Answer commands until standard input ends, or a barrier breaks; the exit status."""
    answer({"ready": member.meeting.group.rank()})
    for line in sys.stdin:
        try:
            answer(member.handle(json.loads(line)))
        except BarrierBroken as error:
            answer({"broken": {"cause": error.reason, "detail": str(error)}})
            return EXIT_BARRIER_BROKEN
        except MeshError as error:
            answer({"refused": str(error)})
    return 0


def main(arguments: Sequence[str]) -> int:
    """Join, then serve."""
    epoch, timeout_s = arguments
    try:
        meeting = join(int(epoch), float(timeout_s))
    except BarrierBroken as error:
        answer({"broken": {"cause": error.reason, "detail": str(error)}})
        return EXIT_BARRIER_BROKEN
    return serve(DeviceMember(meeting))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
