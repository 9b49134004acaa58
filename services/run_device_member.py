"""Composition root of one process of a worker's device group; ``device_stage`` starts it.

``python -m services.run_device_member GENERATION COLLECTIVE_S_MAX NAME LOG_LEVEL LOG_FORMAT``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from services import codec, logs
from stage_worker.device_member import join_and_serve
from stagemesh.errors import FrameMalformed
from stagemesh.frame import StepFrame

_PARENT_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG`` of Linux."""


class PipeCodec:
    """Frames as the wire has them, whole."""

    def encode(self, frame: StepFrame) -> bytes:
        return codec.encode_whole(frame)

    def decode(self, data: bytes) -> StepFrame:
        frame = codec.decode_request(data)
        if not isinstance(frame, StepFrame):
            raise FrameMalformed("not a whole frame")
        return frame


def die_with_parent() -> None:
    """On Linux the kernel ends this process with the thread that started it, even while it is
    stopped and could not see its input end. Elsewhere the end of its input has to do."""
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    """Join, then serve; the exit status."""
    generation, collective_s_max, name, level, log_format = arguments
    die_with_parent()
    rank = os.environ.get("MLX_RANK", "")
    logs.configure(
        level=level, log_format=log_format, service="stage-worker", worker=f"{name}/{rank}"
    )
    return join_and_serve(int(generation), float(collective_s_max), PipeCodec())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
